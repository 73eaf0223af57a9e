"""Large blobs over several connections, from a registry that may not play along."""

from __future__ import annotations

import contextlib
import itertools
import threading
from typing import TYPE_CHECKING, Any

import pytest

from stowray.pipeline import lanes, range_plan
from stowray.pipeline.clock import Clock
from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import CancelledError, StorageError, UnavailableError
from stowray.pipeline.fetch import Fetched, Fetcher
from stowray.pipeline.host_records import LIFE_SECONDS, HostRecords
from stowray.pipeline.ingest import Ingest
from stowray.pipeline.lanes import Lanes
from stowray.pipeline.reference import Reference
from stowray.pipeline.registry import Registry
from stowray.pipeline.settings import RegistrySettings
from stowray.pipeline.store import Store
from tests.support.proxy import counting_proxy
from tests.support.registry import FakeRegistry, Fault, incompressible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NAME = "team/app"
MIB = 1 << 20
SIZE = 12 * MIB + 12_345
DATA = incompressible(SIZE)
BLOB = Descriptor("application/octet-stream", Digest.of(DATA), SIZE)
# The first stream's pace: the others have done their parts long before.
SLOW = Fault(trickle=(128 * 1024, 0.02))


class Bench:
    def __init__(self, folder: Path, fake: FakeRegistry, patch: pytest.MonkeyPatch) -> None:
        self.fake = fake
        self.patch = patch
        self.store = Store.open(folder / "store")
        self.records = HostRecords(self.store.path)
        self.registries: list[Registry] = []
        self.told: list[int] = []

    def know(self, connections: int = 4) -> None:
        """Have learned that several connections pay, and let nothing speak against it."""
        self.patch.setattr(range_plan, "FAR_ABOVE", 1e9)
        self.patch.setattr(range_plan, "KNOWN_SECONDS", 0.0)
        self.records.learn(self.fake.host, connections, MIB)

    def measure_quickly(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the first of several connections prove its worth in less than a second."""
        monkeypatch.setattr(range_plan, "SETTLE_SECONDS", 0.1)
        monkeypatch.setattr(range_plan, "TRIAL_SETTLE_SECONDS", 0.1)
        monkeypatch.setattr(range_plan, "WINDOW_SECONDS", 0.2)
        monkeypatch.setattr(range_plan, "LEAST_SECONDS", 0.2)

    def fetch(
        self, cancelled: Callable[[], bool] = lambda: False, host: str = "", **settings: Any
    ) -> Fetched:
        wanted = RegistrySettings(**{"attempts": 4, "range_minimum_bytes": MIB, **settings})
        registry = Registry(wanted, environment={})
        self.registries.append(registry)
        fetcher = Fetcher(self.store, [registry], wanted, uniform=lambda low, high: 0.0)
        reference = Reference.parse(f"{host or self.fake.host}/{NAME}:1")
        return fetcher.fetch(reference, BLOB, report=self.report, cancelled=cancelled)

    def report(
        self, kind: str, id: str, status: str, current: int = 0, total: int = 0, error: str = ""
    ) -> None:
        assert 0 <= current <= total == SIZE
        self.told.append(current)

    @contextlib.contextmanager
    def anew(self, name: str) -> Iterator[Bench]:
        """The same registry with an empty store, which knows nothing of it yet."""
        fresh = Bench(self.store.path.parent / name, self.fake, self.patch)
        try:
            yield fresh
        finally:
            self.registries += fresh.registries
            fresh.store.close()

    @property
    def holds(self) -> bool:
        if not self.store.has(BLOB.digest, SIZE):
            return False
        return self.store.blob_path(BLOB.digest).read_bytes() == DATA

    def parts(self) -> list[tuple[int, int]]:
        """Return the ranges that were asked for, ends exclusive."""
        found = []
        for request in self.fake.seen("/blobs/"):
            if request.range is not None:
                first, last = request.range.removeprefix("bytes=").split("-")
                found.append((int(first), int(last) + 1))
        return found


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with FakeRegistry() as fake:
        fake.add_blob(DATA)
        made = Bench(tmp_path, fake, monkeypatch)
        yield made
        held = [registry._client._limiter.held(fake.host) for registry in made.registries]
        assert not any(held)
        for registry in made.registries:
            registry.close()
        made.store.close()
        assert [thread.name for thread in threading.enumerate() if thread.name == "lane"] == []


def test_a_large_blob_comes_in_parts_over_connections_that_serve_again(bench: Bench) -> None:
    bench.know()
    bench.fake.fault("/blobs/", SLOW)
    fetched = bench.fetch()
    assert bench.holds
    assert fetched.retries == 0
    parts = sorted(bench.parts())
    # Closed, small, one after the other up to the end: nothing twice but what was under way.
    assert parts[-1][1] == SIZE
    assert all(one[1] == other[0] for one, other in itertools.pairwise(parts))
    assert all(end - start <= MIB for start, end in parts)
    assert fetched.fetched_bytes <= SIZE + MIB
    connections = {request.connection for request in bench.fake.seen("/blobs/")}
    assert 2 <= len(connections) <= 1 + 4
    assert bench.told == sorted(bench.told)


def test_signed_urls_are_asked_for_each_part(bench: Bench) -> None:
    bench.know()
    bench.fake.redirect = True
    bench.fake.fault("/cdn/", SLOW)
    bench.fetch()
    assert bench.holds
    assert bench.fake.count("/cdn/") > 4


def test_small_blobs_and_single_connections_stay_whole(bench: Bench) -> None:
    bench.know()
    bench.fake.fault("/blobs/", SLOW)
    bench.fetch(range_minimum_bytes=SIZE + 1)
    assert bench.holds
    assert bench.parts() == []


@pytest.mark.parametrize("limits", [{"range_connections": 1}, {"connections": 1}])
def test_no_second_connection_where_only_one_may_be(bench: Bench, limits: dict[str, int]) -> None:
    bench.know()
    bench.fake.fault("/blobs/", SLOW)
    bench.fetch(**limits)
    assert bench.holds
    assert bench.parts() == []


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(ignore_range=True), id="ignored"),
        pytest.param(Fault(shift_range=1), id="shifted"),
        pytest.param(Fault(multipart=True), id="multipart"),
        pytest.param(Fault(remove=("Content-Range",)), id="no Content-Range"),
        pytest.param(Fault(false_range=f"bytes 0-{SIZE - 1}/{SIZE}"), id="false Content-Range"),
        pytest.param(Fault(encoding="gzip"), id="encoded"),
        pytest.param(Fault(status=416), id="416"),
    ],
)
def test_a_host_without_ranges_serves_one_stream(
    bench: Bench, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.measure_quickly(monkeypatch)
    bench.fake.fault("/blobs/", SLOW)
    bench.fake.fault("/blobs/", fault, repeat=True)
    fetched = bench.fetch()
    assert bench.holds
    assert fetched.fetched_bytes == SIZE
    assert len(bench.parts()) <= 3
    # This is remembered, by other processes too.
    known = HostRecords(bench.store.path).find(bench.fake.host)
    assert known is not None
    assert known.connections == 1


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([Fault(cut="reset", after=300_000)], id="reset"),
        pytest.param([Fault(cut="fin", after=300_000), Fault(cut="reset", after=-1)], id="twice"),
        pytest.param([Fault(), Fault(ignore_range=True)], id="a 200"),
        pytest.param([Fault(), Fault(shift_range=1)], id="a shifted range"),
        pytest.param([Fault(status=408)], id="408"),
        pytest.param([Fault(status=503)], id="503"),
        pytest.param([Fault(short_range=100_000)], id="short"),
        pytest.param([Fault(no_total=True)], id="no total"),
        pytest.param([Fault(length="chunked")], id="chunked"),
    ],
)
def test_a_part_that_fails_is_asked_for_again(bench: Bench, faults: list[Fault]) -> None:
    bench.know(connections=2)
    bench.fake.fault("/blobs/", SLOW)
    bench.fake.fault("/blobs/", *faults)
    fetched = bench.fetch()
    assert bench.holds
    assert len(bench.parts()) > 4
    assert fetched.fetched_bytes <= SIZE + 2 * MIB


def test_every_connection_breaks(bench: Bench) -> None:
    bench.know()
    bench.fake.fault("/blobs/", Fault(cut="reset", after=3 * MIB, trickle=SLOW.trickle))
    bench.fake.fault("/blobs/", Fault(cut="fin", after=700_000), repeat=True)
    fetched = bench.fetch()
    assert bench.holds
    assert fetched.fetched_bytes <= SIZE + MIB
    assert fetched.retries > 10


def test_lanes_that_never_come_off_do_no_harm(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.measure_quickly(monkeypatch)
    bench.fake.fault("/blobs/", SLOW)
    bench.fake.fault("/blobs/", Fault(status=500), repeat=True)
    fetched = bench.fetch()
    assert bench.holds
    assert fetched.fetched_bytes == SIZE


@pytest.mark.parametrize("status", [401, 403, 404, 400])
def test_a_refused_part_is_left_to_the_first_stream(
    bench: Bench, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.measure_quickly(monkeypatch)
    bench.fake.fault("/blobs/", SLOW)
    bench.fake.fault("/blobs/", Fault(status=status), repeat=True)
    assert bench.fetch().fetched_bytes == SIZE
    assert bench.holds


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(ignore_range=True), id="ignored"),
        pytest.param(Fault(shift_range=1), id="shifted"),
        pytest.param(Fault(status=416), id="416"),
        pytest.param(Fault(status=400), id="400"),
    ],
)
def test_a_host_that_has_given_ranges_up(bench: Bench, fault: Fault) -> None:
    bench.know()
    bench.fake.fault("/blobs/", fault, Fault())
    fetched = bench.fetch()
    assert bench.holds
    if fault.status != 400:
        # A 400 may mean anything; the others say that there are no ranges.
        assert fetched.fetched_bytes == SIZE
        assert len(bench.parts()) == 1


def test_ranges_that_end_in_mid_blob(bench: Bench) -> None:
    bench.know()
    bench.fake.fault("/blobs/", SLOW, Fault(), Fault(), Fault(), Fault())
    bench.fake.fault("/blobs/", Fault(ignore_range=True), repeat=True)
    bench.fetch()
    assert bench.holds


@pytest.mark.parametrize("connections", [0, 1, 4])
@pytest.mark.parametrize("minimum", [MIB, 2 * SIZE], ids=["large", "small"])
def test_what_lanes_of_a_run_that_died_have_brought_does_not_come_again(
    bench: Bench, connections: int, minimum: int
) -> None:
    """Each lane leaves some bytes: they are passed over whatever is known of the host by then."""
    here = [(0, 700_000), (MIB, MIB + 5000), (3 * MIB, 3 * MIB + 900_000), (6 * MIB, 8 * MIB)]
    with bench.store.acquire(BLOB.digest, SIZE) as ingest:  # type: ignore[union-attr]
        for start, end in here:
            ingest.write_at(start, DATA[start:end])
    if connections:
        bench.know(connections)
    fetched = bench.fetch(range_minimum_bytes=minimum)
    assert bench.holds
    assert fetched.fetched_bytes == SIZE - sum(end - start for start, end in here)


def test_a_host_without_ranges_sends_what_is_here_again(bench: Bench) -> None:
    with bench.store.acquire(BLOB.digest, SIZE) as ingest:  # type: ignore[union-attr]
        ingest.write_at(0, DATA[:MIB])
        ingest.write_at(3 * MIB, DATA[3 * MIB : 4 * MIB])
    bench.fake.fault("/blobs/", Fault(ignore_range=True), repeat=True)
    assert bench.fetch().fetched_bytes == SIZE
    assert bench.holds
    # Once was enough to learn it.
    assert bench.fake.count("/blobs/") == 2


def test_no_lane_begins_when_the_first_has_given_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.know()
    begun = Lanes._open
    late: list[Lanes] = []

    def begin(self: Lanes) -> None:
        # The others would make room for one another, and the fetch would last as long.
        if self._has_given_up:
            late.append(self)
        begun(self)

    shares: dict[int, int] = {}

    def pause(_low: float, _high: float) -> float:
        # The first gives up at once, the others one after the other.
        if threading.current_thread().name != "lane":
            return 0.0
        return 0.2 * shares.setdefault(threading.get_ident(), len(shares) + 1)

    monkeypatch.setattr(Lanes, "_open", begin)
    monkeypatch.setattr(lanes, "uniform", pause)
    bench.fake.fault("/blobs/", Fault(cut="reset", after=4 * MIB, trickle=SLOW.trickle))
    bench.fake.fault("/blobs/", Fault(), Fault(), Fault())
    bench.fake.fault("/blobs/", Fault(status=503), repeat=True)
    with pytest.raises(UnavailableError):
        bench.fetch()
    assert late == []


def test_the_registry_dies_in_mid_blob(bench: Bench) -> None:
    bench.know()
    bench.fake.fault("/blobs/", Fault(cut="reset", after=4 * MIB, trickle=SLOW.trickle))
    bench.fake.fault("/blobs/", Fault(), Fault(), Fault())
    bench.fake.fault("/blobs/", Fault(status=503), repeat=True)
    with pytest.raises(UnavailableError) as caught:
        bench.fetch()
    assert caught.value.status == 503
    bench.fake.clear_faults()
    # What was contiguous is kept.
    with bench.store.acquire(BLOB.digest, SIZE) as ingest:  # type: ignore[union-attr]
        kept = ingest.offset
    assert 0 < kept < SIZE
    assert bench.fetch().fetched_bytes < SIZE - kept + MIB
    assert bench.holds


def test_a_full_disk_ends_all_lanes_with_its_own_error(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.know()
    bench.fake.fault("/blobs/", SLOW)
    write_at = Ingest.write_at

    def full(self: Ingest, offset: int, data: Any) -> None:
        if offset > 6 * MIB:
            raise StorageError("store", f"the disk is full at {offset}")
        write_at(self, offset, data)

    monkeypatch.setattr(Ingest, "write_at", full)
    with pytest.raises(StorageError):
        bench.fetch()
    assert not bench.store.has(BLOB.digest)


def test_little_is_read_and_not_yet_written_however_many_lanes_there_are(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lanes hold is lost when the process dies; the registry sends as fast as it can."""
    bench.know(8)
    sizes: list[int] = []
    write_at = Ingest.write_at

    def noted(self: Ingest, offset: int, data: Any) -> None:
        sizes.append(len(data))
        write_at(self, offset, data)

    monkeypatch.setattr(Ingest, "write_at", noted)
    bench.fetch()
    assert bench.holds
    assert 8 * max(sizes) < MIB


def test_a_cancelled_fetch_leaves_nothing_running(bench: Bench) -> None:
    bench.know()
    bench.fake.fault("/blobs/", SLOW)
    bench.fake.fault("/blobs/", Fault(), Fault(), Fault(stall=200_000), Fault(hang=True))
    bench.fake.fault("/blobs/", Fault(stall=10), repeat=True)

    with pytest.raises(CancelledError):
        bench.fetch(cancelled=lambda: len(bench.parts()) >= 4 and max(bench.told) > MIB)
    assert not [thread for thread in threading.enumerate() if thread.name == "lane"]
    bench.fake.clear_faults()
    with bench.store.acquire(BLOB.digest, SIZE) as ingest:  # type: ignore[union-attr]
        kept = ingest.offset
    assert bench.fetch().fetched_bytes < SIZE - kept + MIB
    assert bench.holds


def test_wrong_parts_void_the_generation_once(bench: Bench) -> None:
    bench.know()
    bench.fake.fault("/blobs/", SLOW, Fault(corrupt=1000))
    fetched = bench.fetch()
    assert bench.holds
    assert fetched.fetched_bytes >= 2 * SIZE


# A machine that has other things to do gives no steady rate to measure: it gets several chances.
CHANCES = 5


def test_what_is_measured_is_remembered(bench: Bench) -> None:
    """Each connection is slow for itself, so the second one doubles the rate, and so on."""
    bench.fake.fault("/blobs/", Fault(trickle=(16 * 1024, 0.01)), repeat=True)
    found = []
    for chance in range(CHANCES):
        with bench.anew(str(chance)) as fresh:
            fresh.fetch(range_connections=2)
            assert fresh.holds
            known = fresh.records.find(bench.fake.host)
        found.append(0 if known is None else known.connections)
        if found[-1] == 2:
            break
    assert found[-1] == 2, found
    assert bench.parts()


def test_records_expire_and_a_damaged_file_is_no_matter(tmp_path: Path) -> None:
    now = [1000.0]
    clock = Clock(wall=lambda: now[0])
    HostRecords(tmp_path, clock).learn("r.example", 4, 77)
    found = HostRecords(tmp_path, clock).find("r.example")
    assert found is not None
    assert (found.connections, found.bytes_per_second) == (4, 77)
    now[0] += LIFE_SECONDS
    assert HostRecords(tmp_path, clock).find("r.example") is None
    now[0] = 0.0  # a clock that was set back
    assert HostRecords(tmp_path, clock).find("r.example") is None
    (tmp_path / "hosts.json").write_bytes(b"\0" * 100)
    records = HostRecords(tmp_path, clock)
    assert records.find("r.example") is None
    records.learn("s.example", 2, 5)
    assert HostRecords(tmp_path, clock).find("s.example") is not None


def test_records_of_several_processes_are_kept(tmp_path: Path) -> None:
    first, second = HostRecords(tmp_path), HostRecords(tmp_path)
    assert first.find("r.example") is second.find("r.example") is None
    first.learn("r.example", 4, 1)
    second.learn("s.example", 2, 1)
    assert HostRecords(tmp_path).find("r.example") is not None
    assert HostRecords(tmp_path).find("s.example") is not None


def test_where_several_connections_bring_nothing_the_rest_comes_in_one_piece(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of a fixed width: another connection takes from the first what it brings itself."""
    bench.measure_quickly(monkeypatch)
    found = []
    with counting_proxy(bench.fake.host, bytes_per_second=2 * MIB) as line:
        for chance in range(CHANCES):
            bench.fake.requests.clear()
            with bench.anew(str(chance)) as fresh:
                fetched = fresh.fetch(host=line.host, range_connections=4)
                assert fresh.holds
                assert fetched.retries == 0
                known = fresh.records.find(line.host)
            found.append(0 if known is None else known.connections)
            if found[-1] == 1:
                break
    assert found[-1] == 1, found
    # The part that showed it, and perhaps one that was under way then; after that one to the end
    # (of which others are given some again, should the line seem to stand still).
    assert any(end == SIZE and end - start > 4 * MIB for start, end in bench.parts())


def test_a_record_of_a_limit_that_is_gone_is_corrected(bench: Bench) -> None:
    """It is measured against the first moment, before the others that it promises are opened."""
    bench.records.learn(bench.fake.host, 4, 64 * 1024)
    bench.fake.fault("/blobs/", SLOW, repeat=True)
    bench.fetch()
    assert bench.holds
    known = HostRecords(bench.store.path).find(bench.fake.host)
    assert known is not None
    assert known.bytes_per_second > MIB
