"""A stack of trees reads as one tree: what a mount shows, with the root as the layers say."""

from __future__ import annotations

import os
import random
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.errors import StorageError
from stowray.pipeline.overlay import ChainView
from stowray.pipeline.removal import remove_tree
from tests.support.entries import (
    Entry,
    directory,
    file,
    hardlink,
    opaque,
    symlink,
    whiteout,
)
from tests.support.judge import differences, read_tree
from tests.support.random_layers import random_layers
from tests.support.sequential import RefusedError, Sequential
from tests.support.stacks import commit_all, tar_bytes
from tests.support.trees import read_view

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = os.geteuid() == 0


@pytest.fixture
def base() -> Iterator[Path]:
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(dir=memory, prefix="stowray-overlay-"))
    yield path
    remove_tree(path)


def build(base: Path, *layers: Sequence[Entry]) -> ChainView:
    return ChainView(
        commit_all([tar_bytes(layer) for layer in layers], base, privileged=ROOT), ROOT
    )


def paths(view: ChainView) -> list[str]:
    return [os.fsdecode(node.path) for node in view.walk()]


def test_no_trees_are_an_empty_root() -> None:
    with ChainView([], ROOT) as view:
        (root,) = view.walk()
        assert (root.mode, root.uid, root.gid, root.mtime_ns) == (0o755, 0, 0, 0)
        assert view.find(b"a") is None
        assert view.shows_root


def test_upper_names_win_and_whiteouts_hide(base: Path) -> None:
    lower = [directory("d"), file("d/a", b"1"), file("d/b"), directory("gone"), file("gone/x")]
    with build(base, lower, [file("d/a", b"22"), whiteout("d/b"), whiteout("gone")]) as view:
        assert paths(view) == ["", "d", "d/a"]
        assert view.lookup(b"d/a").size == 2
        assert view.find(b"gone") is None
        assert view.find(b"gone/x") is None
        assert view.find(b"d/a/below-a-file") is None
        with pytest.raises(StorageError):
            view.lookup(b"d/b")


def test_an_opaque_directory_and_a_file_in_between_stop_the_merge(base: Path) -> None:
    layers = [
        [file("d/a"), file("e/a")],
        [directory("d"), opaque("d"), file("d/b"), file("e")],
        [file("d/c"), file("e/c")],
    ]
    with build(base, *layers) as view:
        assert paths(view) == ["", "d", "d/b", "d/c", "e", "e/c"]


def test_symlinks_are_never_followed(base: Path) -> None:
    with build(base, [directory("usr"), file("usr/x"), symlink("lib", "usr")]) as view:
        assert view.find(b"lib/x") is None
        assert view.readlink(view.lookup(b"lib")) == b"usr"


def test_an_opaque_root_hides_content_but_not_the_description_of_the_root(base: Path) -> None:
    layers = [[directory(".", 0o700, mtime=5), file("a")], [Entry(".wh..wh..opq"), file("b")]]
    with build(base, *layers) as view:
        assert paths(view) == ["", "b"]
        assert (view.lookup(b"").mode, view.lookup(b"").mtime_ns) == (0o700, 5 * 10**9)
        assert [path.name for path in view.effective_lowers] == ["layer1"]
        assert not view.shows_root


def test_the_topmost_entry_for_the_root_describes_it(base: Path) -> None:
    root = directory(".", 0o750, xattrs={"user.k": b"v"})
    with build(base, [directory(".", 0o700)], [root], [file("a")]) as view:
        node = view.lookup(b"")
        assert (node.mode, view.xattrs(node)) == (0o750, {b"user.k": b"v"})
        assert not view.shows_root


def test_hard_links_are_the_visible_names(base: Path) -> None:
    lower = [file("a", b"1"), hardlink("b", "a"), hardlink("c", "a"), file("single")]
    with build(base, lower, [whiteout("b")]) as view:
        assert view.links(view.lookup(b"a")) == [b"a", b"c"]
        assert view.links(view.lookup(b"single")) == [b"single"]


def test_a_missing_tree_is_a_storage_error(base: Path) -> None:
    with ChainView([base / "nowhere"], ROOT) as view:
        for call in (view.walk, lambda: [view.find(b"a")], lambda: view.children(b"a")):
            with pytest.raises(StorageError):
                list(call())


def test_names_longer_than_any_file_system_takes_are_not_there(base: Path) -> None:
    with build(base, [directory("d")]) as view:
        assert view.find(b"n" * 300) is None
        assert view.find(b"n" * 300 + b"/x") is None


