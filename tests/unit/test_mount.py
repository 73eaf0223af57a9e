from __future__ import annotations

import os
import stat
import subprocess
import threading
from base64 import b64decode
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stowray.pipeline import kernel
from stowray.pipeline.clock import Boot
from stowray.pipeline.collect import collect
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import NotFoundError, StorageError
from stowray.pipeline.leases import leases
from stowray.pipeline.mount import is_mounted, mount, sweep, umount
from stowray.pipeline.mountinfo import parse_mountinfo, topmost
from stowray.pipeline.rootfs import write_rootfs
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.store import Store
from tests.support.chains import Layer, commit_chain
from tests.support.judge import assert_same_tree
from tests.support.plain_user import plain_directory, run_plain
from tests.support.tars import archive, directory, file, opaque
from tests.support.vectors import table

if TYPE_CHECKING:
    from collections.abc import Iterator

root_only = [
    pytest.mark.root,
    pytest.mark.skipif(os.getuid() != 0, reason="mounting needs root"),
]
BASE = archive(directory("./", mode=0o711), directory("d"), file("d/f", b"one"), file("top", b"t"))
UPPER = archive(file("d/.wh.f"), file("d/g", b"two"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as store:
        yield store


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Path]:
    """A mount point; what a failing test leaves mounted there is taken away."""
    point = tmp_path / "point"
    yield point
    while is_mounted(point):
        kernel.unmount(os.fsencode(point), kernel.MNT_DETACH)


def commit(store: Store, *layers: bytes) -> Digest:
    return commit_chain(Snapshots(store), layers)[-1].chain_id


def mounts_of(store: Store) -> list[str]:
    return os.listdir(store.path / "mounts")


KINDS = {stat.S_IFREG: "f", stat.S_IFDIR: "d", stat.S_IFLNK: "l"}
ORACLE = table("layer_oracle")


class TestRoot:
    pytestmark = root_only

    @pytest.mark.parametrize(
        "case",
        [pytest.param(case, id=case["name"]) for case in ORACLE["cases"] if not case.get("error")],
    )
    def test_the_kernel_shows_what_the_fields_tools_agree_on(
        self, store: Store, point: Path, tmp_path: Path, case: dict[str, Any]
    ) -> None:
        layers = [
            Layer(b64decode(ORACLE["blobs"][digest]), diff_id)
            for digest, diff_id in zip(case["layers"], case["diff_ids"], strict=True)
        ]
        chain_id = commit_chain(Snapshots(store), layers)[-1].chain_id
        write_rootfs(store, chain_id, tmp_path / "copy")
        mount(store, chain_id, point)
        assert_same_tree(point, tmp_path / "copy")
        # "f 0644 0:0 mt=… …": kind, mode and owner.
        expected = {name: text.split()[:3] for name, text in case["tree"].items()}
        seen = {}
        for path in point.rglob("*"):
            status = path.lstat()
            mode = f"{stat.S_IMODE(status.st_mode):04o}"
            name = str(path.relative_to(point))
            seen[name] = [
                KINDS[stat.S_IFMT(status.st_mode)],
                mode,
                f"{status.st_uid}:{status.st_gid}",
            ]
        assert seen == expected
        umount(store, point)

    @pytest.mark.parametrize(
        ("layers", "mode"),
        [
            pytest.param([BASE], 0o711, id="a single lower directory"),
            pytest.param([BASE, UPPER], 0o711, id="the root of a lower layer"),
            pytest.param([UPPER], 0o755, id="no entry for the root at all"),
            pytest.param(
                [BASE, archive(opaque(""), file("only", b"o"))], 0o711, id="an opaque root"
            ),
        ],
    )
    def test_it_shows_what_a_flattened_copy_has(
        self, store: Store, point: Path, tmp_path: Path, layers: list[bytes], mode: int
    ) -> None:
        chain_id = commit(store, *layers)
        write_rootfs(store, chain_id, tmp_path / "copy")
        mount(store, chain_id, point)
        assert_same_tree(point, tmp_path / "copy")
        assert stat.S_IMODE(point.stat().st_mode) == mode
        with pytest.raises(OSError, match="Read-only"):
            (point / "new").touch()
        umount(store, point)
        assert list(point.iterdir()) == []
        assert mounts_of(store) == []
        assert leases(store) == []

    def test_an_image_of_no_layers_is_an_empty_tree(self, store: Store, point: Path) -> None:
        mount(store, None, point)
        assert list(point.iterdir()) == []
        assert stat.S_IMODE(point.stat().st_mode) == 0o755
        umount(store, point)

    @pytest.mark.parametrize("count", [128, 500, 503])
    def test_any_number_of_layers(self, store: Store, point: Path, count: int) -> None:
        # Equal layers would be one lower directory: each has a file of its own.
        layers = [archive(directory("./"), file(f"f{n}", b"%d" % n)) for n in range(count - 1)]
        chain_id = commit(store, BASE, *layers)
        mount(store, chain_id, point)
        assert (point / "f0").read_bytes() == b"0"
        assert (point / f"f{count - 2}").read_bytes() == b"%d" % (count - 2)
        assert (point / "d" / "f").read_bytes() == b"one"
        assert len(os.listdir(point)) == count - 1 + 2
        umount(store, point)

    def test_changes_go_to_the_upper_directory(
        self, store: Store, point: Path, tmp_path: Path
    ) -> None:
        chain_id = commit(store, BASE, UPPER)
        upper = tmp_path / "changes, of: mine"
        mount(store, chain_id, point, rw_upper=upper)
        assert stat.S_IMODE(point.stat().st_mode) == 0o711
        (point / "d" / "g").write_bytes(b"changed")
        (point / "top").unlink()
        umount(store, point)
        assert (upper / "d" / "g").read_bytes() == b"changed"
        mount(store, chain_id, point, rw_upper=upper)
        assert (point / "d" / "g").read_bytes() == b"changed"
        assert not (point / "top").exists()
        umount(store, point)
        mount(store, chain_id, point)
        assert (point / "d" / "g").read_bytes() == b"two"
        umount(store, point)

    def test_the_lease_outlives_the_process_and_ends_with_the_mount(
        self, store: Store, point: Path
    ) -> None:
        chain_id = commit(store, BASE, UPPER)
        mount(store, chain_id, point)
        collect(store)
        assert (point / "d" / "g").read_bytes() == b"two"
        assert Snapshots(store).has(chain_id)
        umount(store, point)
        collect(store)
        assert not Snapshots(store).has(chain_id)

    def test_after_a_reboot_nothing_is_held(self, store: Store, point: Path) -> None:
        mount(store, commit(store, BASE), point)
        kernel.unmount(os.fsencode(point))
        with Store.open(store.path, boot=Boot("another", store.boot.host)) as later:
            assert leases(later) == []
            assert sweep(later) == 1

    def test_what_others_unmounted_only_loses_its_lease(self, store: Store, point: Path) -> None:
        mount(store, commit(store, BASE), point)
        kernel.unmount(os.fsencode(point))
        umount(store, point)
        assert leases(store) == []
        with pytest.raises(StorageError, match="not mounted from"):
            umount(store, point)

    def test_what_others_mounted_is_never_unmounted(self, store: Store, point: Path) -> None:
        point.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", str(point)], check=True)
        try:
            with pytest.raises(StorageError, match="not mounted from"):
                umount(store, point)
            with pytest.raises(StorageError, match="mounted here already"):
                mount(store, commit(store, BASE), point)
            assert os.path.ismount(point)
        finally:
            subprocess.run(["umount", str(point)], check=True)

    def test_a_mount_point_is_free_and_empty(
        self, store: Store, point: Path, tmp_path: Path
    ) -> None:
        chain_id = commit(store, BASE)
        mount(store, chain_id, point)
        with pytest.raises(StorageError, match="an image is mounted here already"):
            mount(store, chain_id, point)
        umount(store, point)
        (point / "mine").touch()
        with pytest.raises(StorageError, match="not empty"):
            mount(store, chain_id, point)
        with pytest.raises(StorageError):
            mount(store, chain_id, point / "mine")
        with pytest.raises(StorageError):
            mount(store, chain_id, tmp_path / "no" / "parent")
        assert leases(store) == []

    def test_a_link_to_the_mount_point_does_as_well(
        self, store: Store, point: Path, tmp_path: Path
    ) -> None:
        point.mkdir()
        (tmp_path / "link").symlink_to(point)
        assert mount(store, commit(store, BASE), tmp_path / "link") == point
        umount(store, tmp_path / "link")
        assert not is_mounted(point)

    def test_a_busy_mount_stays_with_its_lease(self, store: Store, point: Path) -> None:
        mount(store, commit(store, BASE), point)
        with (point / "top").open("rb"), pytest.raises(StorageError, match="in use"):
            umount(store, point)
        assert is_mounted(point)
        assert len(leases(store)) == 1
        umount(store, point)

    def test_a_failure_holds_nothing(self, store: Store, point: Path, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError):
            mount(store, Digest.of(b"other"), point)
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match="no directory"):
            mount(store, commit(store, BASE), point, rw_upper=tmp_path / "file")
        assert leases(store) == []
        assert mounts_of(store) == []
        assert not is_mounted(point)

    def test_an_upper_directory_that_the_kernel_refuses(
        self, store: Store, point: Path, tmp_path: Path
    ) -> None:
        chain_id = commit(store, BASE)
        mount(store, chain_id, tmp_path / "outer", rw_upper=tmp_path / "upper")
        try:
            with pytest.raises(StorageError, match="kernel refuses this overlay mount"):
                mount(store, chain_id, point, rw_upper=tmp_path / "outer" / "upper")
            assert not is_mounted(point)
            assert len(leases(store)) == len(mounts_of(store)) == 1
        finally:
            umount(store, tmp_path / "outer")

    def test_the_working_directory_of_others_stays(self, store: Store, point: Path) -> None:
        here = Path.cwd()
        seen: set[str] = set()
        stop = threading.Event()

        def watch() -> None:
            while not stop.is_set():
                seen.add(os.readlink("/proc/self/cwd"))
                seen.add(str(Path.cwd()))

        watcher = threading.Thread(target=watch)
        watcher.start()
        chain_id = commit(store, BASE)
        for _ in range(20):
            mount(store, chain_id, point)
            umount(store, point)
        stop.set()
        watcher.join()
        assert seen == {str(here)}


