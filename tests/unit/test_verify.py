from __future__ import annotations

import gzip
import json
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.clock import Boot
from stowray.pipeline.collect import collect, remove
from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import CancelledError, NotFoundError
from stowray.pipeline.records import ReferenceRecord
from stowray.pipeline.removal import remove_tree
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.store import Store
from stowray.pipeline.tree_compare import compare_trees
from stowray.pipeline.verify import verify
from tests.support.chains import commit_chain
from tests.support.plain_user import plain_directory, run_plain
from tests.support.tars import archive, device, directory, file, hardlink, symlink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BASE = archive(
    directory("./"),
    directory("d", mode=0o750),
    file("d/f", b"one", mtime=1000),
    hardlink("d/g", "d/f"),
    symlink("d/link", "f"),
    file("other", b"other"),
)
OTHER = archive(directory("./"), file("d/.wh.f"), file("unlike", b"unlike"))
UPPER = archive(file("d/new", b"new"), file("d/.wh.f"), hardlink("d/copied", "other"))
NAME = "localhost/a/b:1"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as store:
        yield store


def put_image(store: Store, name: str, *layers: bytes, unpack: bool = True) -> ReferenceRecord:
    """Put an image into the store: layers as plain tar, stand-ins for manifest and config."""
    chain_id = ""
    if unpack:
        chain_id = commit_chain(Snapshots(store), layers)[-1].chain_id
    documents = [f"manifest {name}".encode(), f"config {name}".encode()]
    for data in (*layers, *documents):
        store.put_blob(Digest.of(data), data)
    manifest, config = map(Digest.of, documents)
    record = ReferenceRecord(
        reference=name,
        platform="linux/amd64",
        resolved=Descriptor("application/x", manifest, len(documents[0])),
        manifest=manifest,
        manifest_media_type="application/x",
        manifest_size=len(documents[0]),
        config=config,
        layers=tuple(map(Digest.of, layers)),
        chain_id=chain_id,
        unpacked=unpack,
        pinned=False,
        created=time.time(),
    )
    store.record_reference(record)
    return record


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)


def tree_of(store: Store, record: ReferenceRecord, depth: int = 0) -> Path:
    """Return the tree of a layer, the topmost first."""
    return Snapshots(store).lowers(Digest(record.chain_id))[depth]


def test_a_whole_store_has_no_damage(store: Store) -> None:
    put_image(store, NAME, BASE, UPPER)
    put_image(store, "localhost/a/c:1", OTHER, BASE)
    report = verify(store, deep=True)
    assert report.damaged == ()
    assert (report.blobs, report.trees) == (7, 3)
    assert report.size == len(BASE) + len(UPPER) + len(OTHER) + sum(
        len(f"{kind} localhost/a/{name}:1") for kind in ("manifest", "config") for name in "bc"
    )
    assert report.text().endswith("no damage")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(lambda path: overwrite(path, b"!" + BASE[1:]), "digest", id="a bit"),
        pytest.param(lambda path: overwrite(path, BASE[:100]), "digest", id="cut short"),
        pytest.param(lambda path: overwrite(path, b""), "digest", id="empty"),
        pytest.param(lambda path: path.unlink(), "missing", id="gone"),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), "opened", id="a directory"),
        pytest.param(
            lambda path: (path.unlink(), path.symlink_to("/etc/passwd")), "opened", id="a link"
        ),
    ],
)
def test_a_damaged_blob_is_named_and_put_aside(
    store: Store, damage: Callable[[Path], object], reason: str
) -> None:
    put_image(store, NAME, BASE)
    other = put_image(store, "localhost/a/c:1", OTHER)
    path = store.blob_path(Digest.of(BASE))
    damage(path)
    report = verify(store)
    (found,) = report.damaged
    assert (found.kind, found.digest, found.path) == ("blob", Digest.of(BASE), str(path))
    assert reason in found.reason
    assert report.references == ((NAME, "linux/amd64", True),)
    assert str(path) in report.text()
    assert verify(store, [other.reference]).damaged == ()
    assert verify(store, [NAME]).damaged == report.damaged
    assert verify(store, repair=True).damaged == report.damaged
    assert not os.path.lexists(path)
    store.put_blob(Digest.of(BASE), BASE)
    assert verify(store, deep=True).damaged == ()


def change(name: str) -> Callable[[Path], object]:
    def content(tree: Path) -> None:
        status = (tree / "d/f").stat()
        (tree / "d/f").write_bytes(b"two")
        os.utime(tree / "d/f", ns=(status.st_mtime_ns, status.st_mtime_ns))

    def relinked(tree: Path) -> None:
        (tree / "d/g").unlink()
        (tree / "d/g").write_bytes(b"one")
        os.utime(tree / "d/g", (1000, 1000))

    changes: dict[str, Callable[[Path], object]] = {
        "content": content,
        "size": lambda tree: (tree / "d/f").write_bytes(b"longer"),
        "mode": lambda tree: (tree / "other").chmod(0o4777),
        "modification time": lambda tree: os.utime(tree / "other", (5, 5)),
        "is missing": lambda tree: (tree / "other").unlink(),
        "should not be there": lambda tree: (tree / "extra").touch(),
        "hard links": relinked,
        "link target": lambda tree: (
            (tree / "d/link").unlink(),
            (tree / "d/link").symlink_to("g"),
        ),
        "extended attributes": lambda tree: os.setxattr(tree / "other", "user.x", b"1"),
        "is a directory": lambda tree: ((tree / "other").unlink(), (tree / "other").mkdir()),
    }
    return changes[name]


