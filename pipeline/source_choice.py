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

from stowray.pipeline.source_actions import (
    ORIGIN,
    Action,
    AskLease,
    Fetch,
    GiveUp,
    Patience,
    Pause,
    Probe,
    Report,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stowray.pipeline.source_standing import Standing

# Deeper than any tree, so that two nodes that wait for each other are not asked for ever.
_HOP_LIMIT: Final = 24
_FAILED, _SLOW, _STARVED, _SILENT = "failed", "slow", "starved", "silent"


class SourceChoice:
    """Chooses for one stripe on one node; ``sources`` are in the planner's order."""

    __slots__ = (
        "_anew",
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
        "_lost",
        "_origin_failures",
        "_origin_from",
        "_patience",
        "_pause_until",
        "_promised",
        "_reader_had",
        "_source_pace",
        "_sources",
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
        "taken",
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
        self.taken = 0  # bytes that sources gave
        self.reports: list[Report] = []
        self._sources = tuple(sources)
        self._elsewhere: tuple[str, ...] = ()
        self._standing = standing
        self._patience = patience
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
        self._anew: str | None = None  # began again from nothing: it may well be behind
        self._promised = False  # whether the owner of the leases says that the source has bytes
        # Who had nothing of what the owner promised, where, and since when.
        self._lost: dict[str, tuple[int, float]] = {}
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

    # -- events -----------------------------------------------------------------------------------

    def begin(self, now: float) -> Action:
        """Return the first action."""
        return self._next(now)

    def started(self, now: float, have: int) -> Action | None:
        """Take note that the present source answers and has ``have`` bytes of the stripe.

        One that is behind this node can only be waited for: another is better.
        """
        self._standing.heard(self.source or ORIGIN)
        if self._promised and have <= self.position:
            return self._has_lost(now)
        if self.source in (ORIGIN, self._anew) or have + self._patience.margin >= self.position:
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
        self._standing.heard(self.source or ORIGIN)
        if further:
            self._suspect(now, patience.answer / 4)
        self.position += count
        self.taken += count
        self._heard = now
        self._asked = 0.0
        self._promised = False
        if self.source == ORIGIN and count:
            self._origin_failures = 0
        if self._limit <= self.position < self.length:
            return self._next(now)
        return None

    def skipped(self, count: int, now: float) -> Action | None:
        """Go on behind bytes that are here already: read from there, if a node is the source."""
        self.position += count
        self._turn_window(now)
        if self.done or (self.source == ORIGIN and self.position < self._limit):
            return None
        return self._take(now, self.source) if self.source else self._next(now)

    def begun_anew(self, now: float) -> Action:
        """Ask again: the source found its own bytes wrong and begins anew, at which it is good."""
        self._anew = self.source
        if self.source not in self._sources:
            # It was named because it read or had the bytes, and may now wait for this node's.
            self._elsewhere = ()
        return self._next(now)

    def turned_away(self, now: float) -> Action:
        """Ask the present source no more: it gives others what this stripe is not for."""
        self._sources = tuple(one for one in self._sources if one != self.source)
        self._elsewhere = tuple(one for one in self._elsewhere if one != self.source)
        return self._next(now)

    def held_up(self, now: float) -> None:
        """Take note that this node itself did not read for a while: nobody is to blame."""
        self._heard = now
        self._turn_window(now)

    def failed(self, now: float, reason: str) -> Action:
        """Pass over a source that refused, broke off, or is gone."""
        return self._leave(now, _FAILED, reason)

    def unheard(self, now: float) -> Action:
        """Pass over a source that does not answer, which may be alive and have no time."""
        return self._leave(now, _SILENT, "does not answer")

    def busy(self, now: float, seconds: float) -> Action:
        """Pass over a source that has too many children, for ``seconds``."""
        if self.source:
            self._standing.postpone(self.source, now + seconds)
        elif self.source == ORIGIN:
            self._origin_from = now + seconds
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
                return self.unheard(now)
            # Those who read from that one will notice; here it need not be tried first.
            self._suspect(now, patience.answer)
            return self._starve(now)
        if self._promised and now > self._heard:  # two that have lost it may wait for each other
            return self._probe(now, self.source)
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
            self._standing.heard(hop)
            self._source_pace = pace
        if self._promised and have <= self.position:
            return self._has_lost(now)
        self._promised = False
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
            return self._starve(now)
        if hop == self.source and have + margin < self.position and hop != self._anew:
            return self._leave(now, _STARVED, "is behind")
        if upstream == ORIGIN and hop == self.source:
            # It reads from the origin. If bytes come there and are few, it is slow; if none come
            # the origin may be to blame, and another reader would get no more: that takes longer.
            trickles = now - self._heard < self._patience.silence or 0 <= self._reader_had < have
            self._reader_had = have
            if trickles:
                return self._leave(now, _SLOW, "receives slowly")
            return self._starve(now)
        self._hops += 1
        if not upstream or self._hops > _HOP_LIMIT:
            return self._starve(now)
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
                fetch = self._take(now, node)
                self._promised = not reading
                return fetch
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
        failed = tuple(
            dict.fromkeys(
                (
                    *(source for source in known if self._standing.has_failed(source)),
                    *(source for source in self._lost if self._lacks(source, now)),
                )
            )
        )
        slow = tuple(source for source in known if self._standing.is_slow(source))
        return AskLease(self.position, failed, slow)

    def _take(self, now: float, source: str) -> Fetch:
        self.source = source
        if source != self._anew:
            self._anew = None
        self._limit = self.length
        self._promised = False
        self._reader_had = -1
        self._dry = False
        self._asked = self._starved_since = self._answered = 0.0
        self._heard = now
        self._turn_window(now)
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

    def _has_lost(self, now: float) -> Action:
        source = self.source or ORIGIN
        if self._lost.get(source, (-1, 0.0))[0] != self.position:
            self._lost[source] = (self.position, now)
        return self._leave(now, _STARVED, "has lost it")

    def _lacks(self, source: str, now: float) -> bool:
        """Tell whether ``source`` has lacked the next byte for long, which the owner promised.

        One that proves a blob now gives the last byte soon; one whose fetch has ended never will.
        """
        position, since = self._lost[source]
        return position == self.position and now - since >= self._patience.deaf

    def _starve(self, now: float) -> Action | None:
        """Stay with the source, which waits for others, for a time."""
        self._asked = 0.0
        self._answered = now
        self._dry = True
        if not self._starved_since:
            self._starved_since, self._starved_position = now, self.position
        self._turn_window(now)
        return None

    def _suspect(self, now: float, seconds: float) -> None:
        """Try others before a node further up that has not answered for ``seconds``."""
        if now - self._asked >= seconds:
            self._standing.postpone(self._hop, now + self._patience.avoid)

    def _leave(self, now: float, kind: str, detail: str) -> Action:
        source = self.source
        if source is not None:
            told = _FAILED if kind == _SILENT else kind
            self.reports.append(Report(source, told, self.position, detail))
        if source == ORIGIN:
            self._origin_failures += 1
            wait = self._patience.avoid * (1 << min(self._origin_failures - 1, 6))
            self._origin_from = now + wait
        elif source is not None:
            if kind == _STARVED:
                self._standing.postpone(source, now + self._patience.avoid)
            elif kind == _SILENT:
                self._standing.silent(source, now, self._patience.deaf)
            else:
                self._standing.strike(source, now, failed=kind == _FAILED)
        return self._next(now)

    def _turn_window(self, now: float) -> None:
        self._window = now
        self._window_position = self.position
