from __future__ import annotations

import io
import os
import signal
import stat
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import CancelledError, NotFoundError, StorageError
from stowray.pipeline.mount import mount, umount
from stowray.pipeline.rootfs import check_destination, flatten, write_rootfs
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.store import Store
from tests.support import entries, peers
from tests.support.chains import commit_chain
from tests.support.images import Layout
from tests.support.judge import assert_same_tree, differences, read_tree
from tests.support.plain_user import plain_directory, run_plain
from tests.support.tars import archive, directory, file, hardlink
from tests.support.verdicts import umoci

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_root = [
    pytest.mark.root,
    pytest.mark.skipif(os.getuid() != 0, reason="owners and devices need root"),
]


def layer(parts: list[entries.Entry]) -> bytes:
    out = io.BytesIO()
    entries.write_tar(parts, out)
    return out.getvalue()


BASE_ENTRIES = [
    entries.directory("./", 0o751, mtime="1600000000.25"),
    entries.directory("d", 0o1777, uid=5, gid=6),
    entries.file("d/set-ids", b"#!", mode=0o6755, uid=7, gid=8, mtime="1500000000.123456789"),
    entries.file("d/closed", b"x", mode=0),
    entries.file("d/capable", b"c", mode=0o755, xattrs={"user.note": b"\0\xff\n="}),
    entries.hardlink("d/again", "d/set-ids"),
    entries.directory("away"),
    entries.file("away/gone", b"gone"),
    entries.symlink("link", "/etc/../d/closed", uid=9),
    entries.hardlink("link-again", "link"),
    entries.directory("locked", 0o500),
    entries.file("locked/in", b"in"),
    entries.file("name\\ with\nodd\udcff", b"odd"),
    entries.file("large", bytes(300_000) + b"end"),
    entries.directory("many"),
    *(entries.file(f"many/{number}", b"%d" % number) for number in range(400)),
]
BASE = layer(BASE_ENTRIES)
UPPER_ENTRIES = [
    entries.whiteout("away"),
    entries.file("d/new", b"new", mode=0o640),
    entries.directory("away", 0o700),
    entries.file("away/fresh", b"fresh"),
]
UPPER = layer(UPPER_ENTRIES)
DEVICES_ENTRIES = [
    entries.directory("./"),
    entries.Entry("null", kind=b"3", device=(1, 3), mode=0o666),
    entries.Entry("disk", kind=b"4", device=(8, 1), mode=0o660, gid=6),
    entries.Entry("pipe", kind=b"6", mode=0o622),
    entries.hardlink("null-again", "null"),
]
DEVICES = layer(DEVICES_ENTRIES)
OWNED_ENTRIES = [
    entries.directory("of", 0o755, uid=1000, gid=2000),
    entries.directory("of/closed", 0o555, uid=128),
    entries.file("of/user", b"u", mode=0o444, uid=1000, xattrs={"user.note": b"n"}),
    entries.file("of/group", b"g", mode=0o2755, gid=127),
    entries.file("of/both", b"b", uid=4294967294, gid=16384, xattrs={"user.note": b"n"}),
    entries.file("of/high", b"h", mode=0, uid=4294967294, gid=128),
    entries.hardlink("of/high-again", "of/high"),
    entries.file("of/root", b"r", mode=0o444, xattrs={"user.note": b"n"}),
    entries.symlink("of/link", "user", uid=5, gid=5),
]
OWNED = layer(OWNED_ENTRIES)
OWNER = "user.rootlesscontainers"
NOT_BY_UMOCI = {
    b"of/closed": {OWNER: bytes.fromhex("08800110ffffffff0f")},
    b"of/user": {OWNER: bytes.fromhex("08e80710ffffffff0f"), "user.note": b"n"},
    b"of/high": {OWNER: bytes.fromhex("08feffffff0f108001")},
    b"of/high-again": {OWNER: bytes.fromhex("08feffffff0f108001")},
    b"of/root": {"user.note": b"n"},
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as store:
        yield store


def commit(store: Store, *layers: bytes) -> Digest:
    return commit_chain(Snapshots(store), layers)[-1].chain_id


@pytest.mark.parametrize("link", ["auto", "copy", "hardlink"])
@pytest.mark.parametrize(
    "layers",
    [
        pytest.param([BASE], id="one layer"),
        pytest.param([BASE, UPPER], id="two layers"),
        pytest.param([BASE, DEVICES], id="devices", marks=needs_root),
    ],
)
@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="compares with an overlay mount: needs root")
def test_it_is_what_the_kernel_shows(
    store: Store, tmp_path: Path, layers: list[bytes], link: str
) -> None:
    chain_id = commit(store, *layers)
    result = write_rootfs(store, chain_id, tmp_path / "out", link=link)  # type: ignore[arg-type]
    point = mount(store, chain_id, tmp_path / "mounted")
    try:
        # Directories of an overlay have sizes and times of their own making; all else is equal.
        assert_same_tree(tmp_path / "out", point)
    finally:
        umount(store, point)
    assert result.entries == sum(1 for _ in (tmp_path / "out").rglob("*"))
    assert result.skipped == []


