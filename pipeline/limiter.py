"""What one host gets at once and per second, and for how long it is left alone.

Invariant: a permit is held for one HTTP exchange, from before the request to the end of the body,
and given back on every path; a host that asks for a pause gets it from all threads of the process.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.errors import CancelledError

if TYPE_CHECKING:
    from collections.abc import Callable

DOCUMENT_PERMITS = 4
POLL_SECONDS = 0.05
# Sleeps shorter than this are put together: they would be inexact and cost more than they save.
SHORTEST_SLEEP_SECONDS = 0.02


@dataclass(slots=True)
class _Host:
    blobs: int = 0
    documents: int = 0
    waiting: int = 0  # for a permit for a blob
    not_before: float = 0.0
    next_request: float = 0.0
    document_gap: float = 0.0
    last_document: float = 0.0
    paid_until: float = 0.0  # when the bytes that came so far were due


class Limiter:
    """Permits per host: ``connections`` for blobs, a few more for small documents.

    Documents have permits of their own, so that a manifest never waits behind layers. Rates are per
    second, of requests and of the bytes of blobs; 0 is no limit.
    """

    def __init__(
        self,
        connections: int,
        clock: Clock = SYSTEM_CLOCK,
        *,
        requests_per_second: float = 0.0,
        bytes_per_second: int = 0,
    ) -> None:
        self._connections = max(1, connections)
        self._requests = requests_per_second
        self._bytes = bytes_per_second
        self._clock = clock
        self._changed = threading.Condition()
        self._hosts: dict[str, _Host] = {}

    def acquire(
        self, host: str, *, document: bool, cancelled: Callable[[], bool] | None = None
    ) -> Callable[[], None]:
        """Wait for a permit and return what gives it back (once; more calls are harmless)."""
        with self._changed:
            state = self._hosts.setdefault(host, _Host())
            if not document:
                state.waiting += 1
            try:
                self._wait(state, host, document=document, cancelled=cancelled)
            finally:
                if not document:
                    state.waiting -= 1
            self._count_request(state, document=document)
            if document:
                state.documents += 1
            else:
                state.blobs += 1
        held = [True]

        def release() -> None:
            with self._changed:
                if not held:
                    return
                held.clear()
                if document:
                    state.documents -= 1
                else:
                    state.blobs -= 1
                self._changed.notify_all()

        return release

    def _wait(
        self, state: _Host, host: str, *, document: bool, cancelled: Callable[[], bool] | None
    ) -> None:
        while True:
            if cancelled is not None and cancelled():
                raise CancelledError(f"request to {host}")
            begin = max(state.not_before, state.next_request)
            if document:
                begin = max(begin, state.last_document + state.document_gap)
            rest = begin - self._clock.monotonic()
            free = (
                state.documents < DOCUMENT_PERMITS if document else state.blobs < self._connections
            )
            if free and rest <= 0:
                return
            if rest > 0:
                self._changed.release()
                try:
                    self._clock.sleep(min(rest, POLL_SECONDS))
                finally:
                    self._changed.acquire()
            else:
                self._changed.wait(POLL_SECONDS if cancelled is not None else None)

    def _count_request(self, state: _Host, *, document: bool) -> None:
        now = self._clock.monotonic()
        if self._requests > 0:
            state.next_request = now + 1.0 / self._requests
        if document:
            state.last_document = now

    def spend(self, host: str, count: int, cancelled: Callable[[], bool]) -> None:
        """Wait until ``count`` bytes more of ``host`` are within its share of the line."""
        if not self._bytes:
            return
        with self._changed:
            state = self._hosts.setdefault(host, _Host())
            now = self._clock.monotonic()
            state.paid_until = max(now, state.paid_until) + count / self._bytes
            end = state.paid_until
        while (rest := end - self._clock.monotonic()) > SHORTEST_SLEEP_SECONDS:
            if cancelled():
                raise CancelledError(f"bytes of {host}")
            self._clock.sleep(min(rest, POLL_SECONDS))

    def pause(self, host: str, seconds: float) -> None:
        """Start no exchange with ``host`` for that long."""
        with self._changed:
            state = self._hosts.setdefault(host, _Host())
            state.not_before = max(state.not_before, self._clock.monotonic() + seconds)

    def space_documents(self, host: str, seconds: float) -> None:
        """Let at least that long pass between two requests for documents of ``host``."""
        with self._changed:
            self._hosts.setdefault(host, _Host()).document_gap = seconds

    def held(self, host: str) -> int:
        """Return how many permits are out."""
        with self._changed:
            state = self._hosts.get(host, _Host())
            return state.blobs + state.documents

    def spare(self, host: str) -> int:
        """Return how many permits for blobs nobody holds or waits for."""
        with self._changed:
            state = self._hosts.get(host, _Host())
            if state.not_before > self._clock.monotonic():
                return 0
            return max(0, self._connections - state.blobs - state.waiting)
