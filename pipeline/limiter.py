"""How many exchanges one host gets at once, and for how long it is left alone.

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


@dataclass(slots=True)
class _Host:
    blobs: int = 0
    documents: int = 0
    not_before: float = 0.0


class Limiter:
    """Permits per host: ``connections`` for blobs, a few more for small documents.

    Documents have permits of their own, so that a manifest never waits behind layers.
    """

    def __init__(self, connections: int, clock: Clock = SYSTEM_CLOCK) -> None:
        self._connections = max(1, connections)
        self._clock = clock
        self._changed = threading.Condition()
        self._hosts: dict[str, _Host] = {}

    def acquire(
        self, host: str, *, document: bool, cancelled: Callable[[], bool] | None = None
    ) -> Callable[[], None]:
        """Wait for a permit and return what gives it back (once; more calls are harmless)."""
        with self._changed:
            state = self._hosts.setdefault(host, _Host())
            while True:
                if cancelled is not None and cancelled():
                    raise CancelledError(f"request to {host}")
                rest = state.not_before - self._clock.monotonic()
                free = (
                    state.documents < DOCUMENT_PERMITS
                    if document
                    else state.blobs < self._connections
                )
                if free and rest <= 0:
                    break
                if rest > 0:
                    self._changed.release()
                    try:
                        self._clock.sleep(min(rest, POLL_SECONDS))
                    finally:
                        self._changed.acquire()
                else:
                    self._changed.wait(POLL_SECONDS if cancelled is not None else None)
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

    def pause(self, host: str, seconds: float) -> None:
        """Start no exchange with ``host`` for that long."""
        with self._changed:
            state = self._hosts.setdefault(host, _Host())
            state.not_before = max(state.not_before, self._clock.monotonic() + seconds)

    def held(self, host: str) -> int:
        """Return how many permits are out."""
        with self._changed:
            state = self._hosts.get(host, _Host())
            return state.blobs + state.documents
