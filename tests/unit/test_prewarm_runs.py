"""Whole runs over a cluster that is none: what is said of nodes that are late, gone or new."""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from stowray.actors import connect, prewarm_muster
from stowray.cli.app import run as command
from stowray.pipeline.errors import (
    CancelledError,
    DeadlineError,
    NotFoundError,
    StorageError,
    UnavailableError,
    describe,
)
from tests.support.fake_cluster import FakeCluster, FakeNode, after, later

if TYPE_CHECKING:
    from pathlib import Path

    from stowray.pipeline.prewarm_report import PrewarmReport

DEBIAN = "docker.io/library/debian:12"
NOSUCH = "docker.io/library/nosuch:latest"
PLAN = {"images": ["debian:12"]}
BOTH = {"images": ["debian:12", "nosuch"]}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    made = FakeCluster()
    made.install(monkeypatch)
    monkeypatch.setattr(prewarm_muster, "STRAGGLER_SECONDS", 0.1)
    monkeypatch.setattr(connect, "passed_over", lambda _settings: "")
    return made


async def slow(node: FakeNode, request: dict[str, Any]) -> Any:
    """Begin long after the others."""
    await asyncio.sleep(0.8)
    return await node.do_begin_run(request)


async def broken(_node: FakeNode, _request: dict[str, Any]) -> Any:
    raise StorageError("/store", "permission denied")


async def hang(_node: FakeNode, *_about: Any) -> Any:
    await asyncio.sleep(60.0)


def states(report: PrewarmReport) -> dict[str, str]:
    return {node.name: node.state for node in report.nodes}


def told(lines: list[dict[str, Any]]) -> dict[tuple[str | None, str | None], str]:
    """Return by reference and node the type of the error, empty where there is none."""
    return {
        (line["reference"], line["node"]): line.get("error", {}).get("type", "") for line in lines
    }


# Nodes that are late


def test_status_waits_for_a_node_that_answers_late(cluster: FakeCluster) -> None:
    cluster.add("n1")
    cluster.add("n2", begin_run=slow)
    report = cluster.run(PLAN).status()
    assert states(report) == {"n1": "ready", "n2": "ready"}
    assert told(report.results()) == {(DEBIAN, "n1"): "", (DEBIAN, "n2"): ""}
    assert report.exit_code == 0


def test_status_names_a_late_node_that_cannot_begin(cluster: FakeCluster) -> None:
    async def fails_late(node: FakeNode, request: dict[str, Any]) -> Any:
        await asyncio.sleep(0.8)
        return await broken(node, request)

    cluster.add("n1")
    cluster.add("n2", begin_run=fails_late)
    report = cluster.run(PLAN).status()
    assert told(report.results()) == {(DEBIAN, "n1"): "", (DEBIAN, "n2"): "StorageError"}
    assert report.exit_code == 1


def test_a_dry_run_waits_for_a_node_that_answers_late(cluster: FakeCluster) -> None:
    cluster.add("n1")
    cluster.add("n2", begin_run=slow)
    assert told(cluster.run(PLAN).plan().results()) == {(DEBIAN, "n1"): "", (DEBIAN, "n2"): ""}


def test_a_wave_that_lacks_a_late_node_waits_for_it(cluster: FakeCluster) -> None:
    cluster.add("n1", begin_run=slow)
    cluster.add("n2")
    report = cluster.run(PLAN | {"waves": [1, "100%"]}).run()
    assert states(report) == {"n1": "ready", "n2": "ready"}
    assert [wave.passed for wave in report.waves] == [True, True]
    assert report.exit_code == 0


def test_a_wave_that_has_enough_does_not_wait_for_a_late_node(cluster: FakeCluster) -> None:
    cluster.add("n1", begin_run=slow)
    for name in ("n2", "n3"):
        cluster.add(name)
    plan = PLAN | {"waves": [2, "100%"], "failure": {"minimum_ready": 0.5}}
    report = cluster.run(plan).run()
    assert set(states(report).values()) == {"ready"}
    completed = report.waves[0].completed
    assert completed is not None
    assert completed < 0.7


def test_a_late_node_that_fails_ends_its_wave_and_is_named(cluster: FakeCluster) -> None:
    async def fails_late(node: FakeNode, request: dict[str, Any]) -> Any:
        await asyncio.sleep(0.8)
        return await broken(node, request)

    cluster.add("n1", begin_run=fails_late)
    cluster.add("n2")
    report = cluster.run(PLAN | {"waves": [1, "100%"]}).run()
    assert states(report) == {"n1": "failed", "n2": "skipped"}
    assert told(report.results())[DEBIAN, "n1"] == "StorageError"


