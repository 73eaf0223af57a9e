"""What the images of a run share in a fetching actor, though each has an engine of its own."""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/

from __future__ import annotations

import asyncio
import gc
import weakref
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from stowray.actors import cluster as ray_cluster
from stowray.actors.engines import Engines
from stowray.actors.lease_book import LeaseBooks
from stowray.actors.prewarm_access import RunAccess
from stowray.actors.spread_fetchers import KEPT, KEPT_RUNS, SpreadFetchers
from stowray.actors.wire import settings_to_dict
from stowray.pipeline.clock import SYSTEM_CLOCK
from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.reference import Reference
from stowray.pipeline.registry import never
from stowray.pipeline.settings import Settings
from stowray.pipeline.spread import Part
from stowray.pipeline.stripes import Stripe
from tests.support import stores
from tests.support.registry import OCI_LAYER, incompressible
from tests.support.spread import TOKEN, Cluster

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stowray.pipeline.fetch import Fetched
    from stowray.pipeline.spread_fetch import SpreadFetcher

SIZE = (1 << 20) + 7
IMAGES = ("a/one:1", "a/two:1", "b/three:1", "c/four:1", "d/five:1")


class Owner:
    """The owner of the leases as a handle of it looks, with books that can be lost."""

    def __init__(self) -> None:
        self.leases = self
        self.questions: list[tuple[str, list[Any]]] = []
        self.lose()

    def lose(self) -> None:
        self.books = LeaseBooks(restarted=False)

    def remote(self, request: dict[str, Any]) -> dict[str, Any]:
        self.questions.append((request["question"], request["about"]))
        return self.books.answer(request)


class Clock:
    """Time passes by sleeping only."""

    def __init__(self) -> None:
        self.now = 100.0
        self.clock = replace(SYSTEM_CLOCK, monotonic=lambda: self.now, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Actor:
    """What a fetching actor keeps, and the tasks that it is given."""

    def __init__(self, folder: Path, clock: Clock | None = None) -> None:
        self.folder = folder
        self.engines = Engines()
        self.spreads = SpreadFetchers(clock.clock if clock else SYSTEM_CLOCK)
        self.owner = Owner()
        self.access = RunAccess(Settings(), {})
        self.origins: list[Any] = []

    def fetcher(
        self, image: str, *, run: str = "r", stamp: str = "s", host: str = "r.test", **more: Any
    ) -> SpreadFetcher:
        reference = Reference.parse(f"{host}/{image}")
        spread = {
            "run": run,
            "stamp": stamp,
            "node": "n2",
            "address": "n2:1",
            "token": TOKEN,
            "part": Part("n2").to_dict(),
            "leases": self.owner,
            "connections": 4,
            "bandwidth": 0,
        }
        task = {
            "store": str(self.folder),
            "settings": settings_to_dict(self.access.for_nodes) | {"node": "n2"},
            "environment": {},
            "access": asyncio.run(self.access.to(reference)) | {"of": str(reference)},
            "spread": spread | more,
        }
        fetcher = self.spreads.get(task, self.engines.get(task), reference)
        self.origins += fetcher._origins
        return fetcher

    def close(self) -> None:
        for origin in self.origins:
            origin.close()


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "wait", lambda answer, *_, **__: answer)


@pytest.fixture
def actor(workspace: Path) -> Iterator[Actor]:
    with closing(Actor(workspace / "n2")) as made:
        yield made


def fetch(fetcher: SpreadFetcher, image: str, digest: str, host: str) -> Fetched:
    return fetcher.fetch(
        Reference.parse(f"{host}/{image}"),
        Descriptor(OCI_LAYER, Digest(digest), SIZE),
        report=lambda *_, **__: None,
        cancelled=never,
    )


def test_images_of_a_run_keep_one_bandwidth_also_in_a_part_that_was_dealt_anew(
    workspace: Path,
) -> None:
    clock = Clock()
    actor = Actor(workspace / "n2", clock)
    found = [actor.fetcher(image, bandwidth=1_000_000) for image in IMAGES]
    found.append(actor.fetcher(IMAGES[0], stamp="anew", bandwidth=1_000_000))
    assert len(set(map(id, found))) == len(found), "each image has ways of its own"
    begun = clock.now
    for _ in range(10):
        for fetcher in found:
            fetcher._shared.throttle.spend(100_000, never)
    assert clock.now - begun == pytest.approx(len(found), abs=0.1)
    # Another run has a limit of its own.
    before = clock.now
    actor.fetcher(IMAGES[0], run="other", bandwidth=1_000)._shared.throttle.spend(1_000, never)
    assert clock.now - before == pytest.approx(1.0, abs=0.1)


