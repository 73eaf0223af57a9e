"""Which source a stripe comes from next: its parent, other nodes, the origin.

Invariant: one method is called per event, with the time, and returns what to do now; nothing here
waits or reads. Bytes are taken in order, and whatever happens to a source, reading goes on at the
same byte from the next one. The origin is read only under a lease (``origin_leases.py``), so that
the children of a dead root do not all turn to the registry.

A source that sends little is *asked* how far it is and whom it reads from itself, and so on up to
the first that has more. The one below that is slow, or its link is; only its own children leave it.
All others further down wait for them, else one slow or dead node would make everybody below it look
for other sources at once. One that does not answer its own children is dead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# No node has an empty name.
ORIGIN: Final = ""

_FADE: Final = 0.95
# Deeper than any tree, so that two nodes that wait for each other are not asked for ever.
_HOP_LIMIT: Final = 24
_FAILED, _SLOW, _STARVED = "failed", "slow", "starved"


@dataclass(frozen=True, slots=True)
class Patience:
    """For how long, in seconds, what is put up with.

    A source is dead after ``silence`` without a byte and ``answer`` without an answer. It is slow
    when it gives less than ``slow_fraction`` of the expected rate, or less than ``least_rate``
    bytes per second, for ``slow``. One that waits for its own source is left after ``starved``.
    Who failed is passed over for ``avoid``, twice as long each time. ``tries`` is how often the
    origin may fail without a byte in between. ``margin`` bytes are on their way or in buffers: two
    nodes that are equally far may seem to differ by so much.
    """

    silence: float = 1.0
    answer: float = 1.0
    slow: float = 2.0
    slow_fraction: float = 0.35
    least_rate: float = 1024.0
    starved: float = 8.0
    avoid: float = 5.0
    tries: int = 6
    margin: int = 16 << 20


@dataclass(frozen=True, slots=True)
class Fetch:
    """Read from ``source`` (``ORIGIN`` or a node) from ``position`` on; leave the one before."""

    source: str
    position: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask ``source`` how far it is and whom it reads from; keep reading meanwhile."""

    source: str


