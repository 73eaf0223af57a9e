"""How many connections one blob is worth, and who fetches which bytes of it.

Invariant: nothing here waits or reads, and the time comes in from outside. The parts that are
handed out are disjoint and in order, so that the contiguous prefix, which the unpacking follows,
grows with all connections together and little is lost when a pull is killed. A further connection
is kept only if all of them together have become faster by it.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING, Final

from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from stowray.pipeline.host_records import HostRecord

SMALLEST_PART: Final = 1 << 20
LARGEST_PART: Final = 16 << 20
PART_SECONDS: Final = 1.0

SETTLE_SECONDS: Final = 0.5
WINDOW_SECONDS: Final = 1.0
# Twice the connections have to bring this much more, or they only get in each other's way.
LEAST_GAIN: Final = 1.25
# With less than this part of the time spent on waiting it is not the network that is slow.
LEAST_WAITING: Final = 0.5
# Finding out must pay: so many seconds have to be left at the present rate.
LEAST_SECONDS: Final = 2 * (SETTLE_SECONDS + WINDOW_SECONDS)


class Parts:
    """The bytes from ``start`` to ``end``, handed out from the start on; not thread-safe."""

    def __init__(self, start: int, end: int) -> None:
        self._next = start
        self._end = end
        self._returned: list[tuple[int, int]] = []

    @property
    def is_empty(self) -> bool:
        """Tell whether everything was handed out."""
        return self._next >= self._end and not self._returned

    def take(self, size: int, prefix: int, window: int) -> tuple[int, int] | None:
        """Return ``(start, end)`` of the first part that nobody has; None for none in the window.

        What lies before ``prefix`` is there already and is passed over.
        """
        while self._returned:
            start, end = heappop(self._returned)
            if end > prefix:
                return max(start, prefix), end
        start = max(self._next, prefix)
        if start >= self._end or start >= prefix + window:
            return None
        self._next = min(start + size, self._end)
        return start, self._next

    def give_back(self, start: int, end: int) -> None:
        """Hand out again, before all others, what somebody could not fetch."""
        if start < end:
            heappush(self._returned, (start, end))


def part_size(bytes_per_second: float, left: int, count: int) -> int:
    """Return how large a part should be: about a second long, and none late at the end."""
    wanted = int(bytes_per_second * PART_SECONDS)
    share = left // max(1, count)
    return max(SMALLEST_PART, min(wanted, share, LARGEST_PART))


@dataclass(frozen=True, slots=True)
class Finding:
    """What is worth remembering of a host: how many connections pay, and the rate of one."""

    connections: int
    bytes_per_second: int


class Climb:
    """Doubles the connections as long as that helps; not thread-safe.

    ``wanted`` is how many there should be now. What was found out earlier is used at once.
    """

    def __init__(self, limit: int, now: float, known: HostRecord | None = None) -> None:
        self.wanted = 1
        self.rate = 0.0  # of one connection
        self.finding: Finding | None = None
        self._limit = limit
        self._best = 1
        self._best_rate = 0.0
        self._done = limit <= 1
        self._from = now + SETTLE_SECONDS
        self._received = 0
        self._since = now
        if known is not None:
            self._done = True
            self.wanted = self._best = min(known.connections, limit)
            self.rate = float(known.bytes_per_second)

    @property
    def is_over(self) -> bool:
        """Tell whether ``wanted`` will stay as it is."""
        return self._done

    def look(self, now: float, received: int, active: int, left: int, waiting: float) -> None:
        """Judge what the connections bring and set ``wanted``; call it every now and then.

        ``received`` counts all bytes so far, ``active`` the connections, and ``waiting`` is the
        part of the time that the first one has waited for its peer.
        """
        if self._done:
            return
        if now < self._from:
            self._received, self._since = received, now
            return
        seconds = now - self._since
        if seconds < WINDOW_SECONDS:
            return
        rate = (received - self._received) / seconds
        if active < self.wanted:
            # The host or the limits of our own gave no more: that says nothing of what pays.
            self._end()
        elif self.wanted == 1:
            if waiting < LEAST_WAITING or left < rate * LEAST_SECONDS:
                self._done = True
                return
            self._best_rate = rate
            self._climb(now)
        elif rate < self._best_rate * LEAST_GAIN:
            self._end(learn=True)
        else:
            self._best, self._best_rate = self.wanted, rate
            if self.wanted == self._limit:
                self._end(learn=True)
            elif left < rate * LEAST_SECONDS:
                self._end()
            else:
                self._climb(now)

    def _climb(self, now: float) -> None:
        self.rate = self._best_rate / self._best
        self.wanted = min(2 * self.wanted, self._limit)
        self._from = now + SETTLE_SECONDS

    def _end(self, *, learn: bool = False) -> None:
        self._done = True
        self.wanted = self._best
        self.rate = self._best_rate / self._best
        if learn or self._best > 1:
            self.finding = Finding(self._best, int(self.rate))
