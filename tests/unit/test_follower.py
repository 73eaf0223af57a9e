from __future__ import annotations

import os
import shutil
import threading
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import (
    CancelledError,
    DigestMismatchError,
    NodeError,
    SizeMismatchError,
    StorageError,
)
from stowray.pipeline.ingest_home import GenerationChanged
from stowray.pipeline.ingeststate import IngestState
from stowray.pipeline.locks import try_lock
from stowray.pipeline.prefix_digest import CHECKPOINT_EVERY
from stowray.pipeline.store import Store
from tests.support.stores import OTHER_HOST, commit, kill, listen, pattern, start

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stowray.pipeline.follower import Follower
    from stowray.pipeline.ingest import Ingest

MIB = 1 << 20

FOLLOW = """
path, digest, size = sys.argv[1], Digest(sys.argv[2]), int(sys.argv[3])
store = Store.open(path)
say("following")
hasher, buffer = digest.hasher(), bytearray(300_000)
with store.follow(digest, size, grace_seconds=60) as follower:
    while count := follower.read_into(buffer):
        hasher.update(memoryview(buffer)[:count])
    follower.wait_proven()
say(hasher.hexdigest())
"""

WRITE_AND_WAIT = """
path, digest, size, seed, stop = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
store = Store.open(path)
ingest = store.acquire(Digest(digest), size)
ingest.write(hashlib.shake_256(seed.to_bytes(8, "little")).digest(size)[ingest.offset:stop])
say("written")
sys.stdin.read()
"""


@pytest.fixture
def store(workspace: Path) -> Iterator[Store]:
    with Store.open(workspace / "store") as store:
        yield store


def take(store: Store, digest: Digest, size: int) -> Ingest:
    ingest = store.acquire(digest, size)
    assert ingest is not None
    return ingest


def drain(follower: Follower, size: int = 1 << 20) -> bytes:
    parts = []
    while part := follower.read(size):
        parts.append(part)
    return b"".join(parts)


def test_a_committed_blob_is_read_to_its_end(store: Store) -> None:
    data = pattern(3 * MIB)
    digest = commit(store, data)
    with store.follow(digest, len(data)) as follower:
        assert follower.proven
        assert drain(follower, 700_000) == data
        assert follower.read() == b""
        follower.wait_proven()


def test_an_empty_blob_needs_no_wait(store: Store) -> None:
    with store.follow(Digest.of(b""), 0) as follower:
        assert follower.read() == b""
        assert follower.read_into(bytearray(1)) == 0


def test_a_growing_blob_is_read_as_it_grows_and_over_its_commit(store: Store) -> None:
    data = pattern(1000)
    digest = Digest.of(data)
    with store.follow(digest, 1000) as follower, take(store, digest, 1000) as ingest:
        ingest.write(data[:300])
        assert follower.read(200) == data[:200]
        assert follower.read() == data[200:300]
        ingest.write(data[300:400])
        buffer = bytearray(1000)
        assert follower.read_into(buffer) == 100
        assert buffer[:100] == data[300:400]
        assert not follower.proven
        ingest.write(data[400:])
        ingest.commit()
        assert drain(follower) == data[400:]
        assert follower.proven


def test_only_the_contiguous_prefix_is_read(store: Store) -> None:
    data = pattern(1000)
    digest = Digest.of(data)
    with store.follow(digest, 1000) as follower, take(store, digest, 1000) as ingest:
        ingest.write_at(500, data[500:])
        ingest.write_at(0, data[:100])
        assert follower.read() == data[:100]
        ingest.write_at(100, data[100:500])
        assert follower.read() == data[100:]


@pytest.mark.parametrize("begun", [False, True], ids=["before the ingest", "during the ingest"])
def test_another_process_follows(store: Store, begun: bool) -> None:
    size = 5 * MIB
    data = pattern(size)
    digest = Digest.of(data)
    ingest = take(store, digest, size) if begun else None
    process = start(FOLLOW, store.path, digest, size)
    listen(process, "following")
    ingest = ingest or take(store, digest, size)
    with ingest:
        for offset in range(0, size, 100_000):
            ingest.write(data[offset : offset + 100_000])
        ingest.commit()
    output, errors = process.communicate(timeout=60)
    assert output.strip() == digest.encoded, errors