@pytest.mark.peers
@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="umoci keeps owners as root only")
def test_it_is_what_umoci_unpacks(store: Store, tmp_path: Path) -> None:
    peers.require("umoci")
    layout = Layout(tmp_path / "layout")
    parts = [layout.add_layer(part) for part in (BASE_ENTRIES, UPPER_ENTRIES, DEVICES_ENTRIES)]
    layout.tag("it", layout.add_image(parts))
    (tmp_path / "a" / "b").mkdir(parents=True)
    peers.run(["umoci", "unpack", "--image", f"{layout.path}:it", str(tmp_path / "a" / "b" / "c")])
    write_rootfs(store, commit(store, BASE, UPPER, DEVICES), tmp_path / "out")
    assert_same_tree(tmp_path / "out", tmp_path / "a" / "b" / "c" / "rootfs")


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="owners and devices need root")
def test_plain_trees_keep_all_that_root_can_give(store: Store, tmp_path: Path) -> None:
    # Root of a container that may neither set trusted attributes nor make devices has such trees.
    for privileged in (True, False):
        snapshots = Snapshots(store, privileged=privileged)
        top = commit_chain(snapshots, [BASE, UPPER, DEVICES])[-1].chain_id
        with snapshots.held(top, "test") as view:
            flatten(view, tmp_path / str(privileged))
    assert_same_tree(tmp_path / "False", tmp_path / "True")


def large_files(count: int) -> bytes:
    parts = [directory("./")]
    parts += [file(f"large-{number}", b"%d" % number * (2 << 20)) for number in range(count)]
    return archive(*parts, hardlink("again", "large-0"))


def test_large_files_are_copied_by_threads(store: Store, tmp_path: Path) -> None:
    chain_id = commit(store, large_files(9))
    before = threading.active_count()
    result = write_rootfs(store, chain_id, tmp_path / "out", link="copy")
    assert threading.active_count() == before
    assert (result.entries, result.size) == (10, 9 * (2 << 20))
    assert (tmp_path / "out" / "again").samefile(tmp_path / "out" / "large-0")
    assert_same_tree(tmp_path / "out", Snapshots(store).lowers(chain_id)[0])


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="mounts a small tmpfs: needs root")
def test_a_full_disk_under_the_threads_leaves_nothing(store: Store, tmp_path: Path) -> None:
    chain_id = commit(store, large_files(9))
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(small)], check=True)
    before = threading.active_count()
    try:
        with pytest.raises(StorageError, match=r"small/out/(again|large-\d): .*disk is full"):
            write_rootfs(store, chain_id, small / "out")
        assert list(small.iterdir()) == []
        assert threading.active_count() == before
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_holes_stay_holes(store: Store, tmp_path: Path) -> None:
    chain_id = commit(store, archive(directory("./"), file("holes", b"x" * 4096)))
    tree = Snapshots(store).lowers(chain_id)[0]
    with (tree / "holes").open("r+b") as source:
        source.truncate(64 << 20)
        source.seek(32 << 20)
        source.write(b"middle")
    write_rootfs(store, chain_id, tmp_path / "out", link="copy")
    made = tmp_path / "out" / "holes"
    assert made.stat().st_size == 64 << 20
    assert made.stat().st_blocks * 512 < 1 << 20
    assert made.read_bytes() == (tree / "holes").read_bytes()


