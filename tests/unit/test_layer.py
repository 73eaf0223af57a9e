"""One layer becomes one tree: the tables as root and as a plain user, attacks, limits, threads."""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stowray.pipeline.entry_list import read_entry_list
from stowray.pipeline.errors import CancelledError, LayerError, StorageError
from stowray.pipeline.layer import stage_layer
from stowray.pipeline.limits import LayerLimits
from stowray.pipeline.overlay import ChainView
from stowray.pipeline.removal import remove_tree
from tests.support import tars
from tests.support.entries import Entry, directory, file, hardlink, opaque, symlink, whiteout
from tests.support.layer_cases import all_checks, make_host, watch
from tests.support.plain_user import plain_directory, run_plain
from tests.support.stacks import commit_all, reader, tar_bytes
from tests.support.tars import gzipped
from tests.support.trees import read_view

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

ROOT = os.geteuid() == 0
as_root = pytest.mark.skipif(not ROOT, reason="only root makes devices and changes owners")


@pytest.fixture
def base() -> Iterator[Path]:
    """A directory in memory where there is one: thousands of small files are fast there."""
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(dir=memory, prefix="stowray-layer-"))
    yield path
    remove_tree(path)


@pytest.fixture
def tree(base: Path) -> Path:
    (base / "tree").mkdir()
    return base / "tree"


def stage(tree: Path, entries: Sequence[Entry], privileged: bool = ROOT) -> None:
    stage_layer(reader(tar_bytes(entries)), tree, privileged=privileged)


@pytest.mark.parametrize("privileged", [True, False] if ROOT else [False])
@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in all_checks()])
def test_tables_hold(base: Path, check: Callable[[Path, bool], None], privileged: bool) -> None:
    check(base, privileged)


TABLES_AS_PLAIN_USER = """
import sys, traceback
from pathlib import Path
import msgpack, isal.igzip, queue
from tests.support.layer_cases import all_checks
become_plain()
for number, (name, check) in enumerate(all_checks()):
    place = Path(sys.argv[1]) / str(number)
    place.mkdir()
    try:
        check(place, False)
    except Exception:
        print(name, traceback.format_exc())
"""


def test_tables_hold_as_a_plain_user() -> None:
    with plain_directory() as place:
        assert run_plain(TABLES_AS_PLAIN_USER, place) == ""


def test_metadata_is_exact(tree: Path) -> None:
    stage(
        tree,
        [
            directory("./", 0o711, mtime="5.000000007"),
            directory("d", 0o2750, mtime="-100.5"),
            file("d/f", b"data", mode=0o640, mtime="1700000000.123456789", xattrs={"user.k": b"v"}),
            symlink("l", "/nowhere/../x", mtime="7.000000001"),
        ],
    )
    assert stat.S_IMODE(tree.stat().st_mode) == 0o711
    assert tree.stat().st_mtime_ns == 5_000_000_007
    assert stat.S_IMODE((tree / "d").stat().st_mode) == 0o2750
    assert (tree / "d").stat().st_mtime_ns == -100_500_000_000
    found = (tree / "d/f").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_mtime_ns) == (0o640, 1_700_000_000_123_456_789)
    assert os.getxattr(tree / "d/f", "user.k") == b"v"
    assert os.readlink(tree / "l") == "/nowhere/../x"
    assert (tree / "l").lstat().st_mtime_ns == 7_000_000_001


def test_times_beyond_the_file_system_are_clamped_not_wrapped(tree: Path) -> None:
    stage(tree, [file("a", mtime=2**62), directory("d", mtime=2**62)])
    assert (tree / "a").stat().st_mtime > 2**31
    assert (tree / "d").stat().st_mtime > 2**31


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_the_diff_id_is_of_the_algorithm_asked_for(tree: Path, algorithm: str) -> None:
    data = tar_bytes([file("a", b"x")])
    staged = stage_layer(reader(data), tree, privileged=ROOT, algorithm=algorithm)
    assert staged.diff_id == f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


