"""Who sent wrong bytes of a blob, and whom to take it from then.

Invariant: nobody is banned for what it only passed on. A node is banned when it sent wrong bytes
and said that it had proven them, or when the checkpoints of those through whose hands they went
(``find_liar``) show that they were right before it and wrong after it; and the latter is only
decided when this node, or two others that say the same, have proven the blob. Until then, whoever
may have sent them is left alone.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import field
from typing import TYPE_CHECKING, Final

from stowray.pipeline.errors import DigestMismatchError, NodeError
from stowray.pipeline.fetch import WRONG_LIMIT
from stowray.pipeline.source_choice import ORIGIN, Report, find_liar
from stowray.pipeline.spread_leases import stripe_key
from stowray.pipeline.spread_shared import OWNER_ERRORS
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stowray.pipeline.spread_job import Job
    from stowray.pipeline.spread_stream import StripeStream
    from stowray.pipeline.witness import Witness

# More nodes than these are not asked for one blob.
_WITNESS_LIMIT: Final = 24
# So often wrong bytes may come without anybody to blame before only the origin is asked.
_UNDECIDED_LIMIT: Final = 1


@dataclass(slots=True)
class _Case:
    """One generation that proved wrong: its checkpoints, who gave what, and what others say."""

    condemned: Mapping[int, bytes]
    streams: Sequence[StripeStream]
    witnesses: dict[str, Witness] = field(default_factory=dict)


class Inquiry:
    """All that went wrong with one blob on this node."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._cases: list[_Case] = []
        self._convicted: set[str] = set()
        self._undecided = 0
        self._origin_wrong = 0
        self._is_resumed = job.ingest.is_resumed

    def trusted(self, sources: Sequence[str]) -> tuple[str, ...]:
        """Return those of ``sources`` from which the blob is taken now."""
        if self._undecided > _UNDECIDED_LIMIT:
            return ()
        return tuple(source for source in sources if source not in self._job.distrusted)

    def checkpoints(self) -> Mapping[int, bytes]:
        """Return the checkpoints of what is about to be proven, if anybody will want them."""
        return self._job.ingest.checkpoints() if self._cases else {}

    def forget(self) -> None:
        """Take note that the bytes are dropped before anything was proven of them."""
        self._is_resumed = False
        self._tell_lost()

    def open(self, streams: Sequence[StripeStream], error: DigestMismatchError) -> None:
        """Take note that the bytes of ``streams`` proved wrong; ``error`` when that is final."""
        job = self._job
        case = _Case(job.ingest.condemned, streams)
        self._tell_lost()
        job.retry()
        givers = {giver for stream in streams for giver in stream.givers}
        is_resumed, self._is_resumed = self._is_resumed, False
        if givers == {ORIGIN} and not is_resumed:
            self._origin_wrong += 1
            job.prefer_home()
            if self._origin_wrong >= WRONG_LIMIT:
                raise error
            return
        liar = None if is_resumed else _sole_liar(streams)
        if liar is not None:
            self._convict(liar, 0, "sent all bytes and had proven them, it said")
            return
        self._cases.append(case)
        self._hear(case, givers)
        known = len(self._convicted)
        agreed = _agreed(case.witnesses)
        if agreed is not None:
            self._decide(case, agreed)
            if len(self._convicted) > known:
                return
        if not is_resumed:
            # Else the bytes that an earlier run left may have been the wrong ones.
            self._undecided += 1
            # Those that said nothing of proof come first; by now they may have the right bytes.
            claims = {claim for stream in streams for claim in stream.claims}
            unproven = {giver for giver, claim in claims if not claim.complete}
            proven = {name for name, witness in case.witnesses.items() if witness.complete}
            job.distrusted = (unproven - proven if unproven else givers) - {ORIGIN}

    def close(self, proven: Mapping[int, bytes]) -> None:
        """Decide all cases: this node has proven the blob, with these checkpoints on the way."""
        for case in self._cases:
            self._decide(case, proven)

    # -- internals --------------------------------------------------------------------------------

    def _tell_lost(self) -> None:
        shared, count = self._job.shared, self._job.shown.count
        for index in range(count):
            with suppress(*OWNER_ERRORS):
                shared.leases.lost(stripe_key(self._job.digest, index, count))

    def _hear(self, case: _Case, givers: set[str]) -> None:
        """Ask all through whose hands the bytes may have gone, before they forget."""
        shared = self._job.shared
        waiting = sorted(givers - {ORIGIN})
        asked: set[str] = set()
        while waiting and len(asked) < _WITNESS_LIMIT:
            node = waiting.pop(0)
            if node in asked or node == shared.node:
                continue
            asked.add(node)
            address = shared.address(node)
            if not address:
                continue
            self._job.check()
            with suppress(NodeError):
                witness = shared.client.checkpoints(address, self._job.digest)
                case.witnesses[node] = witness
                waiting += [name for name in witness.upstreams if name]

    def _decide(self, case: _Case, proven: Mapping[int, bytes]) -> None:
        first = _first_difference(case.condemned, proven)
        if first is None:
            return
        stream = next(
            stream
            for stream in case.streams
            if stream.stripe.position(first) > stream.stripe.position(first - 1)
        )
        given = stream.giver(stream.stripe.position(first - 1))
        if given is None:
            return
        giver, claim = given
        if giver == ORIGIN:
            self._convict(ORIGIN, first, "")
            return
        if claim.complete:
            self._convict(giver, first, "sent wrong bytes and had proven them, it said")
            return
        mine = case.condemned[first]
        hops: list[tuple[str, Mapping[int, bytes]]] = [(self._job.shared.node, {first: mine})]
        node: str | None = giver
        while node and node in case.witnesses and node not in dict(hops):
            witness = case.witnesses[node]
            hops.append((node, {first: _told(witness, first, mine)}))
            upstreams = witness.upstreams
            index = stream.stripe.index
            node = upstreams[index] if index < len(upstreams) else None
        hops = [(name, {at: told for at, told in points.items() if told}) for name, points in hops]
        guilty = _guilty(proven, hops, case.witnesses, reaches_origin=node == ORIGIN)
        if guilty is not None:
            self._convict(guilty, first, "the bytes are right before it and wrong behind it")

    def _convict(self, guilty: str, offset: int, detail: str) -> None:
        if guilty in self._convicted:
            return
        self._convicted.add(guilty)
        self._job.work.remarks.append(Report(guilty, "lying", offset, detail))
        if guilty != ORIGIN:
            self._job.shared.standing.ban(guilty)


