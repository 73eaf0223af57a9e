"""Who sent wrong bytes of a blob, where they are, and whom to take it from then.

Invariant: nobody is banned for what it only passed on. A node is banned when it has found its own
committed bytes wrong, when it sent wrong bytes and said that it had proven them, or when it had
right ones and sent others (``find_liar``); which bytes were wrong is known from comparing them with
this node's own proven copy, byte for byte. Until then, whoever may have sent them is left alone.

A blob that proves wrong is not thrown away: a node that has proven it tells the digests of its
pieces, and only those that differ come again. Where nobody has, see ``spread_repair``; and if it
came in stripes, nodes that each had others of them would wait for each other's second try. So each
of them takes it in one piece then, along one tree: who is first reads it alone from the origin, and
what comes of that is the verdict for all below.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from stowray.pipeline import fates
from stowray.pipeline.errors import DigestMismatchError, NodeError
from stowray.pipeline.fetch import WRONG_LIMIT
from stowray.pipeline.files import open_regular, translated
from stowray.pipeline.pieces import PIECE_SIZE, differences, differing, piece_digest
from stowray.pipeline.source_actions import ORIGIN, Report
from stowray.pipeline.source_blame import Hop, find_liar
from stowray.pipeline.spread_leases import stripe_key
from stowray.pipeline.spread_repair import Repair
from stowray.pipeline.spread_shared import OWNER_ERRORS
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from stowray.pipeline.pieces import Range
    from stowray.pipeline.spread_claims import Claim
    from stowray.pipeline.spread_job import Job
    from stowray.pipeline.spread_stream import StripeStream

# More nodes than these are not asked for one blob, and fewer yet have to read it for this one.
_ASKED_LIMIT: Final = 24
_READ_LIMIT: Final = 4
# Deeper than any tree.
_HOP_LIMIT: Final = 24
# So many generations may prove wrong before the blob is given up.
_GENERATION_LIMIT: Final = 6


@dataclass(frozen=True, slots=True)
class _Case:
    """The generation that proved wrong last: its checkpoints, and who gave what."""

    condemned: Mapping[int, bytes]
    streams: Sequence[StripeStream]


class Inquiry:
    """All that went wrong with one blob on this node; ``path`` is where it is once proven."""

    def __init__(self, job: Job, path: Path) -> None:
        self._job = job
        self._path = path
        self._case: _Case | None = None
        self._convicted: set[str] = set()
        # Who alone gave a piece that is wrong, if the piece has this digest once it is proven.
        self._accused: dict[str, tuple[Range, bytes]] = {}
        self._best: str | None = None
        self._wrong = 0
        self._origin_wrong = 0
        self._is_resumed = job.ingest.is_resumed
        job.ingest.keeps_wrong = True

    def sources(self, planned: Sequence[str]) -> tuple[str, ...]:
        """Return from whom a stripe is taken now, of those that were ``planned`` and others."""
        job = self._job
        known = dict.fromkeys((self._best, *planned) if self._best else planned)
        return tuple(source for source in known if source not in job.distrusted)

    def checkpoints(self) -> Mapping[int, bytes]:
        """Return the checkpoints of what is about to be proven, if anybody will want them."""
        return self._job.ingest.checkpoints() if self._case is not None else {}

    def drop(self) -> None:
        """Drop bytes before anything was proven of them: their source has found them wrong."""
        ingest = self._job.ingest
        self._is_resumed = False
        self._case = None
        self._job.repair = None
        ingest.keeps_wrong = False
        ingest.restart()
        ingest.keeps_wrong = True
        self._tell_lost()

    def open(self, streams: Sequence[StripeStream], error: DigestMismatchError) -> None:
        """Take note that the bytes of ``streams`` proved wrong, and prepare to go on.

        Raises ``error`` when nothing better is to be hoped for.
        """
        job = self._job
        self._tell_lost()
        job.retry()
        job.repair = None
        self._wrong += 1
        self._best = None
        givers = {giver for stream in streams for giver in stream.givers}
        is_resumed, self._is_resumed = self._is_resumed, False
        if givers == {ORIGIN} and not is_resumed:
            self._note_origin(error)
        elif self._wrong >= _GENERATION_LIMIT:
            raise error
        self._case = None if is_resumed else _Case(job.ingest.condemned, streams)
        liar = None if is_resumed else _sole_liar(streams)
        if liar is not None:
            self._convict(liar, 0, "sent all bytes and had proven them, it said")
        wrong = self._compare(streams, givers)
        claims = {claim for stream in streams for claim in stream.claims}
        if wrong is not None:
            claims = {claim for start, end in wrong for claim in _givers(streams, start, end)}
        if not is_resumed:
            # Who says that it has proven them may be wrong; others may have been given them.
            job.distrusted |= {giver for giver, claim in claims if claim.complete}
            job.suspects |= {
                (giver, claim.generation)
                for giver, claim in claims
                if giver != ORIGIN and not claim.complete
            }
        if wrong is None and not is_resumed and not any(claim.complete for _, claim in claims):
            self._take_whole()
        if job.ingest.wrong_data >= 0:
            job.repair = Repair(job.ingest, guesses=wrong is None)
            if wrong is not None:
                job.repair.keep(wrong)

    def close(self, proven: Mapping[int, bytes]) -> None:
        """Charge who is to blame: this node has proven the blob, with these checkpoints."""
        case, data = self._case, self._job.ingest.wrong_data
        if not self._accused and (case is None or data < 0):
            return
        with translated(self._path, "compare a blob"):
            descriptor = open_regular(self._path)
            try:
                for giver, ((start, end), digest) in self._accused.items():
                    if piece_digest(os.pread(descriptor, end - start, start)) == digest:
                        self._convict(giver, start, "sent wrong bytes and had proven them, it said")
                if case is None or data < 0:
                    return
                found = differences(data, descriptor, self._job.ingest.size)
            finally:
                os.close(descriptor)
        asked: set[object] = set()
        for number, offset in enumerate(found):
            given = next(iter(_givers(case.streams, offset, offset + 1)), None)
            if given is None or given in asked:
                continue
            asked.add(given)
            point = min((at for at in case.condemned if at > offset and at in proven), default=0)
            right = proven[point] if point and number == 0 else b""
            guilty = find_liar(right, self._hops(case, offset, point if right else 0))
            if guilty is not None:
                self._convict(guilty, offset, "sent other bytes than it had")

    # -- internals --------------------------------------------------------------------------------

    def _tell_lost(self) -> None:
        shared, count = self._job.shared, self._job.shown.count
        for index in range(count):
            with suppress(*OWNER_ERRORS):
                shared.leases.lost(stripe_key(self._job.digest, index, count))

    def _take_whole(self) -> None:
        """Let a blob in stripes come in one piece: the origin is the most likely to be wrong."""
        job = self._job
        if job.shown.count > 1:
            job.is_whole = True
            if not self._origin_wrong:
                self._origin_wrong = 1
                job.prefer_home()

    def _note_origin(self, error: DigestMismatchError) -> None:
        job = self._job
        self._origin_wrong += 1
        job.prefer_home()
        if self._origin_wrong + len(job.given_up_by) >= WRONG_LIMIT:
            job.ingest.give_up()
            raise error

    def _compare(
        self, streams: Sequence[StripeStream], givers: Iterable[str]
    ) -> Sequence[Range] | None:
        """Return which pieces are wrong, as somebody tells who has proven the blob.

        Who is found to have damaged bytes itself is charged on the way.
        """
        job = self._job
        read = 0
        for node, address in self._holders(streams, givers):
            if read >= _READ_LIMIT:
                break
            read += 1
            job.check()
            with suppress(NodeError):
                pieces = job.shared.client.pieces(address, job.digest)
                if pieces.damaged:
                    self._convict(node, 0, "has found the bytes on its disk wrong")
                if not pieces.complete or job.ingest.wrong_data < 0:
                    continue
                wrong = differing(job.ingest.wrong_data, job.ingest.size, pieces.digests)
                if wrong:
                    self._best = node
                    self._accuse(streams, wrong, pieces.digests)
                    return wrong
        return None

    def _accuse(
        self, streams: Sequence[StripeStream], wrong: Sequence[Range], right: Sequence[bytes]
    ) -> None:
        for start, end in wrong:
            given = set(_givers(streams, start, end))
            if len(given) == 1 and not any(stream.has_kept for stream in streams):
                giver, claim = given.pop()
                if claim.complete:
                    self._accused[giver] = ((start, end), right[start // PIECE_SIZE])

    def _holders(
        self, streams: Sequence[StripeStream], givers: Iterable[str]
    ) -> Iterable[tuple[str, str]]:
        """Yield those that say that they have proven the blob, with their addresses."""
        job, shared = self._job, self._job.shared
        planned = [source for stream in streams for source in stream.sources]
        waiting = list(dict.fromkeys((*sorted(givers), *planned)))
        asked: set[str] = {ORIGIN, shared.node}
        stripe = streams[0].stripe
        while waiting and len(asked) < _ASKED_LIMIT:
            node = waiting.pop(0)
            address = "" if node in asked else shared.address(node)
            asked.add(node)
            if not address:
                continue
            with suppress(NodeError):
                told = shared.client.have(address, job.digest, stripe)
                if told.complete:
                    yield node, address
                elif told.upstream:
                    waiting.append(told.upstream)

    def _hops(self, case: _Case, offset: int, point: int) -> Iterable[Hop]:
        """Yield through whose hands the byte at ``offset`` came, from its giver upwards.

        ``point`` is the checkpoint at which they are compared, 0: none.
        """
        job = self._job
        stream = _stream(case.streams, offset)
        given = stream.giver(stream.stripe.position(offset))
        if given is None:
            return
        node, claim = given
        generation = claim.generation
        is_claimed = claim.complete
        for _ in range(_HOP_LIMIT):
            if node == ORIGIN or is_claimed:
                yield Hop(node, is_claimed)
                return
            address = job.shared.address(node)
            if not address:
                return
            fate, told, upstream = fates.UNKNOWN, b"", None
            with suppress(NodeError):
                have = job.shared.client.have(address, job.digest, stream.stripe, generation)
                fate, upstream = have.fate, have.upstream
                if point and fate == fates.GROWING:
                    witness = job.shared.client.checkpoints(address, job.digest)
                    if witness.generation == generation:
                        told = witness.checkpoints.get(point, b"")
            yield Hop(node, fate=fate, told=told)
            if fate != fates.GROWING or upstream is None:
                return
            # What it reads now it most likely read then; a generation is not known of that one.
            node, generation = upstream, 0

    def _convict(self, guilty: str, offset: int, detail: str) -> None:
        if guilty in self._convicted:
            return
        self._convicted.add(guilty)
        self._job.work.remarks.append(Report(guilty, "lying", offset, detail))
        if guilty != ORIGIN:
            self._job.shared.standing.ban(guilty)


def _stream(streams: Sequence[StripeStream], offset: int) -> StripeStream:
    return next(
        stream
        for stream in streams
        if stream.stripe.position(offset + 1) > stream.stripe.position(offset)
    )


def _givers(streams: Sequence[StripeStream], start: int, end: int) -> Iterable[tuple[str, Claim]]:
    """Yield who gave the bytes from ``start`` to ``end``, and what they said of them."""
    for stream in streams:
        yield from stream.given(stream.stripe.position(start), stream.stripe.position(end))


def _sole_liar(streams: Sequence[StripeStream]) -> str | None:
    """Return who gave everything and said that it was proven.

    The last byte of a blob in one piece is a claim as well: it is sent when the rest was proven.
    """
    claims = {(source, claim) for stream in streams for source, claim in stream.claims}
    if len(claims) != 1 or any(stream.has_kept for stream in streams):
        return None
    source, claim = next(iter(claims))
    if source == ORIGIN or not (claim.complete or len(streams) == 1):
        return None
    return source