@as_root
def test_owners_devices_setuid_and_capabilities_as_root(tree: Path) -> None:
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    stage(
        tree,
        [
            file("su", b"x", mode=0o4755, uid=1000, gid=4294967294),
            file("cap", b"x", mode=0o755, uid=7, xattrs={"security.capability": capability}),
            Entry("null", tarfile.CHRTYPE, mode=0o666, device=(1, 3), gid=5),
            Entry("disk", tarfile.BLKTYPE, mode=0o660, device=(4095, 1048575)),
            Entry("pipe", tarfile.FIFOTYPE, mode=0o1777),
        ],
    )
    found = (tree / "su").stat()
    assert (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (0o4755, 1000, 4294967294)
    assert os.getxattr(tree / "cap", "security.capability") == capability
    found = (tree / "null").stat()
    assert stat.S_ISCHR(found.st_mode)
    assert (found.st_rdev, found.st_mode & 0o7777, found.st_gid) == (os.makedev(1, 3), 0o666, 5)
    assert (tree / "disk").stat().st_rdev == os.makedev(4095, 1048575)
    found = (tree / "pipe").stat()
    assert stat.S_ISFIFO(found.st_mode) and found.st_mode & 0o7777 == 0o1777


PLAIN_RECORDS = """
import sys, io
from pathlib import Path
import msgpack, isal.igzip, queue, tarfile
from stowray.pipeline.overlay import ChainView
from tests.support.entries import *
from tests.support.stacks import commit, tar_bytes
from tests.support.trees import read_view
from tests.support.sequential import Sequential
from tests.support.judge import differences
lower = [
    directory("d", 0, uid=5, xattrs={"user.dir": b"1"}),
    file("d/x", b"x", mode=0, uid=70000, xattrs={"user.k": b"v", "security.capability": b"c" * 20}),
    file("ro", b"r", mode=0o444, xattrs={"user.k": b"v"}),
    Entry("null", tarfile.CHRTYPE, mode=0o666, device=(1, 3)),
    Entry("disk", tarfile.BLKTYPE, mode=0o66, device=(8, 1)),
    Entry("pipe", tarfile.FIFOTYPE, mode=0o6, uid=3),
    symlink("l", "x", uid=4),
    directory("closed", 0o555), directory("closed/in", 0o555), file("closed/in/y"),
]
upper = [
    hardlink("d2/null", "null"), hardlink("x2", "d/x"), file("d/new"), whiteout("closed/in/y"),
    file("ro", b"now default"), whiteout("gone/z"), hardlink("l2", "l"),
]
become_plain()
base = Path(sys.argv[1])
model = Sequential()
trees = []
for number, layer in enumerate([lower, upper]):
    commit(tar_bytes(layer), base / f"layer{number}", trees, privileged=False)
    trees.insert(0, base / f"layer{number}")
    model.apply(layer)
    with ChainView(trees, False) as view:
        lines = differences(read_view(view), model.tree())
    print(*lines, sep="\\n", end="")
"""


def test_a_plain_user_keeps_everything_in_the_entry_list() -> None:
    with plain_directory() as place:
        assert run_plain(PLAIN_RECORDS, place) == ""
        assert (place / "layer0" / "null").is_file()
        record = read_entry_list(place / "layer0")[b"null"]
        assert (stat.S_ISCHR(record.file_type), record.device) == (True, (1, 3))


def test_a_whiteout_device_in_a_layer_is_refused(tree: Path) -> None:
    with pytest.raises(LayerError, match="0/0"):
        stage(tree, [Entry("dev/zero", tarfile.CHRTYPE, device=(0, 0))])


@pytest.mark.parametrize("name", ["../a", "a/../b", "/..", "a/.."])
def test_names_that_climb_are_refused(tree: Path, name: str) -> None:
    with pytest.raises(LayerError, match=r"\.\."):
        stage(tree, [file(name)])


def test_too_long_a_component_is_a_layer_error(tree: Path) -> None:
    stage(tree, [file("a" * 255)])
    with pytest.raises(LayerError):
        stage(tree, [file("b" * 256)])


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param([symlink("a", "b"), symlink("b", "a"), file("a/x")], id="symlink loop"),
        pytest.param([file("d/x"), hardlink("d", "d/x")], id="link to what it replaces"),
        pytest.param([directory("d"), hardlink("l", "d")], id="link to a directory"),
        pytest.param([directory("d"), hardlink("l", "./")], id="link to the root"),
        pytest.param([hardlink("l", "../l")], id="link that climbs"),
        pytest.param([symlink("l", "")], id="symlink to nothing"),
        pytest.param([file("a"), file("")], id="no name"),
    ],
)
def test_layers_that_cannot_be_applied_are_refused(base: Path, entries: list[Entry]) -> None:
    with pytest.raises(LayerError):
        commit_all([tar_bytes(entries)], base, privileged=ROOT)
    assert {path.name for path in base.iterdir()} <= {"layer0", "layer0.dropped"}