def test_a_new_generation_voids_what_was_read(store: Store) -> None:
    data = pattern(1000)
    digest = Digest.of(data)
    with store.follow(digest, 1000) as follower, take(store, digest, 1000) as ingest:
        ingest.write(pattern(600, seed=1))
        assert len(follower.read(100)) == 100
        ingest.restart()
        with pytest.raises(GenerationChanged):
            follower.read()
        with pytest.raises(GenerationChanged):  # until the follower says that it begins again
            follower.read()
        ingest.write(data)
        follower.rewind()
        assert drain(follower) == data
        assert follower.generation == 2


def test_a_follower_at_the_end_learns_that_the_bytes_were_wrong(store: Store) -> None:
    data = pattern(1000)
    digest = Digest.of(data)
    with store.follow(digest, 1000) as follower, take(store, digest, 1000) as ingest:
        ingest.write(pattern(1000, seed=1))
        assert len(drain(follower)) == 1000
        with pytest.raises(DigestMismatchError):
            ingest.commit()
        with pytest.raises(GenerationChanged):
            follower.wait_proven()
        follower.rewind()
        ingest.write(data)
        ingest.commit()
        assert drain(follower) == data
        follower.wait_proven()


def test_a_follower_that_has_read_nothing_does_not_mind_a_new_generation(store: Store) -> None:
    data = pattern(1000)
    digest = Digest.of(data)
    with store.follow(digest, 1000) as follower, take(store, digest, 1000) as ingest:
        ingest.write(pattern(600, seed=1))
        assert not follower.proven  # attached to the first generation
        ingest.restart()
        ingest.write(data)
        assert drain(follower) == data


