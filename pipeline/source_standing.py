"""What one node holds of its sources, and what it expects of one.

Invariant: who gave wrong bytes is never asked again in this run; who failed or was slow is passed
over for a time, and its strikes are forgotten when it gives right bytes. That many streams find out
the same at once is one lapse. Who is only silent has not failed yet: it may be alive and busy, and
what it has need not be read again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

_FADE: Final = 0.95


class Standing:
    """What one node holds of its sources, over all it fetches from them."""

    def __init__(self, avoid_seconds: float = 5.0) -> None:
        self._avoid = avoid_seconds
        self._failed: set[str] = set()
        self._slow: set[str] = set()
        self._silent_since: dict[str, float] = {}
        self._strikes: dict[str, int] = {}
        self._lapses: dict[str, int] = {}
        self._until: dict[str, float] = {}
        self._busy: dict[str, float] = {}
        self._banned: set[str] = set()

    def strike(self, source: str, now: float, *, failed: bool = False) -> None:
        """Pass ``source`` over for a time, twice as long each time.

        It ``failed``, or it is slow.
        """
        (self._failed if failed else self._slow).add(source)
        self._pass_over(source, now)

    def silent(self, source: str, now: float, deaf_seconds: float) -> None:
        """Pass over a source that does not answer; that failed when it did so for too long."""
        if now - self._silent_since.setdefault(source, now) >= deaf_seconds:
            self._failed.add(source)
        self._pass_over(source, now)

    def heard(self, source: str) -> None:
        """Take note that ``source`` has answered or sent something."""
        if self._silent_since:
            self._silent_since.pop(source, None)

    def _pass_over(self, source: str, now: float) -> None:
        self._strikes[source] = self._strikes.get(source, 0) + 1
        if now >= self._until.get(source, 0.0):
            lapses = self._lapses.get(source, 0)
            self._lapses[source] = lapses + 1
            self._until[source] = now + self._avoid * (1 << min(lapses, 6))

    def postpone(self, source: str, until: float) -> None:
        """Pass ``source`` over until then: it is busy, or waits itself."""
        self._strikes[source] = self._strikes.get(source, 0) + 1
        self._busy[source] = until

    def forgive(self, source: str) -> None:
        """Forget the strikes of a source that gave right bytes."""
        if self._strikes:
            self._strikes.pop(source, None)
            self._lapses.pop(source, None)
            self._failed.discard(source)
            self._slow.discard(source)

    def ban(self, source: str) -> None:
        """Never ask ``source`` again in this run: it gave wrong bytes."""
        self._banned.add(source)

    def has_failed(self, source: str) -> bool:
        """Tell whether ``source`` cannot be relied on: the origin may be read in its stead."""
        return source in self._failed or source in self._banned

    def is_slow(self, source: str) -> bool:
        """Tell whether ``source`` gave less than others and nothing better since."""
        return source in self._slow

    def is_banned(self, source: str) -> bool:
        """Tell whether ``source`` gave wrong bytes."""
        return source in self._banned

    def strikes(self, source: str) -> int:
        """Return how often ``source`` was passed over since it last was good."""
        return self._strikes.get(source, 0)

    def usable_from(self, source: str) -> float:
        """Return when ``source`` may be asked again; infinity for one that gave wrong bytes."""
        if source in self._banned:
            return float("inf")
        return max(self._until.get(source, 0.0), self._busy.get(source, 0.0))

    def can_give(self, source: str, now: float) -> bool:
        """Tell whether ``source``, slow or not, gives bytes that it has."""
        return not self.has_failed(source) and self._busy.get(source, 0.0) <= now


class Pace:
    """The rate that a node may expect of one source: what its other streams get.

    A node whose own link is slow gets little from everybody, and so blames nobody.
    """

    def __init__(self) -> None:
        self.expected = 0.0

    def observe(self, rates: Iterable[float]) -> float:
        """Take the rates of all streams whose sources were not waiting; return what to expect.

        Called once a second. When most streams are slow at once, or few are left, what they got
        before still counts for a while.
        """
        ordered = sorted(rates)
        median = ordered[len(ordered) // 2] if len(ordered) >= 3 else 0.0
        self.expected = max(median, self.expected * _FADE)
        return self.expected