@pytest.mark.parametrize("depth", [64, 5000])
def test_any_depth_is_staged_and_read(tree: Path, depth: int) -> None:
    path = "/".join(["deep"] * depth)
    stage(tree, [file(path + "/f", b"x"), directory(path, 0o500, mtime=5), whiteout(path + "/g")])
    with ChainView([tree], ROOT) as view:
        nodes = list(view.walk())
        assert len(nodes) == depth + 2
        assert view.lookup(path.encode()).mtime_ns == 5 * 10**9


def test_a_symlink_chain_longer_than_path_max_leads_nowhere(base: Path) -> None:
    # CVE-2025-4517: realpath gives up beyond PATH_MAX and what is left is taken as harmless.
    make_host(base)
    check = watch(base)
    (base / "layer0").mkdir()
    entries: list[Entry] = []
    prefix = ""
    for letter in "abcdefghijklmnop":
        long = letter * 247
        entries += [directory(prefix + long), symlink(prefix + letter, long)]
        prefix += letter + "/"
    entries += [symlink(prefix + "l", "../" * 40 + "victim"), symlink("escape", prefix + "l")]
    entries += [file("escape/hello", b"owned"), file("escape/flag", b"owned")]
    stage(base / "layer0", entries)
    check()
    assert (base / "layer0/victim/hello").read_bytes() == b"owned"


def test_other_names_of_a_replaced_file_keep_its_content(tree: Path) -> None:
    stage(tree, [file("a", b"old"), hardlink("b", "a"), file("a", b"new"), hardlink("c", "b")])
    assert (tree / "b").read_bytes() == b"old"
    assert (tree / "a").read_bytes() == b"new"
    assert (tree / "b").stat().st_ino == (tree / "c").stat().st_ino


def test_link_targets_are_kept_byte_for_byte_and_only_the_link_is_replaced(base: Path) -> None:
    climbing = "../" * 10 + "etc/pki/ca-trust/extracted/java/cacerts"
    lower = [
        file("bin/dash", b"dash"),
        symlink("bin/sh", "dash"),
        symlink("lib/security/cacerts", climbing),
    ]
    trees = commit_all(
        [tar_bytes(lower), tar_bytes([symlink("bin/sh", "/bin/bash")])], base, privileged=ROOT
    )
    with ChainView(trees, ROOT) as view:
        found = read_view(view)
    assert found[b"lib/security/cacerts"].target == climbing.encode()
    assert found[b"bin/sh"].target == b"/bin/bash"
    assert found[b"bin/dash"].content == hashlib.sha256(b"dash").hexdigest()


def test_a_fifo_that_stands_in_the_way_is_replaced_and_never_opened(tree: Path) -> None:
    pipe = Entry("a", tarfile.FIFOTYPE)
    # Opening a fifo for writing waits for a reader that never comes.
    stage(tree, [pipe, hardlink("other", "a"), file("a", b"data"), pipe, file("a", b"again")])
    assert (tree / "a").read_bytes() == b"again"
    assert (tree / "other").is_fifo()


@as_root
def test_a_device_that_stands_in_the_way_is_replaced_and_not_written_to(tree: Path) -> None:
    null = Entry("a", tarfile.CHRTYPE, device=(1, 3))
    stage(tree, [null, hardlink("other", "a"), file("a", b"data")])
    assert (tree / "a").read_bytes() == b"data"
    assert (tree / "other").is_char_device()


def test_many_entries_in_one_directory(tree: Path) -> None:
    stage(tree, [file(f"d/{number}") for number in range(20_000)])
    assert len(os.listdir(tree / "d")) == 20_000