def _sole_liar(streams: Sequence[StripeStream]) -> str | None:
    """Return who gave everything and said that it was proven.

    The last byte of a blob in one piece is a claim as well: it is sent when the rest was proven.
    """
    claims = {(source, claim) for stream in streams for source, claim in stream.claims}
    if len(claims) != 1:
        return None
    source, claim = next(iter(claims))
    if source == ORIGIN or not (claim.complete or len(streams) == 1):
        return None
    return source


def _agreed(witnesses: Mapping[str, Witness]) -> Mapping[int, bytes] | None:
    """Return the checkpoints of nodes that have proven the blob, if two or more say the same."""
    told = [witness.checkpoints for witness in witnesses.values() if witness.complete]
    if len(told) < 2 or any(points != told[0] for points in told):
        return None
    return told[0]


def _first_difference(condemned: Mapping[int, bytes], proven: Mapping[int, bytes]) -> int | None:
    for offset in sorted(condemned):
        if offset in proven and condemned[offset] != proven[offset]:
            return offset
    return None


def _told(witness: Witness, offset: int, mine: bytes) -> bytes:
    """Return what a node says of ``offset``: of the bytes that it passed on, if it still knows."""
    if witness.condemned.get(offset) == mine:
        return mine
    return witness.checkpoints.get(offset) or witness.condemned.get(offset) or b""


def _guilty(
    proven: Mapping[int, bytes],
    hops: Sequence[tuple[str, Mapping[int, bytes]]],
    witnesses: Mapping[str, Witness],
    *,
    reaches_origin: bool,
) -> str | None:
    """Return who is to blame, None when the hops do not tell.

    ``find_liar`` finds the last hop whose bytes are wrong. If that one says that it has proven
    them it is to blame; else it passed on what it got, from one that has the right bytes itself and
    sent others.
    """
    verdict = find_liar(proven, hops)
    if verdict is None:
        return None
    names = [name for name, _ in hops]
    number = names.index(verdict.node)
    if number > 0 and witnesses[verdict.node].complete:
        return verdict.node
    if number + 1 < len(hops):
        name, points = hops[number + 1]
        return name if points.get(verdict.offset) == proven[verdict.offset] else None
    return ORIGIN if reaches_origin else None
