"""What becomes of a pre-warm when parts of it die, when it is cancelled, and when nodes join."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.cluster.prewarm import (
    HELD,
    Driver,
    add_held,
    add_image,
    arrived,
    is_gone,
    ours,
    states,
    statuses,
)

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.origin import Origin
    from tests.support.ray_cluster import RayCluster
    from tests.support.registry import FakeRegistry

NODES = {"n0", "n1", "n2", "n3"}
FINDER = """
import importlib.util, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "stowray":
            return importlib.util.spec_from_file_location(name, {place!r})
sys.meta_path.insert(0, Finder())
"""
Until = "Callable[[Callable[[], bool]], None]"


@pytest.fixture
def brought_back(four_nodes: RayCluster) -> Iterator[RayCluster]:
    """The four nodes, complete again after the test."""
    yield four_nodes
    for name in sorted(NODES - set(four_nodes.names)):
        four_nodes.add(name)


def test_a_dead_node_is_told_and_the_others_finish(
    drive: Callable[..., Driver],
    registry: FakeRegistry,
    source: Origin,
    brought_back: RayCluster,
    workspace: Path,
    until: Until,
) -> None:
    reference, path = add_held(registry, source)
    driver = drive(reference)
    until(lambda: all(arrived(workspace, name) > 256 * 1024 for name in NODES))
    brought_back.kill("n2")
    source.hold_after(None)
    code, report = driver.finish()
    assert code == 1
    assert states(report) == {"n0": "ready", "n1": "ready", "n2": "dead", "n3": "ready"}
    (cell,) = [cell for cell in report["cells"] if cell["node"] == "n2"]
    assert (cell["present"], cell["error"]["type"]) == (False, "NodeError")
    until(lambda: is_gone(brought_back))
    # The one that read from the origin may have been the one that died.
    assert registry.count(path) <= 2


@pytest.mark.parametrize("kind", ["NodeActor", "FetchActor", "ResolverActor", "ProgressActor"])
def test_an_actor_that_dies_is_started_anew_and_goes_on(
    drive: Callable[..., Driver],
    registry: FakeRegistry,
    source: Origin,
    four_nodes: RayCluster,
    workspace: Path,
    until: Until,
    kind: str,
) -> None:
    reference, path = add_held(registry, source)
    driver = drive(reference)
    until(lambda: all(arrived(workspace, name) > 256 * 1024 for name in NODES))
    node = "n0" if kind in ("ResolverActor", "ProgressActor") else "n1"
    (victim,) = ours(four_nodes, node, kind)
    os.kill(victim, signal.SIGKILL)
    source.hold_after(None)
    code, report = driver.finish()
    assert code == 0, report
    assert states(report) == dict.fromkeys(NODES, "ready")
    assert all(request.range for request in registry.seen(path)[1:]), "read again from the start"
    until(lambda: is_gone(four_nodes))


def test_a_cancelled_run_is_over_at_once_and_the_next_one_goes_on(
    drive: Callable[..., Driver],
    registry: FakeRegistry,
    source: Origin,
    four_nodes: RayCluster,
    workspace: Path,
    until: Until,
) -> None:
    reference, path = add_held(registry, source)
    driver = drive(reference)
    blob = path.removeprefix("/blobs/")
    until(lambda: all(arrived(workspace, name) >= HELD * 2 // 3 for name in NODES))
    given = sum(one.end - one.start for one in source.sent if one.digest == blob)
    driver.cancel()
    code, report = driver.finish()
    assert code == 130
    assert report["interrupted"]
    assert statuses(report) == {node: {"failed"} for node in NODES}
    # What came counts, though nothing came of it.
    assert report["origin_bytes"] == given
    assert report["peer_bytes"] == 3 * given
    for span in report["spans"]:
        assert (span["digest"], span["completed"]) == (blob, None)
        assert sum(span["by_source"].values()) == given
    until(lambda: is_gone(four_nodes))
    source.hold_after(None)
    code, report = drive(reference).finish()
    assert code == 0
    assert registry.seen(path)[-1].range is not None, "what was fetched is fetched again"


def test_a_killed_driver_leaves_nothing_behind(
    drive: Callable[..., Driver],
    registry: FakeRegistry,
    source: Origin,
    four_nodes: RayCluster,
    workspace: Path,
    until: Until,
) -> None:
    reference, path = add_held(registry, source)
    driver = drive(reference)
    until(lambda: all(arrived(workspace, name) > 256 * 1024 for name in NODES))
    driver.process.kill()
    driver.process.wait()
    until(lambda: is_gone(four_nodes))
    source.hold_after(None)
    code, _ = drive(reference).finish()
    assert code == 0
    assert registry.seen(path)[-1].range is not None


def test_with_one_try_an_actor_that_dies_is_a_node_that_fails(
    start: Callable[..., subprocess.Popen[str]],
    registry: FakeRegistry,
    source: Origin,
    four_nodes: RayCluster,
    workspace: Path,
    until: Until,
) -> None:
    reference, _ = add_held(registry, source)
    process = start("--json", "prewarm", reference, "--nodes", "n[12]", "--tries", "1")
    until(lambda: bool(arrived(workspace, "n1") and arrived(workspace, "n2")))
    (actor,) = ours(four_nodes, "n1", "NodeActor")
    os.kill(actor, signal.SIGKILL)
    source.hold_after(None)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 1, err
    lines = {line["node"]: line for line in map(json.loads, out.splitlines())}
    assert lines["n1"]["error"]["type"] == "NodeError"
    assert lines["n2"]["present"]


def test_a_killed_pull_on_ray_leaves_no_actor_behind(
    start: Callable[..., subprocess.Popen[str]],
    registry: FakeRegistry,
    source: Origin,
    four_nodes: RayCluster,
    until: Until,
) -> None:
    """Nobody tells its actors to go: they end with the job that made them."""
    reference, blob = add_held(registry, source)
    process = start("--engine", "ray", "pull", reference)
    until(lambda: bool(registry.count(blob)))
    assert ours(four_nodes, "n0", "FetchActor")
    process.kill()
    process.communicate(timeout=240)
    until(lambda: is_gone(four_nodes))


def test_a_watched_cluster_warms_who_joins_before_it_counts(
    drive: Callable[..., Driver],
    registry: FakeRegistry,
    four_nodes: RayCluster,
    until: Until,
) -> None:
    reference = add_image(registry, "watched", 300_000)
    driver = drive(reference, watch=True, changes=True)
    everybody = dict.fromkeys(NODES, "ready")
    while driver.line()["nodes"] != everybody:
        continue
    until(lambda: not any(ours(four_nodes, name, "NodeActor") for name in NODES))
    fetched = registry.count("/blobs/")
    four_nodes.add("n4")
    try:
        while (change := driver.line())["nodes"] != everybody | {"n4": "ready"}:
            assert change["nodes"].get("n4") != "ready"
        assert ["n4", reference] in change["present"]
        assert registry.count("/blobs/") == fetched, "what nodes have comes from nodes"
    finally:
        four_nodes.kill("n4")
    # One that leaves a cluster in which all is done has failed nobody.
    while "n4" in driver.line()["nodes"]:
        continue
    driver.cancel()
    code, report = driver.finish()
    assert code == 0
    assert states(report) == everybody
    until(lambda: is_gone(four_nodes))


def test_status_looks_at_the_disk_and_repair_takes_it_from_peers(
    drive: Callable[..., Driver], registry: FakeRegistry, workspace: Path
) -> None:
    references = [add_image(registry, "one", 300_000), add_image(registry, "two", 200_000, 1000)]
    assert drive(*references).finish()[0] == 0
    fetched = registry.count("/blobs/")
    (blob,) = [digest for digest, data in registry.blobs.items() if len(data) > 250_000]
    (workspace / "n1" / "blobs" / "sha256" / blob.removeprefix("sha256:")).unlink()
    for snapshot in (workspace / "n2" / "snapshots").iterdir():
        snapshot.unlink()
    (workspace / "n3").rename(workspace / "lost")
    code, report = drive(*references, do="status").finish()
    assert code == 1
    assert states(report) == {"n0": "ready", "n1": "partial", "n2": "failed", "n3": "failed"}
    assert statuses(report) == {
        "n0": {"exists"},
        "n1": {"exists", "partial"},
        "n2": {"partial"},
        "n3": {"missing"},
    }
    code, report = drive(*references, do="repair").finish()
    assert code == 0
    assert states(report) == dict.fromkeys(NODES, "ready")
    assert statuses(report)["n0"] == {"exists"}
    assert registry.count("/blobs/") == fetched
    assert report["origin_bytes"] == 0
    assert drive(*references, do="status").finish()[0] == 0


def test_a_node_of_another_make_is_named_in_a_sentence(
    drive: Callable[..., Driver], registry: FakeRegistry, four_nodes: RayCluster, workspace: Path
) -> None:
    reference = add_image(registry, "one", 1000)
    decoy = workspace / "decoy"
    decoy.mkdir()
    (decoy / "old.py").write_text('__version__ = "0.0.0"\n')
    # The working directory, and so the real package, would come before PYTHONPATH.
    (decoy / "sitecustomize.py").write_text(FINDER.format(place=str(decoy / "old.py")))
    four_nodes.add("old", PYTHONPATH=str(decoy))
    try:
        code, report = drive(reference, plan={"nodes.names": ["n1", "old"]}).finish()
    finally:
        four_nodes.kill("old")
    assert code == 1
    assert states(report) == {"n1": "ready", "old": "failed"}
    (row,) = [node for node in report["nodes"] if node["name"] == "old"]
    assert (
        "old has stowray 0.0.0 (install the same stowray on every node)"
        in (row["error"]["message"])
    )
