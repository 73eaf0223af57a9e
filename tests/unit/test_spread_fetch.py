"""The peer data path of a run: stores, servers and an origin, all over real sockets."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from stowray.pipeline.copying import reader
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import CancelledError, NotFoundError, UnauthorizedError
from stowray.pipeline.origin_leases import Elsewhere, Granted, Later
from stowray.pipeline.serve_limits import ServeLimits
from stowray.pipeline.settings import RegistrySettings
from stowray.pipeline.source_actions import Patience
from stowray.pipeline.spread_leases import from_wire, stripe_key, to_wire
from stowray.pipeline.stripes import Stripe
from tests.support import stores
from tests.support.registry import Fault, incompressible
from tests.support.spread import Cluster, overlap, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stowray.pipeline.origin import BlobStream
    from stowray.pipeline.spread_leases import LocalLeases

MIB = 1 << 20
UNIT = 1 * MIB
SIZE = 6 * MIB + 12_345


@pytest.fixture
def folder(workspace: Path) -> Path:
    return workspace


@pytest.fixture
def cluster(folder: Path) -> Iterator[Cluster]:
    with Cluster(folder) as made:
        yield made


def stripes(size: int, count: int) -> list[Stripe]:
    return [Stripe(size, index, count, UNIT) for index in range(count)]


# One origin download per byte


def test_four_nodes_and_each_byte_once_from_the_origin(cluster: Cluster) -> None:
    digest = cluster.add(incompressible(SIZE))
    cluster.spread(digest)
    fetched = cluster.fetch(digest)
    cluster.check(digest)
    assert cluster.asked(digest) == [(0, SIZE)]
    from_origin = sum(one.by_source.get(cluster.origin.host, 0) for one in fetched.values())
    from_peers = sum(one.fetched_bytes for one in fetched.values()) - from_origin
    assert (from_origin, from_peers) == (SIZE, 3 * SIZE)
    assert sorted(one.source.partition(":")[0] for one in fetched.values()) == [
        "127.0.0.1",
        "peer",
        "peer",
        "peer",
    ]
    assert all(not one.remarks for one in fetched.values())


@pytest.mark.parametrize("count", [2, 3])
def test_stripes_travel_separately_and_each_byte_once(cluster: Cluster, count: int) -> None:
    """Each node is the root of some stripe and a leaf of others: nobody can wait for the whole."""
    digest = cluster.add(incompressible(SIZE))
    for number, name in enumerate(cluster.nodes):
        others = [other for other in cluster.nodes if other != name]
        cluster.nodes[name].join(
            cluster.part(
                name,
                digest,
                {
                    stripe: () if stripe.index == number else (f"n{stripe.index}", *others[:1])
                    for stripe in stripes(SIZE, count)
                },
            )
        )
    fetched = cluster.fetch(digest)
    cluster.check(digest)
    assert overlap(cluster.asked(digest)) == 0
    assert sum(end - start for start, end in cluster.asked(digest)) == SIZE
    for number in range(count):
        stripe = Stripe(SIZE, number, count, UNIT)
        assert fetched[f"n{number}"].by_source[cluster.origin.host] == stripe.length


def test_many_small_blobs_with_different_roots_and_every_limit_one(folder: Path) -> None:
    """In whatever order each node asks: no node waits for one that waits for it."""
    limits = ServeLimits(followers=1, lookups=1, connections=4096, held=4096)
    settings = RegistrySettings(connections=1)
    patience = Patience(answer=20.0, starved=20.0)
    options = {"permits": 1, "streams": 1, "patience": patience}
    with Cluster(folder, limits=limits, settings=settings, **options) as cluster:
        digests = [cluster.add(incompressible(2000 + seed, seed)) for seed in range(50)]
        plan = cluster.spread(*digests)
        assert len({tree.order[0] for tree in plan.trees}) == 4
        futures = []
        with ThreadPoolExecutor(4 * len(digests)) as pool:
            for number, name in enumerate(cluster.nodes):
                order = list(digests)
                random.Random(number).shuffle(order)
                futures += [pool.submit(cluster.nodes[name].fetch, digest) for digest in order]
            for future in futures:
                future.result(timeout=120)
        for digest in digests:
            cluster.check(digest)
            assert len(cluster.asked(digest)) == 1


def test_one_fetch_at_a_time_in_one_order_never_waits_in_a_ring(folder: Path) -> None:
    """A node with one thread for all its blobs, as long as all begin with the same ones."""
    limits = ServeLimits(followers=1, lookups=1)
    with Cluster(folder, limits=limits, permits=1, streams=1) as cluster:
        digests = [cluster.add(incompressible(2000 + seed, seed)) for seed in range(50)]
        cluster.spread(*digests)

        def all_of(name: str) -> None:
            for digest in digests:
                cluster.nodes[name].fetch(digest)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(all_of, cluster.nodes, timeout=120))
        for digest in digests:
            cluster.check(digest)
            assert len(cluster.asked(digest)) == 1


# What is there already


def test_holders_serve_what_they_have_and_the_origin_is_not_asked(cluster: Cluster) -> None:
    data = incompressible(SIZE)
    digest = cluster.add(data)
    stores.commit(cluster[2].store, data)
    cluster.spread(digest)
    fetched = cluster.fetch(digest)
    cluster.check(digest)
    assert cluster.asked(digest) == []
    assert fetched["n2"].source == "store"
    assert {one.source for name, one in fetched.items() if name != "n2"} == {"peer:n2"}


def test_an_earlier_partial_is_gone_on_with(cluster: Cluster) -> None:
    data = incompressible(SIZE)
    digest = cluster.add(data)
    for node in (cluster[0], cluster[1]):
        ingest = node.store.acquire(Digest(digest), SIZE)
        assert ingest is not None
        with ingest:
            ingest.write(data[: 2 * MIB])
            ingest.write_at(4 * MIB, data[4 * MIB : 5 * MIB])
    cluster.arrange(digest, [Stripe(SIZE)], n1=("n0",), n2=("n0",), n3=("n1",))
    cluster.fetch(digest)
    cluster.check(digest)
    assert sorted(cluster.asked(digest)) == [(2 * MIB, 4 * MIB), (5 * MIB, SIZE)]


def test_a_node_further_than_the_root_is_asked_before_the_origin(cluster: Cluster) -> None:
    data = incompressible(SIZE)
    digest = cluster.add(data)
    ingest = cluster[1].store.acquire(Digest(digest), SIZE)
    assert ingest is not None
    with ingest:
        ingest.write(data[: 3 * MIB])
    cluster.arrange(digest, [Stripe(SIZE)], n1=("n0",), n2=("n1",), n3=("n1",))
    begun = cluster.begin(digest, "n1")
    wait_until(
        lambda: (
            cluster.book.holder(f"{digest}#0/1", SIZE - 1) == "n1"
            or cluster[1].store.has(Digest(digest))
        ),
        "the one that has most reads on",
    )
    begun |= cluster.begin(digest, "n0", "n2", "n3")
    for future in begun.values():
        future.result(timeout=120)
    cluster.check(digest)
    assert cluster.asked(digest) == [(3 * MIB, SIZE)]


def test_a_second_fetch_finds_everything(cluster: Cluster) -> None:
    digest = cluster.add(incompressible(SIZE))
    cluster.spread(digest)
    cluster.fetch(digest)
    again = cluster.fetch(digest)
    assert {(one.source, one.fetched_bytes) for one in again.values()} == {("store", 0)}
    assert len(cluster.asked(digest)) == 1


def test_what_is_not_in_the_part_is_fetched_as_usual(cluster: Cluster) -> None:
    digest, other = cluster.add(incompressible(SIZE)), cluster.add(incompressible(1000, 2))
    cluster.spread(digest)
    assert cluster[3].fetch(other).source == cluster.origin.host
    cluster.check(other, "n3")


# Faults of the origin


def test_the_origin_breaking_off_is_gone_on_with_at_the_same_byte(cluster: Cluster) -> None:
    digest = cluster.add(incompressible(SIZE))
    cluster.origin.fault(f"/blobs/{digest}", Fault(cut="reset", after=3 * MIB))
    cluster.spread(digest)
    cluster.fetch(digest)
    cluster.check(digest)
    (first, second) = cluster.asked(digest)
    assert first == (0, SIZE)
    assert 0 < second[0] <= 3 * MIB
    assert second[1] == SIZE


def test_an_origin_without_ranges_sends_the_blob_once_per_stripe(cluster: Cluster) -> None:
    """Not once for each part of a stripe: those lie far apart, and there are many."""
    digest = cluster.add(incompressible(SIZE))
    cluster.origin.fault(f"/blobs/{digest}", Fault(ignore_range=True), repeat=True)
    cluster.arrange(digest, stripes(SIZE, 2), n1=("n0",), n2=("n0", "n1"), n3=("n1",))
    fetched = cluster.fetch(digest)
    cluster.check(digest)
    # Whether it knows ranges has to be asked; each of the two then comes up to its end.
    assert len(cluster.asked(digest)) <= 4
    assert fetched["n0"].fetched_bytes <= 2 * SIZE


def test_after_the_first_copy_the_origin_may_be_gone(cluster: Cluster) -> None:
    digest = cluster.add(incompressible(SIZE))
    cluster.arrange(digest, [Stripe(SIZE)], n1=("n0",), n2=("n1", "n0"), n3=("n2", "n1"))
    cluster.fetch(digest, "n0")
    cluster.origin.fault("/blobs/", Fault(status=503), repeat=True)
    cluster.fetch(digest, "n1", "n2", "n3")
    cluster.check(digest)
    assert len(cluster.asked(digest)) == 1


def test_what_the_origin_does_not_have_is_told_at_once(cluster: Cluster) -> None:
    digest = cluster.add(incompressible(SIZE))
    cluster.spread(digest)
    cluster.origin.fault("/blobs/", Fault(status=404), repeat=True)
    root = next(node for node in cluster.nodes if cluster.is_root(node))
    with pytest.raises(NotFoundError):
        cluster.nodes[root].fetch(digest)


def test_a_refused_login_reaches_every_node(cluster: Cluster) -> None:
    digest = cluster.add(incompressible(SIZE))
    cluster.spread(digest)
    cluster.origin.fault("/blobs/", Fault(status=401), repeat=True)
    for future in cluster.begin(digest).values():
        with pytest.raises(UnauthorizedError):
            future.result(timeout=120)


def test_the_origin_is_asked_with_a_permit_only(folder: Path) -> None:
    with Cluster(folder, permits=2) as cluster:
        digests = [cluster.add(incompressible(MIB, seed)) for seed in range(8)]
        used: list[int] = []

        def note() -> None:
            cluster.leases.do(lambda _, permits: used.append(permits.used))

        pieces = (MIB // 8, 0.01)
        cluster.origin.fault("/blobs/", Fault(trickle=pieces, then=note), repeat=True)
        cluster.spread(*digests)
        with ThreadPoolExecutor(32) as pool:
            futures = [
                pool.submit(cluster.nodes[name].fetch, digest)
                for name in cluster.nodes
                for digest in digests
            ]
            for future in futures:
                future.result(timeout=120)
        assert len(used) == len(digests)
        assert set(used) <= {1, 2}
        assert cluster.permits.used == 0


# Cancelling


class _LateRenewals:
    """Leases whose renewals are answered when the permit has been given back, or late."""

    def __init__(self, leases: LocalLeases) -> None:
        self._leases = leases
        self._given_back = threading.Event()
        self.renewed = 0

    def of(self, node: str) -> _LateRenewals:
        self._leases = self._leases.of(node)
        return self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._leases, name)

    def progress(self, key: str, position: int) -> float:
        seconds = self._leases.progress(key, position)
        if threading.current_thread().name != "stripe":
            self.renewed += 1
            self._given_back.wait(3)
        return seconds

    def give_back(self, purpose: str) -> None:
        self._leases.give_back(purpose)
        self._given_back.set()


def test_a_renewal_under_way_takes_no_permit_that_was_given_back(folder: Path) -> None:
    with Cluster(folder, 1, permits=1) as cluster:
        cluster.leases = late = _LateRenewals(cluster.leases)  # type: ignore[assignment]
        digest = cluster.add(incompressible(1 << 20))
        cluster.origin.fault(f"/blobs/{digest}", Fault(trickle=(1 << 16, 0.1)))
        cluster.spread(digest)
        cluster.fetch(digest)
        assert late.renewed
        assert cluster.permits.used == 0


def test_a_cancelled_fetch_ends_soon_and_keeps_what_it_has(cluster: Cluster) -> None:
    digest = cluster.add(incompressible(SIZE))
    cluster.spread(digest)
    root = next(node for node in cluster.nodes if cluster.is_root(node))
    cluster.origin.fault(f"/blobs/{digest}", Fault(stall=2 * MIB))
    future = cluster.begin(digest, root)[root]
    cluster.origin.wait_for(digest)
    store = cluster.nodes[root].store
    wait_until(lambda: cluster.prefix(root, digest) == 2 * MIB, "the bytes before the stall")
    cluster.nodes[root].dead.set()
    with pytest.raises(CancelledError):
        future.result(timeout=60)
    ingest = store.acquire(Digest(digest), SIZE)
    assert ingest is not None
    with ingest:
        assert ingest.offset == 2 * MIB


@pytest.mark.parametrize("goes_on", [True, False], ids=["the source goes on", "it does not"])
def test_who_reads_from_the_origin_has_let_go_of_the_source_that_waits(
    folder: Path, goes_on: bool
) -> None:
    """Else bytes of the source count from where it was left: beyond the end, or awaited for ever.

    Two sources that wait are each left before the hunger for the origin, which then comes while
    the second one is still listened to.
    """
    patience = Patience(silence=0.3, answer=2.0, slow=1.0, starved=2.0, avoid=1.0)
    with Cluster(folder, 3, patience=patience) as cluster:
        data = incompressible(SIZE)
        digest = cluster.add(data)
        waiting = [cluster[number].store.acquire(Digest(digest), SIZE) for number in (0, 2)]
        with ExitStack() as stack:
            for ingest in waiting:
                assert ingest is not None
                stack.enter_context(ingest)
                ingest.show_stripes(1, Stripe(SIZE).unit)
                ingest.write(data[:MIB])
            cluster.arrange(digest, [Stripe(SIZE)], n1=("n0", "n2"))
            future = cluster.begin(digest, "n1")["n1"]
            wait_until(lambda: bool(cluster.asked(digest)), "the question to the origin")
            if goes_on:
                for ingest in waiting:
                    assert ingest is not None
                    ingest.write(data[MIB : 2 * MIB])
            future.result(timeout=60)
        cluster.check(digest, "n1")
        assert overlap(cluster.asked(digest)) == 0


def test_bytes_of_a_fetch_that_ended_for_good_are_promised_to_nobody(folder: Path) -> None:
    """Its node lives and serves, and would be named to all others as the one that has them."""
    with Cluster(folder, 2, ttl=3.0) as cluster:
        digest = cluster.add(incompressible(SIZE))
        cluster.origin.fault(f"/blobs/{digest}", Fault(stall=2 * MIB))
        cluster.arrange(digest, [Stripe(SIZE)], n1=("n0",))
        ended = cluster.begin(digest, "n0")["n0"]
        wait_until(lambda: cluster.prefix("n0", digest) == 2 * MIB, "the bytes before the stall")
        cluster[0].dead.set()
        with pytest.raises(CancelledError):
            ended.result(timeout=60)
        cluster.fetch(digest, "n1")
        cluster.check(digest, "n1")


def test_a_lease_that_ends_behind_its_last_byte_takes_nothing_back(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes after the lease's end is to be had from a peer, without being hungry first."""

    def cancelled_at_the_end(stream: BlobStream) -> Callable[[memoryview], int]:
        within = reader(stream)

        def read_into(buffer: memoryview) -> int:
            if len(buffer) == 1:
                # As the limiter does that waits for the share of the last piece.
                raise CancelledError("the lease was lost")
            return within(buffer)

        return read_into

    monkeypatch.setattr("stowray.pipeline.spread_origin.reader", cancelled_at_the_end)
    data = incompressible(SIZE)
    digest = cluster.add(data)
    stores.commit(cluster[1].store, data)
    # The owner knows of its second half only.
    cluster.book.has("n1", stripe_key(digest, 0, 1), SIZE, SIZE // 2, SIZE)
    monkeypatch.setattr("stowray.pipeline.spread_stream._HUNGER", float("inf"))
    cluster.arrange(digest, [Stripe(SIZE)])
    fetched = cluster.fetch(digest, "n0")["n0"]
    assert set(fetched.by_source) == {cluster.origin.host, "peer:n1"}
    assert cluster.asked(digest) == [(0, SIZE // 2)]


# The wire


def test_answers_of_the_owner_cross_processes() -> None:
    for answer in (
        Granted(1, 2, 3.5),
        Elsewhere(("a", "b"), 7, True, 0.5),
        Elsewhere((), 7, False, 0.5),
        Later(2.0),
    ):
        assert from_wire(to_wire(answer)) == answer
