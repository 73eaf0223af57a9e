"""Staged in parallel and settled equals applied one after the other."""

from __future__ import annotations

import json
import os
import random
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stowray.pipeline.errors import LayerError
from stowray.pipeline.layer import Staged, stage_layer
from stowray.pipeline.overlay import ChainView
from stowray.pipeline.reconcile import settle
from stowray.pipeline.removal import remove_tree
from tests.support.entries import Entry, directory, file, hardlink, opaque, symlink, whiteout
from tests.support.judge import differences
from tests.support.plain_user import plain_directory, run_plain
from tests.support.random_layers import random_entry
from tests.support.sequential import RefusedError, Sequential
from tests.support.stacks import commit, commit_all, reader, tar_bytes
from tests.support.trees import read_view

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = os.geteuid() == 0


@pytest.fixture
def base() -> Iterator[Path]:
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(dir=memory, prefix="stowray-reconcile-"))
    yield path
    remove_tree(path)


def check_stack(base: Path, layers: Sequence[Sequence[Entry]], privileged: bool) -> None:
    """Every prefix of the stack equals the model, or both refuse the same layer."""
    model = Sequential()
    trees: list[Path] = []
    for number, layer in enumerate(layers):
        refused = False
        try:
            model.apply(layer)
        except RefusedError:
            refused = True
        tree = base / f"layer{number}"
        try:
            commit(tar_bytes(layer), tree, trees, privileged=privileged)
        except LayerError:
            assert refused
            return
        assert not refused
        trees.insert(0, tree)
        with ChainView(trees, privileged) as view:
            assert not differences(read_view(view), model.tree())


@st.composite
def stacks(draw: st.DrawFn) -> list[list[Entry]]:
    """One to four layers; the entries shrink because each is drawn on its own."""
    entry = st.integers(0, 2**32).map(lambda seed: random_entry(random.Random(seed)))
    return draw(st.lists(st.lists(entry, min_size=1, max_size=6), min_size=1, max_size=4))


LINKED_TWICE = [file("a", b"1"), hardlink("b", "a")]


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@example([[directory("usr"), symlink("lib", "usr")], [file("lib/x"), directory("lib")]])
@example([LINKED_TWICE, [hardlink("c", "a"), file("c", b"2"), whiteout("b")]])
@example([LINKED_TWICE, [hardlink("d/c", "a"), hardlink("d/e", "b"), file("d/c"), whiteout("a")]])
@example([[directory("d", 0o700, uid=9)], [file("d/e/x"), whiteout("d")]])
@example([[directory("d"), file("d/x")], [whiteout("d/x"), whiteout("d"), whiteout("d/y")]])
@example([[symlink("c", "."), file("a/x")], [file("c/a/y"), directory("c/c"), file("c/z")]])
@given(stacks())
def test_staged_alone_and_settled_equals_applied_in_order(layers: list[list[Entry]]) -> None:
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    base = Path(tempfile.mkdtemp(dir=memory, prefix="stowray-stack-"))
    try:
        for privileged in {ROOT, False}:
            place = base / str(privileged)
            place.mkdir()
            check_stack(place, layers, privileged)
    finally:
        remove_tree(base)


RANDOM_AS_PLAIN_USER = """
import random, sys
from pathlib import Path
import msgpack, isal.igzip, queue
from tests.unit.test_reconcile import check_stack
from tests.support.random_layers import random_layers
become_plain()
for seed in range(150):
    base = Path(sys.argv[1]) / str(seed)
    base.mkdir()
    check_stack(base, random_layers(random.Random(seed)), False)
"""


def test_the_same_holds_for_a_plain_user() -> None:
    with plain_directory() as place:
        run_plain(RANDOM_AS_PLAIN_USER, place)


def stage_alone(base: Path, entries: Sequence[Entry]) -> tuple[Path, Staged]:
    tree = base / "upper"
    tree.mkdir()
    return tree, stage_layer(reader(tar_bytes(entries)), tree, privileged=ROOT)


def lower_view(base: Path, *layers: Sequence[Entry]) -> ChainView:
    return ChainView(
        commit_all([tar_bytes(layer) for layer in layers], base, privileged=ROOT), ROOT
    )


def test_a_layer_that_enters_its_directories_depends_on_nothing(base: Path) -> None:
    entries = [
        directory("usr"),
        directory("usr/bin"),
        file("usr/bin/x"),
        symlink("bin", "usr/bin"),
        file("bin/y"),
        hardlink("z", "bin/y"),
        whiteout("gone"),
        whiteout("usr/gone"),
        opaque("usr/bin"),
        whiteout("new"),
        file("new/implied/f"),
    ]
    _, staged = stage_alone(base, entries)
    assert staged.notes == {}