@pytest.mark.parametrize(
    ("reason", "path"),
    [
        ("content", "d/f"),
        ("size", "d/f"),
        ("mode", "other"),
        ("modification time", "other"),
        ("is missing", "other"),
        ("should not be there", "extra"),
        ("hard links", "d/g"),
        ("link target", "d/link"),
        ("extended attributes", "other"),
        ("is a directory", "other"),
    ],
)
def test_a_damaged_tree_is_named_by_path(store: Store, reason: str, path: str) -> None:
    record = put_image(store, NAME, BASE)
    tree = tree_of(store, record)
    change(reason)(tree)
    assert verify(store).damaged == ()
    report = verify(store, deep=True)
    found = [damage for damage in report.damaged if damage.path == f"{tree}/{path}"]
    assert [damage.digest for damage in found] == [record.chain_id]
    assert reason in found[0].reason
    assert report.references == ((NAME, "linux/amd64", True),)


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away and makes devices")
def test_owners_and_devices_are_compared(store: Store) -> None:
    record = put_image(store, NAME, archive(directory("./"), file("mine"), device("null", 1, 3)))
    tree = tree_of(store, record)
    os.chown(tree / "mine", 7, 8)
    status = (tree / "null").stat()
    (tree / "null").unlink()
    os.mknod(tree / "null", status.st_mode, os.makedev(1, 5))
    os.utime(tree / "null", ns=(status.st_mtime_ns, status.st_mtime_ns))
    os.utime(tree, (1000, 1000))
    found = {
        damage.path.rpartition("/")[2]: damage.reason for damage in verify(store, deep=True).damaged
    }
    assert "owner (7:8 for 0:0)" in found["mine"]
    assert "device number" in found["null"]


def test_all_that_differs_in_one_file_is_named(store: Store) -> None:
    record = put_image(store, NAME, BASE)
    path = tree_of(store, record) / "other"
    path.chmod(0o600)
    path.write_bytes(b"longer than it was")
    os.setxattr(path, "user.x", b"1")
    (found,) = [damage for damage in verify(store, deep=True).damaged if damage.path == str(path)]
    for reason in ("mode (0600 for", "size (18 for", "modification time", "extended attributes"):
        assert reason in found.reason


def test_a_tree_that_is_gone_is_damage(store: Store) -> None:
    record = put_image(store, NAME, BASE, UPPER)
    tree = tree_of(store, record, 1)
    remove_tree(tree)
    report = verify(store, [NAME], deep=True)
    assert [(damage.path, damage.reason) for damage in report.damaged] == [
        (str(tree), "is missing")
    ]
    assert report.references == ((NAME, "linux/amd64", True),)
    verify(store, deep=True, repair=True)
    put_image(store, NAME, BASE, UPPER)
    assert verify(store, deep=True).damaged == ()


def test_what_is_unproven_since_a_reboot_is_no_damage(store: Store) -> None:
    put_image(store, NAME, BASE, UPPER)
    with Store.open(store.path, boot=Boot("another", store.boot.host)) as later:
        assert verify(later, deep=True).damaged == ()


def test_a_repaired_tree_is_made_anew(store: Store) -> None:
    record = put_image(store, NAME, BASE, UPPER)
    (tree_of(store, record, 1) / "other").write_bytes(b"damaged")
    report = verify(store, deep=True, repair=True)
    assert {damage.kind for damage in report.damaged} == {"tree"}
    assert report.references == ((NAME, "linux/amd64", True),)
    assert not Snapshots(store).has(Digest(record.chain_id))
    # The upper layer had copied the damaged file up: its tree goes as well, named or not.
    assert Snapshots(store).all() == []
    put_image(store, NAME, BASE, UPPER)
    assert verify(store, deep=True).damaged == ()
    assert (tree_of(store, record) / "d/copied").read_bytes() == b"other"


def test_a_tree_that_cannot_be_compared_is_made_anew_too(store: Store) -> None:
    record = put_image(store, NAME, BASE)
    tree = tree_of(store, record)
    (tree / "other").write_bytes(b"damaged")
    overwrite(store.blob_path(Digest.of(BASE)), b"")
    assert verify(store, repair=True).references
    assert tree.is_dir()
    verify(store, deep=True, repair=True)
    assert not tree.exists()


def test_a_store_that_cannot_be_written_to_is_verified(store: Store) -> None:
    record = put_image(store, NAME, BASE)
    store.writable = False
    assert verify(store).damaged == ()
    with Snapshots(store).held(Digest(record.chain_id), "reader") as view:
        assert view.find(b"d/f") is not None
    assert os.listdir(store.path / "leases") == []


