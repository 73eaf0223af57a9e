from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest

from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import CancelledError, DigestMismatchError, NodeError, UsageError
from stowray.pipeline.store import Store
from stowray.pipeline.workers import WorkerPool


def make_tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def store(tmp_path: Path):
    with Store.open(tmp_path / "store") as opened:
        yield opened


def arguments(store: Store, tar: bytes, diff_id: str | None = None, **more):
    digest = Digest.of(tar)
    return {
        "store": str(store.path),
        "boot": [store.boot.boot_id, store.boot.host],
        "digest": str(digest),
        "size": len(tar),
        "diff_id": diff_id or str(digest),
        "chain_id": str(digest),
        "parent": None,
        "limits": {},
        **more,
    }


def submit(pool: WorkerPool, operation: str, task, cancelled=lambda: False, progress=None):
    return pool.submit(
        operation,
        task,
        on_progress=lambda *sizes: progress.append(sizes) if progress is not None else None,
        cancelled=cancelled,
    )


@pytest.mark.parametrize("fork", [False, True])
def test_a_worker_stages_and_commits(store: Store, fork: bool) -> None:
    tar = make_tar({"a": b"x" * 100_000, "b": b"y"})
    store.put_blob(Digest.of(tar), tar)
    pool = WorkerPool(1, fork=fork)
    pool.start_early()
    try:
        staged = submit(pool, "stage", arguments(store, tar)).result(60)
        assert staged["unpacked_size"] == 100_001
        assert not staged["existed"]
        assert submit(pool, "stage", arguments(store, tar)).result(60)["existed"]
        submit(pool, "commit", arguments(store, tar)).result(60)
    finally:
        pool.close()
    from stowray.pipeline.snapshot import Snapshots

    assert Snapshots(store).has(Digest.of(tar))


def test_an_error_of_the_worker_arrives_as_its_class(store: Store) -> None:
    tar = make_tar({"a": b"x"})
    store.put_blob(Digest.of(tar), tar)
    pool = WorkerPool(1)
    try:
        wrong = str(Digest.of(b"something else"))
        with pytest.raises(DigestMismatchError) as caught:
            submit(pool, "stage", arguments(store, tar, diff_id=wrong)).result(60)
        assert caught.value.expected == wrong
        with pytest.raises(UsageError):
            submit(pool, "dance", arguments(store, tar)).result(60)
    finally:
        pool.close()


def test_a_killed_worker_fails_its_task_and_is_replaced(store: Store) -> None:
    tar = make_tar({"a": b"x"})
    pool = WorkerPool(1)
    try:
        # Nothing writes this blob yet, so the stage waits and the worker can be caught at it.
        waiting = submit(pool, "stage", arguments(store, tar))
        while not pool._workers:
            time.sleep(0.005)
        os.kill(pool._workers[0].pid, signal.SIGKILL)
        with pytest.raises(NodeError):
            waiting.result(60)
        store.put_blob(Digest.of(tar), tar)
        assert submit(pool, "stage", arguments(store, tar)).result(60)["unpacked_size"] == 1
    finally:
        pool.close()


def test_a_cancelled_task_ends_and_the_worker_takes_the_next(store: Store) -> None:
    tar = make_tar({"a": b"x"})
    stop = threading.Event()
    pool = WorkerPool(1)
    try:
        waiting = submit(pool, "stage", arguments(store, tar), stop.is_set)
        queued = submit(pool, "stage", arguments(store, tar), stop.is_set)
        stop.set()
        for future in (waiting, queued):
            with pytest.raises(CancelledError):
                future.result(60)
        store.put_blob(Digest.of(tar), tar)
        assert submit(pool, "stage", arguments(store, tar)).result(60)["unpacked_size"] == 1
    finally:
        pool.close()


def test_tasks_run_side_by_side_up_to_the_size(store: Store) -> None:
    # Two stages that both wait for their blob: a pool that ran them in turn would never reach
    # the second, whose blob is the only one that comes.
    first, second = make_tar({"a": b"1"}), make_tar({"a": b"2"})
    stop = threading.Event()
    pool = WorkerPool(2)
    try:
        waiting = submit(pool, "stage", arguments(store, first), stop.is_set)
        served = submit(pool, "stage", arguments(store, second))
        store.put_blob(Digest.of(second), second)
        assert served.result(60)["unpacked_size"] == 1
        stop.set()
        with pytest.raises(CancelledError):
            waiting.result(60)
    finally:
        pool.close()


def test_workers_end_with_their_owner(store: Store) -> None:
    tar = make_tar({"a": b"x"})
    pool = WorkerPool(1)
    waiting = submit(pool, "stage", arguments(store, tar))
    while not pool._workers:
        time.sleep(0.005)
    pid = pool._workers[0].pid
    # What a killed owner leaves is a closed socket.
    pool._workers[0].connection.shutdown(2)
    with pytest.raises(NodeError):
        waiting.result(60)
    pool.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_progress_arrives(store: Store) -> None:
    tar = make_tar({str(number): os.urandom(1 << 20) for number in range(8)})
    store.put_blob(Digest.of(tar), tar)
    seen: list[tuple[int, int]] = []
    pool = WorkerPool(1)
    try:
        submit(pool, "stage", arguments(store, tar), progress=seen).result(60)
    finally:
        pool.close()
    assert seen
    assert all(total == len(tar) and 0 < current <= total for current, total in seen)


@pytest.mark.parametrize("fork", [False, True])
def test_all_workers_of_a_killed_owner_end(tmp_path: Path, fork: bool) -> None:
    script = f"""
import os, sys, time
from stowray.pipeline.workers import WorkerPool, _Worker
pool = WorkerPool(3, fork={fork})
pool.start_early()
if not {fork}:
    for number in range(3):
        pool._workers[number] = _Worker(number)
print(*[worker.pid for worker in pool._workers.values()], flush=True)
time.sleep(600)
"""
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    pids = [int(text) for text in owner.stdout.readline().split()]
    assert len(pids) == 3
    owner.kill()
    owner.wait()
    owner.stdout.close()
    left = set(pids)
    give_up = time.monotonic() + 60
    while left and time.monotonic() < give_up:
        left = {pid for pid in left if is_alive(pid)}
        time.sleep(0.01)
    assert not left


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
