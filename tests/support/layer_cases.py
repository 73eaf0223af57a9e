"""Tables of layers with the trees they must give, and of attacks with what must not happen.

Each check takes an empty directory and whether to stage as root, so that the same tables hold for
root and, in a process of its own, for a plain user.
"""

from __future__ import annotations

import base64
import io
import os
import re
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stowray.pipeline.errors import LayerError
from stowray.pipeline.layer import stage_layer
from stowray.pipeline.overlay import ChainView
from stowray.pipeline.overlay_node import is_whiteout, namespace
from tests.support.entries import Entry
from tests.support.stacks import commit, commit_all, tar_bytes
from tests.support.trees import read_view, snapshot
from tests.support.vectors import table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stowray.pipeline.overlay_node import Node

Case = dict[str, Any]
ORACLE: Case = table("layer_oracle")
BREAKOUTS: Case = table("layer_breakouts")
WHITEOUTS: Case = table("layer_whiteouts")

KINDS = {
    "file": tarfile.REGTYPE,
    "dir": tarfile.DIRTYPE,
    "symlink": tarfile.SYMTYPE,
    "hardlink": tarfile.LNKTYPE,
    "fifo": tarfile.FIFOTYPE,
    "chardev": tarfile.CHRTYPE,
}
LETTERS = {"f": "file", "d": "directory", "l": "symlink", "c": "character device", "p": "fifo"}


def check_oracle(case: Case, base: Path, privileged: bool) -> None:
    """An image of the oracle gives the tree that the peers agree on, or the one recommended."""
    blobs = [base64.b64decode(ORACLE["blobs"][digest]) for digest in case["layers"]]
    trees: list[Path] = []
    try:
        for number, (blob, diff_id) in enumerate(zip(blobs, case["diff_ids"], strict=True)):
            tree = base / f"layer{number}"
            staged = commit(blob, tree, trees, privileged=privileged)
            assert staged.diff_id == diff_id
            trees.insert(0, tree)
    except LayerError:
        assert case.get("error"), "refused"
        return
    assert not case.get("error"), "accepted"
    with ChainView(trees, privileged) as view:
        actual = read_view(view)
        links = {node.path: len(view.links(node)) for node in view.walk()}
        contents = {n.path: _content(view, n) for n in view.walk() if n.is_file}
    expected = case["tree"]
    assert sorted(os.fsdecode(path) for path in actual if path != b".") == sorted(expected)
    for path, text in expected.items():
        node = actual[os.fsencode(path)]
        shown, _, target = text.partition(" -> ")
        words = shown.split(" ")
        assert (node.kind, node.mode) == (LETTERS[words[0]], words[1]), path
        assert f"{node.uid}:{node.gid}" == words[2], path
        if "mt=1e+09" in words:
            assert node.mtime_ns == 10**18, path
        assert os.fsdecode(node.target) == target, path
        if node.kind == "file":
            count = re.search(r" n(\d+) ", shown)
            assert count is not None
            assert links[os.fsencode(path)] == int(count[1]), path
            assert shown.endswith(repr(contents[os.fsencode(path)])), path


def _content(view: ChainView, node: Node) -> bytes:
    with open(view.open(node), "rb") as stream:
        return stream.read()


def entries_of(rows: Sequence[Case], host: str, name: str) -> list[Entry]:
    """Return the tar entries that the rows of a table describe."""
    entries: list[Entry] = []
    for row in rows:
        kind = row["type"]

        def text(key: str, row: Case = row) -> str:
            return str(row.get(key, "")).replace("{host}", host).replace("{tname}", name)

        mode = int(row.get("mode", "0o755" if kind == "dir" else "0o644"), 8)
        major, _, minor = row.get("dev", "0,0").partition(",")
        entries.append(
            Entry(
                text("name"),
                KINDS[kind],
                text("data").encode("latin-1"),
                mode,
                mtime=row.get("mtime", 1000),
                linkname=text("linkname"),
                device=(int(major), int(minor)),
            )
        )
    return entries


def make_host(base: Path) -> Path:
    """Make what must not be touched: a victim, and a name that only looks inside."""
    host = base / "victim"
    host.mkdir()
    for name, mode in (("hello", 0o644), ("f", 0o640), ("perm400", 0o400)):
        (host / name).write_bytes(b"hello")
        (host / name).chmod(mode)
    (host / "also-exists-outside-root").write_bytes(b"outside")
    (host / "also-exists-outside-root").chmod(0o640)
    (base / "layer0-evil").mkdir()
    (base / "layer1-evil").mkdir()
    return host


