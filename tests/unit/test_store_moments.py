"""What happens to a store between two calls of ours: other processes, full disks, lost folders."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline import acquire as acquire_module
from stowray.pipeline import collect as collect_module
from stowray.pipeline import layer_trees, verify
from stowray.pipeline.collect import collect
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import StorageError
from stowray.pipeline.ingest_home import GenerationChanged
from stowray.pipeline.journal import Journal
from stowray.pipeline.layer_trees import LayerTrees
from stowray.pipeline.leases import leases
from stowray.pipeline.mount import mount
from stowray.pipeline.removal import remove_tree
from stowray.pipeline.store import Store
from tests.support.stores import check_blobs, commit, pattern, stow

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def store(workspace: Path) -> Iterator[Store]:
    with Store.open(workspace / "store") as store:
        yield store


def test_a_store_may_be_behind_a_link(workspace: Path) -> None:
    (workspace / "disk").mkdir()
    link = workspace / "link"
    link.symlink_to("disk")
    with Store.open(link) as store:
        digest = commit(store, pattern(100))
        (link / ".tmp-left").mkdir()
        collect(store)
    assert check_blobs(workspace / "disk") == set(), f"{digest} is of no image"
    assert not [name for name in os.listdir(link) if name.startswith(".probe")]
    (link / "tree" / "below").mkdir(parents=True)
    remove_tree(link / "tree")
    assert not (link / "tree").exists()


def test_a_link_in_the_place_of_a_tree_is_removed_and_not_followed(workspace: Path) -> None:
    (workspace / "kept" / "below").mkdir(parents=True)
    (workspace / "link").symlink_to("kept")
    remove_tree(workspace / "link")
    assert (workspace / "kept" / "below").is_dir()
    assert not (workspace / "link").is_symlink()


def test_a_writer_whose_store_is_gone_is_told_so(store: Store) -> None:
    shutil.rmtree(store.path / "ingest")
    with pytest.raises(StorageError, match="ingest"):
        store.acquire(Digest.of(b"1"), 1)


def test_a_writer_that_cannot_look_at_its_lock_lets_go_of_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: object) -> bool:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(acquire_module, "is_current", stale)
        with pytest.raises(StorageError):
            store.acquire(Digest.of(b"1"), 1)
    ingest = store.acquire(Digest.of(b"1"), 1)
    assert ingest is not None
    ingest.close()


def test_a_resume_that_fails_keeps_what_it_was_to_resume(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pattern(10_000)
    digest = Digest.of(data)
    with store.acquire(digest, len(data)) as ingest:
        ingest.write(data[:6000])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "rewrite", full)
        with pytest.raises(StorageError):
            store.acquire(digest, len(data))
    with store.acquire(digest, len(data)) as ingest:
        assert ingest.offset == 6000


def test_a_read_that_a_restart_overtakes_returns_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first read of all: nothing was returned before, and yet the bytes are void."""
    right, wrong = b"right" * 400, b"wrong" * 400
    digest = Digest.of(right)
    with store.acquire(digest, len(right)) as ingest, store.follow(digest, len(right)) as follower:
        ingest.write(wrong[:1000])
        pread = os.pread

        def overtaken(descriptor: int, count: int, offset: int) -> bytes:
            monkeypatch.undo()
            read = pread(descriptor, count, offset)
            ingest.restart()
            ingest.write(right)
            return read

        monkeypatch.setattr(os, "pread", overtaken)
        with pytest.raises(GenerationChanged):
            follower.read()
        follower.rewind()
        ingest.commit()
        assert follower.read() == right


def test_a_collection_makes_the_folders_that_a_copy_of_the_store_lost(store: Store) -> None:
    digest = commit(store, pattern(100))
    (store.path / "trash").rmdir()
    collect(store)
    assert not store.has(digest)


def test_what_a_pull_puts_aside_while_it_is_listed_stops_no_collection(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = {commit(store, pattern(100, seed)) for seed in range(3)}
    read_record = collect_module.read_record

    def put_aside(*arguments: object) -> object:
        for digest in digests:
            store.quarantine(digest)
        return read_record(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(collect_module, "read_record", put_aside)
    collect(store)
    assert check_blobs(store.path) == set()


@pytest.mark.parametrize("who", ["a collector", "a sweep"])
def test_a_new_workspace_is_nobodys_leftover(
    store: Store, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """Others look at it in the instant between its making and its lock."""
    trees = LayerTrees(store, privileged=False)
    locked = threading.Event()
    try_lock = layer_trees.try_lock
    set_aside = collect_module._set_aside

    def late(descriptor: int, **options: bool) -> bool:
        if not locked.is_set():
            locked.set()
            if who == "a sweep":
                assert trees.sweep() == 1
            else:
                thread.start()
                listed.wait(30)
        return try_lock(descriptor, **options)

    listed, staged = threading.Event(), threading.Event()

    def wait_until_staged(*arguments: object) -> None:
        listed.set()
        staged.wait(30)
        set_aside(*arguments)  # type: ignore[arg-type]

    thread = threading.Thread(target=collect, args=(store,))
    monkeypatch.setattr(collect_module, "_set_aside", wait_until_staged)
    monkeypatch.setattr(layer_trees, "try_lock", late)
    with trees.workspace() as workspace:
        staged.set()
        if who == "a collector":
            thread.join(60)
        assert workspace.tree.is_dir()
    assert not list((store.path / "layers").iterdir())


def test_a_repair_leaves_alone_what_a_pull_has_made_anew_meanwhile(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pattern(5000)
    digest = commit(store, data)
    path = store.blob_path(digest)
    path.chmod(0o644)
    path.write_bytes(b"damaged")
    put_aside = verify._Check.put_aside

    def anew(check: verify._Check) -> None:
        assert not store.prove(digest)
        commit(store, data)
        put_aside(check)

    monkeypatch.setattr(verify._Check, "put_aside", anew)
    report = verify.verify(store, repair=True)
    assert [damage.digest for damage in report.damaged] == [digest]
    assert store.has(digest, len(data))


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root")
def test_a_mount_that_cannot_be_prepared_holds_nothing(store: Store, workspace: Path) -> None:
    stow(store, "a/b:1", "layer")
    (store.path / "mounts").write_bytes(b"")
    with pytest.raises(StorageError):
        mount(store, None, workspace / "point")
    assert leases(store) == []