def test_independent_layers_above_stay(store: Store) -> None:
    whole = archive(directory("./"), file("alone", b"1"))
    record = put_image(store, NAME, BASE, whole)
    (tree_of(store, record, 1) / "other").write_bytes(b"damaged")
    above = tree_of(store, record)
    verify(store, deep=True, repair=True)
    assert above.is_dir()


def test_damaged_records_are_named_and_put_aside(store: Store) -> None:
    put_image(store, NAME, BASE)
    for folder in ("snapshots", "refs"):
        path = next(path for path in (store.path / folder).rglob("*") if path.is_file())
        path.write_bytes(b"{}")
        report = verify(store)
        assert [(damage.kind, damage.path) for damage in report.damaged] == [("record", str(path))]
        verify(store, repair=True)
        put_image(store, NAME, BASE)
        assert verify(store, deep=True).damaged == ()


def test_a_tree_without_its_blob_is_no_damage(store: Store) -> None:
    put_image(store, NAME, BASE)
    store.remove_reference(NAME)
    store.blob_path(Digest.of(BASE)).unlink()
    report = verify(store, deep=True)
    assert report.damaged == ()
    assert report.trees == 0


def test_the_report_is_plain_data(store: Store) -> None:
    put_image(store, NAME, BASE, unpack=False)
    store.blob_path(Digest.of(BASE)).unlink()
    report = verify(store, repair=True).with_repair(True)
    assert report.to_dict() == {
        "blobs": 2,
        "size": len(f"manifest {NAME}config {NAME}"),
        "trees": 0,
        "damaged": [
            {
                "kind": "blob",
                "digest": Digest.of(BASE),
                "path": str(store.blob_path(Digest.of(BASE))),
                "reason": "is missing",
            }
        ],
        "references": [NAME],
        "left": [],
        "repaired": True,
    }
    assert report.text().endswith("mended")


def test_an_unknown_reference_and_a_cancellation(store: Store) -> None:
    put_image(store, NAME, BASE)
    with pytest.raises(NotFoundError, match="localhost/nothing"):
        verify(store, ["localhost/nothing:1"])
    with pytest.raises(CancelledError):
        verify(store, cancelled=lambda: True)


def test_a_tree_that_came_from_another_image_is_compared_with_the_blob_that_is_here(
    store: Store,
) -> None:
    """Two images have one layer in two blobs, and the one that its tree came from is gone."""
    first = put_image(store, "localhost/a/first:1", BASE)
    packed = gzip.compress(BASE)
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [str(Digest.of(BASE))]},
        }
    ).encode()
    for data in (packed, config):
        store.put_blob(Digest.of(data), data)
    second = replace(
        first,
        reference="localhost/a/second:1",
        config=Digest.of(config),
        layers=(Digest.of(packed),),
    )
    store.record_reference(second)
    remove(store, first.reference)
    collect(store)
    assert not store.has(Digest.of(BASE))
    assert verify(store, deep=True).damaged == ()
    overwrite(tree_of(store, second) / "d" / "f", b"two")
    report = verify(store, [second.reference], deep=True)
    assert {damage.kind for damage in report.damaged} == {"tree"}
    assert report.trees == 1


def test_very_deep_trees_are_compared(tmp_path: Path) -> None:
    try:
        for name in ("one", "two"):
            here = os.open(_made(tmp_path / name), os.O_RDONLY)
            for _ in range(1500):
                os.mkdir("d", dir_fd=here)
                below = os.open("d", os.O_RDONLY, dir_fd=here)
                os.close(here)
                here = below
            os.close(os.open(f"leaf-{name}", os.O_CREAT, dir_fd=here))
            os.close(here)
        reasons = {reason for _, reason in compare_trees(tmp_path / "one", tmp_path / "two")}
        assert {"is missing", "should not be there"} <= reasons
    finally:
        # Deeper than what clears temporary directories away can follow.
        for name in ("one", "two"):
            remove_tree(tmp_path / name)


def _made(path: Path) -> Path:
    path.mkdir()
    return path


PLAIN = """
import sys
from pathlib import Path
from stowray.pipeline.store import Store
from stowray.pipeline.verify import verify
from tests.support.tars import archive, device, directory, file
from tests.unit.test_verify import put_image, tree_of
become_plain()
store = Store.open(Path(sys.argv[1]) / "store")
layer = archive(directory("./"), file("f", b"1", uid=5, mode=0), device("null", 1, 3))
record = put_image(store, "localhost/a:1", layer)
print(verify(store, deep=True).text())
tree = tree_of(store, record)
entries = tree.with_name("tree.entries")
entries.write_bytes(entries.read_bytes()[:-1])
print(verify(store, deep=True).text())
"""


def test_a_plain_users_recorded_attributes_are_compared() -> None:
    with plain_directory() as work:
        lines = run_plain(PLAIN, work).splitlines()
        assert lines[0].endswith("no damage")
        assert "entry list: damaged" in lines[1]
