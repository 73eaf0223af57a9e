"""One stripe on its way to this node: does what its source choice wants, and tells it what came.

Invariant: one thread, so that the choice hears its events one after the other; bytes go from the
peer's socket into one buffer and from there into the ingest. Whoever sent each of them is known,
and whether it claimed that it had proven them.
"""

from __future__ import annotations

from bisect import bisect_right
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from stowray.pipeline.copying import BUFFER_SIZE
from stowray.pipeline.errors import DigestMismatchError, NodeError, StowrayError
from stowray.pipeline.fates import ABANDONED, WRONG
from stowray.pipeline.origin_leases import Elsewhere, Granted
from stowray.pipeline.peer_client import BusyError, SilentError, WholeError
from stowray.pipeline.source_actions import (
    ORIGIN,
    Action,
    AskLease,
    Fetch,
    GiveUp,
    Pause,
    Probe,
)
from stowray.pipeline.source_choice import SourceChoice
from stowray.pipeline.spread_claims import NO_CLAIM, Claim, VoidError
from stowray.pipeline.spread_job import Job, label
from stowray.pipeline.spread_leases import stripe_key
from stowray.pipeline.spread_origin import Lease, OriginReader
from stowray.pipeline.spread_shared import OWNER_ERRORS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stowray.pipeline.peer_client import PeerStream
    from stowray.pipeline.spread import Portion
    from stowray.pipeline.spread_repair import Repair

TICK_SECONDS: Final = 0.25
# So long may the owner of the leases be silent while this stripe needs the origin.
OWNER_SECONDS: Final = 60.0
# After so many times the patience with one that waits itself, this stripe looks further.
_HUNGER: Final = 2.0
# A generation that may be wrong is looked at again after so long: it is proven or begun anew.
_SUSPECT_SECONDS: Final = 0.1
# So many nodes that gave a blob up, as the origin has wrong bytes of it, are believed.
_BELIEVED: Final = 2


