"""What the nodes of a pre-warm run together ask of a registry: rates and pauses.

Connections are the lease owner's affair as well, by its permits; the books of both are kept by the
ResolverActor. Invariant: whatever becomes of the owner a node goes on, with its own limits alone.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Final

from stowray.pipeline.spread_shared import OWNER_ERRORS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from stowray.actors.lease_client import LeaseClient
    from stowray.pipeline.node_limits import Kind, Line

# How long what the owner said of a pause is good for.
LOOK_SECONDS: Final = 0.5
# So long nothing is asked of an owner that did not answer: each question may take its time.
SILENT_SECONDS: Final = 15.0


class RunLimits:
    """Implements ``SharedLimits`` for one node of a run; thread-safe."""

    def __init__(self, owner: LeaseClient, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._owner = owner
        self._now = monotonic
        self._lock = threading.Lock()
        self._looks: dict[str, tuple[float, float]] = {}  # when asked, until when to rest
        self._silent_until = float("-inf")

    def permit(self, host: str, kind: Kind, limit: int) -> Callable[[], None] | None:
        """Return what gives nothing back: who reads the origin has the owner's permit already."""
        return lambda: None

    def free(self, host: str, kind: Kind, limit: int) -> int:
        """Return the limit: see ``permit``."""
        return limit

    def is_stopped(self, host: str, kind: Kind, limit: int) -> bool:
        """Return False: see ``permit``."""
        return False

    def waiting(self, host: str, kind: Kind) -> AbstractContextManager[None]:
        """Let nobody know: see ``permit``."""
        return nullcontext()

    def is_waited_for(self, host: str, kind: Kind) -> bool:
        """Return False: see ``permit``."""
        return False

    def pause(self, host: str, seconds: float) -> None:
        """Let no node of the run ask ``host`` for that long."""
        now = self._now()
        with self._lock:
            self._looks[host] = (now, now + seconds)
        with self._asking():
            self._owner.pause_host(host, seconds)

    def rest(self, host: str) -> float:
        """Return for how many seconds more ``host`` is to be left alone."""
        now = self._now()
        with self._lock:
            looked, until = self._looks.get(host, (float("-inf"), 0.0))
        if until <= now and now - looked >= LOOK_SECONDS:
            until = now
            if now >= self._silent_until:
                with self._asking():
                    until = now + self._owner.rest(host)
            with self._lock:
                self._looks[host] = (now, until)
        return max(0.0, until - now)

    def book(self, host: str, line: Line, seconds: float) -> float:
        """Take the next ``seconds`` of a line of the whole run; return when they begin."""
        if self._now() >= self._silent_until:
            with self._asking():
                return self._owner.book(host, line, seconds)
        return 0.0

    def close(self) -> None:
        """Give nothing back: see ``permit``."""

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except OWNER_ERRORS:
            self._silent_until = self._now() + SILENT_SECONDS
