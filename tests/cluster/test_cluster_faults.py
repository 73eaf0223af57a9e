"""What a cluster does to a pre-warm: its head dies, nodes stand still, clocks differ."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.cluster.prewarm import HELD, Driver, add_held, add_image, arrived, is_gone, ours, states
from tests.support.fault_rounds import Rounds
from tests.support.interpose import locked_elsewhere
from tests.support.invariants import check_store
from tests.support.ray_cluster import ray_cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.origin import Origin
    from tests.support.ray_cluster import RayCluster
    from tests.support.registry import FakeRegistry

# As three of the cluster that outlives the tests: a run there goes on in their stores.
NAMES = ("n0", "n1", "n2")
# Raylets outlive their head for longer than the test: who ends before has ended by itself.
PATIENT = {"gcs_rpc_server_reconnect_timeout_s": 600}
Until = "Callable[[Callable[[], bool]], None]"


@contextlib.contextmanager
def driving(cluster: RayCluster, folder: Path, *references: str, **wanted: Any) -> Iterator[Driver]:
    driver = Driver(cluster, folder, {"references": references, **wanted})
    try:
        yield driver
    finally:
        driver.end()


@pytest.mark.parametrize("also_driver", [False, True], ids=["head", "head-and-driver"])
def test_nothing_outlives_a_dead_head_and_the_next_run_goes_on(
    drive: Callable[..., Driver],
    registry: FakeRegistry,
    source: Origin,
    workspace: Path,
    until: Until,
    also_driver: bool,
) -> None:
    reference, path = add_held(registry, source)
    (workspace / "dying").mkdir()
    with (
        ray_cluster(workspace / "dying", NAMES, system=PATIENT) as cluster,
        driving(cluster, workspace, reference) as driver,
    ):
        until(lambda: all(arrived(workspace, name) >= HELD * 2 // 3 for name in NAMES))
        blob = path.removeprefix("/blobs/")
        given = sum(one.end - one.start for one in source.sent if one.digest == blob)
        cluster.kill_head()
        if also_driver:
            driver.send(signal.SIGKILL)
            driver.process.wait()
        else:
            code, report = driver.finish()
            assert (code, report["error"]["type"]) == (6, "NodeError")
            assert "head" in report["error"]["message"]
            reached = report["report"]
            assert (reached["origin_bytes"], reached["peer_bytes"]) == (given, 2 * given)
            assert {cell["error"]["type"] for cell in reached["cells"]} == {"NodeError"}
        until(lambda: not any(ours(cluster, name) for name in NAMES))
        for name in NAMES:
            (raylet,) = cluster.processes(name)["raylet"]
            os.kill(raylet, 0)
            check_store(workspace / name)
            # One that Ray ended before it could tidy leaves a lease that nobody is bound by.
            assert not any(map(locked_elsewhere, (workspace / name / "leases").iterdir()))
    source.hold_after(None)
    code, report = drive(reference, plan={"nodes.names": list(NAMES)}).finish()
    assert code == 0, report
    assert states(report) == dict.fromkeys(NAMES, "ready")
    assert registry.seen(path)[-1].range is not None, "what was fetched is fetched again"
    for name in NAMES:
        assert not list((workspace / name / "leases").iterdir())


@pytest.mark.parametrize("fault", ["kill NodeActor", "kill node", "freeze node"])
def test_a_fault_at_a_random_moment(four_nodes: RayCluster, workspace: Path, fault: str) -> None:
    seed = random.randrange(1 << 30)
    print(f"python -m tests.support.fault_rounds --seed {seed} --rounds 1 --fault '{fault}'")
    Rounds(four_nodes, workspace, seed).carry_out(0, fault)


@pytest.mark.parametrize("kind", ["NodeActor", "FetchActor"])
def test_an_actor_that_stands_still_is_replaced(
    drive: Callable[..., Driver],
    registry: FakeRegistry,
    source: Origin,
    four_nodes: RayCluster,
    workspace: Path,
    until: Until,
    kind: str,
) -> None:
    reference, _ = add_held(registry, source)
    driver = drive(reference)
    names = four_nodes.names
    until(lambda: all(arrived(workspace, name) > 256 * 1024 for name in names))
    (victim,) = ours(four_nodes, "n1", kind)
    os.kill(victim, signal.SIGSTOP)
    try:
        until(lambda: ours(four_nodes, "n1", kind) not in ([], [victim]))
        source.hold_after(None)
        code, report = driver.finish()
        assert code == 0, json.dumps(report)
        assert states(report) == dict.fromkeys(names, "ready")
        until(lambda: is_gone(four_nodes))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)


def test_a_late_node_is_begun_without_and_taken_in(
    drive: Callable[..., Driver],
    registry: FakeRegistry,
    four_nodes: RayCluster,
    until: Until,
) -> None:
    driver = drive(add_image(registry, "late", 300_000), changes=True)
    until(lambda: bool(ours(four_nodes, "n3", "NodeActor")))
    (late,) = ours(four_nodes, "n3", "NodeActor")
    os.kill(late, signal.SIGSTOP)
    try:
        while {**driver.line()["nodes"], "n3": ""} != {
            "n0": "ready",
            "n1": "ready",
            "n2": "ready",
            "n3": "",
        }:
            continue
    finally:
        os.kill(late, signal.SIGCONT)
    code, report = driver.finish()
    assert code == 0, json.dumps(report)
    assert states(report) == dict.fromkeys(four_nodes.names, "ready")


def test_a_resolver_that_dies_learns_again_who_has_what(
    drive: Callable[..., Driver],
    registry: FakeRegistry,
    source: Origin,
    four_nodes: RayCluster,
    workspace: Path,
    until: Until,
) -> None:
    reference, _path = add_held(registry, source)
    driver = drive(reference)
    names = four_nodes.names
    until(lambda: all(arrived(workspace, name) > 256 * 1024 for name in names))
    (victim,) = ours(four_nodes, "n0", "ResolverActor")
    os.kill(victim, signal.SIGKILL)
    until(lambda: ours(four_nodes, "n0", "ResolverActor") not in ([], [victim]))
    source.hold_after(None)
    code, report = driver.finish()
    assert code == 0, json.dumps(report)
    assert source.sent_twice() == {}, "who had what was forgotten"


FILLER = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
kept = []
for _ in range(30):
    try:
        kept.append(ray.put(bytes(4 << 20)))
    except ray.exceptions.RayError:
        break
print("full", flush=True)
sys.stdin.read()
"""


