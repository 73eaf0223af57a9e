"""Two Ray jobs at once on the stores of the same nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.cluster.prewarm import add_image
from tests.support.invariants import check_store

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.origin import Origin
    from tests.support.ray_cluster import RayCluster
    from tests.support.registry import FakeRegistry

PROGRAM = Path(sys.executable).parent / "stowray"
SECONDS = 240.0


@pytest.fixture
def start(four_nodes: RayCluster, workspace: Path) -> Callable[..., subprocess.Popen[str]]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "XDG_", "STOWRAY_"))
    }

    def begin(*arguments: str) -> subprocess.Popen[str]:
        common = ["--address", four_nodes.address, "--store", str(workspace / "{node}")]
        return subprocess.Popen(
            [str(PROGRAM), *common, "--progress", "none", "--json", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**kept, **four_nodes.environment, "XDG_RUNTIME_DIR": str(workspace)},
        )

    return begin


def test_two_pulls_of_two_jobs_fetch_each_blob_once(
    start: Callable[..., subprocess.Popen[str]],
    registry: FakeRegistry,
    source: Origin,
    workspace: Path,
) -> None:
    one = add_image(registry, "one", 400_000, 2000).replace(registry.host, source.host)
    other = add_image(registry, "other", 300_000, 2000).replace(registry.host, source.host)
    jobs = [start("--engine", "ray", "pull", *names) for names in ((one, other), (other, one))]
    for job in jobs:
        out, err = job.communicate(timeout=SECONDS)
        assert job.returncode == 0, err
        assert len(out.splitlines()) == 2
    fetched = Counter(request.path for request in registry.requests if "/blobs/" in request.path)
    assert fetched
    assert set(fetched.values()) == {1}, fetched
    (store,) = [path for path in workspace.iterdir() if (path / "version").exists()]
    check_store(store)


def test_a_job_whose_driver_is_killed_leaves_the_other_one_all(
    start: Callable[..., subprocess.Popen[str]],
    registry: FakeRegistry,
    source: Origin,
    workspace: Path,
) -> None:
    reference = add_image(registry, "shared", 2_000_000, 2000)
    reference = reference.replace(registry.host, source.host)
    source.hold_after(500_000)
    jobs = [start("prewarm", reference) for _ in range(2)]
    assert source.wait_sent(500_000, SECONDS)
    jobs[0].send_signal(signal.SIGKILL)
    jobs[0].communicate()
    source.hold_after(None)
    out, err = jobs[1].communicate(timeout=SECONDS)
    assert jobs[1].returncode == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["node"] for line in lines] == ["n0", "n1", "n2", "n3"]
    assert all(line["present"] for line in lines)
    for line in lines:
        check_store(workspace / line["node"])
