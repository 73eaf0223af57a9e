"""Nodes that die, lag or lie in the middle of a run, and what becomes of the others."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import DigestMismatchError, NodeError
from stowray.pipeline.fates import ABANDONED, GROWING, WRONG
from stowray.pipeline.peer_client import PeerClient
from stowray.pipeline.source_actions import ORIGIN, Patience
from stowray.pipeline.stripes import Stripe
from tests.support import stores
from tests.support.registry import Fault, incompressible
from tests.support.spread import TOKEN, Cluster, Proxy, overlap, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stowray.pipeline.fetch import Fetched

MIB = 1 << 20
SIZE = 6 * MIB + 12_345
# Under any load nobody is taken for slow or dead.
PATIENT = Patience(silence=300.0, answer=60.0, slow=300.0, starved=300.0, avoid=300.0)
# Larger than what is on its way or in buffers, and with checkpoints.
LARGE = 40 * MIB
UNIT = 8 * MIB


@pytest.fixture
def cluster(workspace: Path) -> Iterator[Cluster]:
    with Cluster(workspace) as made:
        yield made


@pytest.fixture
def patient(workspace: Path) -> Iterator[Cluster]:
    with Cluster(workspace, patience=PATIENT) as made:
        yield made


@pytest.fixture
def proxies() -> Iterator[list[Proxy]]:
    made: list[Proxy] = []
    yield made
    for proxy in made:
        proxy.close()


def put_before(cluster: Cluster, proxies: list[Proxy], name: str) -> Proxy:
    """Let all others reach a node by way of a proxy only."""
    proxy = Proxy(cluster.nodes[name].address)
    proxies.append(proxy)
    cluster.addresses[name] = proxy.address
    return proxy


def lying(fetched: Fetched) -> set[str]:
    return {remark.source for remark in fetched.remarks if remark.kind == "lying"}


def kinds(remarks: tuple[object, ...]) -> set[tuple[str, str]]:
    return {(remark.source, remark.kind) for remark in remarks}  # type: ignore[attr-defined]


# Death


@pytest.mark.parametrize("how", ["refuses", "is silent"])
def test_when_the_root_dies_only_what_died_with_it_is_read_again(
    cluster: Cluster, proxies: list[Proxy], how: str
) -> None:
    digest = cluster.add(incompressible(SIZE))
    proxy = put_before(cluster, proxies, "n0")
    cluster.arrange(digest, [Stripe(SIZE)], n1=("n0",), n2=("n0", "n1"), n3=("n1", "n0"))
    cluster.origin.fault(f"/blobs/{digest}", Fault(stall=3 * MIB))
    begun = cluster.begin(digest)
    others = ("n1", "n2", "n3")
    for name in others:
        wait_until(lambda name=name: cluster.prefix(name, digest) == 3 * MIB, "the first half")
    proxy.silent.set()
    cluster[0].die()
    if how == "refuses":
        proxy.close()
    cluster.leases.do(lambda leases, _: leases.node_died("n0"))
    for name in others:
        begun[name].result(timeout=120)
    cluster.check(digest, *others)
    first, *again = cluster.asked(digest)
    assert first == (0, SIZE)
    assert min(again)[0] == 3 * MIB
    assert overlap(again) == 0
    failed = [kinds(begun[name].result().remarks) for name in others]
    assert ("n0", "failed") in set.union(*failed)


def test_a_dead_node_in_the_middle_costs_the_origin_nothing(
    cluster: Cluster, proxies: list[Proxy]
) -> None:
    digest = cluster.add(incompressible(SIZE))
    proxy = put_before(cluster, proxies, "n1")
    cluster.arrange(digest, [Stripe(SIZE)], n1=("n0",), n2=("n1", "n0"), n3=("n2", "n1", "n0"))
    cluster.origin.fault(f"/blobs/{digest}", Fault(trickle=(MIB // 4, 0.1)))
    begun = cluster.begin(digest)
    wait_until(lambda: cluster.prefix("n3", digest) >= MIB, "bytes at the end of the chain")
    cluster[1].die()
    proxy.close()
    for name in ("n0", "n2", "n3"):
        begun[name].result(timeout=120)
    cluster.check(digest, "n0", "n2", "n3")
    assert cluster.asked(digest) == [(0, SIZE)]


def test_a_node_that_never_begins_is_looked_past(cluster: Cluster) -> None:
    """Its server answers, but nothing fetches there: its disk is full, say."""
    digest = cluster.add(incompressible(SIZE))
    cluster.arrange(digest, [Stripe(SIZE)], n1=("n0",), n2=("n0", "n1"), n3=("n0", "n1"))
    cluster.fetch(digest, "n1", "n2", "n3")
    cluster.check(digest, "n1", "n2", "n3")
    assert overlap(cluster.asked(digest)) == 0


# Slowness


def test_a_slow_parent_is_left_at_the_same_byte(workspace: Path, proxies: list[Proxy]) -> None:
    # So that the buffers of the sockets between are no part of it.
    patience = Patience(silence=0.5, answer=5.0, slow=1.0, starved=8.0, margin=0, least_rate=1e6)
    with Cluster(workspace, patience=patience) as cluster:
        data = incompressible(SIZE)
        digest = cluster.add(data)
        for name in ("n0", "n1"):
            stores.commit(cluster.nodes[name].store, data)
        proxy = put_before(cluster, proxies, "n0")
        proxy.bytes_per_second = 200_000
        cluster.arrange(digest, [Stripe(SIZE)], n2=("n0", "n1"))
        fetched = cluster.fetch(digest, "n2")["n2"]
        cluster.check(digest, "n2")
    assert cluster.asked(digest) == []
    assert 0 < fetched.by_source["peer:n0"] < fetched.by_source["peer:n1"]
    assert sum(fetched.by_source.values()) == fetched.fetched_bytes
    assert kinds(fetched.remarks) == {("n0", "slow")}
    # What was on its way is all that comes twice.
    assert fetched.fetched_bytes == SIZE


# Lies


def flip(cluster: Cluster, name: str, digest: str, offset: int) -> None:
    """Let the bytes of a committed blob rot on a node's disk."""
    path = cluster.nodes[name].store.blob_path(Digest(digest))
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def test_a_holder_with_wrong_bytes_is_banned_and_others_finish_it(cluster: Cluster) -> None:
    data = incompressible(SIZE)
    digest = cluster.add(data)
    for name in ("n0", "n1"):
        stores.commit(cluster.nodes[name].store, data)
    flip(cluster, "n0", digest, 5)
    cluster.arrange(digest, [Stripe(SIZE)], n2=("n0", "n1"), n3=("n0", "n1"))
    fetched = cluster.fetch(digest, "n2", "n3")
    cluster.check(digest, "n2", "n3")
    assert cluster.asked(digest) == []
    for one in fetched.values():
        assert lying(one) == {"n0"}
        # Only the piece that is wrong comes again, and what is on its way behind it.
        assert one.by_source["peer:n0"] == SIZE
        assert one.by_source["peer:n1"] < SIZE / 2
    # The disk that rots is found out, and what it holds is not held for the blob any more.
    assert not cluster[0].store.has(Digest(digest))


