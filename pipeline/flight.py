"""One flight per key: whoever asks for the same thing at the same time waits for one answer.

Invariant: a result is remembered for ``ttl_seconds`` of the monotonic clock, an error or a
cancellation never; a waiter that leaves does not disturb the others, and the work itself is told
to stop only when the last waiter has left.
"""

from __future__ import annotations

import threading
from dataclasses import field
from typing import TYPE_CHECKING, Generic, TypeVar

from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.errors import CancelledError
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

Value = TypeVar("Value")

POLL_SECONDS = 0.05
KEPT_LIMIT = 4096


@dataclass(slots=True)
class _Flight(Generic[Value]):
    done: threading.Event = field(default_factory=threading.Event)
    waiters: int = 0
    values: list[Value] = field(default_factory=list)
    error: BaseException | None = None


class SingleFlight(Generic[Value]):
    """Runs work once per key for all who ask meanwhile, and keeps the answer for a while."""

    def __init__(self, ttl_seconds: float, clock: Clock = SYSTEM_CLOCK) -> None:
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._flights: dict[Hashable, _Flight[Value]] = {}
        self._kept: dict[Hashable, tuple[float, Value]] = {}

    def do(
        self,
        key: Hashable,
        work: Callable[[Callable[[], bool]], Value],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Value:
        """Return the answer for ``key``: a kept one, that of a flight under way, or of a new one.

        ``work(abandoned)`` runs on a thread of its own and may poll ``abandoned`` to learn that
        nobody waits any more. Raises what the work raised, or CancelledError when this waiter's
        own ``cancelled`` says so.
        """
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                if self._clock.monotonic() < kept[0]:
                    return kept[1]
                del self._kept[key]
            flight = self._flights.get(key)
            if flight is None:
                # Counted before the thread starts, or the work could think itself abandoned.
                flight = self._flights[key] = _Flight(waiters=1)
                threading.Thread(
                    target=self._fly, args=(key, flight, work), name="flight", daemon=True
                ).start()
            else:
                flight.waiters += 1
        try:
            while not flight.done.wait(POLL_SECONDS):
                if cancelled():
                    raise CancelledError(str(key))
        finally:
            with self._lock:
                flight.waiters -= 1
        if isinstance(flight.error, CancelledError) and not cancelled():
            # All earlier waiters left and the work gave up just as this one came.
            return self.do(key, work, cancelled)
        if flight.error is not None:
            raise flight.error
        return flight.values[0]

    def forget(self, key: Hashable) -> None:
        """Drop the kept answer for ``key``."""
        with self._lock:
            self._kept.pop(key, None)

    def _fly(
        self,
        key: Hashable,
        flight: _Flight[Value],
        work: Callable[[Callable[[], bool]], Value],
    ) -> None:
        try:
            value = work(lambda: flight.waiters == 0)
        except BaseException as error:  # noqa: BLE001 - every waiter must be woken with the cause
            with self._lock:
                flight.error = error
                del self._flights[key]
        else:
            with self._lock:
                flight.values.append(value)
                del self._flights[key]
                if self._ttl_seconds > 0:
                    self._keep(key, value)
        finally:
            flight.done.set()

    def _keep(self, key: Hashable, value: Value) -> None:
        now = self._clock.monotonic()
        if len(self._kept) >= KEPT_LIMIT:
            self._kept = {old: kept for old, kept in self._kept.items() if now < kept[0]}
        if len(self._kept) < KEPT_LIMIT:
            self._kept[key] = (now + self._ttl_seconds, value)
