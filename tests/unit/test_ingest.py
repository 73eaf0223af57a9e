from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import DigestMismatchError, SizeMismatchError, StorageError
from stowray.pipeline.prefix_digest import CHECKPOINT_EVERY
from stowray.pipeline.store import Store
from tests.support.stores import (
    FIRST_BOOT,
    NEXT_BOOT,
    check_blobs,
    commit,
    kill,
    leftovers,
    listen,
    pattern,
    run_killed,
    start,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stowray.pipeline.ingest import Ingest

MIB = 1 << 20
LONG = 2 * CHECKPOINT_EVERY + 3 * MIB + 7

WRITE = """
path, digest, size, seed, stop = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
store = Store.open(path)
data = hashlib.shake_256(seed.to_bytes(8, "little")).digest(size)
ingest = store.acquire(Digest(digest), size)
say("none" if ingest is None else f"at {ingest.offset}")
if ingest is None:
    sys.exit()
ingest.write(data[ingest.offset:stop])
say("written")
if stop < size:
    sys.stdin.read()
ingest.commit()
ingest.close()
say("committed")
"""


@pytest.fixture
def store(workspace: Path) -> Iterator[Store]:
    with Store.open(workspace / "store", boot=FIRST_BOOT) as store:
        yield store


def take(store: Store, digest: Digest, size: int) -> Ingest:
    ingest = store.acquire(digest, size)
    assert ingest is not None
    return ingest


def take_bare(store: Store, digest: Digest, size: int) -> Ingest:
    ingest = store.acquire(digest, size, bare=True)
    assert ingest is not None
    return ingest


def data_file(store: Store, digest: Digest) -> Path:
    (path,) = store.ingest_path(digest).glob("data.*")
    return path


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
@pytest.mark.parametrize("size", [0, 1, 4096, MIB + 1])
def test_a_blob_becomes_visible_by_its_commit(store: Store, algorithm: str, size: int) -> None:
    data = pattern(size)
    digest = Digest.of(data, algorithm)
    with take(store, digest, size) as ingest:
        ingest.write(data)
        assert not store.blob_path(digest).exists()
        assert not store.has(digest)
        ingest.commit()
        ingest.commit()
    assert store.has(digest, size)
    assert check_blobs(store.path) == {digest}
    assert leftovers(store.path) == []


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_the_modes_do_not_depend_on_the_umask(workspace: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        with Store.open(workspace / "store") as store:
            digest = commit(store, b"content")
            assert store.has(digest)
    finally:
        os.umask(previous)
    assert (workspace / "store").stat().st_mode & 0o7777 == 0o700
    check_blobs(workspace / "store")


def test_two_algorithms_give_two_names_of_the_same_bytes(store: Store) -> None:
    assert check_blobs(store.path) == set()
    names = {commit(store, b"same", algorithm) for algorithm in ("sha256", "sha512")}
    assert check_blobs(store.path) == names


def test_a_body_that_is_too_long_is_refused_before_it_is_written(store: Store) -> None:
    data = pattern(1000)
    with take(store, Digest.of(data), 1000) as ingest:
        ingest.write(data[:600])
        with pytest.raises(SizeMismatchError) as caught:
            ingest.write(data[600:] + b"x")
        assert (caught.value.expected, caught.value.actual) == (1000, 1001)
        assert ingest.offset == 600
        ingest.write(data[600:])
        ingest.commit()


def test_a_body_that_is_too_short_is_kept_for_the_next_writer(store: Store) -> None:
    data = pattern(1000)
    digest = Digest.of(data)
    with take(store, digest, 1000) as ingest:
        ingest.write(data[:999])
        with pytest.raises(SizeMismatchError):
            ingest.commit()
    assert not store.has(digest)
    with take(store, digest, 1000) as ingest:
        assert ingest.offset == 999
        ingest.write(data[999:])
        ingest.commit()
    assert store.has(digest)


def test_wrong_bytes_are_dropped_and_right_ones_follow_in_a_new_generation(store: Store) -> None:
    data = pattern(1000)
    digest = Digest.of(data)
    with take(store, digest, 1000) as ingest:
        first = ingest.generation
        ingest.write(pattern(1000, seed=1))
        with pytest.raises(DigestMismatchError) as caught:
            ingest.commit()
        assert caught.value.expected == digest
        assert caught.value.actual == Digest.of(pattern(1000, seed=1))
        assert check_blobs(store.path) == set()
        assert (ingest.offset, ingest.generation) == (0, first + 1)
        assert data_file(store, digest).stat().st_size == 0
        ingest.write(data)
        ingest.commit()
    assert check_blobs(store.path) == {digest}
    assert leftovers(store.path) == []


def test_a_restart_drops_what_was_written(store: Store) -> None:
    data = pattern(1000)
    with take(store, Digest.of(data), 1000) as ingest:
        ingest.write(pattern(500, seed=1))
        ingest.restart()
        assert (ingest.offset, ingest.generation) == (0, 2)
        ingest.restart()  # nothing to drop: the same generation goes on
        assert ingest.generation == 2
        ingest.write(data)
        ingest.commit()
    assert store.has(Digest.of(data))


def test_one_writer_at_a_time(store: Store) -> None:
    data = pattern(10)
    digest = Digest.of(data)
    with take(store, digest, 10) as ingest:
        assert store.acquire(digest, 10) is None
        process = start(WRITE, store.path, digest, 10, 0, 10)
        listen(process, "none")
        assert process.wait(60) == 0
        process.communicate()
        ingest.write(data)
        ingest.commit()
    # Whoever comes later finds it done.
    with take(store, digest, 10) as late:
        assert late.offset == 10
        late.commit()
    assert leftovers(store.path) == []


def test_a_follower_that_stops_in_its_test_of_life_keeps_nobody_out_afterwards(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pattern(5000)
    digest = Digest.of(data)
    with store.acquire(digest, len(data)) as ingest:
        ingest.write(data[:100])
    monkeypatch.setattr("stowray.pipeline.ingest._LIFE_SIGN_ATTEMPTS", 3)
    path = store.ingest_path(digest) / "state"
    with path.open("rb") as state:
        fcntl.flock(state, fcntl.LOCK_SH)
        assert store.acquire(digest, len(data)) is None
    ingest = store.acquire(digest, len(data))
    assert ingest is not None, "who gave up has let go of what it had locked"
    with ingest:
        assert ingest.offset == 100
        ingest.write(data[100:])
        ingest.commit()
    assert check_blobs(store.path) == {str(digest)}


@pytest.mark.parametrize("size", [1, 500, 5000, 50_000])
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_resume_goes_on_where_it_was(store: Store, size: int, part: float) -> None:
    data = pattern(size)
    digest = Digest.of(data)
    reached = int(size * part)
    with take(store, digest, size) as ingest:
        ingest.write(data[:reached])
    with take(store, digest, size) as ingest:
        assert ingest.offset == reached
        ingest.write(data[reached:])
        ingest.commit()
    assert check_blobs(store.path) == {digest}
    assert leftovers(store.path) == []


@pytest.mark.parametrize("same_boot", [True, False], ids=["same boot", "after a reboot"])
@pytest.mark.parametrize(
    ("damage_at", "expected"),
    [
        pytest.param(None, LONG - 5, id="none"),
        pytest.param(0, 0, id="first byte"),
        pytest.param(CHECKPOINT_EVERY - 1, 0, id="end of the first checkpoint"),
        pytest.param(CHECKPOINT_EVERY, CHECKPOINT_EVERY, id="second checkpoint"),
        pytest.param(LONG - 6, 2 * CHECKPOINT_EVERY, id="last byte"),
    ],
)
def test_only_the_proven_part_of_a_damaged_partial_is_kept(
    store: Store, damage_at: int | None, expected: int, same_boot: bool
) -> None:
    data = pattern(LONG)
    digest = Digest.of(data)
    with take(store, digest, LONG) as ingest:
        ingest.write(data[:-5])
        generation = ingest.generation
    if damage_at is not None:
        with data_file(store, digest).open("r+b") as file:
            file.seek(damage_at)
            file.write(bytes([data[damage_at] ^ 1]))
    with Store.open(store.path, boot=FIRST_BOOT if same_boot else NEXT_BOOT) as other:
        with take(other, digest, LONG) as ingest:
            assert ingest.offset == expected
            # Bytes that followers have seen may change now, so they must be told.
            assert (ingest.generation == generation) == (damage_at is None)
            ingest.write(data[expected:])
            ingest.commit()
        assert other.has(digest)
    assert leftovers(store.path) == []


@pytest.mark.parametrize("length", [0, 1, CHECKPOINT_EVERY, LONG - 100])
def test_a_partial_that_lost_its_end_is_kept_as_far_as_it_goes(store: Store, length: int) -> None:
    data = pattern(LONG)
    digest = Digest.of(data)
    with take(store, digest, LONG) as ingest:
        ingest.write(data[:-5])
    os.truncate(data_file(store, digest), length)
    with take(store, digest, LONG) as ingest:
        assert ingest.offset == length // CHECKPOINT_EVERY * CHECKPOINT_EVERY
        ingest.write(data[ingest.offset :])
        ingest.commit()
    assert check_blobs(store.path) == {digest}


@pytest.mark.parametrize("name", ["state", "journal", "data"])
@pytest.mark.parametrize("content", [None, b"", b"\0" * 64, b"\xff" * 64, b"garbage" * 100])
def test_damage_of_our_own_files_costs_at_most_the_partial(
    store: Store, name: str, content: bytes | None
) -> None:
    data = pattern(5000)
    digest = Digest.of(data)
    with take(store, digest, 5000) as ingest:
        ingest.write(data[:4000])
    path = data_file(store, digest) if name == "data" else store.ingest_path(digest) / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with take(store, digest, 5000) as ingest:
        assert ingest.offset == 0
        ingest.write(data)
        ingest.commit()
    assert check_blobs(store.path) == {digest}
    assert leftovers(store.path) == []


def test_another_size_of_the_same_digest_starts_anew(store: Store) -> None:
    data = pattern(1000)
    digest = Digest.of(data)
    with take(store, digest, 2000) as ingest:
        ingest.write(data)
    with take(store, digest, 1000) as ingest:
        assert ingest.offset == 0
        ingest.write(data)
        ingest.commit()
    assert store.has(digest, 1000)
    assert not store.has(digest, 2000)


@pytest.mark.parametrize(
    ("boot", "kept"),
    [
        pytest.param(None, LONG - 5, id="same boot: all that was written"),
        pytest.param(NEXT_BOOT, 2 * CHECKPOINT_EVERY, id="after a reboot: the checkpoints"),
    ],
)
def test_a_killed_writer_is_taken_over(store: Store, boot: object, kept: int) -> None:
    data = pattern(LONG, seed=3)
    digest = Digest.of(data)
    process = start(WRITE, store.path, digest, LONG, 3, LONG - 5)
    listen(process, "at 0")
    listen(process, "written")
    assert store.acquire(digest, LONG) is None
    kill(process)
    with Store.open(store.path, boot=boot) as other:  # type: ignore[arg-type]
        with take(other, digest, LONG) as ingest:
            assert ingest.offset == kept
            ingest.write(data[kept:])
            ingest.commit()
        assert other.has(digest)
    assert leftovers(store.path) == []


@pytest.mark.parametrize(
    "failpoint",
    [
        "ingest-proven",
        "ingest-before-rename",
        "ingest-after-rename",
        "ingest-after-record",
        "ingest-before-unlock",
    ],
)
def test_a_crash_at_any_step_of_a_commit_leaves_all_or_nothing(
    workspace: Path, failpoint: str
) -> None:
    data = pattern(10_000, seed=5)
    digest = Digest.of(data)
    path = workspace / "store"
    run_killed(WRITE, path, digest, 10_000, 5, 10_000, failpoint=failpoint)
    visible = check_blobs(path)
    assert visible == (
        set() if failpoint in ("ingest-proven", "ingest-before-rename") else {digest}
    )
    with Store.open(path) as store:
        with take(store, digest, 10_000) as ingest:
            assert ingest.offset == 10_000  # nothing is fetched twice
            ingest.commit()
        assert store.has(digest, 10_000)
    assert check_blobs(path) == {digest}
    assert leftovers(path) == []


def test_writers_that_are_killed_again_and_again_end_with_the_blob(workspace: Path) -> None:
    size = 3 * MIB
    data = pattern(size, seed=9)
    digest = Digest.of(data)
    path = workspace / "store"
    Store.open(path).close()
    for stop in range(MIB // 2, size, MIB // 2):
        process = start(WRITE, path, digest, size, 9, stop)
        listen(process, f"at {stop - MIB // 2}")
        listen(process, "written")
        kill(process)
        assert check_blobs(path) == set()
    processes = [start(WRITE, path, digest, size, 9, size) for _ in range(3)]
    for process in processes:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert check_blobs(path) == {digest}


class TestWriteAt:
    def test_only_the_contiguous_prefix_counts(self, store: Store) -> None:
        data = pattern(1000)
        with take(store, Digest.of(data), 1000) as ingest:
            ingest.write_at(500, data[500:700])
            assert ingest.offset == 0
            ingest.write_at(0, data[:400])
            assert ingest.offset == 400
            ingest.write_at(700, data[700:])
            assert ingest.offset == 400
            ingest.write_at(400, data[400:500])
            assert ingest.offset == 1000
            ingest.commit()
        assert check_blobs(store.path) == {Digest.of(data)}

    def test_bytes_that_are_there_are_never_rewritten(self, store: Store) -> None:
        data = pattern(1000)
        other = pattern(1000, seed=1)
        with take(store, Digest.of(data), 1000) as ingest:
            ingest.write_at(0, data[:300])
            ingest.write_at(600, data[600:800])
            ingest.write_at(100, other[100:300] + data[300:600] + other[600:800] + data[800:])
            assert ingest.offset == 1000
            ingest.commit()
        assert check_blobs(store.path) == {Digest.of(data)}

    def test_threads_write_ranges_in_any_order(self, store: Store) -> None:
        size = 20 * MIB
        data = pattern(size)
        pieces = list(range(0, size, 256 << 10))
        pieces = pieces[1::2] + pieces[::2]
        guard = threading.Lock()
        with take(store, Digest.of(data), size) as ingest:

            def work() -> None:
                while True:
                    with guard:
                        if not pieces:
                            return
                        offset = pieces.pop()
                    ingest.write_at(offset, data[offset : offset + (256 << 10)])

            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert ingest.offset == size
            ingest.commit()
        assert check_blobs(store.path) == {Digest.of(data)}

    def test_what_lies_beyond_a_hole_is_fetched_again(self, store: Store) -> None:
        data = pattern(1000)
        digest = Digest.of(data)
        with take(store, digest, 1000) as ingest:
            ingest.write_at(0, data[:100])
            ingest.write_at(500, pattern(500, seed=2))
        with take(store, digest, 1000) as ingest:
            assert ingest.offset == 100
            ingest.write(data[100:])
            ingest.commit()
        assert check_blobs(store.path) == {digest}


class TestFullDisk:
    @pytest.fixture
    def small(self, workspace: Path) -> Iterator[Store]:
        path = workspace / "small"
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)], check=True)
        try:
            with Store.open(path / "store") as store:
                store.reserve_bytes = 0
                yield store
        finally:
            subprocess.run(["umount", str(path)], check=True)

    @pytest.mark.root
    def test_a_blob_that_cannot_fit_is_refused_before_its_first_byte(self, small: Store) -> None:
        digest = Digest.of(b"big")
        with pytest.raises(StorageError, match=r"needs 10995116277760 more bytes"):
            small.acquire(digest, 10 << 40)
        assert leftovers(small.path) == []
        assert commit(small, b"other blobs go on")

    @pytest.mark.root
    def test_a_disk_that_fills_up_keeps_the_partial(self, small: Store) -> None:
        data = pattern(MIB)
        digest = Digest.of(data)
        filler = small.path.parent / "filler"
        with take(small, digest, MIB) as ingest:
            ingest.write(data[: 256 << 10])
            with filler.open("wb", buffering=0) as file, pytest.raises(OSError):
                while True:
                    file.write(bytes(64 << 10))
            with pytest.raises(StorageError, match=r"still needs: the disk is full") as caught:
                while True:
                    ingest.write(data[ingest.offset : ingest.offset + (64 << 10)])
            assert f"({MIB} bytes)" in str(caught.value)
            reached = ingest.offset
        assert reached >= 256 << 10
        filler.unlink()
        with take(small, digest, MIB) as ingest:
            assert ingest.offset == reached
            ingest.write(data[reached:])
            ingest.commit()
        assert check_blobs(small.path) == {digest}

    @pytest.mark.root
    def test_others_that_fill_the_disk_stop_the_writer_before_it_is_full(
        self, workspace: Path
    ) -> None:
        path = workspace / "small"
        path.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(path)], check=True)
        try:
            with Store.open(path / "store") as store:
                store.reserve_bytes = 4 * MIB
                digest = Digest.of(b"large")
                with take(store, digest, 24 * MIB) as ingest:
                    (path / "filler").write_bytes(bytes(8 * MIB))
                    with pytest.raises(StorageError, match="stay in reserve"):
                        while True:
                            ingest.write(bytes(MIB))
                    system = os.statvfs(path)
                    assert system.f_bavail * system.f_frsize > store.reserve_bytes
        finally:
            subprocess.run(["umount", str(path)], check=True)

    def test_the_reserve_stays_free(self, store: Store) -> None:
        system = os.statvfs(store.path)
        store.reserve_bytes = system.f_bavail * system.f_frsize + (1 << 40)
        with pytest.raises(StorageError, match=f"{store.reserve_bytes} stay in reserve"):
            store.acquire(Digest.of(b"1"), 1)
        assert leftovers(store.path) == []

    def test_a_size_limit_of_the_process_is_a_storage_error(self, store: Store) -> None:
        data = pattern(MIB)
        digest = Digest.of(data)
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with take(store, digest, MIB) as ingest:
            resource.setrlimit(resource.RLIMIT_FSIZE, (512 << 10, old[1]))
            try:
                with pytest.raises(StorageError, match="ulimit -f"):
                    ingest.write(data)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, old)
                signal.signal(signal.SIGXFSZ, handler)
            ingest.write(data[ingest.offset :])
            ingest.commit()
        assert check_blobs(store.path) == {digest}