def test_modes_do_not_depend_on_the_umask(store: Store, tmp_path: Path) -> None:
    chain_id = commit(store, archive(directory("./"), file("f", b"1", mode=0o666)))
    before = os.umask(0o077)
    try:
        write_rootfs(store, chain_id, tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out" / "f").stat().st_mode) == 0o666


def test_a_set_group_id_parent_leaves_no_trace(store: Store, tmp_path: Path) -> None:
    chain_id = commit(store, archive(directory("./"), directory("d"), file("d/f", b"1")))
    parent = tmp_path / "shared"
    parent.mkdir()
    parent.chmod(0o2777)
    write_rootfs(store, chain_id, parent / "out")
    for path in (parent / "out", parent / "out" / "d"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o755


@pytest.mark.parametrize("link", ["auto", "copy"])
def test_writes_never_reach_the_store(store: Store, tmp_path: Path, link: str) -> None:
    chain_id = commit(store, archive(directory("./"), file("f", b"kept")))
    write_rootfs(store, chain_id, tmp_path / "out", link=link)  # type: ignore[arg-type]
    (tmp_path / "out" / "f").write_bytes(b"changed")
    (tmp_path / "out" / "f").chmod(0)
    kept = Snapshots(store).lowers(chain_id)[0] / "f"
    assert kept.read_bytes() == b"kept"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o644


def test_hard_links_share_with_the_store(store: Store, tmp_path: Path) -> None:
    chain_id = commit(store, archive(directory("./"), file("f", b"kept")))
    result = write_rootfs(store, chain_id, tmp_path / "out", link="hardlink")
    assert result.linked == 1
    assert (tmp_path / "out" / "f").samefile(Snapshots(store).lowers(chain_id)[0] / "f")


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="mounts a tmpfs: needs root")
def test_the_destination_may_be_a_mount_point(store: Store, tmp_path: Path) -> None:
    chain_id = commit(store, BASE)
    write_rootfs(store, chain_id, tmp_path / "out")
    point = tmp_path / "point"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(point)], check=True)
    try:
        with pytest.raises(StorageError, match="hard links need"):
            write_rootfs(store, chain_id, point, link="hardlink")
        assert list(point.iterdir()) == []
        with pytest.raises(StorageError, match="cannot share blocks"):
            write_rootfs(store, chain_id, point, link="reflink")
        assert list(point.iterdir()) == []
        write_rootfs(store, chain_id, point)
        assert_same_tree(point, tmp_path / "out")
        with pytest.raises(StorageError, match="not empty"):
            write_rootfs(store, chain_id, point)
    finally:
        subprocess.run(["umount", str(point)], check=True)


def test_only_new_and_empty_destinations(store: Store, tmp_path: Path) -> None:
    chain_id = commit(store, archive(directory("./"), file("f", b"1")))
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(full)
    for name in ("full", "file", "link", "missing/out"):
        with pytest.raises(StorageError):
            check_destination(tmp_path / name)
        with pytest.raises(StorageError):
            write_rootfs(store, chain_id, tmp_path / name)
    assert (full / "mine").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    write_rootfs(store, chain_id, tmp_path / "empty")
    assert (tmp_path / "empty" / "f").read_bytes() == b"1"