@dataclass(frozen=True, slots=True)
class AskLease:
    """Ask the owner of the leases for the origin from ``position`` on.

    ``failed`` gave nothing or wrong bytes, ``slow`` give too little.
    """

    position: int
    failed: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pause:
    """There is nobody to ask now: stop reading, call ``tick`` at ``until``."""

    until: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Neither nodes nor origin have helped."""

    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """Something that a source did, for the log and the final report."""

    source: str
    kind: str
    position: int
    detail: str = ""


Action = Fetch | Probe | AskLease | Pause | GiveUp


class Standing:
    """What one node holds of its sources, over all it fetches from them."""

    def __init__(self, avoid_seconds: float = 5.0) -> None:
        self._avoid = avoid_seconds
        self._failed: set[str] = set()
        self._slow: set[str] = set()
        self._strikes: dict[str, int] = {}
        self._until: dict[str, float] = {}
        self._busy: dict[str, float] = {}
        self._banned: set[str] = set()

    def strike(self, source: str, now: float, *, failed: bool = False) -> None:
        """Pass ``source`` over for a time, twice as long each time.

        It ``failed``, or it is slow.
        """
        (self._failed if failed else self._slow).add(source)
        strikes = self._strikes.get(source, 0)
        self._strikes[source] = strikes + 1
        self._until[source] = now + self._avoid * (1 << min(strikes, 6))

    def postpone(self, source: str, until: float) -> None:
        """Pass ``source`` over until then: it is busy, or waits itself."""
        self._strikes[source] = self._strikes.get(source, 0) + 1
        self._busy[source] = until

    def forgive(self, source: str) -> None:
        """Forget the strikes of a source that gave right bytes."""
        if self._strikes:
            self._strikes.pop(source, None)
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


class SourceChoice:
    """Chooses for one stripe on one node; ``sources`` are in the planner's order."""

    __slots__ = (
        "_answered",
        "_asked",
        "_below",
        "_dry",
        "_elsewhere",
        "_expected",
        "_heard",
        "_hop",
        "_hops",
        "_limit",
        "_origin_failures",
        "_origin_from",
        "_patience",
        "_pause_until",
        "_reader_had",
        "_source_pace",
        "_sources",
        "_spans",
        "_standing",
        "_starved_position",
        "_starved_since",
        "_waits_for_lease",
        "_window",
        "_window_position",
        "length",
        "position",
        "reports",
        "source",
    )

    def __init__(
        self,
        sources: Sequence[str],
        length: int,
        standing: Standing,
        patience: Patience,
        *,
        position: int = 0,
    ) -> None:
        self.length = length
        self.position = position
        self.source: str | None = None
        self.reports: list[Report] = []
        self._sources = tuple(sources)
        self._elsewhere: tuple[str, ...] = ()
        self._standing = standing
        self._patience = patience
        self._spans: list[tuple[int, str]] = []
        self._heard = 0.0
        self._asked = 0.0
        self._answered = 0.0
        self._starved_since = 0.0
        self._starved_position = position
        self._dry = False
        self._window = 0.0
        self._window_position = position
        self._hop = self._below = ""
        self._hops = 0
        self._source_pace = 0.0
        self._expected = 0.0
        # How far a source that reads from the origin was when last asked; -1: no such source.
        self._reader_had = -1
        self._pause_until = 0.0
        self._limit = length
        self._waits_for_lease = False
        self._origin_from = 0.0
        self._origin_failures = 0

    @property
    def done(self) -> bool:
        """Tell whether all bytes are here; that they are right the caller has to prove."""
        return self.position >= self.length

    @property
    def is_starved(self) -> bool:
        """Tell whether this stripe waits for others: its rate then says nothing of this node."""
        return not self.done and (
            self.source is None or bool(self._asked) or bool(self._starved_since)
        )

    def source_of(self, position: int) -> str | None:
        """Return who gave the byte at ``position``."""
        found = None
        for start, source in self._spans:
            if start > position:
                break
            found = source
        return found

    # -- events -----------------------------------------------------------------------------------

    def begin(self, now: float) -> Action:
        """Return the first action."""
        return self._next(now)

    def started(self, now: float, have: int) -> Action | None:
        """Take note that the present source answers and has ``have`` bytes of the stripe.

        One that is behind this node can only be waited for: another is better.
        """
        if self.source == ORIGIN or have + self._patience.margin >= self.position:
            return None
        return self._leave(now, _STARVED, "is behind")

    def received(self, count: int, now: float) -> Action | None:
        """Take note of bytes from the present source."""
        patience = self._patience
        further = bool(self._asked) and self._hop != self.source
        if (self._dry or further) and now - self._heard >= patience.silence + patience.answer / 2:
            # The source has one again: how long it had none says nothing of its rate.
            self._turn_window(now)
        self._dry = False
        if further:
            self._suspect(now, patience.answer / 4)
        self.position += count
        self._heard = now
        self._asked = 0.0
        if self.source == ORIGIN and count:
            self._origin_failures = 0
        if self._limit <= self.position < self.length:
            return self._next(now)
        return None

    def held_up(self, now: float) -> None:
        """Take note that this node itself did not read for a while: nobody is to blame."""
        self._heard = now
        self._turn_window(now)

    def failed(self, now: float, reason: str) -> Action:
        """Pass over a source that refused, broke off, or is gone."""
        return self._leave(now, _FAILED, reason)

    def busy(self, now: float, seconds: float) -> Action:
        """Pass over a source that has too many children, for ``seconds``."""
        if self.source:
            self._standing.postpone(self.source, now + seconds)
        elif self.source == ORIGIN:
            self._origin_from = now + seconds
        return self._next(now)

    def wrong(self, now: float, position: int, liar: str | None) -> Action:
        """Go back to ``position``: from there the bytes proved wrong, and ``liar`` is to blame.

        Without a ``liar`` (nothing could be compared) it is whoever gave the byte there.
        """
        guilty = liar if liar is not None else self.source_of(position)
        self.position = min(position, self.position)
        self._spans = [span for span in self._spans if span[0] < self.position]
        if guilty is not None:
            self.reports.append(Report(guilty, "lying", position))
            if guilty == ORIGIN:
                self._origin_failures += 1
                self._origin_from = now + self._patience.avoid
            else:
                self._standing.ban(guilty)
        return self._next(now)

    def tick(self, now: float, expected: float = 0.0) -> Action | None:
        """Look whether the present source is to be doubted; call it about twice a second."""
        patience = self._patience
        self._expected = expected
        if self.source is None:
            if self.done or self._waits_for_lease or now < self._pause_until:
                return None
            return self._next(now)
        if self.source == ORIGIN or self.done:
            # The registry client has its own limits for a body that stalls, and tells by failed().
            return None
        if self._asked:
            if now - self._asked < patience.answer:
                return None
            if self._hop == self.source:
                return self._leave(now, _FAILED, "does not answer")
            # Those who read from that one will notice; here it need not be tried first.
            self._suspect(now, patience.answer)
            self._starve(now)
            return None
        least = max(expected * patience.slow_fraction, patience.least_rate)
        if self._starved_since and now - self._starved_since >= patience.starved:
            came = self.position - self._starved_position
            if came >= least * (now - self._starved_since):
                # In bursts with pauses between them, but as much as is to be expected.
                self._starved_since, self._reader_had = 0.0, -1
                return None
            if self._reader_had >= 0:
                return self._leave(now, _SLOW, "gets nothing from the origin")
            return self._leave(now, _STARVED, "has waited too long itself")
        if now - max(self._heard, self._answered) >= patience.silence:
            return self._probe(now, self.source)
        if now - self._window >= patience.slow:
            rate = (self.position - self._window_position) / (now - self._window)
            if rate < least:
                return self._probe(now, self.source)
            self._turn_window(now)
            self._starved_since = 0.0
            self._reader_had = -1
            self._standing.forgive(self.source)
        return None

    def told(
        self, now: float, have: int, upstream: str | None, *, pace: float = 0.0
    ) -> Action | None:
        """Take the answer to the last probe: how far that node is, and whom it reads from.

        ``upstream`` is None while it looks for a source itself. ``pace`` is the rate that it
        expects of one source (:class:`Pace`), 0 when it does not say: one that gets from others
        what this node gets is not slow itself, and will leave a slow one.
        """
        if not self._asked or self.source is None:
            return None
        hop, below = self._hop, self._below
        if hop == self.source:
            self._source_pace = pace
        margin = self._patience.margin
        if have > self.position + margin or have >= self.length:
            if hop == self.source:
                return self._leave(now, _SLOW, "has more than it sends")
            its, mine = self._source_pace, self._expected
            if its <= mine / 2 if its else below == self.source:
                return self._leave(now, _SLOW, "receives slowly")
            if below == self.source:
                # It is the one above that sends little: the source will leave that one itself.
                self._standing.postpone(hop, now + self._patience.avoid)
            self._starve(now)
            return None
        if hop == self.source and have + margin < self.position:
            return self._leave(now, _STARVED, "is behind")
        if upstream == ORIGIN and hop == self.source:
            # It reads from the origin. If bytes come there and are few, it is slow; if none come
            # the origin may be to blame, and another reader would get no more: that takes longer.
            trickles = now - self._heard < self._patience.silence or 0 <= self._reader_had < have
            self._reader_had = have
            if trickles:
                return self._leave(now, _SLOW, "receives slowly")
            self._starve(now)
            return None
        self._hops += 1
        if not upstream or self._hops > _HOP_LIMIT:
            self._starve(now)
            return None
        self._hop, self._below, self._asked = upstream, hop, now
        return Probe(upstream)

    def granted(self, now: float, end: int) -> Action:
        """Read from the origin up to ``end``."""
        self._waits_for_lease = False
        fetch = self._take(now, ORIGIN)
        self._limit = end
        return fetch

    def elsewhere(
        self, now: float, nodes: Sequence[str], end: int, seconds: float, *, reading: bool
    ) -> Action:
        """Get the bytes up to ``end`` from ``nodes``, who are still ``reading`` or have them.

        If that does not help, ask again after ``seconds``. From a slow one, bytes that it has are
        better than none.
        """
        self._waits_for_lease = False
        self._elsewhere = tuple(nodes)
        for node in nodes:
            if self._standing.usable_from(node) <= now:
                return self._take(now, node)
        for node in () if reading else nodes:
            if self._standing.can_give(node, now):
                fetch = self._take(now, node)
                self._limit = end
                return fetch
        return self._pause(now, seconds)

    def later(self, now: float, seconds: float) -> Action:
        """Ask for the lease again after ``seconds``."""
        self._waits_for_lease = False
        return self._pause(now, seconds)

    def lease_lost(self, now: float) -> Action | None:
        """Stop reading from the origin: another node may hold the lease by now."""
        return self._next(now) if self.source == ORIGIN else None

    # -- internals --------------------------------------------------------------------------------

    def _next(self, now: float) -> Action:
        """Return the first source that may be asked now, else the way to the origin."""
        self.source = None
        standing = self._standing
        best, fewest = None, 1 << 30
        for source in (*self._sources, *self._elsewhere):
            strikes = standing.strikes(source)
            # In the planner's order, but whoever has never failed before all others.
            if strikes < fewest and standing.usable_from(source) <= now:
                best, fewest = source, strikes
        if best is not None:
            return self._take(now, best)
        if self._origin_failures >= self._patience.tries:
            return GiveUp(f"the origin failed {self._origin_failures} times, and no node helps")
        if now < self._origin_from:
            return self._pause(now, self._origin_from - now)
        self._waits_for_lease = True
        # Who is only slow, busy or waiting has the bytes or will: no reason to read them again.
        known = dict.fromkeys((*self._sources, *self._elsewhere))
        failed = tuple(source for source in known if self._standing.has_failed(source))
        slow = tuple(source for source in known if self._standing.is_slow(source))
        return AskLease(self.position, failed, slow)

    def _take(self, now: float, source: str) -> Fetch:
        self.source = source
        self._limit = self.length
        self._reader_had = -1
        self._dry = False
        self._asked = self._starved_since = self._answered = 0.0
        self._heard = now
        self._turn_window(now)
        if not self._spans or self._spans[-1][1] != source:
            if self._spans and self._spans[-1][0] == self.position:
                self._spans.pop()
            self._spans.append((self.position, source))
        return Fetch(source, self.position)

    def _pause(self, now: float, seconds: float) -> Pause:
        self.source = None
        usable = [
            self._standing.usable_from(source) for source in (*self._sources, *self._elsewhere)
        ]
        self._pause_until = min([now + seconds, *(at for at in usable if at > now)])
        return Pause(self._pause_until)

    def _probe(self, now: float, source: str) -> Probe:
        self._asked = now
        self._hop, self._below, self._hops = source, "", 0
        return Probe(source)

    def _starve(self, now: float) -> None:
        """Stay with the source, which waits for others, for a time."""
        self._asked = 0.0
        self._answered = now
        self._dry = True
        if not self._starved_since:
            self._starved_since, self._starved_position = now, self.position
        self._turn_window(now)

    def _suspect(self, now: float, seconds: float) -> None:
        """Try others before a node further up that has not answered for ``seconds``."""
        if now - self._asked >= seconds:
            self._standing.postpone(self._hop, now + self._patience.avoid)

    def _leave(self, now: float, kind: str, detail: str) -> Action:
        source = self.source
        if source is not None:
            self.reports.append(Report(source, kind, self.position, detail))
        if source == ORIGIN:
            self._origin_failures += 1
            wait = self._patience.avoid * (1 << min(self._origin_failures - 1, 6))
            self._origin_from = now + wait
        elif source is not None:
            if kind == _STARVED:
                self._standing.postpone(source, now + self._patience.avoid)
            else:
                self._standing.strike(source, now, failed=kind == _FAILED)
        return self._next(now)

    def _turn_window(self, now: float) -> None:
        self._window = now
        self._window_position = self.position


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who is to blame for wrong bytes, and the checkpoint at which that shows first."""

    node: str
    offset: int


def find_liar(
    proven: Mapping[int, bytes], hops: Sequence[tuple[str, Mapping[int, bytes]]]
) -> Verdict | None:
    """Return the hop at which the checkpoints first differ from those of a proven copy.

    ``hops`` go from the one who found out upwards: itself, its source, that one's source. Each maps
    offsets to the digest of all bytes before. Whoever only passed on what it got has a source that
    differs as well, and is not to blame; a hop that says nothing about the offset is passed over.
    """
    first = None
    for offset in sorted(hops[0][1]) if hops else ():
        if offset in proven and hops[0][1][offset] != proven[offset]:
            first = offset
            break
    if first is None:
        return None
    guilty = hops[0][0]
    for node, checkpoints in hops[1:]:
        told = checkpoints.get(first)
        if told is None:
            continue
        if told == proven[first]:
            break
        guilty = node
    return Verdict(guilty, first)