# Ranges written beyond the prefix

ISLANDS = """
path, digest, size, seed = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:5])
boot = Boot(sys.argv[5], sys.argv[6])
store = Store.open(path, boot=boot)
data = hashlib.shake_256(seed.to_bytes(8, "little")).digest(size)
ingest = store.acquire(Digest(digest), size)
for start, end in ((0, 1_000_000), (3_000_000, 4_000_000), (4_000_000, 5_000_000),
                   (6_000_000, 7_000_000)):
    ingest.write_at(start, data[start:end])
say("written")
sys.stdin.read()
"""


def test_islands_of_a_killed_writer_are_kept_on_the_same_boot(
    workspace: Path, store: Store
) -> None:
    data = pattern(LONG, 5)
    digest = Digest.of(data)
    boot = (FIRST_BOOT.boot_id, FIRST_BOOT.host)
    writer = start(ISLANDS, store.path, digest, LONG, 5, *boot)
    listen(writer, "written")
    kill(writer)
    ingest = store.acquire(digest, LONG)
    assert ingest is not None
    with ingest:
        assert (ingest.offset, ingest.is_resumed) == (1_000_000, True)
        assert ingest.gap(0, LONG) == (1_000_000, 3_000_000)
        assert ingest.gap(3_500_000, LONG) == (5_000_000, 6_000_000)
        assert ingest.gap(3_500_000, 4_500_000) is None
        assert ingest.gap(6_500_000, 9_000_000) == (7_000_000, 9_000_000)
        ingest.write_at(1_000_000, data[1_000_000:3_000_000])
        assert ingest.offset == 5_000_000
        ingest.write_at(5_000_000, data[5_000_000:6_000_000])
        ingest.write(data[7_000_000:])
        ingest.commit()
    assert check_blobs(store.path) == {str(digest)}