class StripeStream:
    """See the module."""

    def __init__(self, job: Job, portion: Portion, sources: Sequence[str]) -> None:
        self.stripe = portion.stripe
        self.key = stripe_key(job.digest, self.stripe.index, self.stripe.count)
        self.lease: Lease | None = None
        self._job = job
        self._shared = job.shared
        self._depth = portion.depth
        self.resumed = self._find_gap(0)
        self.choice = SourceChoice(
            sources,
            self.stripe.length,
            self._shared.standing,
            self._shared.patience,
            position=self.resumed,
        )
        self._origin = OriginReader(job, self)
        self.sources = tuple(sources)
        self._fed_at = self._asked_at = job.now()
        # Where each source began, and what it said of its bytes.
        self._spans: list[tuple[int, str | None, Claim]] = []
        self._claim = NO_CLAIM  # of the present source
        self._turned_away: set[str] = set()
        self._unheard_since: float | None = None

    # -- what others want to know -----------------------------------------------------------------

    @property
    def claims(self) -> set[tuple[str, Claim]]:
        """Who gave bytes, and what they said of these."""
        return {(source, claim) for _, source, claim in self._spans if source is not None}

    @property
    def givers(self) -> set[str]:
        """Who gave bytes."""
        return {source for source, _ in self.claims}

    @property
    def has_kept(self) -> bool:
        """Whether bytes are in it that nobody gave for this generation."""
        return bool(self.resumed) or any(source is None for _, source, _ in self._spans)

    @property
    def has_peers(self) -> bool:
        """Whether there is anybody but the origin to ask."""
        return bool(self.sources)

    def renew(self, now: float) -> None:
        """Renew what the owner gave; called by another thread than the stripe's."""
        self._origin.renew(now)

    def giver(self, position: int) -> tuple[str, Claim] | None:
        """Return who gave the byte at ``position`` and what that one said; None: nobody did now."""
        return next(iter(self.given(position, position + 1)), None)

    def given(self, start: int, end: int) -> Iterator[tuple[str, Claim]]:
        """Yield who gave positions ``start`` to ``end``, and what they said of them."""
        first = bisect_right(self._spans, start, key=lambda span: span[0]) - 1
        for at, source, claim in self._spans[max(0, first) :]:
            if at >= end or start >= end:
                return
            if source is not None:
                yield source, claim

    # -- life -------------------------------------------------------------------------------------

    def run(self) -> None:
        """Bring all bytes of the stripe; raises what ends it."""
        choice, pulse = self.choice, self._shared.pulse
        self._announce()
        pulse.add(choice)
        try:
            action: Action | None = None if choice.done else choice.begin(self._job.now())
            while not choice.done:
                self._job.check()
                action = self._do(action)
        finally:
            pulse.remove(choice)
            self.tell(None)
        if ORIGIN in self.givers or self._depth <= 1:
            # Those next to the origin tell that they have it, so that nobody reads it again.
            with suppress(*OWNER_ERRORS):
                self._shared.leases.has(self.key, self.stripe.length)

    def take(self, view: memoryview, source: str, claim: Claim = NO_CLAIM) -> Action | None:
        """Write bytes of the present source where they belong, and hear what is to be done."""
        job, stripe, position = self._job, self.stripe, self.choice.position
        if not self._spans or self._spans[-1][1:] != (source, claim):
            self._spans.append((position, source, claim))
        if stripe.count == 1:
            job.ingest.write_at(position, view)
        else:
            at = 0
            for start, end in stripe.ranges(position, position + len(view)):
                job.ingest.write_at(start, view[at : at + end - start])
                at += end - start
            job.shown.advance(stripe.index, position + len(view))
        self._shared.throttle.spend(len(view), job.is_over)
        self._fed_at = now = job.now()
        action = self.choice.received(len(view), now)
        if job.repair is None or self.choice.done:
            return action
        return self._use_kept(job.repair, position) or action

    def _use_kept(self, repair: Repair, position: int) -> Action | None:
        """Pass over what is here of an earlier generation, behind what came just now."""
        choice = self.choice
        if repair.guesses:
            for start, end in self.stripe.ranges(position, choice.position):
                repair.compare(start, end)
        count = self._find_gap(choice.position) - choice.position
        return self.skip(count) if count else None

    def skip(self, count: int) -> Action | None:
        """Pass over bytes that are in the ingest already."""
        position = self.choice.position
        self._spans.append((position, None, NO_CLAIM))
        if self.stripe.count > 1:
            self._job.shown.advance(self.stripe.index, position + count)
        return self.choice.skipped(count, self._job.now())

    def tell(self, upstream: str | None) -> None:
        """Tell this node's peers whom the stripe is read from."""
        self._job.shown.tell(self.stripe.index, upstream)

    # -- what the choice wants --------------------------------------------------------------------

    def _do(self, action: Action | None) -> Action | None:
        job = self._job
        match action:
            case Fetch(source, _):
                return self._read_peer(source)
            case AskLease():
                return self._ask(action)
            case Pause(until):
                self.tell(None)
                job.wait(until - job.now())
            case GiveUp(reason):
                raise job.hopeless or job.last_error or NodeError(job.digest, reason)
            case _:
                job.wait(TICK_SECONDS / 5)
        return self.tick()

    def settle(self, action: Action | None) -> Action | None:
        """Carry out a question, which does not end what is being read."""
        job = self._job
        while isinstance(action, Probe):
            address = self._shared.address(action.source)
            if not address:
                return None  # as if it did not answer; the choice finds that out by itself
            try:
                told = self._shared.client.have(address, job.digest, self.stripe)
            except NodeError:
                return None
            if told.given_up:
                job.given_up_by.add(action.source)
                if action.source == self.choice.source:
                    return self.choice.failed(job.now(), "has given the blob up")
            action = self.choice.told(job.now(), told.have, told.upstream, pace=told.pace)
        return action

    def tick(self) -> Action | None:
        """Let the choice doubt the present source, and carry out its question."""
        shared, now = self._shared, self._job.now()
        if self.choice.done:
            return None
        shared.pulse.beat()
        self._job.shown.tell_pace(shared.pulse.expected)
        if now - max(self._fed_at, self._asked_at) >= _HUNGER * shared.patience.starved:
            return self._ask_anyway(now)
        return self.settle(self.choice.tick(now, shared.pulse.expected))

    def _ask_anyway(self, now: float) -> Action | None:
        """Ask for a lease although there are sources: all may wait for one that will never begin.

        A node whose disk is full, say, lives and serves, and never has this blob. The caller asks
        once it has let go of the source: what that one still sends belongs to an older position.
        """
        choice, shared = self.choice, self._shared
        if self._origin.failures >= shared.patience.tries and self._job.last_error is not None:
            raise self._job.last_error
        if now - self._fed_at >= self._job.deadline_seconds:
            raise NodeError(self._job.digest, "no node and no origin brings it")
        failed = tuple(name for name in self.sources if shared.standing.has_failed(name))
        return AskLease(choice.position, failed)

    # -- peers ------------------------------------------------------------------------------------

    def _read_peer(self, source: str) -> Action | None:
        job, choice = self._job, self.choice
        self._claim = NO_CLAIM
        address = self._shared.address(source)
        if not address:
            return choice.failed(job.now(), "nobody knows its address")
        self.tell(source)
        client = self._shared.client
        try:
            with client.open_stripe(address, job.digest, self.stripe, choice.position) as stream:
                return self._take_from(stream, source)
        except BusyError as busy:
            return choice.busy(job.now(), busy.seconds)
        except WholeError:
            return self._turn_away(source)
        except NodeError as error:
            job.retry()
            return self._go_on_without(source, address, error)

    def _turn_away(self, source: str) -> Action:
        """Go on without ``source``, which waits until the blob is proven: perhaps for this node."""
        self._turned_away.add(source)
        return self.choice.turned_away(self._job.now())

    def _go_on_without(self, source: str, address: str, error: NodeError) -> Action:
        """Go on when ``source`` refused or broke off: it may have found its own bytes wrong."""
        job, choice = self._job, self.choice
        claim = self._claim
        try:
            told = self._shared.client.have(address, job.digest, self.stripe, claim.generation)
        except SilentError:
            return choice.unheard(job.now())
        except NodeError:
            return choice.failed(job.now(), error.reason)
        is_void = not claim.complete and told.fate in (WRONG, ABANDONED)
        is_given_up = told.given_up or told.fate == ABANDONED
        if told.whole:
            return self._turn_away(source)
        if not is_void and not is_given_up:
            return choice.failed(job.now(), error.reason)
        if is_given_up:
            job.given_up_by.add(source)
            action = choice.failed(job.now(), "has given the blob up")
        else:
            action = choice.begun_anew(job.now())
        if is_void and self.stripe.count == 1 and self._spans[-1:] and self._spans[-1][1] == source:
            # Its bytes and those here are the same ones. Of stripes others may be the wrong ones.
            raise VoidError(source) from error
        return action

    def _take_from(self, stream: PeerStream, source: str) -> Action | None:
        job, choice = self._job, self.choice
        while (head := stream.begin(TICK_SECONDS)) is None:
            job.check()
            action = self.tick()
            if action is not None:
                return action
        claim = self._claim = Claim(head.generation, head.complete)
        if not head.complete and self._is_doubtful(source, head.generation):
            return choice.busy(job.now(), _SUSPECT_SECONDS)
        action = self.settle(choice.started(job.now(), head.have))
        if action is not None:
            return action
        tick_at = job.now() + TICK_SECONDS
        name = label(source)
        buffer: memoryview | None = None
        is_holding = False
        try:
            while True:
                job.check()
                if not is_holding and stream.is_ready(TICK_SECONDS):
                    self._get_slot()
                    is_holding = True
                count = None
                if is_holding:
                    buffer = buffer or memoryview(bytearray(BUFFER_SIZE))
                    count = stream.read_into(buffer, TICK_SECONDS)
                if count is not None and buffer is not None:
                    job.count(name, count)
                    action = self.take(buffer[:count], source, claim)
                    if action is not None or choice.done:
                        return self.settle(action)
                elif is_holding:
                    # Nothing flows: others may go on.
                    self._shared.slots.release()
                    is_holding = False
                if count is None or job.now() >= tick_at:
                    tick_at = job.now() + TICK_SECONDS
                    action = self.tick()
                    if action is not None:
                        return action
        finally:
            if is_holding:
                self._shared.slots.release()

    def _is_doubtful(self, source: str, generation: int) -> bool:
        """Tell whether bytes that ``source`` has not proven may be the wrong ones once more."""
        job = self._job
        repairs = job.repair is not None and not job.repair.guesses
        if repairs and source not in self.sources:
            # It had them perhaps from here. The piece may be asked of the origin instead.
            job.distrusted.add(source)
            return True
        if (source, generation) not in job.suspects:
            return False
        if not job.is_whole and job.now() - self._fed_at >= self._shared.patience.starved:
            # It may wait for this node in turn, and neither will ever prove what it has.
            job.distrusted.add(source)
        return True

    def _get_slot(self) -> None:
        """Wait for a slot; it is not the source that is slow meanwhile."""
        while not self._shared.slots.acquire(timeout=TICK_SECONDS):
            self._job.check()
            self.choice.held_up(self._job.now())

    # -- the origin -------------------------------------------------------------------------------

    def _ask(self, wish: AskLease) -> Action | None:
        job, choice = self._job, self.choice
        self.tell(None)
        if len(job.given_up_by) >= _BELIEVED and job.given_up_by.issuperset(self.sources):
            job.ingest.give_up()
            raise DigestMismatchError(job.digest, job.digest, "other bytes, as other nodes found")
        asked = self._asked_at = job.now()
        try:
            answer = self._shared.leases.ask(
                self.key,
                self.stripe.length,
                wish.position,
                failed=tuple({*wish.failed, *job.distrusted, *self._turned_away}),
                slow=wish.slow,
            )
        except OWNER_ERRORS as error:
            return self._go_on_unheard(error)
        self._unheard_since = None
        if isinstance(answer, Granted):
            if job.hopeless is not None:
                self._shared.leases.release(self.key)
                raise job.hopeless
            return self._origin.read(Lease(answer.start, answer.end, asked + answer.seconds))
        if isinstance(answer, Elsewhere):
            nodes = [node for node in answer.nodes if node not in job.distrusted]
            seconds = min(1.0, answer.seconds)
            return choice.elsewhere(job.now(), nodes, answer.end, seconds, reading=answer.reading)
        return choice.later(job.now(), answer.seconds)

    def _go_on_unheard(self, error: StowrayError) -> Action:
        now = self._job.now()
        if self._unheard_since is None:
            self._unheard_since = now
        if now - self._unheard_since >= OWNER_SECONDS:
            raise error
        return self.choice.later(now, 1.0)

    # -- where to begin ---------------------------------------------------------------------------

    def _find_gap(self, position: int) -> int:
        """Return up to where the bytes from ``position`` on are here already."""
        for start, end in self.stripe.ranges(position):
            gap = self._job.ingest.gap(start, end)
            if gap is not None:
                return position + gap[0] - start
            position += end - start
        return position

    def _announce(self) -> None:
        """Show and tell what is there already."""
        if not self.resumed:
            return
        if self.stripe.count > 1:
            self._job.shown.advance(self.stripe.index, self.resumed)
        with suppress(*OWNER_ERRORS):
            self._shared.leases.has(self.key, self.stripe.length, 0, self.resumed)