def test_a_banned_node_is_not_asked_for_the_next_blob(cluster: Cluster) -> None:
    first, second = incompressible(SIZE, 1), incompressible(SIZE, 2)
    digests = [cluster.add(first), cluster.add(second)]
    for data in (first, second):
        for name in ("n0", "n1"):
            stores.commit(cluster.nodes[name].store, data)
    flip(cluster, "n0", digests[0], 5)
    parts = [cluster.part("n2", d, {Stripe(SIZE): ("n0", "n1")}) for d in digests]
    both = type(parts[0])("n2", parts[0].portions + parts[1].portions, cluster.addresses)
    cluster[2].join(both)
    cluster[2].fetch(digests[0])
    fetched = cluster[2].fetch(digests[1])
    assert fetched.by_source == {"peer:n1": SIZE}


def test_a_wrong_byte_on_the_way_is_charged_to_who_sent_it(
    cluster: Cluster, proxies: list[Proxy]
) -> None:
    """A blob in one piece: the next in the chain finds out before it passes the last byte on."""
    digest = cluster.add(incompressible(SIZE))
    proxy = put_before(cluster, proxies, "n0")
    seen = 0

    def change(data: bytearray) -> None:
        nonlocal seen
        before, seen = seen, seen + len(data)
        if before <= 2 * MIB < seen:
            data[2 * MIB - before] ^= 0xFF

    proxy.change = change
    cluster.arrange(digest, [Stripe(SIZE)], n1=("n0",), n2=("n1",), n3=("n2",))
    fetched = cluster.fetch(digest)
    cluster.check(digest)
    assert ("n0", "lying") in kinds(fetched["n1"].remarks)
    for name in ("n2", "n3"):
        assert not any(kind == "lying" for _, kind in kinds(fetched[name].remarks)), name
    # Once for the run, and the wrong piece once more because its only other copy is with a liar.
    assert cluster.asked(digest) == [(0, SIZE), (MIB, 2 * MIB)]