def test_islands_do_not_outlive_a_crash(store: Store) -> None:
    data = pattern(LONG, 5)
    digest = Digest.of(data)
    ingest = store.acquire(digest, LONG)
    assert ingest is not None
    with ingest:
        ingest.write(data[:100_000])
        ingest.write_at(3_000_000, data[3_000_000:4_000_000])
    with Store.open(store.path, boot=NEXT_BOOT) as later:
        ingest = later.acquire(digest, LONG)
        assert ingest is not None
        with ingest:
            assert ingest.gap(0, LONG) == (ingest.offset, LONG)


def test_an_island_that_was_cut_or_is_wrong_costs_no_more_than_the_generation(store: Store) -> None:
    data = pattern(LONG, 5)
    digest = Digest.of(data)
    for damage in ("cut", "wrong"):
        ingest = store.acquire(digest, LONG)
        assert ingest is not None
        with ingest:
            ingest.write_at(0, data[:100_000])
            ingest.write_at(3_000_000, data[3_000_000:4_000_000])
        (path,) = store.ingest_path(digest).glob("data.*")
        with path.open("r+b") as file:
            if damage == "cut":
                file.truncate(3_500_000)
            else:
                file.seek(3_500_000)
                file.write(b"damage")
        ingest = store.acquire(digest, LONG)
        assert ingest is not None
        with ingest:
            assert ingest.offset == 100_000
            if damage == "cut":
                assert ingest.gap(0, LONG) == (100_000, LONG)
                continue
            ingest.write(data[100_000:3_000_000])
            ingest.write(data[4_000_000:])
            with pytest.raises(DigestMismatchError):
                ingest.commit()
            assert ingest.gap(0, LONG) == (0, LONG)
            ingest.write(data)
            ingest.commit()
    assert check_blobs(store.path) == {str(digest)}


