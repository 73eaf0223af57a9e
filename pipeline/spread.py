"""Who fetches what from whom: a distribution tree for each stripe of each blob.

Invariant: the sources of a node, besides the origin, all come before it in the order of its tree,
so no two nodes ever wait for each other; the same input and seed give the same trees.

Each node receives every byte once. So that none has to send more than about that, the inner places
of each tree go to the nodes that have the fewest bytes to send so far: a node is an inner node of a
few trees and a leaf of all others. Roots, the nodes that read from the origin, are balanced by
bytes as well. Nodes that have a blob already are above all others; nodes that share one store are
one node.
"""

from __future__ import annotations

import random
from dataclasses import field
from typing import TYPE_CHECKING, Any, Final

from stowray.pipeline.errors import UsageError
from stowray.pipeline.spread_tree import Tree
from stowray.pipeline.stripes import Stripe, divide
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

DEFAULT_FAN_OUT: Final = 4
# Stripes of all blobs together, per place of the fan-out: finer ones balance the nodes better, but
# each is a stream of its own on every node.
_STRIPES_PER_CHILD: Final = 4
_STRIPE_LIMIT: Final = 16
_LEAST_SHARE: Final = 64 << 20
# Of the nodes that have a blob, so many are kept for those that come later.
_SPARE_HOLDERS: Final = 64


@dataclass(frozen=True, slots=True)
class Blob:
    """A blob of the run."""

    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class NodeState:
    """What a node said about itself: which blobs of the run it lacks and which it has.

    ``store`` is the store's nonce. A node that does not serve (slow, or about to leave) is made a
    leaf as long as there are others.
    """

    name: str
    missing: frozenset[str] = frozenset()
    present: frozenset[str] = frozenset()
    store: str = ""
    address: str = ""
    serves: bool = True


@dataclass(frozen=True, slots=True)
class Portion:
    """What one node needs to know of one tree: its sources by name, best first, then the origin.

    ``holds`` tells that it has the blob and only serves it; ``children`` how many will come.
    """

    digest: str
    stripe: Stripe
    sources: tuple[str, ...]
    depth: int
    children: int
    holds: bool = False

    @property
    def is_root(self) -> bool:
        """Return whether the node begins at the origin."""
        return not self.sources and not self.holds