def test_overlay_attributes_are_not_taken_from_the_tar(tree: Path) -> None:
    forged = {"trusted.overlay.opaque": b"y", "user.overlay.opaque": b"y", "user.k": b"v"}
    staged = stage_layer(
        reader(tar_bytes([directory("d", xattrs=forged), file("f", xattrs=forged)])),
        tree,
        privileged=ROOT,
    )
    for name in ("d", "f"):
        assert os.listxattr(tree / name) == ["user.k"]
    assert len(staged.warnings) == 4


def test_hidden_attributes_on_symlinks_are_a_warning(tree: Path) -> None:
    data = tar_bytes([symlink("s", "t", xattrs={"user.k": b"v"})])
    staged = stage_layer(reader(data), tree, privileged=ROOT)
    assert [line.partition(":")[0] for line in staged.warnings] == ["s"]


def test_sparse_and_large_files_are_whole(base: Path, tree: Path) -> None:
    content = os.urandom(3 << 20)
    with (base / "holes").open("wb") as out:
        out.seek(5 << 20)
        out.write(content)
        out.truncate(9 << 20)
    for options in (["--sparse-version=1.0"], ["--format=gnu"]):
        archive = base / "holes.tar"
        subprocess.run(["tar", "-C", base, "-S", *options, "-cf", archive, "holes"], check=True)
        stage_layer(reader(archive.read_bytes(), 10_000), tree, privileged=ROOT)
        assert (tree / "holes").read_bytes() == (base / "holes").read_bytes()


def test_the_diff_id_covers_the_padding(tree: Path) -> None:
    data = tar_bytes([file("a", b"x")]) + bytes(20480) + b"behind the end" + bytes(100)
    staged = stage_layer(reader(data, 777), tree, privileged=ROOT)
    assert staged.diff_id == "sha256:" + hashlib.sha256(data).hexdigest()
    assert staged.tar_size == len(data)
    assert (staged.entries, staged.unpacked_size) == (1, 1)