@pytest.mark.parametrize("has_room", [True, False], ids=["room", "no room"])
def test_a_wrong_copy_is_kept_only_where_there_is_room_beside_the_right_one(
    store: Store, has_room: bool
) -> None:
    data, wrong = pattern(100_000), pattern(100_000, seed=1)
    digest = Digest.of(data)
    with take(store, digest, len(data)) as ingest:
        ingest.keeps_wrong = True
        ingest.write(wrong)
        if not has_room:
            # As if others had filled the disk meanwhile.
            store.reserve_bytes = 1 << 62
        with pytest.raises(DigestMismatchError):
            ingest.commit()
        assert (ingest.wrong_data >= 0) is has_room
        if has_room:
            assert os.pread(ingest.wrong_data, len(wrong), 0) == wrong
        store.reserve_bytes = 0
        ingest.write(data)
        ingest.commit()
    assert check_blobs(store.path) == {digest}
    assert leftovers(store.path) == []


# -- blobs that come whole at once -----------------------------------------------------------------

WRITE_BARE = WRITE.replace("size)\nsay", "size, bare=True)\nsay")


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_a_blob_that_comes_whole_leaves_no_trace_before_its_commit(
    store: Store, algorithm: str
) -> None:
    data = pattern(5000)
    digest = Digest.of(data, algorithm)
    with take_bare(store, digest, len(data)) as ingest:
        ingest.write(data)
        assert ingest.offset == len(data)
        assert os.listdir(store.ingest_path(digest)) == ["lock"]
        assert store.acquire(digest, len(data)) is None, "two writers"
        ingest.commit()
    assert store.blob_path(digest).read_bytes() == data
    assert check_blobs(store.path) == {digest}
    assert leftovers(store.path) == []


