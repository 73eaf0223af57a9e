from __future__ import annotations

import os
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import (
    CancelledError,
    DigestMismatchError,
    InvalidDigestError,
    NotFoundError,
    StorageError,
)
from stowray.pipeline.leases import leases
from stowray.pipeline.store import Store
from tests.support.plain_user import plain_directory, run_plain
from tests.support.stores import (
    FIRST_BOOT,
    NEXT_BOOT,
    check_blobs,
    commit,
    leftovers,
    listen,
    pattern,
    record,
    run_killed,
    start,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PUT = """
store = Store.open(sys.argv[1])
store.put_blob(Digest.of(b"document"), b"document")
"""


@pytest.fixture
def path(workspace: Path) -> Path:
    return workspace / "store"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store.open(path, boot=FIRST_BOOT) as store:
        yield store


class TestOpen:
    def test_a_new_store_is_a_private_oci_layout_with_a_nonce(self, store: Store) -> None:
        assert store.path.stat().st_mode & 0o7777 == 0o700
        assert (store.path / "oci-layout").read_text() == '{"imageLayoutVersion":"1.0.0"}'
        assert len(store.nonce) == 32
        with Store.open(store.path) as again:
            assert again.nonce == store.nonce

    def test_two_stores_have_two_nonces(self, store: Store, workspace: Path) -> None:
        with Store.open(workspace / "other") as other:
            assert other.nonce != store.nonce

    def test_parents_are_made(self, workspace: Path) -> None:
        Store.open(workspace / "a" / "b" / "store").close()

    def test_nothing_is_made_for_a_reader(self, path: Path) -> None:
        with pytest.raises(StorageError, match="no store here"):
            Store.open(path, create=False)
        assert not path.exists()
        path.mkdir()
        with pytest.raises(StorageError, match="no store here"):
            Store.open(path, create=False)
        assert list(path.iterdir()) == []

    def test_a_directory_of_somebody_else_is_left_alone(self, path: Path) -> None:
        path.mkdir(mode=0o755)
        (path / "thesis.txt").write_text("precious")
        with pytest.raises(StorageError, match="not empty and not a store"):
            Store.open(path)
        assert os.listdir(path) == ["thesis.txt"]
        assert path.stat().st_mode & 0o777 == 0o755

    def test_a_file_in_its_place_is_named(self, path: Path) -> None:
        path.write_text("")
        with pytest.raises(StorageError, match="not a directory"):
            Store.open(path)

    def test_a_newer_format_is_refused(self, store: Store) -> None:
        (store.path / "version").write_text("2\n")
        with pytest.raises(StorageError, match=r"newer stowray .*upgrade"):
            Store.open(store.path)

    def test_a_damaged_version_is_named(self, store: Store) -> None:
        (store.path / "version").write_text("one\n")
        with pytest.raises(StorageError, match="damaged"):
            Store.open(store.path)

    @pytest.mark.parametrize("name", ["version", "nonce", "oci-layout", "index.json"])
    @pytest.mark.parametrize("content", [b"", b"\0" * 16])
    def test_files_that_a_power_cut_emptied_are_made_again(
        self, store: Store, name: str, content: bytes
    ) -> None:
        digest = commit(store, b"content")
        (store.path / name).write_bytes(content)
        (store.path / "version").write_bytes(b"")
        with Store.open(store.path, boot=NEXT_BOOT) as again:
            assert again.has(digest)
            assert len(again.nonce) == 32
        assert (store.path / "oci-layout").read_text() == '{"imageLayoutVersion":"1.0.0"}'
        assert (store.path / "index.json").read_text().startswith('{"schemaVersion":2')

    def test_a_half_made_store_is_finished(self, path: Path) -> None:
        run_killed("Store.open(sys.argv[1])", path, failpoint="create-before-version")
        with Store.open(path) as store:
            commit(store, b"content")

    def test_many_processes_make_one_store(self, path: Path) -> None:
        code = "say(Store.open(sys.argv[1]).nonce)"
        processes = [start(code, path) for _ in range(6)]
        answers = {process.communicate(timeout=60) for process in processes}
        assert len(answers) == 1

    @pytest.mark.root
    def test_a_read_only_store_can_be_read_but_not_written(self, store: Store) -> None:
        digest = commit(store, b"content")
        subprocess.run(["mount", "--bind", store.path, store.path], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", store.path, store.path], check=True)
            with pytest.raises(StorageError, match="cannot be written"):
                Store.open(store.path)
            for boot in (FIRST_BOOT, NEXT_BOOT):
                with Store.open(store.path, boot=boot, create=False) as reader:
                    assert not reader.writable
                    assert reader.has(digest)
                    assert reader.read_blob(digest, 100) == b"content"
                    assert reader.references() == []
                    with reader.lease("reader", [digest]), reader.lock("name", wait_seconds=0):
                        reader.confirm(digest, "registry/a")
                    assert not reader.confirmed(digest, "registry/a")
                    with reader.follow(digest, 7) as follower:
                        assert follower.read() == b"content"
        finally:
            subprocess.run(["umount", store.path], check=True)

    def test_a_store_of_somebody_else_is_refused(self) -> None:
        code = """
from stowray.pipeline.errors import StorageError
from stowray.pipeline.store import Store
import stowray.pipeline.probe, stowray.pipeline.layout, stowray.pipeline.references
import sys
become_plain()
try:
    Store.open(sys.argv[1] + "/store")
except StorageError as error:
    print(error)
"""
        with plain_directory() as folder:
            folder.chmod(0o555)
            if os.getuid() == 0:
                os.chown(folder, 0, 0)
            assert "permission denied" in run_plain(code, folder)

    def test_open_files_do_not_grow(self, store: Store) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            Store.open(store.path)  # closed when it is collected
            with Store.open(store.path) as other:
                other.has(Digest.of(b""))
        assert len(os.listdir("/proc/self/fd")) <= before + 1


class TestBlobs:
    def test_a_document_is_put_once(self, store: Store) -> None:
        digest = Digest.of(b"document")
        store.put_blob(digest, b"document")
        before = store.blob_path(digest).stat()
        store.put_blob(digest, b"document")
        assert store.blob_path(digest).stat().st_ino == before.st_ino
        assert store.read_blob(digest, 8) == b"document"
        assert check_blobs(store.path) == {digest}
        assert leftovers(store.path) == []

    def test_a_wrong_document_is_refused(self, store: Store) -> None:
        with pytest.raises(DigestMismatchError):
            store.put_blob(Digest.of(b"document"), b"other")
        assert check_blobs(store.path) == set()
        assert leftovers(store.path) == []

    @pytest.mark.parametrize("failpoint", ["put-before-rename", "put-after-rename"])
    def test_a_crash_while_a_document_is_put(self, path: Path, failpoint: str) -> None:
        run_killed(PUT, path, failpoint=failpoint)
        check_blobs(path)
        with Store.open(path) as store:
            store.put_blob(Digest.of(b"document"), b"document")
            assert store.has(Digest.of(b"document"))

    def test_a_document_over_the_limit_is_not_read(self, store: Store) -> None:
        digest = commit(store, b"12345")
        with pytest.raises(StorageError, match="larger than 4 bytes"):
            store.read_blob(digest, 4)

    def test_absent_blobs(self, store: Store) -> None:
        digest = Digest.of(b"absent")
        assert not store.has(digest)
        with pytest.raises(NotFoundError):
            store.open_blob(digest)
        with pytest.raises(NotFoundError):
            store.read_blob(digest, 100)

    @pytest.mark.parametrize("text", ["sha256:../../../etc/passwd", "sha256:" + "A" * 64, ""])
    def test_no_path_is_made_of_what_is_no_digest(self, store: Store, text: str) -> None:
        for method in (store.blob_path, store.ingest_path, store.source_path):
            with pytest.raises(InvalidDigestError):
                method(text)  # type: ignore[arg-type]

    @pytest.mark.parametrize("kind", ["symlink", "fifo", "directory"])
    def test_what_is_planted_under_a_digest_is_refused(
        self, store: Store, workspace: Path, kind: str
    ) -> None:
        digest = Digest.of(b"content")
        target = store.blob_path(digest)
        if kind == "symlink":
            (workspace / "outside").write_bytes(b"content")
            target.symlink_to(workspace / "outside")
        elif kind == "fifo":
            os.mkfifo(target)
        else:
            target.mkdir()
        with pytest.raises(StorageError):
            store.open_blob(digest)
        with pytest.raises(StorageError):
            store.read_blob(digest, 100)

    @pytest.mark.parametrize("flip", [True, False], ids=["bit flipped", "cut short"])
    def test_a_damaged_document_is_put_aside_when_it_is_read(
        self, store: Store, flip: bool
    ) -> None:
        digest = commit(store, b"content")
        blob = store.blob_path(digest)
        blob.chmod(0o644)
        blob.write_bytes(b"Content" if flip else b"cont")
        with pytest.raises(NotFoundError):
            store.read_blob(digest, 100)
        assert not blob.exists()
        assert not store.has(digest)
        commit(store, b"content")
        assert store.has(digest)

    def test_a_blob_that_was_cut_short_is_not_there(self, store: Store) -> None:
        digest = commit(store, pattern(1000))
        os.truncate(store.blob_path(digest), 500)
        assert not store.has(digest)
        assert not store.blob_path(digest).exists()

    def test_a_trusted_blob_can_be_proven_on_suspicion(self, store: Store) -> None:
        digest = commit(store, b"content")
        assert store.prove(digest)
        store.blob_path(digest).chmod(0o644)
        store.blob_path(digest).write_bytes(b"CONTENT")
        assert not store.prove(digest)
        assert not store.has(digest)
        assert not store.prove(digest)

    def test_a_blob_of_another_size_is_not_the_one(self, store: Store) -> None:
        digest = commit(store, b"content")
        assert store.has(digest, 7)
        assert not store.has(digest, 8)
        assert store.has(digest)  # and it stays

    def test_a_blob_without_record_is_proven_once(self, store: Store) -> None:
        digest = commit(store, b"content")
        bad = commit(store, b"another")
        for blob in (digest, bad):
            store.source_path(blob).unlink()
        store.blob_path(bad).chmod(0o644)
        store.blob_path(bad).write_bytes(b"ANOTHER")
        with Store.open(store.path, boot=FIRST_BOOT) as other:
            assert other.has(digest)
            assert other.blob_record(digest).size == 7
            assert not other.has(bad)
        assert [entry.read_bytes() for entry in (store.path / "quarantine").iterdir()] == [
            b"ANOTHER"
        ]


class TestTrust:
    def damage(self, store: Store, digest: Digest) -> None:
        blob = store.blob_path(digest)
        blob.chmod(0o644)
        blob.write_bytes(b"\0" * blob.stat().st_size)

    @pytest.mark.parametrize(
        ("synced", "rebooted", "believed"),
        [
            pytest.param(False, False, True, id="same boot"),
            pytest.param(False, True, False, id="after a reboot"),
            pytest.param(True, True, True, id="synced before the reboot"),
        ],
    )
    def test_what_is_not_trusted_is_proven(
        self, store: Store, synced: bool, rebooted: bool, believed: bool
    ) -> None:
        damaged = commit(store, b"damaged")
        sound = commit(store, b"content")
        if synced:
            store.sync()
        self.damage(store, damaged)
        boot = NEXT_BOOT if rebooted else FIRST_BOOT
        with Store.open(store.path, boot=boot) as other:
            assert other.has(damaged) == believed
            assert other.has(sound)
            assert check_blobs_except(other, damaged if believed else None) == {sound}

    def test_what_comes_after_a_sync_is_not_durable(self, store: Store) -> None:
        store.sync()
        late = commit(store, b"late")
        self.damage(store, late)
        with Store.open(store.path, boot=NEXT_BOOT) as other:
            assert not other.has(late)

    def test_a_proof_is_remembered(self, store: Store) -> None:
        digest = commit(store, b"content")
        with Store.open(store.path, boot=NEXT_BOOT) as other:
            assert other.has(digest)
            assert other.blob_record(digest).verified is not None
        self.damage(store, digest)
        with Store.open(store.path, boot=NEXT_BOOT) as third:
            assert third.has(digest)  # not hashed again: its record was renewed in this boot

    def test_a_confirmation_proves_nothing(self, store: Store) -> None:
        digest = commit(store, b"content")
        self.damage(store, digest)
        with Store.open(store.path, boot=NEXT_BOOT) as other:
            other.confirm(digest, "registry.example/a/b")
            assert not other.has(digest)
            assert other.confirmed(digest, "registry.example/a/b")


def check_blobs_except(store: Store, ignored: Digest | None) -> set[str]:
    if ignored is not None:
        store.blob_path(ignored).unlink()
    return check_blobs(store.path)


def test_only_sync_waits_for_the_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[int] = []
    for name in ("fsync", "fdatasync", "sync"):
        monkeypatch.setattr(os, name, lambda *descriptor: waited.append(len(descriptor)))
    digest = commit(store, pattern(1000))
    store.put_blob(Digest.of(b"1"), b"1")
    store.confirm(digest, "a/b")
    store.record_reference(record(digest))
    with store.lease("pull", [digest]) as lease:
        lease.add([Digest.of(b"1")])
    store.remove_reference("docker.io/library/debian:latest")
    assert waited == []
    store.sync()
    assert waited


class TestSources:
    def test_confirmations_add_up_and_survive_the_blob(self, store: Store) -> None:
        digest = Digest.of(b"content")
        assert not store.confirmed(digest, "a/b")
        store.confirm(digest, "a/b")
        commit(store, b"content")
        store.confirm(digest, "c/d")
        store.confirm(digest, "c/d")
        with Store.open(store.path) as other:
            assert other.blob_record(digest).repositories == ("a/b", "c/d")
            assert other.has(digest)

    def test_threads_lose_no_confirmation(self, store: Store) -> None:
        digest = commit(store, b"content")
        names = [f"registry/{number}" for number in range(24)]

        def work(part: list[str]) -> None:
            for name in part:
                store.confirm(digest, name)

        threads = [threading.Thread(target=work, args=(names[first::4],)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(store.blob_record(digest).repositories) == set(names)

    @pytest.mark.parametrize("content", [b"", b"\0" * 300, b"{}", b'{"checksum":"'])
    def test_a_damaged_record_is_as_good_as_none(self, store: Store, content: bytes) -> None:
        digest = commit(store, b"content")
        store.confirm(digest, "a/b")
        store.source_path(digest).write_bytes(content)
        with Store.open(store.path) as other:
            assert not other.confirmed(digest, "a/b")
            assert other.has(digest)
            other.confirm(digest, "a/b")
            assert other.confirmed(digest, "a/b")


class TestLock:
    HOLD = """
with Store.open(sys.argv[1]).lock(sys.argv[2], wait_seconds=5):
    say("held")
    sys.stdin.read()
"""

    def test_threads_and_processes_exclude_each_other(self, store: Store) -> None:
        process = start(self.HOLD, store.path, "name")
        listen(process, "held")
        with (
            pytest.raises(StorageError, match="lock of name"),
            store.lock("name", wait_seconds=0.01),
        ):
            pass
        process.communicate("", timeout=60)
        with store.lock("name", wait_seconds=0), pytest.raises(StorageError):
            store.lock("name", wait_seconds=0.01).__enter__()

    def test_a_dead_holder_frees_the_lock(self, store: Store) -> None:
        process = start(self.HOLD, store.path, "name")
        listen(process, "held")
        process.kill()
        with store.lock("name", wait_seconds=30):
            pass
        process.communicate(timeout=60)

    def test_a_forked_process_does_not_keep_the_lock(self, store: Store) -> None:
        code = """
store = Store.open(sys.argv[1])
with store.lock("name", wait_seconds=5), store.lease("x", [Digest.of(b"1")]):
    ingest = store.acquire(Digest.of(b"12"), 2)
    ingest.write(b"1")
    child = os.fork()
    if child == 0:
        sys.stdin.read()
        os._exit(0)
    ingest.close()
say("released")
os.waitpid(child, 0)
"""
        process = start(code, store.path)
        listen(process, "released")
        with store.lock("name", wait_seconds=0):
            pass
        ingest = store.acquire(Digest.of(b"12"), 2)
        assert ingest is not None
        ingest.close()
        assert leases(store) == []
        process.communicate("", timeout=60)

    def test_a_waiter_can_be_cancelled(self, store: Store) -> None:
        with (
            store.lock("name", wait_seconds=0),
            pytest.raises(CancelledError),
            store.lock("name", wait_seconds=60, cancelled=lambda: True),
        ):
            pass

    @pytest.mark.parametrize("name", ["../escape", "a/b", "", "x" * 500, "commit-" + "a" * 64])
    def test_any_name_is_a_name(self, store: Store, name: str) -> None:
        before = sorted(os.listdir(store.path))
        with (
            store.lock(name, wait_seconds=0),
            pytest.raises(StorageError),
            store.lock(name, wait_seconds=0),
        ):
            pass
        # Names that hold a digest would pile up for ever.
        assert os.listdir(store.path / "locks") == []
        assert sorted(os.listdir(store.path)) == before

    def test_a_removed_lock_file_excludes_nobody_twice(self, store: Store) -> None:
        name = "commit-" + "b" * 64
        running, most, guard = 0, 0, threading.Lock()

        def work() -> None:
            nonlocal running, most
            for _ in range(30):
                with store.lock(name, wait_seconds=60):
                    with guard:
                        running += 1
                        most = max(most, running)
                    with guard:
                        running -= 1

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most == 1


def test_who_served_a_blob_is_recorded_with_its_proof(tmp_path: Path) -> None:
    data = b"served"
    digest = Digest.of(data)
    with Store.open(tmp_path / "store") as store:
        ingest = store.acquire(digest, len(data))
        assert ingest is not None
        with ingest:
            ingest.repository = "registry.example/a"
            ingest.write(data)
            ingest.commit()
        assert store.confirmed(digest, "registry.example/a")
        written = store.source_path(digest).stat()
        store.confirm(digest, "registry.example/a")
        assert store.source_path(digest).stat().st_ino == written.st_ino
        assert store.has(digest, len(data))
