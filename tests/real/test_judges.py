"""What other tools make of the same layers; where they differ, docs/differences.md says why."""

from __future__ import annotations

import base64
import contextlib
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import LayerError
from stowray.pipeline.rootfs import write_rootfs
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.store import Store
from tests.support import images, judge, runtimes, verdicts
from tests.support.chains import Layer, commit_chain
from tests.support.plain_user import plain_directory, run_plain
from tests.support.random_layers import random_layers
from tests.support.stacks import tar_bytes
from tests.support.vectors import table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.catalogue import Catalogue
    from tests.support.verdicts import Verdict

    Ask = Callable[[images.Layout, str], Verdict]

pytestmark = [
    pytest.mark.peers("umoci", "podman", "containerd", "ctr"),
    pytest.mark.root,
    pytest.mark.slow,
]

ORACLE = table("layer_oracle")
CASES = {case["name"]: case for case in ORACLE["cases"]}
TOOLS = ("umoci", "umoci rootless", "containerd native", "containerd overlayfs", "podman")
DIFFERENCES = Path(__file__).parents[2] / "docs" / "differences.md"
# Clocks of file systems lag behind.
LAG_NS = 1_000_000_000


def listed(tool: str) -> set[str]:
    """The cases in which the documented table has ``tool`` differ."""
    rows = [line.split("|")[1:3] for line in DIFFERENCES.read_text().splitlines() if "| `" in line]
    found = {case.strip(" `") for case, tools in rows if tool in map(str.strip, tools.split(","))}
    assert found <= CASES.keys()
    return found


def case_blobs(name: str) -> list[bytes]:
    return [base64.b64decode(ORACLE["blobs"][digest]) for digest in CASES[name]["layers"]]


def case_layout(name: str, folder: Path) -> images.Layout:
    layout = images.Layout(folder / name)
    layers = []
    for blob, diff_id in zip(case_blobs(name), CASES[name]["diff_ids"], strict=True):
        zipped = blob.startswith(b"\x1f\x8b") or name == "074_mt_gzip_content_plain"
        media_type = images.OCI_LAYER + ("+gzip" if zipped else "")
        layers.append(images.Layer(layout.add_blob(blob, media_type), diff_id, 0))
    layout.tag(name, layout.add_image(layers))
    return layout


def make_ours(layers: list[Layer], folder: Path) -> None:
    """Write the tree of the layers as ``tree`` in ``folder``; a refused image leaves none."""
    folder.mkdir()
    with Store.open(folder / "store") as store:
        try:
            top = commit_chain(Snapshots(store), layers)[-1]
        except LayerError:
            return
        write_rootfs(store, top.chain_id, folder / "tree")


def read_ours(folder: Path) -> Verdict:
    tree = folder / "tree"
    return judge.read_tree(tree) if tree.exists() else None