def flip_on_the_way(proxy: Proxy, at: int) -> None:
    """Let one byte of what a node sends be another, once."""
    seen = 0

    def change(received: bytearray) -> None:
        nonlocal seen
        before, seen = seen, seen + len(received)
        if before <= at < seen:
            received[at - before] ^= 0xFF

    proxy.change = change


def test_a_relay_of_wrong_stripes_is_not_banned(patient: Cluster, proxies: list[Proxy]) -> None:
    """n0 holds the blob and sends a wrong byte of it; n1 passes that on before it can know."""
    data = incompressible(LARGE)
    digest = patient.add(data)
    for name in ("n0", "n3"):
        stores.commit(patient.nodes[name].store, data)
    flip_on_the_way(put_before(patient, proxies, "n0"), 3 * MIB)
    first, second = (Stripe(LARGE, index, 2, UNIT) for index in range(2))
    patient[1].join(patient.part("n1", digest, {first: ("n0", "n3"), second: ("n3",)}))
    patient[2].join(patient.part("n2", digest, {first: ("n1", "n3"), second: ("n3",)}))
    fetched = patient.fetch(digest, "n1", "n2")
    patient.check(digest, "n1", "n2")
    assert patient.asked(digest) == []
    for name in ("n1", "n2"):
        assert lying(fetched[name]) <= {"n0"}, f"{name} BLAMES {lying(fetched[name])}"
    assert lying(fetched["n1"]) == {"n0"}


def test_a_relay_that_has_the_right_bytes_by_now_is_not_banned(
    patient: Cluster, proxies: list[Proxy]
) -> None:
    """It found its first bytes wrong, and has proven others long before its child asks."""
    data = incompressible(LARGE)
    digest = patient.add(data)
    for name in ("n0", "n3"):
        stores.commit(patient.nodes[name].store, data)
    flip_on_the_way(put_before(patient, proxies, "n0"), 3 * MIB)
    slow = put_before(patient, proxies, "n3")
    first, second = (Stripe(LARGE, index, 2, UNIT) for index in range(2))
    # n2 gets the wrong stripe through n1 and the other one late.
    late = threading.Event()
    slow.change = lambda _: late.wait(60)  # type: ignore[assignment,return-value]
    direct = patient.nodes["n3"].address
    mine = patient.part("n1", digest, {first: ("n0",), second: ("n3",)})
    patient[1].join(replace(mine, addresses={**patient.addresses, "n3": direct}))
    patient[2].join(patient.part("n2", digest, {first: ("n1",), second: ("n3",)}))
    begun = patient.begin(digest, "n1", "n2")
    try:
        assert lying(begun["n1"].result(timeout=120)) == {"n0"}
    finally:
        late.set()
    fetched = begun["n2"].result(timeout=120)
    patient.check(digest, "n1", "n2")
    assert "n1" not in lying(fetched)
    assert overlap(patient.asked(digest)) == 0


def test_a_relay_that_sends_others_than_it_has_is_banned(
    patient: Cluster, proxies: list[Proxy]
) -> None:
    data = incompressible(LARGE)
    digest = patient.add(data)
    stores.commit(patient[0].store, data)
    flip_on_the_way(put_before(patient, proxies, "n1"), 3 * MIB)
    stripes = [Stripe(LARGE, index, 2, UNIT) for index in range(2)]
    patient.arrange(digest, stripes, n1=("n0",), n2=("n1", "n0"), n3=("n2", "n0"))
    fetched = patient.fetch(digest, "n1", "n2", "n3")
    patient.check(digest)
    assert patient.asked(digest) == []
    assert lying(fetched["n1"]) == set()
    assert lying(fetched["n2"]) == {"n1"}
    assert lying(fetched["n3"]) <= {"n1"}