# Waves


def test_a_node_that_is_to_have_nothing_does_not_fail_its_wave(cluster: FakeCluster) -> None:
    for name in ("n1", "n2", "n3", "n4"):
        cluster.add(name)
    cluster.platforms["n2"] = "linux/arm64"
    image = {"reference": "debian:12", "platforms": ["linux/amd64"]}
    report = cluster.run({"images": [image], "waves": [2, "100%"]}).run()
    assert states(report) == {"n1": "ready", "n2": "skipped", "n3": "ready", "n4": "ready"}
    assert [wave.passed for wave in report.waves] == [True, True]
    assert report.exit_code == 0


# Nodes that die, and what no run leaves open


def test_a_node_that_dies_before_its_images_are_known_has_failed_cells(
    cluster: FakeCluster,
) -> None:
    async def dies(node: FakeNode, request: dict[str, Any]) -> Any:
        later(0.2, lambda: cluster.remove("n2"))
        return await node.do_begin_run(request)

    cluster.add("n1")
    cluster.add("n2", begin_run=dies)
    cluster.resolving_seconds = 0.6
    report = cluster.run(PLAN).run()
    assert states(report) == {"n1": "ready", "n2": "dead"}
    assert told(report.results()) == {(DEBIAN, "n1"): "", (DEBIAN, "n2"): "NodeError"}
    assert report.exit_code == 1


@pytest.mark.parametrize("status", [True, False])
def test_an_interrupted_run_leaves_no_row_open(cluster: FakeCluster, status: bool) -> None:
    cluster.add("n1", presence=hang, pull=hang)
    run = cluster.run(PLAN)
    report = run.status(cancelled=after(0.5)) if status else run.run(after(0.5))
    assert states(report) == {"n1": "failed"}
    assert told(report.results()) == {(DEBIAN, "n1"): "CancelledError"}
    assert report.exit_code == 130


# Dry runs


def test_a_dry_run_names_images_that_do_not_resolve(cluster: FakeCluster) -> None:
    cluster.add("n1")
    cluster.refusals[NOSUCH] = NotFoundError("nosuch:latest", "docker.io")
    dry = cluster.run(BOTH).plan()
    assert told(dry.results()) == {(DEBIAN, "n1"): "", (NOSUCH, "n1"): "NotFoundError"}
    assert dry.exit_code == 1
    dry = cluster.run({"images": ["nosuch"]}).plan()
    assert told(dry.results()) == {(NOSUCH, "n1"): "NotFoundError"}
    assert dry.exit_code == 3


def test_a_dry_run_names_nodes_that_fail(cluster: FakeCluster) -> None:
    cluster.add("n1")
    cluster.add("n2", begin_run=broken)
    cluster.add("n3")
    cluster.silent.add("n3")
    dry = cluster.run(PLAN).plan()
    assert told(dry.results()) == {
        (DEBIAN, "n1"): "",
        (DEBIAN, "n2"): "StorageError",
        (DEBIAN, "n3"): "NodeError",
    }
    assert dry.exit_code == 1
    cluster.remove("n1")
    cluster.remove("n3")
    assert cluster.run(PLAN).plan().exit_code == StorageError.exit_code


def test_a_dry_run_of_which_nothing_fails_is_fine(cluster: FakeCluster) -> None:
    cluster.add("n1")
    cluster.add("n2")
    cluster.platforms["n2"] = "linux/arm64"
    image = {"reference": "debian:12", "platforms": ["linux/amd64"]}
    dry = cluster.run({"images": [image]}).plan()
    assert told(dry.results()) == {(DEBIAN, "n1"): ""}
    assert dry.exit_code == 0


def test_a_node_without_room_is_refused_once_in_a_dry_run(cluster: FakeCluster) -> None:
    async def full(node: FakeNode, images: list[dict[str, Any]]) -> Any:
        return await node.do_survey(images) | {"free": 1}

    cluster.add("n1", survey=full)
    dry = cluster.run(PLAN).plan()
    assert [(line["reference"], line["node"]) for line in dry.results()] == [(DEBIAN, "n1")]
    assert dry.exit_code == StorageError.exit_code


def test_a_dry_run_that_is_interrupted_or_out_of_time_says_so(cluster: FakeCluster) -> None:
    cluster.add("n1", survey=hang)
    with pytest.raises(CancelledError):
        cluster.run(PLAN).plan(after(0.4))
    with pytest.raises(DeadlineError):
        cluster.run(PLAN | {"failure": {"deadline_seconds": 0.4}}).plan()


