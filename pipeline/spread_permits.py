"""Connections to the registry, as the stripes of one process get them and pass them on.

Invariant: a permit is used by one stripe at a time, and given back by the last one. It is passed on
for ``TURN_SECONDS`` after it was given, so that many small blobs cost few questions; then others
get their turn. Few stripes of a process stand in the owner's line, the others wait here for them.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from stowray.pipeline.errors import DeadlineError, NodeError
from stowray.pipeline.origin_leases import Later
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.clock import Clock
    from stowray.pipeline.spread_leases import Leases

TURN_SECONDS: Final = 0.5
_ASKING_LIMIT: Final = 2
# How long after the owner did not answer; and how often a stripe looks whether it is to end.
_PAUSE_SECONDS: Final = 0.5
_LOOK_SECONDS: Final = 0.25


@dataclass(frozen=True, slots=True)
class Permit:
    """One connection: under which name the owner knows it, and since when."""

    purpose: str
    since: float


class _Waiting:
    """A stripe that waits; ``permit`` is what another one has passed on to it."""

    __slots__ = ("is_asking", "permit", "woken")

    def __init__(self) -> None:
        self.is_asking = False
        self.permit: Permit | None = None
        self.woken = threading.Event()


class Permits:
    """The permits of one process; thread-safe."""

    def __init__(self, leases: Leases, clock: Clock) -> None:
        self._leases = leases
        self._clock = clock
        self._lock = threading.Lock()
        self._line: list[_Waiting] = []
        self._count = 0

    def get(self, purpose: str, is_over: Callable[[], bool]) -> Permit | None:
        """Wait for a connection for ``purpose``; None when it ``is_over`` before.

        What ``is_over`` raises is passed on.
        """
        with self._lock:
            # A name of its own: what this stripe had before may be in use by another one by now,
            # and the owner would take the question for a renewal.
            self._count += 1
            purpose = f"{purpose} {self._count}"
            waiting = _Waiting()
            self._line.append(waiting)
            self._wake_next()
        got: Permit | None = None
        try:
            while not is_over():
                pause = _LOOK_SECONDS
                if waiting.is_asking:
                    granted = self._ask(purpose)
                    if isinstance(granted, Permit):
                        got = granted
                        return granted
                    pause = granted
                waiting.woken.wait(pause)
                with self._lock:
                    waiting.woken.clear()
                    if waiting.permit is not None:
                        got, waiting.permit = waiting.permit, None
                        return got
            return None
        finally:
            self._leave(waiting, purpose, has_got=got is not None)

    def renew(self, permit: Permit) -> None:
        """Keep a permit that is in use; owner's errors are passed on."""
        self._leases.permit(permit.purpose)

    def give_back(self, permit: Permit) -> None:
        """Pass a permit on, or end it."""
        with self._lock:
            if self._clock.monotonic() - permit.since < TURN_SECONDS:
                for waiting in self._line:
                    if not waiting.is_asking:
                        self._line.remove(waiting)
                        waiting.permit = permit
                        waiting.woken.set()
                        return
        with suppress(NodeError, DeadlineError):
            self._leases.give_back(permit.purpose)

    def _ask(self, purpose: str) -> Permit | float:
        """Return a permit, or for how long to wait."""
        try:
            answer = self._leases.permit(purpose)
        except (NodeError, DeadlineError):
            return _PAUSE_SECONDS
        if isinstance(answer, Later):
            return answer.seconds
        return Permit(purpose, self._clock.monotonic())

    def _leave(self, waiting: _Waiting, purpose: str, *, has_got: bool) -> None:
        with self._lock:
            if waiting in self._line:
                self._line.remove(waiting)
            self._wake_next()
            unused, waiting.permit = waiting.permit, None
        if unused is not None:
            self.give_back(unused)
        if waiting.is_asking and not has_got:
            with suppress(NodeError, DeadlineError):
                self._leases.give_back(purpose)

    def _wake_next(self) -> None:
        """Let the first of the line ask; called under the lock."""
        asking = sum(1 for waiting in self._line if waiting.is_asking)
        for waiting in self._line:
            if asking >= _ASKING_LIMIT:
                return
            if not waiting.is_asking:
                waiting.is_asking = True
                waiting.woken.set()
                asking += 1
