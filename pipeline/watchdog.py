"""Ends exchanges that are cancelled, silent or too slow, while their thread is blocked in a read.

Invariant: an exchange under watch whose caller has cancelled it, or whose peer keeps it alive with
a few bytes, loses its socket within a second; the blocked thread then finds out why from
``verdict``. A socket timeout alone does neither: each byte resets it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import field
from typing import TYPE_CHECKING

from stowray.pipeline.known_secrets import KnownSecrets
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.clock import Clock

TICK_SECONDS = 0.1
LINGER_SECONDS = 1.0


@dataclass(slots=True, eq=False)
class Watch:
    """One exchange: what may end it, and what it has seen.

    Only time spent waiting for the peer counts for its speed: a reader that is itself slow (a full
    disk queue, a hash) must not make a good source look bad. ``url`` is fit to be shown, and
    ``secrets`` makes other text so. ``refuses`` tells addresses that a
    connection made for it must not lead to; ``peer`` is the one that it led to.
    """

    url: str
    cancelled: Callable[[], bool] | None
    begun: float
    headers_deadline: float
    secrets: KnownSecrets = field(default_factory=KnownSecrets, repr=False)
    refuses: Callable[[str], bool] | None = None
    peer: str = ""
    connection: socket.socket | None = None
    reused: bool = False
    in_body: bool = False
    verdict: str = ""
    waited: float = 0.0
    received: int = 0
    waiting_since: float | None = None
    window_waited: float = 0.0
    window_received: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def attach(self, connection: socket.socket | None, *, reused: bool) -> None:
        """Take the socket that the exchange runs over."""
        with self.lock:
            self.connection = connection
            self.reused = reused
            if self.verdict:
                self._shut()

    def cut(self, verdict: str) -> None:
        """End the exchange from another thread."""
        with self.lock:
            if not self.verdict:
                self.verdict = verdict
            self._shut()

    def _shut(self) -> None:
        if self.connection is not None:
            # SSLSocket.shutdown would drop the TLS layer under the reader's feet, which then
            # takes ciphertext for content; the plain call ends the TCP stream only.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self.connection, socket.SHUT_RDWR)


class Watchdog:
    """One thread over all exchanges of a transport; it ends when there is nothing to watch."""

    def __init__(self, clock: Clock, minimum_rate: int, window_seconds: float) -> None:
        self._clock = clock
        self._minimum = minimum_rate * window_seconds
        self._window = window_seconds
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._watches: set[Watch] = set()
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, watch: Watch) -> None:
        """Watch an exchange from now on."""
        with self._lock:
            # The thread is not woken: it looks round by itself, and waking it for each of many
            # small exchanges costs more than the exchange.
            self._watches.add(watch)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
                self._thread.start()

    def remove(self, watch: Watch) -> None:
        """Watch it no longer; harmless when it is not watched."""
        with self._lock:
            self._watches.discard(watch)

    def close(self) -> None:
        """Cut whatever is still under way and end the thread."""
        with self._lock:
            self._closed = True
            watches = list(self._watches)
            thread = self._thread
            self._wake.notify()
        for watch in watches:
            watch.cut("closed")
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        idle = 0.0
        while True:
            with self._lock:
                self._wake.wait_for(lambda: self._closed, TICK_SECONDS)
                idle = 0.0 if self._watches else idle + TICK_SECONDS
                if self._closed or idle > LINGER_SECONDS:
                    self._thread = None
                    return
                watches = list(self._watches)
            now = self._clock.monotonic()
            for watch in watches:
                verdict = self.judge(watch, now)
                if verdict:
                    watch.cut(verdict)

    def judge(self, watch: Watch, now: float) -> str:
        """Return why ``watch`` has to end now, ``""`` when it may go on."""
        if watch.verdict:
            return ""
        if watch.cancelled is not None and watch.cancelled():
            return "cancelled"
        if not watch.in_body:
            return "silent" if now >= watch.headers_deadline else ""
        since = watch.waiting_since
        waited = watch.waited + (now - since if since is not None else 0.0)
        if waited - watch.window_waited < self._window:
            return ""
        if watch.received - watch.window_received < self._minimum:
            return "slow"
        watch.window_waited = waited
        watch.window_received = watch.received
        return ""