def test_implied_parents_take_the_attributes_from_below(base: Path) -> None:
    tree, staged = stage_alone(base, [file("d/e/f"), whiteout("d/g"), whiteout("w/x/y")])
    assert json.loads(json.dumps(staged.notes)) == staged.notes
    lower = [
        directory("d", 0o2700, uid=9, gid=8, mtime=5, xattrs={"user.k": b"v"}),
        directory("w", 0o711, mtime=6),
        directory("w/x", 0o710),
        file("w/x/y"),
    ]
    with lower_view(base, lower) as below:
        assert settle(tree, staged, below)
        # Killed behind the last step and done again: nothing changes.
        assert settle(tree, staged, below)
        with ChainView([tree, *below.lowers], ROOT) as view:
            node = view.lookup(b"d")
            assert (node.mode, node.uid, node.gid, node.mtime_ns) == (0o2700, 9, 8, 5 * 10**9)
            assert view.xattrs(node) == {b"user.k": b"v"}
            assert view.lookup(b"d/e").mode == 0o755
            assert (view.lookup(b"w").mode, view.lookup(b"w/x").mode) == (0o711, 0o710)
            assert view.find(b"w/x/y") is None


def test_a_whiteout_in_a_missing_directory_makes_none(base: Path) -> None:
    entries = [directory("d", 0o555, mtime=5), whiteout("d/no/x"), whiteout("nowhere/y/z")]
    tree, staged = stage_alone(base, entries)
    with lower_view(base) as below:
        assert settle(tree, staged, below)
    assert sorted(os.listdir(tree)) == ["d"]
    assert os.listdir(tree / "d") == []
    assert (tree / "d").stat().st_mtime_ns == 5 * 10**9
    assert (tree / "d").stat().st_mode & 0o7777 == 0o555


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        pytest.param([symlink("lib", "usr/lib")], [file("lib/x")], id="entry through a link"),
        pytest.param([symlink("lib", "usr/lib")], [whiteout("lib/x")], id="whiteout through one"),
        pytest.param([symlink("a", "b/c")], [symlink("l", "a/.."), file("l/x")], id="link and up"),
        pytest.param([file("f", b"1")], [hardlink("g", "f")], id="hard link to a lower file"),
    ],
)
def test_what_cannot_be_mended_is_left_alone(
    base: Path, lower: list[Entry], upper: list[Entry]
) -> None:
    tree, staged = stage_alone(base, upper)
    before = {path: path.lstat() for path in sorted(tree.rglob("*"))}
    with lower_view(base, lower) as below:
        assert not settle(tree, staged, below)
    assert {path: path.lstat() for path in sorted(tree.rglob("*"))} == before
    shutil.rmtree(base / "layer0")
    check_stack(base, [lower, upper], ROOT)


def test_a_file_below_an_implied_parent_gives_way(base: Path) -> None:
    tree, staged = stage_alone(base, [file("f/x"), whiteout("g/x")])
    with lower_view(base, [file("f", uid=9), file("g")]) as below:
        assert settle(tree, staged, below)
        with ChainView([tree, *below.lowers], ROOT) as view:
            assert (view.lookup(b"f").mode, view.lookup(b"f").uid) == (0o755, 0)
            assert view.lookup(b"g").is_file


def test_one_tree_serves_chains_whose_roots_differ(base: Path) -> None:
    _, staged = stage_alone(base, [file("a")])
    assert staged.notes == {}
    for number, mode in enumerate((0o700, 0o751)):
        place = base / str(number)
        place.mkdir()
        with (
            lower_view(place, [directory(".", mode)]) as below,
            ChainView([base / "upper", *below.lowers], ROOT) as view,
        ):
            assert view.lookup(b"").mode == mode


def test_a_hard_link_to_a_lower_file_shares_one_inode_with_all_its_names(base: Path) -> None:
    lower = [file("a", b"1", mode=0o4755, uid=5), hardlink("d/b", "a"), hardlink("c", "a")]
    upper = [whiteout("c"), hardlink("e", "d/b")]
    trees = commit_all([tar_bytes(lower), tar_bytes(upper)], base, privileged=ROOT)
    with ChainView(trees, ROOT) as view:
        node = view.lookup(b"e")
        assert (node.mode, node.uid, node.size) == (0o4755, 5, 1)
        assert view.links(node) == [b"a", b"d/b", b"e"]
        assert view.find(b"c") is None


@pytest.mark.parametrize(
    "entry",
    [
        Entry("a", tarfile.FIFOTYPE, mode=0o611, uid=3),
        Entry("a", tarfile.CHRTYPE, mode=0o611, device=(1, 3)),
        Entry("a", tarfile.BLKTYPE, mode=0o11, device=(8, 1)),
        symlink("a", "nowhere", uid=3),
        file("a", mode=0, xattrs={"user.k": b"v"}),
    ],
    ids=["fifo", "character device", "block device", "symlink", "unreadable file"],
)
def test_hard_links_to_lower_things_of_all_kinds(base: Path, entry: Entry) -> None:
    layers = [[entry, hardlink("b", "a")], [hardlink("d/c", "a"), whiteout("b")]]
    layers += [[hardlink("e", "d/c"), file("d/c"), hardlink("f", "a")]]
    for privileged in {ROOT, False}:
        place = base / str(privileged)
        place.mkdir()
        check_stack(place, layers, privileged)


@pytest.mark.parametrize("target", ["nope", "d", "gone", "d/x/y"])
def test_a_hard_link_to_nothing_or_a_directory_is_refused(base: Path, target: str) -> None:
    lower = [directory("d"), file("gone")]
    blobs = [tar_bytes(lower), tar_bytes([whiteout("gone"), hardlink("h", target)])]
    with pytest.raises(LayerError, match="hard link"):
        commit_all(blobs, base, privileged=ROOT)