def test_a_tree_that_changes_under_the_reader_is_an_error(base: Path) -> None:
    with build(base, [file("a"), symlink("l", "a")]) as view:
        regular, link = view.lookup(b"a"), view.lookup(b"l")
        for name in ("a", "l"):
            (base / "layer0" / name).unlink()
        for call in (
            lambda: view.open(regular),
            lambda: view.readlink(link),
            lambda: view.xattrs(regular),
        ):
            with pytest.raises(StorageError):
                call()


def test_names_of_any_bytes(base: Path) -> None:
    names = ["caf\udce9", "new\nline", "back\\slash", "-dash", "e\u0301", "\u00e9"]
    with build(base, [file(name) for name in names]) as view:
        assert sorted(paths(view)[1:]) == sorted(names)


def test_many_directories_with_few_descriptors(base: Path) -> None:
    layers = [[file(f"{first}/{second}/f") for first in range(30) for second in range(10)]] * 3
    with build(base, *layers) as view:
        before = len(os.listdir("/proc/self/fd"))
        assert len(paths(view)) == 1 + 30 + 300 + 300
        assert len(os.listdir("/proc/self/fd")) - before < 220
        assert view.find(b"3/4/f") is not None


def test_a_look_goes_no_further_down_than_it_must(base: Path) -> None:
    layers = [[file("a/b/c")], *([file(f"a/b/d{number}")] for number in range(60))]
    with build(base, *layers) as view:
        before = len(os.listdir("/proc/self/fd"))
        assert view.find(b"a/b/d58") is not None
        assert len(os.listdir("/proc/self/fd")) - before <= 6
        assert view.find(b"a/b/c") is not None
        assert len(os.listdir("/proc/self/fd")) - before == 3 * 61
        assert view.find(b"a/b/none") is None
        assert len(view.children(b"a/b")) == 61


def test_a_parent_that_is_no_longer_kept_still_finds_the_rest(base: Path) -> None:
    wide = [file(f"top/w{number}/f") for number in range(200)]
    layers = [[*wide, file("top/deep/below")], [file("top/deep/above")], [file("top/else")]]
    before = len(os.listdir("/proc/self/fd"))
    with build(base, *layers) as view:
        # Found in the second tree; the third is not looked at yet.
        assert view.find(b"top/deep/above") is not None
        for number in range(200):
            assert view.find(f"top/w{number}/f".encode()) is not None
        assert view.find(b"top/deep/below") is not None
        assert [node.path for node in view.children(b"top/deep")] == [
            b"top/deep/above",
            b"top/deep/below",
        ]
        assert len(os.listdir("/proc/self/fd")) - before < 220
    assert len(os.listdir("/proc/self/fd")) == before


def test_descriptors_are_closed(base: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with build(base, [file("a/b/c")], [file("a/b/d")]) as view:
        paths(view)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(not ROOT, reason="mounting needs root")
def test_a_mount_shows_the_same(base: Path) -> None:
    checked = 0
    for seed in range(60):
        layers = random_layers(random.Random(seed))
        model = Sequential()
        try:
            for layer in layers:
                model.apply(layer)
        except RefusedError:
            continue
        place = base / str(seed)
        (place / "mounted").mkdir(parents=True)
        (place / "empty").mkdir()
        with build(place, *layers) as view:
            lowers = [*view.effective_lowers, place / "empty"]
            expected = read_view(view)
        options = "lowerdir=" + ":".join(map(str, lowers))
        subprocess.run(
            ["mount", "-t", "overlay", "-o", f"ro,{options}", "none", place / "mounted"], check=True
        )
        try:
            actual = read_tree(place / "mounted")
        finally:
            subprocess.run(["umount", place / "mounted"], check=True)
        # The root of a mount is the topmost directory's: see ``shows_root``.
        del actual[b"."], expected[b"."]
        assert not differences(actual, expected), seed
        checked += 1
    assert checked > 20


def test_whiteouts_in_a_directory_of_one_layer_do_not_show_in_a_mount(base: Path) -> None:
    if not ROOT:
        pytest.skip("mounting needs root")
    with build(base, [file("x")], [directory("new"), whiteout("new/gone")]) as view:
        lowers = ":".join(map(str, view.lowers))
    assert stat.S_ISCHR((base / "layer1/new/gone").lstat().st_mode)
    (base / "mounted").mkdir()
    subprocess.run(
        ["mount", "-t", "overlay", "-o", f"ro,lowerdir={lowers}", "none", base / "mounted"],
        check=True,
    )
    try:
        assert os.listdir(base / "mounted/new") == []
    finally:
        subprocess.run(["umount", base / "mounted"], check=True)
