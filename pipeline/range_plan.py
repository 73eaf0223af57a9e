"""How many connections one blob is worth, and who fetches which bytes of it.

Invariant: nothing here waits or reads, and the time comes in from outside. The parts that are
handed out are disjoint and in order, so that the contiguous prefix, which the unpacking follows,
grows with all connections together and little is lost when a pull is killed. Further connections
are kept only as far as all of them together have become faster by them, and nothing that was found
out, now or earlier, is believed against what comes.
"""

from __future__ import annotations

from heapq import heappop, heappush
from math import ceil
from typing import TYPE_CHECKING, Final, Literal

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

# For how long the first connection is compared with what was known of the host.
KNOWN_SECONDS: Final = 0.1
# A rate this many times another is a different one: what was found out by the other is void.
FAR_ABOVE: Final = 2.0
# What was decided is compared with what comes, over so long.
WATCH_SECONDS: Final = 0.5
# A connection that has brought much and then nothing for so long stands still.
STILL_SECONDS: Final = 0.2
# No rate is told by less than this.
LEAST_SPAN_SECONDS: Final = 0.01
# With so much left all are tried although fewer are on record.
LONG_SECONDS: Final = 10.0
# How often in a blob it is measured anew.
MOST_CHECKS: Final = 3


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
                start = max(start, prefix)
                # All that was left of a long one is for several to share.
                self.give_back(start + size, end)
                return start, min(start + size, end)
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
    half where it grows or comes in bursts; less if it stands still after a first burst), then all
    at once, and what they bring tells how many are worth keeping.

    What was found out earlier (``known``) is a start: the first tenth of a second has to agree with
    it before others join. What was decided is looked at from then on: a rate that is far from what
    it was decided by is measured again, some times in a blob at most.
    """

    def __init__(self, limit: int, now: float, known: HostRecord | None = None) -> None:
        self.wanted = 1
        self.rate = 0.0  # of one connection
        self.finding: Finding | None = None
        self._limit = limit
        self._phase: Literal["known", "one", "all", "settled"] = "one"
        self._begun = now  # of what the first connection is judged by
        self._came = 0  # by then
        self._alone = _one_meter(now)
        self._alone_rate = 0.0
        self._all: _Meter | None = None
        self._all_rate = 0.0  # of several, who were too fast or too slow for what was known
        self._most = 1
        self._checks = 0
        self._last = (now, 0)  # when bytes came last, and how many there were then
        self._marks = [(now, 0)]  # how many there were, over the last second
        self._watched: tuple[float, int, int] | None = None  # since when, bytes, connections
        self._known = known
        if known is not None:
            self.rate = float(known.bytes_per_second)
            self._alone_rate = self.rate
            self._phase = "known" if known.connections > 1 else "settled"
        if limit <= 1:
            self._phase = "settled"

    @property
    def may_grow(self) -> bool:
        """Tell whether there could be a second connection at all."""
        return self._limit > 1

    @property
    def is_over(self) -> bool:
        """Tell whether ``wanted`` will stay as it is for all that is known."""
        return self._phase == "settled"

    @property
    def reach(self) -> int:
        """Return how far beyond the contiguous bytes a part may begin."""
        largest = part_size(self.rate, LARGEST_PART, 1)
        return PARTS_AHEAD * largest * max(2, self.wanted)

    def part_size(self, left: int) -> int:
        """Return how large the next part should be when ``left`` bytes are nobody's."""
        seconds = PART_SECONDS if self._phase in ("known", "settled") else TRIAL_SECONDS
        return part_size(self.rate, left, self.wanted, seconds)

    def look(self, now: float, received: int, active: int, left: int, waiting: float) -> None:
        """Judge what the connections bring and set ``wanted``; call it every now and then.

        ``received`` counts all bytes so far, ``active`` the connections, and ``waiting`` is the
        part of the time that the first one has waited for its peer.
        """
        if self._limit <= 1:
            return
        if received > self._last[1]:
            self._last = now, received
        self._marks.append((now, received))
        while len(self._marks) > 2 and self._marks[1][0] <= now - WINDOW_SECONDS:
            del self._marks[0]
        if self._phase == "known":
            self._look_at_known(now, received)
        elif self._phase == "all":
            self._look_at_all(now, received, active)
        elif self._stands_still(now, received, active, left, waiting):
            average = (received - self._came) / (now - self._begun)
            self._alone_rate = self.rate = self._recent_rate(now, received) or average
            self._try_all(now)
        elif self._phase == "one":
            self._look_at_one(now, received, active, left, waiting)
        else:
            self._look_again(now, received, active, left, waiting)

    def _look_at_known(self, now: float, received: int) -> None:
        seconds = now - self._begun
        if seconds < KNOWN_SECONDS or self._known is None:
            return
        if received > FAR_ABOVE * self.rate * seconds:
            # No such limit any more: perhaps this one needs no others.
            self.rate = received / seconds
            self._phase = "one"
            self._alone = _one_meter(now)
            return
        self.wanted = min(self._known.connections, self._limit)
        self._phase = "settled"

    def _look_at_one(
        self, now: float, received: int, active: int, left: int, waiting: float
    ) -> None:
        if active > 1:
            # Others are still at their last parts.
            self._measure_one(now, received)
            return
        meter = self._alone
        if not meter.tell(now, received):
            return
        self._alone_rate = meter.rate
        if self._all_rate:
            # Several were measured just before.
            self._judge(self._all_rate, self._most)
        elif left < meter.rate * LEAST_SECONDS:
            self._settle_for_one(meter.rate)
        elif waiting < LEAST_WAITING:
            # Only the longer look is believed when it says that nothing is to be found out.
            if meter.is_long:
                self.rate = meter.rate
                self._phase = "settled"
        else:
            self.rate = meter.rate
            self._try_all(now)

    def _settle_for_one(self, rate: float) -> None:
        self.rate = rate
        self._phase = "settled"
        if self._known is not None and self._known.connections > 1:
            self.finding = Finding(1, int(rate))

    def _measure_one(self, now: float, received: int) -> None:
        self.wanted = 1
        self._phase = "one"
        self._begun, self._came = now, received
        self._alone = _one_meter(now)

    def _try_all(self, now: float) -> None:
        self.wanted = self._limit
        self._phase = "all"
        self._most = 1
        self._all_rate = 0.0
        self._watched = None
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
        if active < 2:
            # The host or the limits of our own gave no more: that says nothing of what pays.
            self.wanted = 1
            self._phase = "settled"
            return
        self._judge(meter.rate, active)

    def _judge(self, rate: float, active: int) -> None:
        """Keep as many of ``active`` connections, which bring ``rate`` together, as pay."""
        gain = rate / self._alone_rate
        if gain >= FULL_SHARE * active:
            best = active
        elif gain < LEAST_GAIN:
            best = 1
        else:
            best = min(active, ceil(LEAST_GAIN * gain))
        self.rate = rate / best if best > 1 else self._alone_rate
        if active >= self.wanted or best < active:
            self.finding = Finding(best, int(self.rate))
        self.wanted = best
        self._phase = "settled"
        self._all_rate = 0.0
        self._watched = None

    # -- what was decided, seen again ------------------------------------------------------------

    def _stands_still(
        self, now: float, received: int, active: int, left: int, waiting: float
    ) -> bool:
        """Tell whether the only connection brings nothing now, having brought much.

        So do limits that let the allowance of the first second through at once.
        """
        return (
            self.wanted == active == 1
            and now - self._last[0] >= STILL_SECONDS
            and received - self._came >= SMALLEST_PART
            and left >= self._recent_rate(now, received) * LEAST_SECONDS
            and waiting >= LEAST_WAITING
            and self._may_check()
        )

    def _recent_rate(self, now: float, received: int) -> float:
        begun, came = self._marks[0]
        return (received - came) / max(now - begun, LEAST_SPAN_SECONDS)

    def _look_again(
        self, now: float, received: int, active: int, left: int, waiting: float
    ) -> None:
        if self._watched is None or self._watched[2] != active:
            self._watched = now, received, active
        begun, came, _ = self._watched
        seconds = now - begun
        if seconds < WATCH_SECONDS:
            return
        self._watched = None
        rate = (received - came) / seconds
        if active != self.wanted or rate <= 0 or left < rate * LEAST_SECONDS:
            return
        if active > 1:
            is_other = not LEAST_GAIN * self.rate <= rate <= FAR_ABOVE * self.rate * active
            if is_other and self._may_check():
                self._all_rate, self._most = rate, active
                self.rate = rate
                self._measure_one(now, received)
                return
        elif rate * FAR_ABOVE < self.rate and waiting >= LEAST_WAITING and self._may_check():
            self._measure_one(now, received)
            return
        if self._known is None or self.finding is not None or self.wanted >= self._limit:
            return
        if left >= rate * LONG_SECONDS and waiting >= LEAST_WAITING and self._may_check():
            # Fewer than there may be, because of what was once: much is left, and trying is cheap.
            self._alone_rate = rate if active == 1 else self._alone_rate or rate / active
            self._try_all(now)

    def _may_check(self) -> bool:
        self._checks += 1
        return self._checks <= MOST_CHECKS


def _one_meter(now: float) -> _Meter:
    return _Meter(now, now + SETTLE_SECONDS, SAMPLE_SECONDS, SAMPLES_AGREE)


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
