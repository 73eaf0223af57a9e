from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.errors import CancelledError, NodeError, StorageError
from stowray.pipeline.rootfs import flatten, write_rootfs
from stowray.pipeline.rootfs_file import write_file
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.store import Store
from stowray.pipeline.tree_tar import write_tar
from tests.support import entries
from tests.support.chains import commit_chain
from tests.support.judge import assert_same_tree, differences, read_tree
from tests.unit.test_rootfs import BASE, DEVICES, OWNED, UPPER, layer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stowray.pipeline.digest import Digest

# setfcap's version 2 with one permitted capability: a byte that is no UTF-8.
CAPABLE = bytes.fromhex("0100000200000080") + bytes(12)
LONG = "d" * 90 + "/" + "e" * 200
ODD = layer(
    [
        entries.directory("d" * 90),
        entries.file(LONG, b"long", mtime="-12.5"),
        entries.hardlink("to-long", LONG),
        entries.symlink("far", "/" + "t" * 300),
        entries.file("büro", b"u", uid=3_000_000, gid=4294967294, mtime="1.000000001"),
        entries.file("blocks", b"b" * 1024),
        entries.file("capable", b"c", xattrs={"security.capability": CAPABLE}),
    ]
)
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="owners and devices need root")
needs_squashfs = pytest.mark.skipif(
    shutil.which("mksquashfs") is None or shutil.which("unsquashfs") is None,
    reason="not installed: squashfs-tools (make deps)",
)
UNTAR = ["tar", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--same-owner", "-xpf"]
UNSQUASH = ["unsquashfs", "-quiet", "-no-progress", "-xattrs", "-d"]
EVERYTHING = [BASE, UPPER, DEVICES, OWNED, ODD]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as store:
        yield store


def commit(store: Store, *layers: bytes, privileged: bool = True) -> Digest:
    return commit_chain(Snapshots(store, privileged=privileged), layers)[-1].chain_id


@pytest.mark.root
@needs_root
@pytest.mark.parametrize("privileged", [True, False])
def test_tar_makes_of_it_what_rootfs_makes(store: Store, tmp_path: Path, privileged: bool) -> None:
    """GNU tar is the judge; a plain user's store gives the very same bytes."""
    snapshots = Snapshots(store, privileged=privileged)
    chain_id = commit_chain(snapshots, EVERYTHING)[-1].chain_id
    with snapshots.held(chain_id, "test") as view:
        flatten(view, tmp_path / "tree")
        with (tmp_path / "out.tar").open("wb") as stream:
            written = write_tar(view, stream.fileno())
    assert (tmp_path / "out.tar").stat().st_size == written.length
    assert written.length % 10240 == 0
    (tmp_path / "out").mkdir()
    subprocess.run(
        [*UNTAR, str(tmp_path / "out.tar"), "-C", str(tmp_path / "out")],
        check=True,
        capture_output=True,
    )
    assert_same_tree(tmp_path / "out", tmp_path / "tree")
    assert written.entries == len(read_tree(tmp_path / "tree"))


@pytest.mark.root
@needs_root
@needs_squashfs
def test_squashfs_holds_what_rootfs_makes(store: Store, tmp_path: Path) -> None:
    chain_id = commit(store, BASE, UPPER, DEVICES, OWNED)
    write_rootfs(store, chain_id, tmp_path / "tree")
    write_file(store, chain_id, tmp_path / "image", "squashfs")
    subprocess.run(
        [*UNSQUASH, str(tmp_path / "out"), str(tmp_path / "image")],
        check=True,
        capture_output=True,
    )

    def to_the_second(path: Path) -> dict:
        tree = {
            name: replace(node, mtime_ns=node.mtime_ns // 10**9)
            for name, node in read_tree(path).items()
        }
        # mksquashfs 4.5 gives the root the time of making when it reads a tar.
        tree[b"."] = replace(tree[b"."], mtime_ns=0)
        return tree

    assert differences(to_the_second(tmp_path / "out"), to_the_second(tmp_path / "tree")) == []


@needs_squashfs
def test_the_same_image_makes_the_same_squashfs(store: Store, tmp_path: Path, monkeypatch) -> None:
    chain_id = commit(store, BASE, UPPER)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1600000000")
    digests = set()
    for name in ("a", "b"):
        write_file(store, chain_id, tmp_path / name, "squashfs")
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_missing_program_is_said_before_anything_is_made(
    store: Store, tmp_path: Path, monkeypatch
) -> None:
    chain_id = commit(store, BASE)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("stowray.pipeline.deliver_program._MORE_PATH", str(tmp_path))
    with pytest.raises(NodeError, match="apt-get install squashfs-tools"):
        write_file(store, chain_id, tmp_path / "out", "squashfs")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["tar", pytest.param("squashfs", marks=needs_squashfs)])
def test_a_file_appears_whole_or_not_at_all(store: Store, tmp_path: Path, form: str) -> None:
    chain_id = commit(store, BASE)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(CancelledError):
        write_file(store, chain_id, folder / "out", form, cancelled=lambda: True)  # type: ignore[arg-type]
    assert list(folder.iterdir()) == []
    (folder / "out").write_text("mine")
    with pytest.raises(StorageError, match="exists already"):
        write_file(store, chain_id, folder / "out", form)  # type: ignore[arg-type]
    assert (folder / "out").read_text() == "mine"
    with pytest.raises(StorageError, match="no such directory"):
        write_file(store, chain_id, tmp_path / "none" / "out", form)  # type: ignore[arg-type]


def test_an_image_of_no_layers_is_an_empty_tar(store: Store, tmp_path: Path) -> None:
    write_file(store, None, tmp_path / "out", "tar")
    listing = subprocess.run(
        ["tar", "-tf", str(tmp_path / "out")], check=True, capture_output=True, text=True
    )
    assert listing.stdout == "./\n"
