from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowray.pipeline.errors import UsageError
from stowray.pipeline.spread import (
    Blob,
    NodeState,
    Part,
    Spread,
    Tree,
    join,
    spread,
)
from stowray.pipeline.stripes import LARGE_UNIT, SMALL_UNIT, Stripe, divide

MIB = 1 << 20
GB = 10**9
IMAGE = [Blob(f"b{number}", size) for number, size in enumerate((6 * GB, 2 * GB, GB, GB // 2))]
ALL = frozenset(blob.digest for blob in IMAGE)


def empty(count: int) -> list[NodeState]:
    return [NodeState(f"n{number}", ALL, address=f"10.0.0.{number}:1") for number in range(count)]


@given(
    size=st.integers(0, 400 * MIB),
    share=st.integers(1, 64 * MIB),
    limit=st.integers(1, 9),
    at=st.integers(0, 400 * MIB),
)
@settings(max_examples=60, deadline=None)
def test_stripes_are_a_partition(size: int, share: int, limit: int, at: int) -> None:
    stripes = divide(size, share, limit)
    assert 1 <= len(stripes) <= limit
    ranges = sorted(part for stripe in stripes for part in stripe.ranges() if part[0] < part[1])
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges)][: len(ranges)]
    assert sum(end - start for start, end in ranges) == size
    assert sum(stripe.length for stripe in stripes) == size
    # Positions say how much of each stripe lies before an offset; together that is the offset.
    assert sum(stripe.position(at) for stripe in stripes) == min(at, size)
    for stripe in stripes:
        middle = stripe.length // 3
        split = [*stripe.ranges(0, middle), *stripe.ranges(middle)]
        assert sum(end - start for start, end in split) == stripe.length
        if middle:
            assert stripe.offset(middle) == next(stripe.ranges(middle))[0]
            assert stripe.position(stripe.offset(middle)) == middle


@pytest.mark.parametrize(
    ("size", "unit"),
    [
        pytest.param(200 * MIB, SMALL_UNIT, id="8 MiB below 256 MiB"),
        pytest.param(4 << 30, LARGE_UNIT, id="16 MiB above"),
    ],
)
def test_stripes_begin_at_whole_units(size: int, unit: int) -> None:
    stripes = divide(size, size // 4, 16)
    assert len(stripes) == 4
    assert all(start % unit == 0 for stripe in stripes for start, _ in stripe.ranges())


def test_a_blob_within_its_share_stays_whole() -> None:
    assert divide(64 * MIB, 64 * MIB, 16) == (Stripe(64 * MIB, 0, 1, SMALL_UNIT),)
    assert divide(0, 64 * MIB, 16) == (Stripe(0, 0, 1, SMALL_UNIT),)


def states(draw: st.DrawFn) -> list[NodeState]:
    count = draw(st.integers(1, 30))
    digests = [f"b{number}" for number in range(4)]
    nodes = []
    for number in range(count):
        missing = frozenset(draw(st.sets(st.sampled_from(digests))))
        store = draw(st.sampled_from(["", "", "s1", "s2"]))
        serves = draw(st.booleans())
        present = frozenset(digests) - missing
        nodes.append(NodeState(f"n{number}", missing, present, store, f"a{number}", serves))
    return nodes


@given(
    nodes=st.composite(states)(),
    fan_out=st.integers(1, 5),
    seed=st.integers(0, 3),
    late=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_every_node_gets_each_byte_once_from_nodes_before_it(
    nodes: list[NodeState], fan_out: int, seed: int, late: int
) -> None:
    blobs = [Blob(f"b{number}", (number * 150 + 1) * MIB) for number in range(4)]
    plan = spread(blobs, nodes, fan_out=fan_out, seed=seed)
    plan = join(plan, [NodeState(f"late{number}", ALL) for number in range(late)])
    assert plan.nodes[len(nodes) :] == tuple(f"late{number}" for number in range(late))
    received: Counter[tuple[int, str]] = Counter()
    for tree in plan.trees:
        assert len(set(tree.order)) == len(tree.order)
        children: Counter[int] = Counter()
        for rank, number in enumerate(tree.order):
            assert all(above < rank for above in tree.sources(rank))
            parent = tree.parent(rank)
            if rank < tree.holders:
                assert tree.digest in nodes[number].present
                continue
            received[number, tree.digest] += tree.stripe.length
            if parent is None:
                assert tree.holders == 0 and rank == 0
            else:
                children[parent] += 1
                assert tree.sources(rank)[0] == parent
        for rank in range(len(tree.order)):
            assert tree.children(rank) == children[rank] <= fan_out
    sizes = {blob.digest: blob.size for blob in blobs}
    for number, node in enumerate(nodes):
        alone = node.name not in plan.sharing
        for digest, size in sizes.items():
            expected = size if alone and digest in node.missing else 0
            assert received[number, digest] == expected
    # One node per store does the work, and the others know which.
    for node in nodes:
        if node.store:
            writer = plan.writers[node.store]
            assert plan.sharing.get(node.name, writer) == writer
            assert (node.name == writer) != (node.name in plan.sharing)


@given(nodes=st.composite(states)(), seed=st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_the_same_input_gives_the_same_plan_and_survives_the_wire(
    nodes: list[NodeState], seed: int
) -> None:
    plan = spread(IMAGE, nodes, seed=seed)
    assert plan == spread(IMAGE, nodes, seed=seed)
    assert Spread.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    for part in plan.parts():
        assert Part.from_dict(json.loads(json.dumps(part.to_dict()))) == part
        assert plan.part(part.node) == part
        for portion in part.portions:
            assert set(portion.sources) <= set(part.addresses)


def test_what_a_node_sends_and_who_reads_from_the_origin_is_balanced() -> None:
    plan = spread(IMAGE, empty(400))
    total = sum(blob.size for blob in IMAGE)
    sends: Counter[int] = Counter()
    reads: Counter[int] = Counter()
    for tree in plan.trees:
        reads[tree.order[0]] += tree.stripe.length
        for rank, number in enumerate(tree.order):
            sends[number] += tree.children(rank) * tree.stripe.length
    assert max(sends.values()) < 1.15 * total
    # No node reads more than one stripe.
    assert len(reads) == len(plan.trees) > 12
    assert plan.origin_bytes == total
    assert plan.peer_bytes == 399 * total


def test_a_large_blob_is_striped_and_each_stripe_has_another_root() -> None:
    plan = spread([Blob("b0", 6 * GB)], empty(50))
    assert len(plan.trees) == 16
    assert len({tree.order[0] for tree in plan.trees}) == 16


def test_nodes_that_have_a_blob_are_asked_instead_of_the_origin() -> None:
    nodes = [NodeState("has", present=ALL), NodeState("has too", present=ALL), *empty(10)]
    plan = spread(IMAGE, nodes)
    assert plan.origin_bytes == 0
    for part in plan.parts():
        for portion in part.portions:
            assert portion.holds == part.node.startswith("has")
            assert not portion.is_root
            assert portion.holds or portion.sources


def test_nodes_that_do_not_serve_are_leaves() -> None:
    nodes = [NodeState(f"n{number}", ALL, serves=number > 5) for number in range(12)]
    for part in spread(IMAGE, nodes, fan_out=2).parts():
        if int(part.node[1:]) <= 5:
            assert all(not portion.children for portion in part.portions)


def test_the_only_node_is_a_root_even_if_it_does_not_serve() -> None:
    (part,) = spread(IMAGE, [NodeState("n0", ALL, serves=False)]).parts()
    assert all(portion.is_root for portion in part.portions)


def test_nodes_with_one_store_fetch_once() -> None:
    nodes = [NodeState(f"n{number}", ALL, store="nfs") for number in range(3)]
    first, *others = spread(IMAGE, nodes).parts()
    assert first.portions
    assert [(part.portions, part.shares_with) for part in others] == [((), "n0")] * 2


def test_late_nodes_change_nothing_for_those_before() -> None:
    plan = spread(IMAGE, empty(20))
    later = join(plan, [NodeState("late", ALL), NodeState("n3", ALL)])
    assert later.nodes == (*plan.nodes, "late")
    for old, new in zip(plan.parts(), later.parts(), strict=False):
        assert [portion.sources for portion in old.portions] == [
            portion.sources for portion in new.portions
        ]
    assert all(not portion.children for portion in later.part("late").portions)
    assert all(portion.sources for portion in later.part("late").portions)


def test_a_late_node_with_a_known_store_gets_no_place() -> None:
    plan = spread(IMAGE, [NodeState("n0", ALL, store="nfs")])
    part = join(plan, [NodeState("late", ALL, store="nfs")]).part("late")
    assert (part.portions, part.shares_with) == ((), "n0")


def test_a_warm_cluster_still_serves_late_nodes() -> None:
    plan = spread(IMAGE, [NodeState(f"n{number}", present=ALL) for number in range(200)])
    assert plan.peer_bytes == plan.origin_bytes == 0
    late = join(plan, [NodeState("late", ALL)])
    assert all(portion.sources for portion in late.part("late").portions)
    assert late.origin_bytes == 0


def test_orphans_form_a_chain_below_the_grandparent() -> None:
    tree = Tree("b0", Stripe(GB), 0, tuple(range(85)), 4)
    children = [rank for rank in range(85) if tree.parent(rank) == 6]
    assert children == [25, 26, 27, 28]
    assert [tree.sources(rank)[1] for rank in children] == [tree.parent(6), 25, 26, 27]
    assert tree.depth(0) == 0
    assert tree.depth(25) == tree.depth(6) + 1 == 3


@pytest.mark.parametrize(
    ("nodes", "fan_out", "named"),
    [
        pytest.param([NodeState("n0")], 0, "fan_out", id="no fan-out"),
        pytest.param([NodeState("n0"), NodeState("n0")], 1, "n0", id="a name twice"),
    ],
)
def test_bad_input_is_named(nodes: list[NodeState], fan_out: int, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        spread(IMAGE, nodes, fan_out=fan_out)