def watch(base: Path) -> Callable[[], None]:
    """Return a check that nothing beside the layer trees has changed since."""
    watched = [base / "victim", base / "layer0-evil", base / "layer1-evil"]
    before = {path: snapshot(path) for path in watched}
    listing = sorted(path.name for path in base.iterdir())

    def check() -> None:
        for path in watched:
            assert snapshot(path) == before[path], "HOST PATH WAS CHANGED! THIS IS AN ESCAPE!"
        now = {path.name for path in base.iterdir()}
        extra = {name for name in now if not name.startswith("layer")} - set(listing)
        assert not extra, f"HOST PATH WAS CHANGED! {extra}"

    return check


def layers_of(case: Case, host: str) -> list[list[Entry]]:
    """Return the layers of an attack: the lower ones, then those between its boundaries."""
    layers: list[list[Case]] = [case["lower"]] if case.get("lower") else []
    layers.append([])
    for row in case["entries"]:
        if row["type"] == "layer-boundary":
            layers.append([])
        else:
            layers[-1].append(row)
    return [entries_of(rows, host, case["name"].replace(" ", "-")) for rows in layers]


# Refused by us and contained by those that the table is from: a name with ``..`` or no name.
REFUSED = {
    "SymlinkParentDirectory",
    "SymlinkEmptyFilename",
    "SymlinkParentRelative",
    "WhiteoutRelativePath",
    "WhiteoutParent",
}


def check_breakout(case: Case, base: Path, privileged: bool) -> None:
    """An attack changes nothing outside; what the table says of the inside holds too."""
    host = make_host(base)
    check = watch(base)
    blobs = [tar_bytes(layer) for layer in layers_of(case, str(host))]
    expected = case["expect"]
    try:
        trees = commit_all(blobs, base, privileged=privileged)
    except LayerError:
        check()
        assert case["name"] in REFUSED or isinstance(expected, str), "refused"
        return
    check()
    assert case["name"] not in REFUSED, "accepted"
    with ChainView(trees, privileged) as view:
        for node in view.walk():
            if node.is_file:
                assert _content(view, node) != b"hello", "HOST FILE WAS READ"
        if not isinstance(expected, str):
            for item in expected:
                _check_inside(view, item, case["name"])


def _check_inside(view: ChainView, item: Case, name: str) -> None:
    kind = item["check"]
    path = item.get("path", "").replace("{tname}", name)
    if kind == "file_content":
        node = resolve(view, path)
        assert node is not None
        assert _content(view, node) == item["data"].encode("latin-1")
    elif kind == "absent":
        assert resolve(view, path) is None
    elif kind == "host_absent":
        assert not Path(path).exists()
    elif kind in ("same_inode_resolved_in_root", "different_inode"):
        first, second = resolve(view, item["a"]), resolve(view, item["b"])
        assert first is not None and second is not None
        assert (first.inode == second.inode) == (kind != "different_inode")
    elif kind == "both_symlinks_same_target":
        targets = {view.readlink(view.lookup(item[key].strip("/").encode())) for key in "ab"}
        assert len(targets) == 1
    else:
        assert kind == "host_mode_unchanged"


def resolve(view: ChainView, path: str) -> Node | None:
    """Return what a path leads to inside the root, all symlinks followed."""
    pending = path.encode().split(b"/")[::-1]
    real: list[bytes] = []
    for _ in range(1000):
        while pending and pending[-1] in (b"", b"."):
            pending.pop()
        if not pending:
            return view.find(b"/".join(real))
        part = pending.pop()
        if part == b"..":
            real = real[:-1]
            continue
        node = view.find(b"/".join([*real, part]))
        if node is None:
            return None
        if node.is_symlink:
            target = view.readlink(node)
            real = [] if target.startswith(b"/") else real
            pending += target.split(b"/")[::-1]
        else:
            real.append(part)
    raise AssertionError("symlink loop")


def names_of(rows: Sequence[str]) -> list[Entry]:
    """Return entries for names: directories end in a slash, the rest are files."""
    return [
        Entry(
            row.rstrip("/"),
            tarfile.DIRTYPE if row.endswith("/") else tarfile.REGTYPE,
            mode=0o755 if row.endswith("/") else 0o644,
        )
        for row in rows
    ]


