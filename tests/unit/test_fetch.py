"""Fetching into a real store from a registry that misbehaves."""

from __future__ import annotations

import gzip
import subprocess
import sys
import textwrap
import threading
from typing import TYPE_CHECKING, Any

import pytest

from stowray.pipeline.clock import Clock
from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import (
    CancelledError,
    DigestMismatchError,
    NotFoundError,
    RegistryError,
    SizeMismatchError,
    StowrayError,
    UnavailableError,
)
from stowray.pipeline.fetch import KNOWN_BLOBS, Fetched, Fetcher
from stowray.pipeline.reference import Reference
from stowray.pipeline.registry import Registry
from stowray.pipeline.settings import RegistrySettings
from stowray.pipeline.store import Store
from tests.support.registry import FakeRegistry, Fault, incompressible

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NAME = "team/app"
SIZE = 3_000_000
DATA = incompressible(SIZE)
BLOB = Descriptor("application/octet-stream", Digest.of(DATA), SIZE)


def no_wait(_low: float, _high: float) -> float:
    return 0.0


class Reports:
    """Collects reports and checks what must hold of each."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def __call__(
        self, kind: str, id: str, status: str, current: int = 0, total: int = 0, error: str = ""
    ) -> None:
        assert kind == "blob"
        assert 0 <= current <= total
        self.seen.append((status, current))

    @property
    def statuses(self) -> list[str]:
        """Return the statuses without repetitions."""
        return [
            status
            for index, (status, _) in enumerate(self.seen)
            if index == 0 or self.seen[index - 1][0] != status
        ]


class Bench:
    """A registry, a store, and what fetches from the one into the other."""

    def __init__(self, folder: Path, fake: FakeRegistry) -> None:
        self.fake = fake
        self.folder = folder
        self.store = Store.open(folder / "store")
        self.reports = Reports()
        self.registries: list[Registry] = []
        self.reference = Reference.parse(f"{fake.host}/{NAME}:1")

    def registry(self, **settings: Any) -> Registry:
        registry = Registry(RegistrySettings(**settings), environment={})
        self.registries.append(registry)
        return registry

    def fetcher(self, origins: Any = None, **settings: Any) -> Fetcher:
        settings = {"attempts": 4, "stall_timeout_seconds": 20.0, **settings}
        return Fetcher(
            self.store,
            [self.registry(**settings)] if origins is None else origins,
            RegistrySettings(**settings),
            uniform=no_wait,
        )

    def fetch(
        self,
        descriptor: Descriptor = BLOB,
        cancelled: Callable[[], bool] = lambda: False,
        **settings: Any,
    ) -> Fetched:
        return self.fetcher(**settings).fetch(
            self.reference, descriptor, report=self.reports, cancelled=cancelled
        )

    def holds(self, descriptor: Descriptor = BLOB, data: bytes = DATA) -> bool:
        if not self.store.has(descriptor.digest, descriptor.size):
            return False
        return self.store.blob_path(descriptor.digest).read_bytes() == data

    @property
    def leftovers(self) -> list[str]:
        return [path.name for path in (self.store.path / "ingest").iterdir()]

    def ranges(self) -> list[str | None]:
        return [request.range for request in self.fake.seen("/blobs/")]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with FakeRegistry() as fake:
        fake.add_blob(DATA)
        made = Bench(tmp_path, fake)
        yield made
        for registry in made.registries:
            registry.close()
        made.store.close()


def test_a_blob_comes_whole_and_is_confirmed(bench: Bench) -> None:
    fetched = bench.fetch()
    assert bench.holds()
    assert fetched.digest == BLOB.digest
    assert (fetched.source, fetched.fetched_bytes, fetched.retries) == (bench.fake.host, SIZE, 0)
    assert bench.reports.statuses == ["waiting", "downloading", "done"]
    assert bench.reports.seen[-1] == ("done", SIZE)
    assert bench.store.confirmed(BLOB.digest, bench.reference.name)
    assert bench.leftovers == []


def test_a_blob_that_is_here_is_not_asked_for(bench: Bench) -> None:
    bench.fetch()
    bench.reports.seen.clear()
    fetched = bench.fetch()
    assert (fetched.source, fetched.fetched_bytes) == ("store", 0)
    assert bench.reports.seen == [("waiting", 0), ("exists", SIZE)]
    assert len(bench.fake.requests) == 1


# Interrupted bodies


@pytest.mark.parametrize("how", ["reset", "fin"])
@pytest.mark.parametrize("after", [-1, 0, 1, SIZE // 2, SIZE - 1])
def test_a_cut_body_goes_on_where_it_ended(bench: Bench, how: str, after: int) -> None:
    bench.fake.fault("/blobs/", Fault(cut=how, after=after))
    fetched = bench.fetch()
    assert bench.holds()
    assert fetched.retries == 1
    ranges = bench.ranges()
    assert ranges[0] is None
    if how == "fin" and after > 0:
        assert ranges[1:] == [f"bytes={after}-{SIZE - 1}"]
        assert fetched.fetched_bytes == SIZE
    # A reset may void what had arrived but was not read yet, never more.
    assert fetched.fetched_bytes <= SIZE


@pytest.mark.parametrize("how", ["reset", "fin"])
@pytest.mark.parametrize("after", [1, 2500, 4999])
def test_a_small_blob_that_is_cut_goes_on_as_well(bench: Bench, how: str, after: int) -> None:
    small = DATA[:5000]
    bench.fake.add_blob(small)
    descriptor = Descriptor(BLOB.media_type, Digest.of(small), len(small))
    bench.fake.fault("/blobs/", Fault(cut=how, after=after))
    fetched = bench.fetch(descriptor)
    assert bench.holds(descriptor, small)
    assert bench.leftovers == []
    if how == "fin":
        assert bench.ranges() == [None, f"bytes={after}-4999"]
        assert fetched.fetched_bytes == 5000


def test_a_small_blob_of_wrong_bytes_gets_one_fresh_try(bench: Bench) -> None:
    small = DATA[:5000]
    bench.fake.add_blob(small)
    descriptor = Descriptor(BLOB.media_type, Digest.of(small), len(small))
    bench.fake.fault("/blobs/", Fault(corrupt=77))
    bench.fetch(descriptor)
    assert bench.holds(descriptor, small)
    assert bench.ranges() == [None, None]


def test_many_cuts(bench: Bench) -> None:
    cuts = [Fault(cut="fin", after=size) for size in (100_000, 1, 0, 700_000, 3, 1_500_000)]
    bench.fake.fault("/blobs/", *cuts)
    assert bench.fetch(attempts=10).retries == len(cuts)
    assert bench.holds()


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(length="none"), id="no length"),
        pytest.param(Fault(length="chunked"), id="chunked"),
        pytest.param(Fault(length="none", cut="fin", after=SIZE), id="cut at its end"),
        pytest.param(Fault(length="chunked", cut="reset", after=SIZE), id="last chunk missing"),
    ],
)
def test_the_descriptor_tells_the_end(bench: Bench, fault: Fault) -> None:
    bench.fake.fault("/blobs/", fault)
    fetched = bench.fetch()
    assert bench.holds()
    assert fetched.retries <= 1


@pytest.mark.parametrize("length", ["none", "chunked"])
def test_a_cut_without_length_is_noticed(bench: Bench, length: str) -> None:
    bench.fake.fault("/blobs/", Fault(length=length, cut="fin", after=SIZE // 3))
    fetched = bench.fetch()
    assert bench.holds()
    assert fetched.fetched_bytes == SIZE
    assert bench.ranges()[1] == f"bytes={SIZE // 3}-{SIZE - 1}"


def test_progress_never_gives_up(bench: Bench) -> None:
    # Each attempt brings a megabyte: two attempts are enough for any length.
    bench.fake.fault("/blobs/", Fault(cut="fin", after=1 << 20), repeat=True)
    fetched = bench.fetch(attempts=2)
    assert bench.holds()
    assert fetched.retries == 2


def test_who_brings_something_is_gone_on_with_at_once(bench: Bench) -> None:
    waits: list[float] = []

    def note(_low: float, high: float) -> float:
        waits.append(high)
        return 0.0

    settings = RegistrySettings(attempts=2)
    fetcher = Fetcher(bench.store, [bench.registry(attempts=2)], settings, uniform=note)
    bench.fake.fault("/blobs/", Fault(cut="fin", after=100_000), repeat=True)
    fetched = fetcher.fetch(bench.reference, BLOB, report=bench.reports)
    assert bench.holds()
    assert fetched.retries == len(bench.ranges()) - 1 == (SIZE - 1) // 100_000
    assert waits == []


def test_no_progress_gives_up(bench: Bench) -> None:
    bench.fake.fault("/blobs/", Fault(cut="fin", after=10), repeat=True)
    with pytest.raises(UnavailableError):
        bench.fetch(attempts=5)
    assert len(bench.fake.requests) == 5
    assert not bench.store.has(BLOB.digest)
    bench.fake.clear_faults()
    # What had come is kept for the next run.
    fetched = bench.fetch()
    assert fetched.fetched_bytes == SIZE - 50
    assert bench.holds()


def test_stalled_and_trickling_bodies_are_left(bench: Bench) -> None:
    bench.fake.fault("/blobs/", Fault(stall=100_000), Fault(trickle=(1, 0.02)), Fault(hang=True))
    fetched = bench.fetch(
        attempts=10,
        stall_timeout_seconds=0.3,
        connect_timeout_seconds=0.3,
        minimum_bytes_per_second=10_000,
    )
    assert bench.holds()
    assert fetched.retries >= 3


def test_a_slow_but_steady_body_is_not_left(bench: Bench) -> None:
    data = DATA[:200_000]
    slow = Descriptor("application/octet-stream", Digest(bench.fake.add_blob(data)), len(data))
    bench.fake.fault("/blobs/", Fault(trickle=(2000, 0.02)))
    fetched = bench.fetch(slow, stall_timeout_seconds=1.0, minimum_bytes_per_second=1000)
    assert (fetched.retries, bench.holds(slow, data)) == (0, True)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 522])
def test_passing_refusals_are_tried_again(bench: Bench, status: int) -> None:
    bench.fake.fault("/blobs/", Fault(status=status))
    assert bench.fetch().retries == 1
    assert "retrying" in bench.reports.statuses


@pytest.mark.parametrize(("status", "kind"), [(404, NotFoundError), (400, RegistryError)])
def test_lasting_refusals_are_not(bench: Bench, status: int, kind: type[Exception]) -> None:
    bench.fake.fault("/blobs/", Fault(status=status), repeat=True)
    with pytest.raises(kind):
        bench.fetch()
    assert bench.fake.count("/blobs/") <= 2
    assert bench.leftovers == []


def test_a_host_that_pauses_us_is_left_alone(bench: Bench) -> None:
    now = [0.0]
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    clock = Clock(monotonic=lambda: now[0], wall=lambda: now[0], sleep=sleep)
    registry = Registry(RegistrySettings(), environment={}, clock=clock)
    bench.registries.append(registry)
    bench.fake.fault("/blobs/", Fault(status=429, headers=(("Retry-After", "7"),)))
    fetcher = Fetcher(bench.store, [registry], clock=clock, uniform=no_wait)
    fetcher.fetch(bench.reference, BLOB, report=bench.reports)
    assert sum(slept) == pytest.approx(7.0, abs=0.2)


# Ranges


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(ignore_range=True), id="ignored"),
        pytest.param(Fault(short_range=700_000), id="short"),
        pytest.param(Fault(no_total=True), id="no total"),
        pytest.param(Fault(shift_range=1), id="shifted"),
        pytest.param(Fault(shift_range=-1), id="shifted back"),
        pytest.param(Fault(multipart=True), id="multipart"),
        pytest.param(Fault(remove=("Content-Range",)), id="no Content-Range"),
        pytest.param(Fault(false_range="bytes 0-2999999/3000000"), id="false Content-Range"),
        pytest.param(Fault(status=416), id="416"),
    ],
)
def test_going_on_whatever_the_range(bench: Bench, fault: Fault) -> None:
    bench.fake.fault("/blobs/", Fault(cut="fin", after=1_000_000), fault)
    fetched = bench.fetch()
    assert bench.holds()
    assert bench.ranges()[1] == f"bytes=1000000-{SIZE - 1}"
    assert fetched.fetched_bytes <= SIZE + 1_000_000


def test_pieces_of_any_size(bench: Bench) -> None:
    data = DATA[:5000]
    small = Descriptor("application/octet-stream", Digest(bench.fake.add_blob(data)), len(data))
    bench.fake.fault("/blobs/", Fault(cut="fin", after=10))
    bench.fake.fault("/blobs/", Fault(short_range=100), repeat=True)
    bench.fetch(small)
    assert bench.holds(small, data)
    assert bench.fake.count("/blobs/") == 51


# Wrong bytes


def test_wrong_bytes_get_one_fresh_try(bench: Bench) -> None:
    bench.fake.fault("/blobs/", Fault(corrupt=SIZE // 2))
    fetched = bench.fetch()
    assert bench.holds()
    assert (fetched.fetched_bytes, fetched.retries) == (2 * SIZE, 1)
    assert bench.ranges() == [None, None]


def test_wrong_bytes_for_ever_are_never_committed(bench: Bench) -> None:
    bench.fake.fault("/blobs/", Fault(corrupt=0), repeat=True)
    with pytest.raises(DigestMismatchError) as caught:
        bench.fetch()
    assert caught.value.expected == BLOB.digest
    assert not bench.store.has(BLOB.digest)
    assert bench.fake.count("/blobs/") == 2
    assert list((bench.store.path / "blobs" / "sha256").glob("*")) == []


def test_another_content_at_the_resume_is_noticed(bench: Bench) -> None:
    other = incompressible(SIZE, seed=2)
    bench.fake.fault("/blobs/", Fault(cut="fin", after=1_000_000), Fault(body=other))
    bench.fetch()
    assert bench.holds()
    assert bench.ranges()[-1] is None


@pytest.mark.parametrize("length", ["right", "none", "chunked"])
def test_too_long(bench: Bench, length: str) -> None:
    bench.fake.fault("/blobs/", Fault(body=DATA + b"x" * 900_000, length=length), repeat=True)
    with pytest.raises(SizeMismatchError) as caught:
        bench.fetch()
    assert caught.value.expected == SIZE
    assert not bench.store.has(BLOB.digest)


@pytest.mark.parametrize("wrong", [SIZE - 1, SIZE + 1])
def test_a_wrong_size_in_the_descriptor_is_an_error(bench: Bench, wrong: int) -> None:
    with pytest.raises((SizeMismatchError, UnavailableError)):
        bench.fetch(Descriptor(BLOB.media_type, BLOB.digest, wrong))
    assert not bench.store.has(BLOB.digest)


def test_an_error_page_does_not_void_what_is_here(bench: Bench) -> None:
    page = Fault(status=200, body=b'{"errors":[]}', headers=(("Content-Type", "text/plain"),))
    bench.fake.fault("/blobs/", Fault(cut="fin", after=2_000_000), page)
    fetched = bench.fetch()
    assert bench.holds()
    assert fetched.fetched_bytes <= SIZE + 100


def test_an_encoded_blob(bench: Bench) -> None:
    packed = gzip.compress(b"layer" * 10_000, mtime=0)
    layer = Descriptor("application/octet-stream", Digest(bench.fake.add_blob(packed)), len(packed))
    bench.fake.fault("/blobs/", Fault(encoding="gzip"))
    bench.fetch(layer)
    assert bench.holds(layer, packed)


def test_a_signed_url_that_expired_at_the_resume(bench: Bench) -> None:
    bench.fake.redirect = True
    cut = Fault(cut="fin", after=1_000_000)
    bench.fake.fault("/cdn/", cut, Fault(then=bench.fake.expire_signatures))
    bench.fetch()
    assert bench.holds()
    assert [request.range for request in bench.fake.seen("/cdn/")] == [
        None,
        f"bytes=1000000-{SIZE - 1}",
        f"bytes=1000000-{SIZE - 1}",
    ]


# Blobs that need no source


@pytest.mark.parametrize("data", [b"", *KNOWN_BLOBS.values()], ids=["empty", "{}", "no layer"])
def test_known_blobs_need_no_network(bench: Bench, data: bytes) -> None:
    known = Descriptor("application/octet-stream", Digest.of(data), len(data))
    fetched = bench.fetch(known)
    assert bench.holds(known, data)
    assert (fetched.fetched_bytes, bench.fake.requests) == (0, [])


def test_inline_data(bench: Bench) -> None:
    inline = Descriptor("application/octet-stream", BLOB.digest, SIZE, data=DATA)
    bench.fetch(inline)
    assert bench.holds()
    assert bench.fake.requests == []


@pytest.mark.parametrize("data", [DATA[:-1], b"x" * SIZE, b""])
def test_wrong_inline_data_is_passed_over(bench: Bench, data: bytes) -> None:
    bench.fetch(Descriptor("application/octet-stream", BLOB.digest, SIZE, data=data))
    assert bench.holds()
    assert len(bench.fake.requests) == 1


def test_a_known_digest_of_another_size_is_no_shortcut(bench: Bench) -> None:
    digest = Digest(next(iter(KNOWN_BLOBS)))
    with pytest.raises(StowrayError):
        bench.fetch(Descriptor("application/octet-stream", digest, 3))


# Several sources


def test_the_next_source_goes_on_at_the_same_byte(bench: Bench) -> None:
    with FakeRegistry() as mirror:
        mirror.add_blob(DATA)
        mirror.fault("/blobs/", Fault(cut="fin", after=1_234_567))
        near = _At(bench.registry(), f"{mirror.host}/{NAME}")
        fetched = bench.fetcher([near, bench.registry()]).fetch(
            bench.reference, BLOB, report=bench.reports
        )
        assert bench.holds()
        assert fetched.fetched_bytes == SIZE
        assert bench.ranges() == [f"bytes=1234567-{SIZE - 1}"]
        assert mirror.count() == 1


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=404),
        Fault(status=401),
        Fault(status=403),
        Fault(status=500),
        Fault(status=400),
        Fault(corrupt=7),
        Fault(body=DATA[:-1]),
        Fault(cut="reset", after=-1),
    ],
)
def test_a_bad_mirror_is_left(bench: Bench, fault: Fault) -> None:
    with FakeRegistry() as mirror:
        mirror.add_blob(DATA)
        mirror.fault("/", fault, repeat=True)
        near = _At(bench.registry(), f"{mirror.host}/{NAME}")
        fetched = bench.fetcher([near, bench.registry()]).fetch(
            bench.reference, BLOB, report=bench.reports
        )
    assert bench.holds()
    assert fetched.source == bench.fake.host


def test_a_dead_mirror_is_left_and_the_error_is_the_registry_s(bench: Bench) -> None:
    dead = _At(bench.registry(), f"127.0.0.1:1/{NAME}")
    bench.fake.fault("/blobs/", Fault(status=404), repeat=True)
    with pytest.raises(NotFoundError) as caught:
        bench.fetcher([dead, bench.registry()]).fetch(bench.reference, BLOB, report=bench.reports)
    assert caught.value.where == bench.fake.host
    bench.fake.clear_faults()
    bench.fetcher([dead, bench.registry()]).fetch(bench.reference, BLOB, report=bench.reports)
    assert bench.holds()


def test_a_mirror_s_wrong_half_is_not_charged_to_the_registry(bench: Bench) -> None:
    with FakeRegistry() as mirror:
        mirror.add_blob(b"x" + DATA[1:], BLOB.digest)
        mirror.fault("/blobs/", Fault(cut="fin", after=2_000_000), repeat=True)
        near = _At(bench.registry(), f"{mirror.host}/{NAME}")
        fetched = bench.fetcher([near, bench.registry()]).fetch(
            bench.reference, BLOB, report=bench.reports
        )
        assert mirror.count() == 1
    assert bench.holds()
    assert fetched.source == bench.fake.host
    assert bench.ranges() == [f"bytes=2000000-{SIZE - 1}", None]


def test_an_earlier_run_s_wrong_bytes_are_not_charged_to_the_registry(bench: Bench) -> None:
    ingest = bench.store.acquire(BLOB.digest, SIZE)
    assert ingest is not None
    with ingest:
        ingest.write(b"x" + DATA[1:1_000_000])
    bench.fake.fault("/blobs/", Fault(), Fault(corrupt=5))
    bench.fetch()
    assert bench.holds()
    assert bench.ranges() == [f"bytes=1000000-{SIZE - 1}", None, None]


def test_a_source_that_hands_over_bytes_objects(bench: Bench) -> None:
    """Images on disk and peers need not fill buffers."""

    class Stream:
        offset = 0
        source = "file"

        def __init__(self) -> None:
            self._left = memoryview(DATA)

        def read(self, size: int) -> bytes:
            piece, self._left = self._left[:size], self._left[size:]
            return bytes(piece)

        def close(self) -> None:
            pass

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

    class Disk:
        def open_blob(self, *_: Any, **__: Any) -> Stream:
            return Stream()

    fetched = bench.fetcher([Disk()]).fetch(bench.reference, BLOB, report=bench.reports)
    assert bench.holds()
    assert fetched.source == "file"


def test_no_source_at_all(bench: Bench) -> None:
    with pytest.raises(NotFoundError):
        bench.fetcher([]).fetch(bench.reference, BLOB, report=bench.reports)


class _At:
    """A registry asked for one repository whatever the reference says, as a mirror is."""

    def __init__(self, registry: Registry, name: str) -> None:
        self._registry = registry
        self._reference = Reference.parse(f"{name}:1")

    def open_blob(self, _reference: Any, *arguments: Any, **options: Any) -> Any:
        return self._registry.open_blob(self._reference, *arguments, **options)


# Cancelling and other writers


@pytest.mark.parametrize(
    "fault", [Fault(stall=2_000_000), Fault(trickle=(50_000, 0.05)), Fault(hang=True)]
)
def test_a_cancelled_fetch_keeps_what_it_has(bench: Bench, fault: Fault) -> None:
    bench.fake.fault("/blobs/", fault)
    received = 100_000 if not fault.hang else 0

    def cancelled() -> bool:
        return bench.fake.count("/blobs/") > 0 and (
            not received or any(current > received for _, current in bench.reports.seen)
        )

    with pytest.raises(CancelledError):
        bench.fetch(cancelled=cancelled)
    fetched = bench.fetch()
    assert bench.holds()
    assert fetched.fetched_bytes <= SIZE - received
    assert bench.leftovers == []


def test_many_threads_fetch_a_blob_once(bench: Bench) -> None:
    fetcher = bench.fetcher()
    results: list[Fetched] = []

    def work() -> None:
        results.append(fetcher.fetch(bench.reference, BLOB, report=Reports()))

    threads = [threading.Thread(target=work) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bench.fake.requests) == 1
    assert sorted(result.fetched_bytes for result in results) == [0] * 9 + [SIZE]
    assert bench.holds()


def wait_together(bench: Bench, names: list[str], status: int) -> list[StowrayError | Fetched]:
    """Fetch in several threads: the first one's request fails when all others wait for it."""
    fetcher = bench.fetcher()
    results: list[StowrayError | Fetched] = []
    reports = [Reports() for _ in names]

    def everybody_waits() -> None:
        while not all(report.seen for report in reports):
            bench.fake._closing.wait(0.01)

    path = f"/v2/{names[0]}/blobs/"
    bench.fake.fault(path, Fault(status=status, body=b"no", then=everybody_waits))

    def work(name: str, report: Reports) -> None:
        reference = Reference.parse(f"{bench.fake.host}/{name}:1")
        try:
            results.append(fetcher.fetch(reference, BLOB, report=report))
        except StowrayError as error:
            results.append(error)

    threads = [
        threading.Thread(target=work, args=arguments)
        for arguments in zip(names, reports, strict=True)
    ]
    threads[0].start()
    bench.fake.wait_for("/blobs/")
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_those_who_wait_for_one_that_fails_get_its_cause(bench: Bench) -> None:
    results = wait_together(bench, [NAME] * 10, 400)
    assert bench.fake.count("/blobs/") == 1
    assert all(isinstance(error, RegistryError) for error in results)
    assert len({str(error) for error in results}) == 1
    # It is no verdict for ever.
    assert bench.fetch().fetched_bytes == SIZE