def test_images_of_a_run_share_slots_permits_pace_and_the_client_of_the_leases(
    actor: Actor,
) -> None:
    shared = [actor.fetcher(image)._shared for image in IMAGES]
    for name in ("slots", "permits", "pulse", "leases", "standing", "throttle", "client"):
        assert len({id(getattr(one, name)) for one in shared}) == 1, name


def test_the_addresses_are_those_of_the_part(actor: Actor) -> None:
    old = actor.fetcher(IMAGES[0], part=Part("n2", (), {"n0": "there:1"}).to_dict())
    new = actor.fetcher(IMAGES[0], stamp="t", part=Part("n2", (), {"n0": "here:2"}).to_dict())
    assert (old._shared.address("n0"), new._shared.address("n0")) == ("there:1", "here:2")
    # Whoever is not in it is asked for, and not looked for where an earlier part had it.
    newest = actor.fetcher(IMAGES[0], stamp="u")
    assert newest._shared.address("n0") == ""
    assert actor.owner.questions == [("address", ["n0"])]


@pytest.mark.parametrize("stamp", ["s", "anew"])
def test_who_lied_in_one_image_is_not_asked_in_the_next_ones(
    workspace: Path, actor: Actor, stamp: str
) -> None:
    with Cluster(workspace, 2) as cluster:
        blobs = [incompressible(SIZE, number) for number in range(3)]
        digests = [cluster.add(data) for data in blobs]
        for data in blobs:
            for number in (0, 1):
                stores.commit(cluster[number].store, data)
        path = cluster[0].store.blob_path(Digest(digests[0]))
        path.chmod(0o644)
        damaged = bytearray(path.read_bytes())
        damaged[5] ^= 0xFF
        path.write_bytes(damaged)
        parts = [cluster.part("n2", one, {Stripe(SIZE): ("n0", "n1")}) for one in digests]
        portions = tuple(portion for part in parts for portion in part.portions)
        part = Part("n2", portions, cluster.addresses).to_dict()
        host = cluster.origin.host
        first = actor.fetcher(IMAGES[0], host=host, part=part)
        told = fetch(first, IMAGES[0], digests[0], host)
        assert {remark.source for remark in told.remarks if remark.kind == "lying"} == {"n0"}
        for image, digest in zip(IMAGES[1:3], digests[1:], strict=True):
            fetcher = actor.fetcher(image, host=host, part=part, stamp=stamp)
            assert fetch(fetcher, image, digest, host).by_source == {"peer:n1": SIZE}
        # Nor when images came in between that have driven its fetcher out.
        for number in range(2 * KEPT):
            actor.fetcher(f"x/{number}:1", host=host, part=part)
        assert actor.fetcher(IMAGES[0], host=host, part=part) is not first
        assert actor.fetcher(IMAGES[0], host=host, part=part)._shared.standing.is_banned("n0")


def test_a_new_owner_is_told_by_the_next_image_what_was_read_for_the_last(
    workspace: Path, actor: Actor
) -> None:
    with Cluster(workspace, 2) as cluster:
        digests = [cluster.add(incompressible(SIZE, number)) for number in (1, 2)]
        host = cluster.origin.host
        for place, (image, digest) in enumerate(zip(IMAGES, digests, strict=False)):
            part = cluster.part("n2", digest, {Stripe(SIZE): ()}).to_dict()
            fetch(actor.fetcher(image, host=host, part=part), image, digest, host)
            if place == 0:
                actor.owner.lose()
                actor.owner.questions.clear()
        told = [about for question, about in actor.owner.questions if question == "has"]
        assert [f"{digests[0]}#0/1", SIZE, 0, SIZE] in told


def test_nothing_stays_of_runs_that_are_long_over(actor: Actor) -> None:
    shared = weakref.ref(actor.fetcher(IMAGES[0], run="old", stamp="old")._shared.standing)
    for number in range(3 * KEPT_RUNS):
        for image in IMAGES:
            actor.fetcher(image, run=f"r{number}", stamp=f"s{number}")
    assert len(actor.spreads._runs) == KEPT_RUNS
    assert len(actor.spreads._fetchers) == KEPT
    gc.collect()
    assert shared() is None
