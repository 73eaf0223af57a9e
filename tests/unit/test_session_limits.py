"""The limits of a registry between the actors that serve the pulls of a session.

An actor keeps one engine per store, settings and environment; every actor here is an ``Engines`` of
its own, as it is in a process of a session, without the process.
"""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from stowray.actors.engines import Engines
from stowray.actors.wire import settings_to_dict
from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.settings import RegistrySettings, Settings
from stowray.pipeline.source import parse_source
from tests.support.registry import FakeRegistry, Fault, incompressible

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LAYERS = 3
# Not alike, or two that share nothing would ask in step, each between the answers of the other.
SIZES = (60_000, 100_000)


class Pulls:
    """Two pulls of two images each, as a session's actors carry them out."""

    def __init__(self, fake: FakeRegistry, stores: tuple[str, str], *, one_actor: bool) -> None:
        self.fake = fake
        self._stores = stores
        first = Engines()
        self._actors = (first, first if one_actor else Engines())
        # What a pull brings along from its shell keeps engines apart, within one actor too.
        self._environments = ({}, {"AWS_PROFILE": "other"} if one_actor else {})
        self._blobs = [
            [incompressible(size, 100 * number + index) for index in range(LAYERS)]
            for number, size in enumerate(SIZES)
        ]
        for blob in (blob for blobs in self._blobs for blob in blobs):
            fake.add_blob(blob)

    def run(self, **settings: Any) -> None:
        """Fetch all blobs of both, each on a thread of its own as in an actor."""
        made = settings_to_dict(Settings(registry=RegistrySettings(**settings)))
        tasks = []
        for number in range(2):
            task = {
                "store": self._stores[number],
                "settings": made,
                "environment": self._environments[number],
            }
            tasks += [(self._actors[number], task, number, blob) for blob in self._blobs[number]]
        engines = {id(engine): engine for engine in (actor.get(task) for actor, task, *_ in tasks)}
        assert len(engines) == 2
        with ThreadPoolExecutor(len(tasks)) as pool:
            for done in [pool.submit(self._fetch, *task) for task in tasks]:
                done.result()
        for engine in engines.values():
            engine.close()

    def _fetch(self, actor: Engines, task: dict[str, Any], number: int, blob: bytes) -> None:
        source = parse_source(f"{self.fake.host}/a/number{number}:1")
        descriptor = Descriptor("application/octet-stream", Digest.of(blob), len(blob))
        fetcher = actor.get(task).fetcher(source)
        fetched = fetcher.fetch(source, descriptor, report=lambda *_, **__: None)
        assert fetched.fetched_bytes == len(blob)


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry() as made:
        yield made


@pytest.fixture(params=["two actors", "two shells"])
def pulls(fake: FakeRegistry, tmp_path: Path, request: pytest.FixtureRequest) -> Pulls:
    store = str(tmp_path / "store")
    return Pulls(fake, (store, store), one_actor=request.param == "two shells")


def test_pulls_of_one_store_share_connections(pulls: Pulls) -> None:
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, pulls.fake.bodies + 1)

    pulls.fake.fault("/blobs/", Fault(trickle=(10_000, 0.02), then=look), repeat=True)
    pulls.run(connections=1)
    assert most == 1


def test_pulls_of_one_store_share_a_rate_of_requests(pulls: Pulls) -> None:
    pulls.run(requests_per_second=10)
    times = sorted(request.time for request in pulls.fake.requests)
    assert len(times) == 2 * LAYERS
    # Arrivals, not departures: one may be held up on its way, but not all of them.
    assert times[-1] - times[0] >= (len(times) - 1) * 0.1 - 0.15


def test_pulls_of_one_store_share_a_line(pulls: Pulls) -> None:
    begun = time.monotonic()
    pulls.run(bytes_per_second=LAYERS * sum(SIZES) // 2)
    # Two seconds for both; the larger one alone needs one and a quarter.
    assert time.monotonic() - begun >= 1.9


def test_pulls_of_one_store_share_a_pause(pulls: Pulls) -> None:
    told = Fault(status=429, headers=(("Retry-After", "3"),))
    pulls.fake.fault("/a/number0/", told)
    pulls.run(connections=1)
    requests = pulls.fake.requests
    paused = next(index for index, request in enumerate(requests) if "number0" in request.path)
    later = [request.time for request in requests[paused + 1 :]]
    assert min(later) - requests[paused].time >= 2.9


def test_stores_of_their_own_share_nothing(fake: FakeRegistry, tmp_path: Path) -> None:
    both_there = threading.Barrier(2)

    def meet() -> None:
        # Only when each of the two has its one connection do both go on.
        both_there.wait(60)

    pulls = Pulls(fake, (str(tmp_path / "one"), str(tmp_path / "two")), one_actor=True)
    for number in range(2):
        fake.fault(f"/a/number{number}/", Fault(then=meet))
    pulls.run(connections=1)
    assert not both_there.broken