def test_a_failure_leaves_nothing(store: Store, tmp_path: Path) -> None:
    chain_id = commit(store, BASE)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CancelledError):
        write_rootfs(store, chain_id, tmp_path / "out", cancelled=lambda: True)
    with pytest.raises(NotFoundError):
        write_rootfs(store, Digest.of(b"other"), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from stowray.pipeline.digest import Digest
from stowray.pipeline.rootfs import write_rootfs
from stowray.pipeline.store import Store
calls = []
def die():
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return False
write_rootfs(Store.open(sys.argv[1]), Digest(sys.argv[2]), Path(sys.argv[3]), cancelled=die)
"""


def test_killed_half_way_there_is_no_tree_and_the_next_run_tidies(
    store: Store, tmp_path: Path
) -> None:
    chain_id = commit(store, BASE)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(store.path), chain_id, str(tmp_path / "out")],
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert [name for name in os.listdir(tmp_path) if name.startswith(".out.stowray-")]
    write_rootfs(store, chain_id, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "store"]


def test_an_image_of_no_layers_is_an_empty_tree(store: Store, tmp_path: Path) -> None:
    write_rootfs(store, None, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


OWNED_AS_PLAIN_USER = """
import sys
from pathlib import Path
from stowray.pipeline.rootfs import write_rootfs
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.store import Store
from tests.support.chains import commit_chain
from tests.unit.test_rootfs import BASE, OWNED
become_plain()
work = Path(sys.argv[1])
store = Store.open(work / "store")
top = commit_chain(Snapshots(store), [BASE, OWNED])[-1]
for link in ("copy", "hardlink"):
    print(write_rootfs(store, top.chain_id, work / link, link=link).skipped)
"""


@pytest.mark.parametrize("link", ["copy", "hardlink"])
@pytest.mark.peers
@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user, which needs root")
def test_a_plain_users_tree_names_owners_as_umoci_does(link: str) -> None:
    peers.require("umoci")
    with plain_directory() as work:
        assert run_plain(OWNED_AS_PLAIN_USER, work) == "[]\n[]\n"
        layout = Layout(work / "layout")
        parts = [layout.add_layer(part) for part in (BASE_ENTRIES, OWNED_ENTRIES)]
        layout.tag("it", layout.add_image(parts))
        expected = umoci(layout, "it", work, rootless=True)
        assert expected is not None
        actual = read_tree(work / link)
        # umoci sets modes first, and then has no right to set attributes on these.
        for name, attributes in NOT_BY_UMOCI.items():
            assert dict(actual[name].xattrs) == attributes
            assert expected[name].xattrs == ()
            actual[name] = replace(actual[name], xattrs=())
        assert differences(actual, expected) == []
        for name in (b"of/group", b"of/both"):
            assert actual[name].xattrs


PLAIN = """
import sys
from pathlib import Path
from stowray.pipeline.rootfs import write_rootfs
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.store import Store
from tests.support.chains import commit_chain
from tests.unit.test_rootfs import BASE, DEVICES, UPPER
become_plain()
work = Path(sys.argv[1])
store = Store.open(work / "store")
top = commit_chain(Snapshots(store), [BASE, UPPER, DEVICES])[-1]
for link in ("auto", "hardlink"):
    result = write_rootfs(store, top.chain_id, work / link, link=link)
    print(len(result.skipped), result.linked > 0)
"""


def test_a_plain_user_gets_all_but_owners_and_devices(store: Store, tmp_path: Path) -> None:
    with plain_directory() as work:
        output = run_plain(PLAIN, work).splitlines()
        # Two devices and the second name of one of them.
        assert output == ["3 False", "3 True"]
        for name in ("auto", "hardlink"):
            tree = work / name
            assert stat.S_IMODE((tree / "d" / "set-ids").stat().st_mode) == 0o6755
            assert (tree / "d" / "set-ids").samefile(tree / "d" / "again")
            assert (tree / "d" / "set-ids").stat().st_mtime_ns == 1500000000123456789
            assert stat.S_IMODE((tree / "d" / "closed").stat().st_mode) == 0
            assert stat.S_IMODE((tree / "locked").stat().st_mode) == 0o500
            assert os.getxattr(tree / "d" / "capable", "user.note") == b"\0\xff\n="
            assert os.readlink(tree / "link") == "/etc/../d/closed"
            assert (tree / "pipe").is_fifo()
            assert not (tree / "null").exists()
            assert [path.name for path in (tree / "away").iterdir()] == ["fresh"]
