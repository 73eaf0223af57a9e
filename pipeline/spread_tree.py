"""Who gets one stripe from whom, by rank.

Invariant: all sources of a rank come before it, so no two nodes ever wait for each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from stowray.pipeline.stripes import Stripe

_SOURCE_LIMIT: Final = 5
# Knuth's multiplier: spreads ranks over the numbers below them.
_MIX: Final = 2654435761


@dataclass(frozen=True, slots=True)
class Tree:
    """The tree of one stripe: nodes by their number, parents before children.

    The first ``holders`` of ``order`` have the blob; without any, the first reads from the origin.
    """

    digest: str
    stripe: Stripe
    holders: int
    order: tuple[int, ...]
    fan_out: int

    def parent(self, rank: int) -> int | None:
        """Return the rank that ``rank`` receives from; None for a holder and for the origin's."""
        place = rank - self.holders
        if place < 0:
            return None
        if self.holders == 0:
            return (place - 1) // self.fan_out if place else None
        # Among many holders the first row is dealt out in turn; below it each node has its children
        # side by side.
        row = self.holders * self.fan_out
        if place < row:
            return place % self.holders
        return self.holders + (place - row) // self.fan_out

    def children(self, rank: int) -> int:
        """Return how many nodes receive from ``rank`` when nothing goes wrong."""
        places = len(self.order) - self.holders
        if self.holders == 0:
            return max(0, min(self.fan_out, places - 1 - rank * self.fan_out))
        row = self.holders * self.fan_out
        if rank < self.holders:
            first = min(places, row)
            return (first - rank + self.holders - 1) // self.holders
        return max(0, min(self.fan_out, places - row - (rank - self.holders) * self.fan_out))

    def depth(self, rank: int) -> int:
        """Return over how many hops ``rank`` receives, the one from the origin not counted."""
        hops = 0
        above = self.parent(rank)
        while above is not None:
            hops += 1
            above = self.parent(above)
        return hops

    def sources(self, rank: int) -> tuple[int, ...]:
        """Return the ranks to ask, the parent first; empty for a root and for holders.

        After the parent comes the sibling on the left and only for the first of the siblings the
        grandparent: when a parent dies, its children form a chain below the place that it leaves
        free, and nobody gets more than one child more.
        """
        parent = self.parent(rank)
        if parent is None:
            return ()
        found = [parent]
        step = self.holders if rank - self.holders < self.holders * self.fan_out else 1
        if rank - step >= self.holders and self.parent(rank - step) == parent:
            found.append(rank - step)
        above = self.parent(parent)
        if above is not None:
            found.append(above)
            above = self.parent(above)
            if above is not None:
                found.append(above)
        # Anyone of those before it, different ones for neighbours, so that many orphans spread.
        found.append((rank * _MIX >> 7) % rank)
        found.append((rank * 3 * _MIX >> 7) % rank)
        return tuple(dict.fromkeys(found))[:_SOURCE_LIMIT]