@pytest.mark.parametrize("blobs", [1, 3])
def test_a_holder_with_wrong_bytes_costs_the_origin_no_byte_twice(
    workspace: Path, blobs: int
) -> None:
    """Nobody else has the blob: all get the wrong bytes from it and pass them on to each other."""
    with Cluster(workspace) as cluster:
        digests = []
        for seed in range(blobs):
            data = incompressible(LARGE, seed)
            digests.append(cluster.add(data))
            stores.commit(cluster[3].store, data)
        flip(cluster, "n3", digests[0], LARGE // 2)
        cluster.spread(*digests)
        assert any(len(tree.order) > 1 for tree in cluster.plan.trees)  # type: ignore[union-attr]
        for digest in digests:
            fetched = cluster.fetch(digest, "n0", "n1", "n2")
            cluster.check(digest, "n0", "n1", "n2")
            blamed = set.union(*(lying(one) for one in fetched.values()))
            assert blamed == ({"n3"} if digest == digests[0] else set())
        # The other blobs of a node that is banned come from the origin as well, if all ban it.
        for digest in digests:
            assert overlap(cluster.asked(digest)) == 0


def test_where_nobody_has_proven_it_the_first_piece_that_differs_is_enough(
    cluster: Cluster,
) -> None:
    """What the origin sends anew shows where the wrong byte was; the rest is as it was."""
    data = incompressible(LARGE)
    digest = cluster.add(data)
    stores.commit(cluster[0].store, data)
    flip(cluster, "n0", digest, 10 * MIB)
    cluster.origin.fault(f"/blobs/{digest}", Fault(trickle=(MIB // 4, 0.05)))
    cluster.arrange(digest, [Stripe(LARGE)], n1=("n0",))
    fetched = cluster.fetch(digest, "n1")["n1"]
    cluster.check(digest, "n1")
    assert lying(fetched) == {"n0"}
    assert fetched.by_source[cluster.origin.host] < LARGE / 2


def test_wrong_bytes_of_the_origin_are_asked_for_once_more_and_never_committed(
    cluster: Cluster,
) -> None:
    digest = cluster.add(incompressible(SIZE))
    cluster.origin.fault(f"/blobs/{digest}", Fault(corrupt=7))
    cluster.spread(digest)
    cluster.fetch(digest)
    cluster.check(digest)
    assert len(cluster.asked(digest)) == 2


@pytest.mark.parametrize("count", [1, 2])
def test_an_origin_that_has_wrong_bytes_only_fails_all(workspace: Path, count: int) -> None:
    """Nodes tell each other that they gave up, so that each need not find out for itself."""
    with Cluster(workspace, patience=replace(PATIENT, starved=10.0, silence=5.0)) as cluster:
        digest = cluster.add(incompressible(LARGE))
        cluster.origin.fault(f"/blobs/{digest}", Fault(corrupt=7), repeat=True)
        stripes = [Stripe(LARGE, index, count, UNIT) for index in range(count)]
        cluster.arrange(digest, stripes, n1=("n0",), n2=("n1", "n0"), n3=("n2",))
        for future in cluster.begin(digest).values():
            with pytest.raises(DigestMismatchError):
                future.result(timeout=120)
        for node in cluster.nodes.values():
            assert not node.store.has(Digest(digest))
        if count == 1:
            # The root twice, and so often that the others can believe it.
            assert len(cluster.asked(digest)) <= 5


def test_nodes_that_need_each_other_s_stripes_agree_soon_that_the_origin_is_wrong(
    workspace: Path,
) -> None:
    """Each is the root of a stripe: whoever tries again waits for none that still tries first."""
    with Cluster(workspace, patience=PATIENT) as cluster:
        digest = cluster.add(incompressible(LARGE))
        cluster.origin.fault(f"/blobs/{digest}", Fault(corrupt=7), repeat=True)
        _arrange_many_roots(cluster, digest, 4)
        for future in cluster.begin(digest).values():
            with pytest.raises(DigestMismatchError):
                future.result(timeout=120)
        # The stripes once; two that read all of it alone are believed. What else is asked for are
        # rests of stripes whose source had begun again.
        whole = [(start, end) for start, end in cluster.asked(digest) if end - start == LARGE]
        assert 2 <= len(whole) <= 3


def test_nodes_that_need_each_other_s_stripes_get_what_is_right_the_second_time(
    workspace: Path,
) -> None:
    with Cluster(workspace, patience=PATIENT) as cluster:
        digest = cluster.add(incompressible(LARGE))
        cluster.origin.fault(f"/blobs/{digest}", Fault(corrupt=7))
        _arrange_many_roots(cluster, digest, 4)
        fetched = cluster.fetch(digest)
        cluster.check(digest)
        assert all(lying(one) <= {ORIGIN} for one in fetched.values())


def _arrange_many_roots(cluster: Cluster, digest: str, count: int) -> None:
    """Let each node be the root of one stripe, and the second, third or last of the others."""
    names = list(cluster.nodes)
    stripes = [Stripe(LARGE, index, count, UNIT) for index in range(count)]
    for place, name in enumerate(names):
        sources = {}
        for stripe in stripes:
            rank = (place - stripe.index) % len(names)
            before = [names[(stripe.index + above) % len(names)] for above in range(rank)]
            sources[stripe] = tuple(reversed(before))
        cluster.nodes[name].join(cluster.part(name, digest, sources))


@pytest.mark.parametrize("count", [1, 2])
def test_children_begin_again_as_soon_as_their_source_does(workspace: Path, count: int) -> None:
    """The origin sends a wrong byte once; no patience has to end before the right ones come."""
    with Cluster(workspace, patience=PATIENT) as cluster:
        digest = cluster.add(incompressible(LARGE))
        cluster.origin.fault(f"/blobs/{digest}", Fault(corrupt=7))
        stripes = [Stripe(LARGE, index, count, UNIT) for index in range(count)]
        cluster.arrange(digest, stripes, n1=("n0",), n2=("n1",), n3=("n2",))
        fetched = cluster.fetch(digest)
        cluster.check(digest)
        for name in ("n1", "n2", "n3"):
            assert lying(fetched[name]) == set()


def test_what_was_given_up_is_told_until_somebody_tries_again(cluster: Cluster) -> None:
    data = incompressible(SIZE)
    digest = cluster.add(data)
    node = cluster[0]
    client = PeerClient(TOKEN, connect_seconds=5.0, answer_seconds=30.0)
    stripe = Stripe(SIZE)
    ingest = node.store.acquire(Digest(digest), SIZE)
    assert ingest is not None
    with ingest:
        ingest.write(bytes(SIZE - 1))
        stream = client.open_stripe(node.address, digest, stripe, 0)
        with stream:
            while (head := stream.begin(10.0)) is None:
                pass
            assert client.have(node.address, digest, stripe, head.generation).fate == GROWING
            ingest.write(b"x")
            with pytest.raises(DigestMismatchError):
                ingest.commit()
        told = client.have(node.address, digest, stripe, head.generation)
        assert (told.fate, told.given_up) == (WRONG, False)
        ingest.give_up()
        assert client.have(node.address, digest, stripe, head.generation).fate == ABANDONED
    assert client.have(node.address, digest, stripe).given_up
    with (
        client.open_stripe(node.address, digest, stripe, 0) as stream,
        pytest.raises(NodeError, match="given the blob up"),
    ):
        while stream.begin(10.0) is None:
            pass
    stores.commit(node.store, data)
    told = client.have(node.address, digest, stripe, head.generation)
    assert (told.complete, told.given_up, told.fate) == (True, False, WRONG)


def test_an_earlier_partial_that_is_wrong_is_nobody_s_fault(cluster: Cluster) -> None:
    data = incompressible(SIZE)
    digest = cluster.add(data)
    stores.commit(cluster[0].store, data)
    ingest = cluster[1].store.acquire(Digest(digest), SIZE)
    assert ingest is not None
    with ingest:
        ingest.write(bytes(MIB))
    cluster.arrange(digest, [Stripe(SIZE)], n1=("n0",))
    fetched = cluster.fetch(digest, "n1")["n1"]
    cluster.check(digest, "n1")
    assert fetched.remarks == ()
    assert SIZE <= fetched.fetched_bytes < SIZE + MIB
