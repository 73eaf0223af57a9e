"""How many connections one blob is worth, and who fetches which bytes of it.

Invariant: nothing here waits or reads, and the time comes in from outside. The parts that are
handed out are disjoint and in order, so that the contiguous prefix, which the unpacking follows,
grows with all connections together and little is lost when a pull is killed. Further connections
are kept only as far as all of them together have become faster by them.
"""

from __future__ import annotations

from heapq import heappop, heappush
from math import ceil
from typing import TYPE_CHECKING, Final

from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from stowray.pipeline.host_records import HostRecord

SMALLEST_PART: Final = 1 << 20
LARGEST_PART: Final = 16 << 20
PART_SECONDS: Final = 1.0
# While several connections are on trial: what one of them holds up shall not be much.
TRIAL_SECONDS: Final = 0.5
# How many parts of each connection the last one may be ahead of the first byte that lacks.
PARTS_AHEAD: Final = 2

# Rates are told by two samples that agree, else by a longer window.
SAMPLE_SECONDS: Final = 0.1
SAMPLES_AGREE: Final = 1.33
SETTLE_SECONDS: Final = 0.5
WINDOW_SECONDS: Final = 1.0
# The same of all together, from when the last of them was opened; here time costs nothing.
TRIAL_SETTLE_SECONDS: Final = 0.3
TRIAL_SAMPLE_SECONDS: Final = 0.25
TRIAL_SAMPLES_AGREE: Final = 1.2
# All together have to bring this much more than one, or they only get in each other's way.
LEAST_GAIN: Final = 1.25
# If each brings this much of what one alone did, none is given up.
FULL_SHARE: Final = 0.7
# With less than this part of the time spent on waiting it is not the network that is slow.
LEAST_WAITING: Final = 0.5
# Finding out must pay: so many seconds have to be left at the present rate.
LEAST_SECONDS: Final = 2.0


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

    @property
    def left(self) -> int:
        """Return how many bytes nobody has."""
        return max(0, self._end - self._next) + sum(end - start for start, end in self._returned)

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


def part_size(bytes_per_second: float, left: int, count: int, seconds: float = PART_SECONDS) -> int:
    """Return how large a part should be: about a second long, and none late at the end."""
    wanted = int(bytes_per_second * seconds)
    share = left // max(1, count)
    return max(SMALLEST_PART, min(wanted, share, LARGEST_PART))


@dataclass(frozen=True, slots=True)
class Finding:
    """What is worth remembering of a host: how many connections pay, and the rate of one."""

    connections: int
    bytes_per_second: int


class Climb:
    """Puts all allowed connections on trial and keeps those that pay; not thread-safe.

    ``wanted`` is how many there should be now. One connection is measured for as long as it takes
    to know its rate (a quarter of a second where that is steady, as behind a limit; a second and a
    half where it grows or comes in bursts), then all at once, and what they bring tells how many
    are worth keeping. What was found out earlier is used at once.
    """

    def __init__(self, limit: int, now: float, known: HostRecord | None = None) -> None:
        self.wanted = 1
        self.rate = 0.0  # of one connection
        self.finding: Finding | None = None
        self._limit = limit
        self._done = limit <= 1
        self._alone = _Meter(now, now + SETTLE_SECONDS, SAMPLE_SECONDS, SAMPLES_AGREE)
        self._all: _Meter | None = None
        self._most = 1
        if known is not None:
            self._done = True
            self.wanted = min(known.connections, limit)
            self.rate = float(known.bytes_per_second)

    @property
    def is_over(self) -> bool:
        """Tell whether ``wanted`` will stay as it is."""
        return self._done

    @property
    def reach(self) -> int:
        """Return how far beyond the contiguous bytes a part may begin."""
        largest = part_size(self.rate, LARGEST_PART, 1)
        return PARTS_AHEAD * largest * max(2, self.wanted)

    def part_size(self, left: int) -> int:
        """Return how large the next part should be when ``left`` bytes are nobody's."""
        seconds = PART_SECONDS if self._done else TRIAL_SECONDS
        return part_size(self.rate, left, self.wanted, seconds)

    def look(self, now: float, received: int, active: int, left: int, waiting: float) -> None:
        """Judge what the connections bring and set ``wanted``; call it every now and then.

        ``received`` counts all bytes so far, ``active`` the connections, and ``waiting`` is the
        part of the time that the first one has waited for its peer.
        """
        if self._done:
            return
        if self._all is None:
            self._look_at_one(now, received, left, waiting)
        else:
            self._look_at_all(now, received, active)

    def _look_at_one(self, now: float, received: int, left: int, waiting: float) -> None:
        meter = self._alone
        if not meter.tell(now, received):
            return
        if left < meter.rate * LEAST_SECONDS:
            self._done = True
        elif waiting < LEAST_WAITING:
            # Only the longer look is believed when it says that nothing is to be found out.
            self._done = meter.is_long
        else:
            self.rate = meter.rate
            self.wanted = self._limit
            self._restart(now)

    def _restart(self, now: float) -> None:
        begin = now + TRIAL_SETTLE_SECONDS
        self._all = _Meter(begin, now + WINDOW_SECONDS, TRIAL_SAMPLE_SECONDS, TRIAL_SAMPLES_AGREE)

    def _look_at_all(self, now: float, received: int, active: int) -> None:
        if active > self._most:
            self._most = active
            self._restart(now)
        meter = self._all
        if meter is None or not meter.tell(now, received):
            return
        self._done = True
        if active < 2:
            # The host or the limits of our own gave no more: that says nothing of what pays.
            self.wanted = 1
            return
        gain = meter.rate / self._alone.rate
        if gain >= FULL_SHARE * active:
            best = active
        elif gain < LEAST_GAIN:
            best = 1
        else:
            best = min(active, ceil(LEAST_GAIN * gain))
        self.rate = meter.rate / best if best > 1 else self._alone.rate
        if active == self.wanted or best < active:
            self.finding = Finding(best, int(self.rate))
        self.wanted = best


class _Meter:
    """The rate at which bytes come: quickly where it is steady, else over a longer window.

    Samples are taken from ``begin`` on, the window begins at ``window_begin``.
    """

    def __init__(self, begin: float, window_begin: float, sample: float, agree: float) -> None:
        self.rate = 0.0
        self.is_long = False
        self._begin = begin
        self._window_begin = window_begin
        self._sample = sample
        self._agree = agree
        self._window: tuple[float, int] | None = None
        self._last: tuple[float, int] | None = None
        self._rates: list[float] = []

    def tell(self, now: float, received: int) -> bool:
        """Take note of the bytes so far; return whether ``rate`` is known now."""
        if now < self._begin:
            return False
        if self._last is None:
            # Not from the beginning: what had come before the first look came in no time.
            self._last = now, received
        if self._window is None and now >= self._window_begin:
            self._window = now, received
        if self._window is not None and now - self._window[0] >= WINDOW_SECONDS:
            self.rate = (received - self._window[1]) / (now - self._window[0])
            self.is_long = True
            return self.rate > 0
        seconds = now - self._last[0]
        if seconds < self._sample:
            return False
        self._rates = [*self._rates[-1:], (received - self._last[1]) / seconds]
        self._last = now, received
        if len(self._rates) < 2:
            return False
        low, high = sorted(self._rates)
        self.rate = (low + high) / 2
        return 0 < high <= self._agree * low