def check_moby_layers(base: Path, privileged: bool) -> None:
    """Four layers with all kinds of whiteouts give the listed tree after each."""
    trees: list[Path] = []
    for row in WHITEOUTS["moby_four_layers"]:
        tree = base / f"layer{row['layer']}"
        commit(tar_bytes(names_of(row["entries"])), tree, trees, privileged=privileged)
        trees.insert(0, tree)
        with ChainView(trees, privileged) as view:
            found = {
                os.fsdecode(node.path) + ("/" if node.is_directory else "")
                for node in view.walk()
                if node.path
            }
        assert found == set(row["tree_after"]), row["layer"]


def check_opaque(case: Case, base: Path, privileged: bool) -> None:
    """Entries of the upper layer survive its opaque marker, all others go."""
    lower, upper = [Entry("test-subdir", tarfile.DIRTYPE, mode=0o755)], []
    for row in case["entries"]:
        entry = Entry(
            f"test-subdir/{row['path']}",
            KINDS[row["type"]],
            mode=0o755 if row["type"] == "dir" else 0o644,
            linkname=row["linkname"] or "",
        )
        (upper if row["in_upper"] else lower).append(entry)
    upper.append(Entry("test-subdir/.wh..wh..opq"))
    blobs = [tar_bytes(lower), tar_bytes(upper)]
    trees = commit_all(blobs, base, privileged=privileged)
    survivors = {
        f"test-subdir/{row['path']}"
        for row in case["entries"]
        if row["survives"] and ".wh." not in row["path"]
    }
    with ChainView(trees, privileged) as view:
        found = {os.fsdecode(node.path) for node in view.walk()}
    assert found - {"", "test-subdir"} == survivors


def check_plain_whiteout(case: Case, base: Path, privileged: bool) -> None:
    """A whiteout removes a file or a tree and leaves its parent's times alone; no name: refused."""
    path = case["path"]
    parent, _, name = path.rpartition("/")
    lower = [Entry(parent, tarfile.DIRTYPE, mode=0o755, mtime="123.000000456")] if parent else []
    if name and case["target_is_dir"]:
        lower += names_of([path + "/", path + "/child"])
    elif name:
        lower += names_of([path])
    upper = [Entry(f"{parent}/.wh.{name}" if parent else f".wh.{name}")]
    blobs = [tar_bytes(lower), tar_bytes(upper)]
    try:
        trees = commit_all(blobs, base, privileged=privileged)
    except LayerError:
        assert case["error"], "refused"
        return
    assert not case["error"], "accepted"
    with ChainView(trees, privileged) as view:
        assert view.find(path.encode()) is None
        if parent:
            assert view.lookup(parent.encode()).mtime_ns == 123_000_000_456


# The peer of the table removes what the same layer made before its whiteout; by the definition
# whiteouts act on lower content only.
KEPT = {"file", "autoconvert-opaquedir/before"}


def check_overlay_format(case: Case, base: Path, privileged: bool) -> None:
    """A layer staged alone has its whiteouts and opaque directories where the table says."""
    tree = base / "tree"
    tree.mkdir()
    data = io.BytesIO(tar_bytes(names_of(case["entries"])))
    stage_layer(lambda: data.read(1000), tree, privileged=privileged)
    for path, expected in case["expect"].items():
        place = tree / path
        if expected in ("present", "file") or path in KEPT:
            assert place.is_file(), path
        elif expected == "absent":
            assert not os.path.lexists(place), path
        elif expected == "whiteout":
            assert is_whiteout(place.lstat()), path
        else:
            assert expected in ("opaque", "opaque dir", "opaque xattr y"), expected
            assert os.getxattr(place, namespace(privileged) + "overlay.opaque") == b"y", path


def all_checks() -> list[tuple[str, Callable[[Path, bool], None]]]:
    """Return every check of the tables with its name."""
    checks: list[tuple[str, Callable[[Path, bool], None]]] = [("moby layers", check_moby_layers)]
    tables: list[tuple[list[Case], Callable[[Case, Path, bool], None]]] = [
        (ORACLE["cases"], check_oracle),
        (BREAKOUTS["exact"], check_breakout),
        (BREAKOUTS["victim"], check_breakout),
        ([c for c in BREAKOUTS["extra"] if c["entries"][0]["type"] != "note"], check_breakout),
        (WHITEOUTS["umoci_opaque"], check_opaque),
        (WHITEOUTS["umoci_plain"]["cases"], check_plain_whiteout),
        (WHITEOUTS["overlay_format"], check_overlay_format),
    ]
    for cases, check in tables:
        for case in cases:

            def run(
                base: Path,
                privileged: bool,
                case: Case = case,
                check: Callable[[Case, Path, bool], None] = check,
            ) -> None:
                check(case, base, privileged)

            checks.append((case["name"], run))
    return checks