def test_modes_are_exact_whatever_the_umask(base: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from tests.support.entries import *
from tests.support.stacks import commit_all, reader, tar_bytes
from tests.support.tars import gzipped
from stowray.pipeline.layer import stage_layer
os.umask(0o077)
stage_layer(reader(tar_bytes([file("f", mode=0o666), directory("d", 0o777)])),
            Path(sys.argv[1]), privileged=os.geteuid() == 0)
"""
    (base / "tree").mkdir()
    subprocess.run(
        [sys.executable, "-c", code, base / "tree"],
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert (base / "tree/f").stat().st_mode & 0o7777 == 0o666
    assert (base / "tree/d").stat().st_mode & 0o7777 == 0o777


class GenerationChanged(Exception):  # noqa: N818
    """As the follower of an ingest raises it."""


def test_what_read_raises_passes_through_and_no_thread_is_left(tree: Path) -> None:
    before = threading.active_count()
    data = io.BytesIO(tar_bytes([file("a", os.urandom(1 << 20))]))

    def read() -> bytes:
        if chunk := data.read(1 << 18):
            return chunk
        raise GenerationChanged

    with pytest.raises(GenerationChanged):
        stage_layer(read, tree, privileged=ROOT)
    assert threading.active_count() == before


def test_a_bad_entry_ends_all_threads_with_much_left_to_read(tree: Path) -> None:
    before = threading.active_count()
    data = tar_bytes([file("../a"), file("b", bytes(64 << 20))])
    with pytest.raises(LayerError):
        stage_layer(reader(data), tree, privileged=ROOT)
    assert threading.active_count() == before


def test_a_bad_entry_is_reported_while_the_rest_does_not_come(tree: Path) -> None:
    before = threading.active_count()
    pieces = [tar_bytes([file("../a")])[:1024]]
    hurry = threading.Event()

    def read() -> bytes:
        if pieces:
            return pieces.pop()
        hurry.wait()
        raise CancelledError("reading")

    with pytest.raises(LayerError, match=r"\.\."):
        stage_layer(read, tree, privileged=ROOT, interrupt=hurry.set)
    assert threading.active_count() == before


def test_nothing_is_interrupted_that_has_ended(tree: Path) -> None:
    calls: list[None] = []
    data = tar_bytes([file("a", b"x")])
    stage_layer(reader(data), tree, privileged=ROOT, interrupt=lambda: calls.append(None))
    assert calls == []


def test_cancelling_ends_the_stage(tree: Path) -> None:
    chunks = 0

    def read() -> bytes:
        nonlocal chunks
        chunks += 1
        return bytes(512)

    with pytest.raises(CancelledError):
        stage_layer(read, tree, privileged=ROOT, cancelled=lambda: chunks >= 5)


def test_progress_tells_the_bytes_of_the_stream(tree: Path) -> None:
    seen: list[int] = []
    data = tar_bytes([file("a", bytes(100_000))])
    stage_layer(reader(data, 10_000), tree, privileged=ROOT, report=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == len(data)


@pytest.mark.parametrize(
    ("limits", "entries"),
    [
        pytest.param(LayerLimits(entries=2), [file("a"), file("b"), file("c")], id="entries"),
        pytest.param(LayerLimits(unpacked_size=10), [file("a", bytes(11))], id="unpacked size"),
        pytest.param(LayerLimits(layer_size=5000), [file("a", bytes(9000))], id="layer size"),
    ],
)
def test_limits_end_in_a_layer_error(tree: Path, limits: LayerLimits, entries: list[Entry]) -> None:
    with pytest.raises(LayerError):
        stage_layer(reader(tar_bytes(entries)), tree, limits=limits, privileged=ROOT)


def stage_above(base: Path, lower: bytes, entries: Sequence[Entry], **options: Any) -> Path:
    """Stage ``entries`` above the layer ``lower``; return the upper tree."""
    for name in ("lower", "upper"):
        (base / name).mkdir()
    stage_layer(reader(lower), base / "lower", privileged=ROOT)
    with ChainView([base / "lower"], ROOT) as view:
        upper = reader(tar_bytes(entries))
        stage_layer(upper, base / "upper", privileged=ROOT, lower=view, **options)
    return base / "upper"


def test_a_link_to_a_sparse_file_below_keeps_its_holes(base: Path) -> None:
    size = 64 << 20
    holes = [(0, 4), (size - 4, 4)]
    lower = tars.archive(tars.pax_sparse("big", "1.0", holes, size, b"headtail"))
    made = stage_above(base, lower, [hardlink("alias", "big")]) / "alias"
    assert made.stat().st_size == size
    assert made.stat().st_blocks * 512 < 1 << 20
    with made.open("rb") as content:
        assert os.pread(content.fileno(), 8, 0) == b"head" + bytes(4)
        assert os.pread(content.fileno(), 8, size - 8) == bytes(4) + b"tail"


def test_copies_of_files_below_count_as_unpacked(base: Path) -> None:
    lower = tar_bytes([file("a", bytes(600)), file("b", bytes(500))])
    links = [hardlink("c", "a"), hardlink("d", "a"), hardlink("e", "b")]
    with pytest.raises(LayerError, match="e: brings the layer beyond 1099 bytes"):
        stage_above(base, lower, links, limits=LayerLimits(unpacked_size=1099))
    remove_tree(base / "lower")
    remove_tree(base / "upper")
    # The second link to one file is no second copy.
    stage_above(base, lower, links, limits=LayerLimits(unpacked_size=1100))


def test_a_file_larger_than_the_disk_is_refused_before_it_is_written(tree: Path) -> None:
    header = tarfile.TarInfo("huge")
    header.size = 200 << 30
    if os.statvfs(tree).f_bavail * os.statvfs(tree).f_frsize > header.size:
        pytest.skip("this disk has room for it")
    data = header.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20)
    with pytest.raises(StorageError, match="needs"):
        stage_layer(reader(data), tree, privileged=ROOT)


@as_root
def test_a_full_disk_is_a_storage_error(base: Path) -> None:
    small = base / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", small], check=True)
    try:
        (small / "tree").mkdir()
        with pytest.raises(StorageError, match="disk is full"):
            stage(small / "tree", [file("a", bytes(900_000)), file("b", bytes(900_000))])
    finally:
        subprocess.run(["umount", small], check=True)


@as_root
def test_attributes_that_a_full_disk_refuses_are_not_left_out(base: Path) -> None:
    small = base / "small"
    small.mkdir()
    # A tmpfs takes what attributes need from the room for its inodes, a KiB for each: beside the
    # two directories and files there is room for the attribute of one file, and for our own marks.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=5", "none", small], check=True)
    try:
        (small / "tree").mkdir()
        entries = [file(str(number), xattrs={"user.x": bytes(490)}) for number in range(2)]
        with pytest.raises(StorageError, match="disk is full"):
            stage(small / "tree", entries)
    finally:
        subprocess.run(["umount", small], check=True)


def test_many_opaque_markers_in_one_tree_cost_no_walks(tree: Path) -> None:
    entries = [file(f"d/{number}/f") for number in range(1000)]
    entries += [opaque(f"d/{number}") for number in range(1000)] + [opaque("d")] * 1000
    stage(tree, entries)
    assert len(os.listdir(tree / "d")) == 1000


def test_no_descriptor_is_left(tree: Path) -> None:
    before = os.listdir("/proc/self/fd")
    stage(tree, [file(f"{number}/a/b/c/f") for number in range(200)])
    assert len(os.listdir("/proc/self/fd")) == len(before)


# What a program that unpacks by helpers, in the tree or above it, runs or loads of an image.
HELPERS = ("gzip", "unpigz", "xz", "zstd", "bzip2", "tar", "sh", "cp", "rm", "setfattr")
BAIT = [
    directory("bin"),
    *(file(f"bin/{name}", b'#!/bin/sh\n: > "$CANARY"\n', mode=0o755) for name in HELPERS),
    directory("etc"),
    file("etc/nsswitch.conf", b"passwd: bait files\ngroup: bait files\n"),
    file("etc/passwd", b"bait:x:77:77::/:/bin/sh\n"),
    directory("lib"),
    file("lib/libnss_bait.so.2", b"\x7fELF"),
    file("lib/libz.so.1", b"\x7fELF"),
]
STAGE_ABOVE = """
import json, os, sys
from pathlib import Path
from stowray.pipeline.layer import stage_layer
from stowray.pipeline.overlay import ChainView
tree, base, *blobs = map(Path, sys.argv[1:])
os.chdir(tree)
os.environ["PATH"] = f"{tree}/bin:bin"
run = []
kinds = ("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen")
sys.addaudithook(lambda name, _: run.append(name) if name in (*kinds, "os.chroot") else None)
for number, blob in enumerate(blobs):
    out = base / f"out{number}"
    out.mkdir()
    with blob.open("rb") as stream, ChainView([tree], os.geteuid() == 0) as lower:
        stage_layer(lambda: stream.read(65536), out, privileged=os.geteuid() == 0, lower=lower)
        stream.seek(0)
maps = Path("/proc/self/maps").read_text()
print(json.dumps([run, [line for line in maps.splitlines() if str(base) in line]]))
"""


def test_nothing_of_a_tree_is_run_and_nothing_of_it_is_loaded(base: Path, tree: Path) -> None:
    stage(tree, BAIT)
    above = tar_bytes([file("lib/data", b"x" * 100_000), file("etc/shadow", mode=0o600, uid=77)])
    blobs = []
    for name, data in (("tar", above), ("gz", gzipped(above)), ("zst", zstd.compress(above))):
        blobs.append(base / f"layer.{name}")
        blobs[-1].write_bytes(data)
    canary = base / "canary"
    done = subprocess.run(
        [sys.executable, "-P", "-c", STAGE_ABOVE, tree, base, *blobs],
        env={**os.environ, "CANARY": str(canary), "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        check=True,
    )
    assert json.loads(done.stdout) == [[], []]
    assert not canary.exists()
    assert (base / "out1" / "lib" / "data").read_bytes() == b"x" * 100_000


def test_attributes_inherited_from_the_store_stay_out(base: Path) -> None:
    (base / "tree").mkdir()
    os.chmod(base / "tree", 0o2777)
    stage(base / "tree", [file("d/f"), directory("e")])
    assert (base / "tree/e").stat().st_mode & 0o7777 == 0o755
    with ChainView([base / "tree"], ROOT) as view:
        assert {node.gid for node in view.walk()} == {0}


def test_the_merged_tree_of_one_layer_is_the_layer(tree: Path) -> None:
    stage(tree, [directory("d", 0o700), file("d/a", b"1"), hardlink("b", "d/a"), symlink("l", "d")])
    with ChainView([tree], ROOT) as view:
        found = read_view(view)
    assert sorted(found) == [b".", b"b", b"d", b"d/a", b"l"]
    assert found[b"b"].links == (b"b", b"d/a")