@dataclass(frozen=True, slots=True)
class Part:
    """One node's part of the spread, all that is sent to it.

    ``addresses`` are those of its sources. ``shares_with`` names the node that writes the store
    which this one reads too; then there are no portions.
    """

    node: str
    portions: tuple[Portion, ...] = ()
    addresses: Mapping[str, str] = field(default_factory=dict)
    shares_with: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the part as plain values; sources are numbers of ``peers``, for there are many."""
        numbers = {name: number for number, name in enumerate(self.addresses)}
        return {
            "node": self.node,
            "shares_with": self.shares_with,
            "peers": [[name, address] for name, address in self.addresses.items()],
            "portions": [
                [
                    portion.digest,
                    *portion.stripe.to_list(),
                    [numbers[name] for name in portion.sources],
                    portion.depth,
                    portion.children,
                    portion.holds,
                ]
                for portion in self.portions
            ],
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Part:
        """Return the part that :meth:`to_dict` described."""
        addresses = {str(name): str(address) for name, address in fields["peers"]}
        names = tuple(addresses)
        portions = tuple(
            Portion(
                digest=str(digest),
                stripe=Stripe(int(size), int(index), int(count), int(unit)),
                sources=tuple(names[number] for number in sources),
                depth=int(depth),
                children=int(children),
                holds=bool(holds),
            )
            for digest, size, index, count, unit, sources, depth, children, holds in fields[
                "portions"
            ]
        )
        return cls(str(fields["node"]), portions, addresses, str(fields["shares_with"]))


@dataclass(frozen=True, slots=True)
class Spread:
    """All trees of a run; ``writers`` maps each store's nonce to the node that writes it."""

    nodes: tuple[str, ...]
    addresses: tuple[str, ...]
    trees: tuple[Tree, ...]
    writers: Mapping[str, str]
    sharing: Mapping[str, str]

    @property
    def origin_bytes(self) -> int:
        """How many bytes come from the origin when nothing goes wrong."""
        return sum(tree.stripe.length for tree in self.trees if tree.order and not tree.holders)

    @property
    def peer_bytes(self) -> int:
        """How many bytes go from node to node."""
        return sum(
            tree.stripe.length * (len(tree.order) - max(1, tree.holders))
            for tree in self.trees
            if tree.order
        )

    def parts(self) -> Iterator[Part]:
        """Yield every node's part, in the order of the nodes."""
        portions: list[list[tuple[Portion, list[int]]]] = [[] for _ in self.nodes]
        for tree in self.trees:
            for rank, number in enumerate(tree.order):
                portions[number].append(self._portion(tree, rank))
        for name, own in zip(self.nodes, portions, strict=True):
            yield self._part(name, own)

    def part(self, node: str) -> Part:
        """Return the part of one node."""
        number = self.nodes.index(node)
        own = []
        for tree in self.trees:
            if number in tree.order:
                own.append(self._portion(tree, tree.order.index(number)))
        return self._part(node, own)

    def _portion(self, tree: Tree, rank: int) -> tuple[Portion, list[int]]:
        sources = [tree.order[above] for above in tree.sources(rank)]
        portion = Portion(
            tree.digest,
            tree.stripe,
            tuple([self.nodes[source] for source in sources]),
            tree.depth(rank),
            tree.children(rank),
            rank < tree.holders,
        )
        return portion, sources

    def _part(self, name: str, own: Sequence[tuple[Portion, list[int]]]) -> Part:
        addresses = {
            self.nodes[source]: self.addresses[source] for _, sources in own for source in sources
        }
        portions = tuple([portion for portion, _ in own])
        return Part(name, portions, addresses, self.sharing.get(name, ""))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {
            "nodes": list(self.nodes),
            "addresses": list(self.addresses),
            "trees": [
                {
                    "digest": tree.digest,
                    "stripe": tree.stripe.to_list(),
                    "holders": tree.holders,
                    "order": list(tree.order),
                    "fan_out": tree.fan_out,
                }
                for tree in self.trees
            ],
            "writers": dict(self.writers),
            "sharing": dict(self.sharing),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Spread:
        """Return the spread that :meth:`to_dict` described."""
        return cls(
            tuple(str(name) for name in fields["nodes"]),
            tuple(str(address) for address in fields["addresses"]),
            tuple(
                Tree(
                    str(tree["digest"]),
                    Stripe(*(int(value) for value in tree["stripe"])),
                    int(tree["holders"]),
                    tuple(int(number) for number in tree["order"]),
                    int(tree["fan_out"]),
                )
                for tree in fields["trees"]
            ),
            {str(store): str(node) for store, node in fields["writers"].items()},
            {str(node): str(writer) for node, writer in fields["sharing"].items()},
        )


def spread(
    blobs: Iterable[Blob],
    nodes: Sequence[NodeState],
    *,
    fan_out: int = DEFAULT_FAN_OUT,
    stripe_limit: int = _STRIPE_LIMIT,
    seed: int = 0,
) -> Spread:
    """Return the trees by which ``nodes`` get those of ``blobs`` that they lack."""
    if fan_out < 1:
        raise UsageError("fan_out", "must be at least 1")
    writers, sharing = _writers(nodes)
    planner = _Planner(nodes, sharing, fan_out, seed)
    wanted: dict[str, int] = {}
    for blob in blobs:
        wanted.setdefault(blob.digest, blob.size)
    places = {digest: planner.places(digest) for digest in wanted}
    total = sum(wanted[digest] for digest, (_, lacking) in places.items() if lacking)
    share = max(_LEAST_SHARE, total // (fan_out * _STRIPES_PER_CHILD))
    stripes = [
        (digest, stripe)
        for digest, size in wanted.items()
        for stripe in divide(size, share, stripe_limit)
    ]
    # The largest first: the small ones then fill what they left uneven.
    stripes.sort(key=lambda entry: (-entry[1].length, entry[0], entry[1].index))
    trees = tuple(
        planner.tree(digest, stripe, *places[digest])
        for digest, stripe in stripes
        if any(places[digest])
    )
    names = tuple(node.name for node in nodes)
    addresses = tuple(node.address for node in nodes)
    return Spread(names, addresses, trees, writers, sharing)


def join(plan: Spread, nodes: Iterable[NodeState]) -> Spread:
    """Return ``plan`` with late nodes added as leaves; nobody else's part gets other sources.

    A node that is known already, or that shares a store with one, is not added to any tree.
    """
    names, addresses = list(plan.nodes), list(plan.addresses)
    known = set(names)
    writers, sharing = dict(plan.writers), dict(plan.sharing)
    orders = [list(tree.order) for tree in plan.trees]
    for node in nodes:
        if node.name in known:
            continue
        number = len(names)
        names.append(node.name)
        addresses.append(node.address)
        known.add(node.name)
        if node.store and writers.setdefault(node.store, node.name) != node.name:
            sharing[node.name] = writers[node.store]
            continue
        for tree, order in zip(plan.trees, orders, strict=True):
            if tree.digest in node.missing:
                order.append(number)
    trees = tuple(
        Tree(tree.digest, tree.stripe, tree.holders, tuple(order), tree.fan_out)
        for tree, order in zip(plan.trees, orders, strict=True)
    )
    return Spread(tuple(names), tuple(addresses), trees, writers, sharing)


def _writers(nodes: Sequence[NodeState]) -> tuple[dict[str, str], dict[str, str]]:
    """Return who writes each store, and of each other node of a store whom it relies on."""
    writers: dict[str, str] = {}
    sharing: dict[str, str] = {}
    seen: set[str] = set()
    for node in nodes:
        if node.name in seen:
            raise UsageError(node.name, "two nodes have this name")
        seen.add(node.name)
        if node.store and writers.setdefault(node.store, node.name) != node.name:
            sharing[node.name] = writers[node.store]
    return writers, sharing


class _Planner:
    """Deals out places; keeps how many bytes each node has to send and to read from the origin."""

    def __init__(
        self, nodes: Sequence[NodeState], sharing: Mapping[str, str], fan_out: int, seed: int
    ) -> None:
        self._nodes = nodes
        self._alone = [node.name not in sharing for node in nodes]
        self._fan_out = fan_out
        self._random = random.Random(seed)
        self._sends = [0] * len(nodes)
        self._reads = [0] * len(nodes)

    def places(self, digest: str) -> tuple[list[int], list[int]]:
        """Return the nodes that have a blob and those that lack it, each store once."""
        holding: list[int] = []
        lacking: list[int] = []
        for number, node in enumerate(self._nodes):
            if not self._alone[number]:
                continue
            if digest in node.missing:
                lacking.append(number)
            elif digest in node.present and node.serves:
                holding.append(number)
        return holding, lacking

    def tree(
        self, digest: str, stripe: Stripe, holding: Sequence[int], lacking: Sequence[int]
    ) -> Tree:
        """Return one stripe's tree and charge the nodes with what it makes them send."""
        holders = self._least_loaded(holding)[: max(len(lacking), _SPARE_HOLDERS)]
        order = self._least_loaded(lacking)
        if order and not holders:
            root = self._root(order)
            order.remove(root)
            order.insert(0, root)
            self._reads[root] += stripe.length
        tree = Tree(digest, stripe, len(holders), (*holders, *order), self._fan_out)
        for rank, number in enumerate(tree.order):
            count = tree.children(rank)
            if count == 0 and rank >= tree.holders:
                break
            self._sends[number] += count * stripe.length
        return tree

    def _least_loaded(self, numbers: Sequence[int]) -> list[int]:
        """Return ``numbers`` with those first that have the least to send; equals in any order."""
        shuffled = list(numbers)
        self._random.shuffle(shuffled)
        shuffled.sort(key=lambda number: (not self._nodes[number].serves, self._sends[number]))
        return shuffled

    def _root(self, order: Sequence[int]) -> int:
        """Return who reads from the origin: one that serves, and that reads least so far."""
        return min(
            order,
            key=lambda number: (
                not self._nodes[number].serves,
                self._reads[number],
                self._sends[number],
            ),
        )
