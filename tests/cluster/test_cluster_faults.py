"""What a cluster does to a pre-warm: its head dies, nodes stand still, clocks differ."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.cluster.prewarm import Driver, add_held, arrived, ours, states
from tests.support.invariants import check_store
from tests.support.origin import Origin, origin
from tests.support.ray_cluster import ray_cluster

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.ray_cluster import RayCluster
    from tests.support.registry import FakeRegistry

NAMES = ("h0", "h1", "h2")
# Raylets outlive their head for longer than the test: who ends before has ended by itself.
PATIENT = {"gcs_rpc_server_reconnect_timeout_s": 600}
Until = "Callable[[Callable[[], bool]], None]"


@pytest.fixture
def source(registry: FakeRegistry) -> Iterator[Origin]:
    """What stands before the registry and can hold it back."""
    with origin(registry.host) as proxy:
        yield proxy


@contextlib.contextmanager
def driving(cluster: RayCluster, folder: Path, *references: str, **wanted: Any) -> Iterator[Driver]:
    driver = Driver(cluster, folder, {"references": references, **wanted})
    try:
        yield driver
    finally:
        driver.end()


@pytest.mark.parametrize("also_driver", [False, True], ids=["head", "head-and-driver"])
def test_nothing_outlives_a_dead_head_and_the_next_run_goes_on(
    registry: FakeRegistry, source: Origin, workspace: Path, until: Until, also_driver: bool
) -> None:
    reference, path = add_held(registry, source)
    for name in ("first", "second"):
        (workspace / name).mkdir()
    with (
        ray_cluster(workspace / "first", NAMES, system=PATIENT) as cluster,
        driving(cluster, workspace, reference) as driver,
    ):
        until(lambda: all(arrived(workspace, name) > 256 * 1024 for name in NAMES))
        cluster.kill_head()
        if also_driver:
            driver.send(signal.SIGKILL)
            driver.process.wait()
        else:
            code, report = driver.finish()
            assert (code, report["error"]["type"]) == (6, "NodeError")
            assert "head" in report["error"]["message"]
        until(lambda: not any(ours(cluster, name) for name in NAMES))
        for name in NAMES:
            (raylet,) = cluster.processes(name)["raylet"]
            os.kill(raylet, 0)
            check_store(workspace / name)
            assert not list((workspace / name / "leases").iterdir())
    source.hold_after(None)
    with (
        ray_cluster(workspace / "second", NAMES) as cluster,
        driving(cluster, workspace, reference) as driver,
    ):
        code, report = driver.finish()
    assert code == 0, report
    assert states(report) == dict.fromkeys(NAMES, "ready")
    assert registry.seen(path)[-1].range is not None, "what was fetched is fetched again"