PLAIN = """
import sys
from pathlib import Path
from stowray.pipeline.errors import StorageError
from stowray.pipeline.mount import mount
from stowray.pipeline.store import Store
become_plain()
work = Path(sys.argv[1])
try:
    mount(Store.open(work / "store"), None, work / "point")
except StorageError as error:
    print(error.reason)
"""


def test_a_plain_user_is_told_what_works_instead() -> None:
    with plain_directory() as work:
        assert "stowray unshare" in run_plain(PLAIN, work)


def test_mountinfo_is_read_with_its_escapes_and_options() -> None:
    text = (
        b"27 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw\n"
        b"44 30 0:39 / /a\\040b\\134c ro - overlay stowray ro,lowerdir=0:1\n"
        b"45 30 0:40 / /a\\040b\\134c ro - tmpfs none rw\n"
    )
    mounts = parse_mountinfo(text)
    assert [mount.point for mount in mounts] == [b"/", b"/a b\\c", b"/a b\\c"]
    top = topmost(b"/a b\\c", mounts)
    assert top is not None
    assert (top.kind, top.source, top.device) == (b"tmpfs", b"none", b"0:40")
    assert topmost(b"/a", mounts) is None
    with pytest.raises(StorageError):
        parse_mountinfo(b"27 1 254:0 / /\n")


def test_a_mount_point_with_a_carriage_return_hides_no_other() -> None:
    text = b"44 30 0:39 / /a\rb ro - tmpfs none rw\n27 1 254:0 / / rw - ext4 /dev/vda rw\n"
    assert [mount.point for mount in parse_mountinfo(text)] == [b"/a\rb", b"/"]