def test_a_blob_that_comes_in_pieces_is_seen_and_resumed(store: Store) -> None:
    data = pattern(5000)
    digest = Digest.of(data)
    with take_bare(store, digest, len(data)) as ingest:
        ingest.write(data[:3000])
        assert not ingest.is_bare
        with store.follow(digest, len(data)) as follower:
            assert follower.read() == data[:3000]
    with take_bare(store, digest, len(data)) as ingest:
        assert (ingest.offset, ingest.is_bare) == (3000, False)
        ingest.write(data[3000:])
        ingest.commit()
    assert check_blobs(store.path) == {digest}


def test_what_is_asked_of_a_whole_blob_that_is_not_written_yet_is_there(store: Store) -> None:
    data = pattern(5000)
    digest = Digest.of(data)
    with take_bare(store, digest, len(data)) as ingest:
        ingest.write(data)
        assert ingest.read(10, 20) == data[10:30]
        with store.follow(digest, len(data)) as follower:
            assert follower.read() == data
        ingest.commit()
    assert check_blobs(store.path) == {digest}


def test_wrong_bytes_that_come_whole_begin_a_new_generation(store: Store) -> None:
    data = pattern(5000)
    digest = Digest.of(data)
    with take_bare(store, digest, len(data)) as ingest:
        ingest.write(pattern(5000, seed=1))
        with pytest.raises(DigestMismatchError):
            ingest.commit()
        assert ingest.offset == 0
        assert not store.has(digest)
        ingest.write(data)
        ingest.commit()
    assert check_blobs(store.path) == {digest}
    assert leftovers(store.path) == []


def test_a_bare_ingest_that_got_nothing_is_gone(store: Store) -> None:
    digest = Digest.of(pattern(5000))
    with take_bare(store, digest, 5000):
        pass
    assert leftovers(store.path) == []


@pytest.mark.parametrize(
    "failpoint",
    ["ingest-proven", "ingest-before-rename", "ingest-after-rename", "ingest-before-unlock"],
)
def test_a_writer_of_a_whole_blob_may_die_anywhere(store: Store, failpoint: str) -> None:
    data = pattern(5000)
    digest = Digest.of(data)
    run_killed(WRITE_BARE, store.path, digest, len(data), 0, len(data), failpoint=failpoint)
    with take_bare(store, digest, len(data)) as ingest:
        if ingest.offset < len(data):
            ingest.write(data)
        ingest.commit()
    assert check_blobs(store.path) == {digest}
    assert leftovers(store.path) == []
