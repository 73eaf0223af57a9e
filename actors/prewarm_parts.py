"""Which part of the spread each node gets that begins its work, whoever works already.

Invariant: a node that begins later gets its bytes from nodes that have them, or that began before
it; nobody's part changes when others join. Pure arithmetic over ``spread``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stowray.pipeline.spread import Blob, NodeState, Part, Spread, join, spread

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stowray.pipeline.spread_tree import Tree


class Parts:
    """Deals out parts; ``blobs`` are all of the run with their sizes."""

    def __init__(self, *, fan_out: int, seed: int = 0) -> None:
        self._fan_out = fan_out
        self._seed = seed
        self._sizes: dict[str, int] = {}
        self._plan: Spread | None = None

    @property
    def digests(self) -> list[str]:
        """Return the digests of all blobs of the run so far."""
        return list(self._sizes)

    def add_blobs(self, sizes: Mapping[str, int]) -> None:
        """Take note of blobs of the run."""
        self._sizes.update(sizes)

    def empty(self, node: str) -> Part:
        """Return the part of a node that only gives."""
        return Part(node)

    def deal(
        self, batch: Sequence[NodeState], holders: Sequence[NodeState], working: Sequence[str]
    ) -> dict[str, Part]:
        """Return the parts of those that begin now.

        ``holders`` are ready and serve all that they have; ``working`` have begun before and are
        still at it. What a holder has is taken from holders; what only those at work will have,
        from them; the rest from the origin.
        """
        held = {digest for holder in holders for digest in holder.present}
        known = {tree.digest for tree in self._plan.trees} if self._plan and working else set()
        coming = [digest for digest in self._sizes if digest in known and digest not in held]
        fresh = [digest for digest in self._sizes if digest not in coming]
        self._seed += 1
        blobs = [Blob(digest, self._sizes[digest]) for digest in fresh]
        begun = spread(blobs, [*holders, *batch], fan_out=self._fan_out, seed=self._seed)
        mine = {node.name for node in batch}
        parts = {part.node: part for part in begun.parts() if part.node in mine}
        if self._plan is None or not working:
            self._plan = begun
            return parts
        joined = join(self._plan, batch)
        wanted = frozenset(coming)
        for node in batch:
            parts[node.name] = _together(parts[node.name], joined.part(node.name), wanted)
        # Later ones may join those of this batch, also for blobs that nobody wanted before.
        trees = tuple(tree for tree in begun.trees if tree.digest not in known)
        self._plan = _grown(joined, begun, trees)
        return parts


def _together(part: Part, other: Part, wanted: frozenset[str]) -> Part:
    """Return ``part`` with those portions of ``other`` that are of ``wanted`` digests."""
    more = [portion for portion in other.portions if portion.digest in wanted]
    sources = {source for portion in more for source in portion.sources}
    addresses = dict(part.addresses) | {
        name: address for name, address in other.addresses.items() if name in sources
    }
    return Part(
        part.node, (*part.portions, *more), addresses, part.shares_with or other.shares_with
    )


def _grown(plan: Spread, other: Spread, trees: Sequence[Tree]) -> Spread:
    """Return ``plan`` with ``trees`` of ``other``, the numbers of their nodes translated."""
    numbers = {name: number for number, name in enumerate(plan.nodes)}
    names, addresses = list(plan.nodes), list(plan.addresses)
    for name, address in zip(other.nodes, other.addresses, strict=True):
        if name not in numbers:
            numbers[name] = len(names)
            names.append(name)
            addresses.append(address)
    added = tuple(
        replace(tree, order=tuple(numbers[other.nodes[number]] for number in tree.order))
        for tree in trees
    )
    return replace(
        plan, nodes=tuple(names), addresses=tuple(addresses), trees=(*plan.trees, *added)
    )