def test_a_full_object_store_is_in_nobodys_way(
    drive: Callable[..., Driver], registry: FakeRegistry, four_nodes: RayCluster
) -> None:
    environment = {**os.environ, **four_nodes.environment}
    filler = subprocess.Popen(
        [sys.executable, "-c", FILLER, four_nodes.address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    try:
        assert filler.stdout is not None
        assert filler.stdout.readline().strip() == b"full"
        code, report = drive(add_image(registry, "crowded", 400_000)).finish()
        assert code == 0, json.dumps(report)
        assert states(report) == dict.fromkeys(four_nodes.names, "ready")
    finally:
        filler.communicate()


def test_four_raylets_of_one_host_without_names_are_four_nodes(
    registry: FakeRegistry, workspace: Path
) -> None:
    (workspace / "unnamed").mkdir()
    reference = add_image(registry, "four", 300_000)
    with ray_cluster(workspace / "unnamed", []) as cluster:
        for number in range(4):
            cluster.add(f"u{number}", named=False)
        with driving(cluster, workspace, reference) as driver:
            code, report = driver.finish()
    assert code == 0, json.dumps(report)
    assert len(states(report)) == 4
    assert len({node["store"] for node in report["nodes"]}) == 4
    assert set(states(report).values()) == {"ready"}