def test_the_command_of_a_dry_run_tells_what_fails(
    cluster: FakeCluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.toml"
    file.write_text('images = ["debian:12", "nosuch"]\n[nodes]\nnames = ["n*", "other"]\n')
    cluster.add("n1")
    cluster.refusals[NOSUCH] = NotFoundError("nosuch:latest", "docker.io")
    assert command(["plan", "-f", str(file), "--json"]) == 1
    *lines, total = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert told(lines) == {(DEBIAN, "n1"): "", (NOSUCH, "n1"): "NotFoundError"}
    assert lines[1]["error"] == describe(NotFoundError("nosuch:latest", "docker.io"))
    assert total["plan"]["warnings"] == ["no node is called other"]
    assert command(["plan", "-f", str(file)]) == 1
    captured = capfd.readouterr()
    assert "nosuch:latest not found" in captured.err
    assert "warning: no node is called other" in captured.out
    cluster.behaviour["n1"] = {"survey": hang}
    assert command(["plan", "-f", str(file), "--deadline", "0.4"]) == DeadlineError.exit_code


# A cluster that is watched


def test_a_watch_outlives_all_nodes_it_selected(cluster: FakeCluster) -> None:
    cluster.add("driver")
    cluster.add("worker-1")
    later(0.8, lambda: cluster.remove("worker-1"))
    later(1.2, lambda: cluster.add("gpu-1"))
    later(2.0, lambda: cluster.add("worker-2"))
    plan = PLAN | {"nodes": {"names": ["worker-*"]}}
    report = cluster.run(plan, watch=True).run(after(3.2))
    assert states(report) == {"worker-2": "ready"}
    assert report.warnings == ("worker-1 has left the cluster",)


def test_a_join_does_not_miss_the_nodes_that_were_there_before(cluster: FakeCluster) -> None:
    cluster.add("head-1")
    cluster.add("worker-1")
    later(0.8, lambda: cluster.add("worker-2"))
    plan = PLAN | {"nodes": {"names": ["head-1", "worker-*", "other"]}}
    report = cluster.run(plan, watch=True).run(after(2.0))
    assert set(states(report).values()) == {"ready"}
    assert len(report.nodes) == 3
    assert report.warnings == ("no node is called other",)


def test_what_did_not_resolve_is_asked_for_again_when_a_node_joins(cluster: FakeCluster) -> None:
    up = after(0.5)
    cluster.refusals[DEBIAN] = lambda: None if up() else UnavailableError("r", 503, "X", "down")
    cluster.add("worker-1")
    later(0.8, lambda: cluster.add("worker-2"))
    report = cluster.run(PLAN, watch=True).run(after(2.2))
    assert states(report) == {"worker-1": "failed", "worker-2": "ready"}
    assert report.images[0].error is None
    assert cluster.resolved == [DEBIAN, DEBIAN]


def test_what_did_not_resolve_is_asked_for_once_in_a_run(cluster: FakeCluster) -> None:
    cluster.refusals[NOSUCH] = NotFoundError("nosuch:latest", "docker.io")
    for name in ("n1", "n2", "n3"):
        cluster.add(name)
    cluster.add("n4", begin_run=slow)
    report = cluster.run(BOTH).run()
    assert set(states(report).values()) == {"partial"}
    assert cluster.resolved.count(NOSUCH) == 1


def test_an_idle_node_may_leave_while_another_is_warmed(cluster: FakeCluster) -> None:
    async def slow_pull(node: FakeNode, request: dict[str, Any]) -> Any:
        await asyncio.sleep(1.0)
        return await node.do_pull(request)

    cluster.add("worker-1")
    cluster.add("worker-3")
    later(0.8, lambda: cluster.add("worker-2", pull=slow_pull))
    later(1.6, lambda: cluster.remove("worker-1"))
    report = cluster.run(PLAN, watch=True).run(after(4.0))
    assert states(report) == {"worker-2": "ready", "worker-3": "ready"}
    assert report.warnings == ("worker-1 has left the cluster",)
    assert report.exit_code == 0


def test_a_node_that_leaves_while_it_is_warmed_is_missed(cluster: FakeCluster) -> None:
    cluster.add("worker-1")
    later(0.8, lambda: cluster.add("worker-2", pull=hang))
    later(2.0, lambda: cluster.remove("worker-2"))
    report = cluster.run(PLAN, watch=True).run(after(3.5))
    assert states(report) == {"worker-1": "ready", "worker-2": "dead"}