def test_a_cause_that_is_another_repository_s_is_not_shared(bench: Bench) -> None:
    results = wait_together(bench, ["secret/app", NAME, NAME], 404)
    failed = [result for result in results if isinstance(result, NotFoundError)]
    assert (len(failed), len(results)) == (1, 3)
    assert bench.holds()


def test_a_dead_writer_is_taken_over(bench: Bench) -> None:
    writer = """
        import sys
        from stowray.pipeline.digest import Digest
        from stowray.pipeline.store import Store
        store = Store.open(sys.argv[1])
        ingest = store.acquire(Digest(sys.argv[2]), int(sys.argv[3]))
        ingest.write(sys.stdin.buffer.read())
        print("written", flush=True)
        sys.stdout.close()
        import time
        time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(writer)]
    command += [str(bench.store.path), str(BLOB.digest), str(SIZE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(DATA[:1_000_000])
        process.stdin.close()
        assert process.stdout.readline() == b"written\n"
        done: list[Fetched] = []
        thread = threading.Thread(target=lambda: done.append(bench.fetch()))
        thread.start()
        # Follows the other one's progress, and asks nothing of the registry meanwhile.
        while not any(current == 1_000_000 for _, current in bench.reports.seen):
            thread.join(0.01)
        assert bench.fake.requests == []
        process.kill()
        thread.join(30)
    assert bench.holds()
    assert done[0].fetched_bytes == SIZE - 1_000_000
    assert bench.ranges() == [f"bytes=1000000-{SIZE - 1}"]


def test_waiting_for_another_writer_can_be_cancelled(bench: Bench) -> None:
    ingest = bench.store.acquire(BLOB.digest, SIZE)
    assert ingest is not None
    with ingest, pytest.raises(CancelledError):
        bench.fetch(cancelled=lambda: bool(bench.reports.seen))
    assert bench.fake.requests == []


def test_what_was_complete_is_committed_without_a_request(bench: Bench) -> None:
    ingest = bench.store.acquire(BLOB.digest, SIZE)
    assert ingest is not None
    with ingest:
        ingest.write(DATA)
    fetched = bench.fetch()
    assert bench.holds()
    assert (fetched.fetched_bytes, bench.fake.requests) == (0, [])


def test_what_was_complete_but_wrong_is_fetched_anew(bench: Bench) -> None:
    ingest = bench.store.acquire(BLOB.digest, SIZE)
    assert ingest is not None
    with ingest:
        ingest.write(bytes(SIZE))
    bench.fetch()
    assert bench.holds()


def test_thousands_of_small_blobs_over_a_few_connections(bench: Bench) -> None:
    blobs = []
    for index in range(300):
        data = b"%d" % index
        blobs.append(
            Descriptor("application/octet-stream", Digest(bench.fake.add_blob(data)), len(data))
        )
    fetcher = bench.fetcher()
    for descriptor in blobs:
        fetcher.fetch(bench.reference, descriptor, report=bench.reports)
    assert len({request.connection for request in bench.fake.requests}) == 1