def test_a_taken_over_ingest_is_read_on(store: Store) -> None:
    data = pattern(MIB, seed=4)
    digest = Digest.of(data)
    process = start(WRITE_AND_WAIT, store.path, digest, MIB, 4, MIB // 2)
    listen(process, "written")
    with store.follow(digest, MIB) as follower:
        read = follower.read(MIB // 4)
        kill(process)
        read += follower.read(MIB)
        assert read == data[: MIB // 2]
        with take(store, digest, MIB) as ingest:
            ingest.write(data[ingest.offset :])
            assert follower.read(MIB) == data[MIB // 2 :]
            ingest.commit()
        follower.wait_proven()


def test_a_resume_that_keeps_less_than_was_read_is_a_new_generation(store: Store) -> None:
    size = CHECKPOINT_EVERY + MIB
    data = pattern(size)
    digest = Digest.of(data)
    with store.follow(digest, size) as follower:
        with take(store, digest, size) as ingest:
            ingest.write(data[: size - 10])
            assert len(follower.read(CHECKPOINT_EVERY + 5)) == CHECKPOINT_EVERY + 5
        (path,) = store.ingest_path(digest).glob("data.*")
        with path.open("r+b") as file:
            file.seek(size - 11)
            file.write(bytes([data[size - 11] ^ 1]))
        with take(store, digest, size) as ingest:
            assert ingest.offset == CHECKPOINT_EVERY
            with pytest.raises(GenerationChanged):
                follower.read()
            follower.rewind()
            ingest.write(data[CHECKPOINT_EVERY:])
            assert drain(follower) == data


@pytest.mark.parametrize("committed", [True, False], ids=["then committed", "then begun anew"])
def test_an_ingest_that_was_collected_voids_what_was_read(store: Store, committed: bool) -> None:
    data = pattern(1000)
    digest = Digest.of(data)
    with store.follow(digest, 1000) as follower:
        with take(store, digest, 1000) as ingest:
            ingest.write(pattern(600, seed=1))
            assert len(follower.read()) == 600
        shutil.rmtree(store.ingest_path(digest))
        # The new ingest counts its generations from 1 again.
        with take(store, digest, 1000) as ingest:
            ingest.write(data)
            if committed:
                ingest.commit()
            with pytest.raises(GenerationChanged):
                follower.read()
            follower.rewind()
            assert drain(follower) == data


def test_a_writer_that_died_between_rename_and_record_is_no_loss(store: Store) -> None:
    data = pattern(1000)
    digest = Digest.of(data)
    with store.follow(digest, 1000) as follower:
        with take(store, digest, 1000) as ingest:
            ingest.write(data)
            assert follower.read(10) == data[:10]
        (path,) = store.ingest_path(digest).glob("data.*")
        path.chmod(0o444)
        path.rename(store.blob_path(digest))
        assert drain(follower) == data[10:]
        follower.wait_proven()


@pytest.mark.parametrize("begun", [False, True], ids=["never begun", "writer gone"])
def test_no_writer_within_the_grace_time_is_a_node_error(store: Store, begun: bool) -> None:
    digest = Digest.of(pattern(1000))
    with store.follow(digest, 1000, grace_seconds=0.2) as follower:
        if begun:
            with take(store, digest, 1000) as ingest:
                ingest.write(pattern(10))
            assert follower.read() == pattern(10)
        with pytest.raises(NodeError, match="nobody has been writing"):
            follower.read()


def test_a_live_writer_is_waited_for_longer_than_the_grace_time(store: Store) -> None:
    digest = Digest.of(pattern(1000))
    calls = 0

    def cancelled() -> bool:
        nonlocal calls
        calls += 1
        return calls > 200  # well beyond the grace time, at 1 ms a call

    with take(store, digest, 1000) as ingest:
        ingest.write(pattern(10))
        with store.follow(digest, 1000, grace_seconds=0.1, cancelled=cancelled) as follower:
            assert follower.read() == pattern(10)
            with pytest.raises(CancelledError):
                follower.read()


def test_what_another_host_writes_is_read_once_it_is_whole(store: Store) -> None:
    data = pattern(1000)
    digest = Digest.of(data)
    calls = 0

    def cancelled() -> bool:
        nonlocal calls
        calls += 1
        return calls > 200  # well beyond the grace time: its writer is seen to live

    with (
        Store.open(store.path, boot=OTHER_HOST) as other,
        take(store, digest, 1000) as ingest,
        other.follow(digest, 1000, grace_seconds=0.1, cancelled=cancelled) as follower,
    ):
        ingest.write(data)
        with pytest.raises(CancelledError):
            follower.read()
        calls = -100
        ingest.commit()
        assert drain(follower) == data


def test_a_prefix_in_the_middle_of_its_change_is_not_used(store: Store) -> None:
    digest = Digest.of(pattern(1000))
    with take(store, digest, 1000) as ingest:
        ingest.write(pattern(10))
        state = IngestState.follow(store.ingest_path(digest) / "state")
        assert state is not None
        assert state.prefix == 10
        with (store.ingest_path(digest) / "state").open("r+b") as file:
            file.seek(16)
            file.write(b"\xff")
        assert state.prefix == 0
        ingest.write(pattern(20)[10:])
        assert state.prefix == 20
        state.close()


def test_another_size_than_the_committed_one_is_refused(store: Store) -> None:
    digest = commit(store, b"12345")
    with store.follow(digest, 6) as follower, pytest.raises(SizeMismatchError) as caught:
        follower.read()
    assert (caught.value.expected, caught.value.actual) == (6, 5)


def test_a_data_file_that_another_program_cut_is_an_error_and_no_end(store: Store) -> None:
    digest = Digest.of(pattern(1000))
    with store.follow(digest, 1000) as follower, take(store, digest, 1000) as ingest:
        ingest.write(pattern(600))
        assert len(follower.read(100)) == 100
        (path,) = store.ingest_path(digest).glob("data.*")
        os.truncate(path, 50)
        with pytest.raises(StorageError, match="cut short"):
            follower.read()


def test_a_test_for_life_turns_no_writer_away(store: Store) -> None:
    digest = Digest.of(pattern(1000))
    with take(store, digest, 1000) as ingest:
        ingest.write(pattern(10))
    state = IngestState.follow(store.ingest_path(digest) / "state")
    assert state is not None
    assert try_lock(state.descriptor, shared=True)  # a follower in the middle of its test
    timer = threading.Timer(0.02, state.close)
    timer.start()
    with take(store, digest, 1000) as ingest:
        assert ingest.offset == 10
    timer.join()


def test_followers_leave_no_descriptors(store: Store) -> None:
    data = pattern(1000)
    digest = Digest.of(data)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with store.follow(digest, 1000) as follower, take(store, digest, 1000) as ingest:
            ingest.write(data[:500])
            follower.read()
            ingest.restart()
            with pytest.raises(GenerationChanged):
                follower.read()
            follower.rewind()
            ingest.write(data[:700])
            follower.read()
            ingest.restart()  # nothing is kept for the next round
    assert len(os.listdir("/proc/self/fd")) == before