OURS_AS_PLAIN_USER = """
import sys
from pathlib import Path
from tests.real.test_judges import CASES, Layer, case_blobs, make_ours
become_plain()
work = Path(sys.argv[1])
for name, case in CASES.items():
    make_ours(list(map(Layer, case_blobs(name), case["diff_ids"])), work / name)
"""


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that a plain user reaches, for all runs."""
    with plain_directory() as work:
        yield work


@contextlib.contextmanager
def tool_of(name: str, folder: Path) -> Iterator[Ask]:
    """Give what asks a tool for its tree of the one image of a layout."""
    folder.mkdir()
    if name.startswith("umoci"):
        rootless = name.endswith("rootless")
        yield lambda layout, tag: verdicts.umoci(layout, tag, folder / tag, rootless=rootless)
    elif name.startswith("containerd"):
        snapshotter = name.split()[1]
        with runtimes.containerd(folder / "private", verdicts.NEVER_COLLECT) as instance:
            yield lambda layout, tag: verdicts.containerd(
                instance, layout, tag, snapshotter, folder
            )
    else:
        with runtimes.podman(folder / "private") as podman:
            yield lambda layout, _: verdicts.podman(podman, layout, folder)


def _with_attributes(node: judge.Node, other: judge.Node) -> judge.Node:
    return replace(node, mode=other.mode, uid=other.uid, gid=other.gid, mtime_ns=other.mtime_ns)


def compare(tool: str, actual: Verdict, expected: Verdict, begun: int) -> list[str]:
    """What differs beyond what differs in every image."""
    if actual is None or expected is None:
        return [] if actual is expected else ["one is refused, the other not"]
    actual, expected = dict(actual), dict(expected)
    for name, node in expected.items():
        mine = actual.get(name)
        if mine is None or node.kind != "directory":
            continue
        if node.mtime_ns >= begun - LAG_NS:
            actual[name] = replace(mine, mtime_ns=node.mtime_ns)
    if not tool.startswith("umoci"):
        del actual[b"."], expected[b"."]
        for name, node in expected.items():
            if node.links and name in actual:
                actual[name] = _with_attributes(actual[name], node)
    if tool == "umoci rootless":
        for name in [name for name in expected.keys() - actual.keys() if name.startswith(b"dev/")]:
            assert (expected[name].kind, expected[name].size) == ("file", 0)
            del expected[name]
    if tool == "podman" and b"srv" in actual:
        # As in the case 086: the image "many-plain" describes it in its lowest layer only.
        actual[b"srv"] = _with_attributes(actual[b"srv"], expected[b"srv"])
    return judge.differences(actual, expected)


@pytest.mark.parametrize("tool", TOOLS)
def test_all_differences_are_explained(place: Path, tool: str) -> None:
    folder = place / tool.replace(" ", "-")
    found: dict[str, list[str]] = {}
    if tool == "umoci rootless":
        run_plain(OURS_AS_PLAIN_USER, place)
    with tool_of(tool, folder) as ask:
        for name, case in CASES.items():
            layout = case_layout(name, folder)
            mine_at = place / name if tool == "umoci rootless" else folder / f"ours-{name}"
            if not mine_at.exists():
                make_ours(list(map(Layer, case_blobs(name), case["diff_ids"])), mine_at)
            begun = time.time_ns()
            lines = compare(tool, read_ours(mine_at), ask(layout, name), begun)
            if lines:
                found[name] = lines
    unexplained = {name: lines for name, lines in found.items() if name not in listed(tool)}
    assert unexplained == {}
    assert set(found) == listed(tool)


def test_random_stacks_are_what_umoci_makes_of_them(place: Path) -> None:
    refused = 0
    for seed in range(60):
        folder = place / f"random-{seed}"
        contents = random_layers(random.Random(seed))
        layout = images.Layout(folder / "layout")
        blobs = [tar_bytes(entries) for entries in contents]
        layers = [
            images.Layer(layout.add_blob(blob, images.OCI_LAYER), Digest.of(blob), 0)
            for blob in blobs
        ]
        layout.tag("it", layout.add_image(layers))
        make_ours(list(map(Layer, blobs)), folder / "ours")
        begun = time.time_ns()
        theirs = verdicts.umoci(layout, "it", folder)
        mine = read_ours(folder / "ours")
        if theirs is None:
            # Among them entries below a file, which only umoci refuses.
            refused += mine is not None
            continue
        # Directories that only an opaque marker asks for: see the list of differences.
        marked = {
            name
            for entries in contents
            for entry in entries
            if entry.name.endswith("/.wh..wh..opq")
            for name in entry.name.split("/")[:-1]
        }
        lines = compare("umoci", mine, theirs, begun)
        unexplained = [
            line for line in lines if line.partition(": ")[0].rpartition("/")[2] not in marked
        ]
        assert unexplained == [], seed
    assert refused < 10


def one_image(catalogue: Catalogue, name: str, folder: Path) -> images.Layout:
    """The image ``name-judge`` alone in a layout."""
    source = catalogue.layout(name)
    descriptor = source.tagged(f"{name}-judge")
    layout = images.Layout(folder / name)
    for part in [descriptor, *source.children(descriptor)]:
        if not layout.blob_path(part["digest"]).exists():
            shutil.copy(source.blob_path(part["digest"]), layout.blob_path(part["digest"]))
    layout.tag(name, descriptor)
    return layout


def layers_of(layout: images.Layout, tag: str) -> list[Layer]:
    config, *descriptors = layout.children(layout.tagged(tag))
    diff_ids = layout.document(config["digest"])["rootfs"]["diff_ids"]
    return [
        Layer(layout.blob(descriptor["digest"]), Digest(diff_id))
        for descriptor, diff_id in zip(descriptors, diff_ids, strict=True)
    ]


REAL_AS_PLAIN_USER = """
import sys
from pathlib import Path
from tests.real.test_judges import images, layers_of, make_ours
become_plain()
layout = images.Layout(Path(sys.argv[1]))
make_ours(layers_of(layout, sys.argv[3]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("image", ["many-plain", "debian"])
@pytest.mark.parametrize("tool", TOOLS)
def test_real_trees_are_the_same(place: Path, catalogue: Catalogue, tool: str, image: str) -> None:
    folder = place / f"{tool.replace(' ', '-')}-{image}"
    with tool_of(tool, folder) as ask:
        layout = one_image(catalogue, image, folder)
        begun = time.time_ns()
        theirs = ask(layout, image)
        assert theirs is not None
        if tool == "umoci rootless":
            mine_at = place / f"plain-{image}"
            run_plain(REAL_AS_PLAIN_USER, layout.path, mine_at, image)
        else:
            mine_at = folder / "ours"
            make_ours(layers_of(layout, image), mine_at)
        assert compare(tool, read_ours(mine_at), theirs, begun) == []
    shutil.rmtree(folder)
