"""Pre-warms that are ended by those who began them: by signals, by the API, within a Ray task."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from tests.cluster.prewarm import HELD, SECONDS, add_held, add_image, arrived, is_gone

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.origin import Origin
    from tests.support.ray_cluster import RayCluster
    from tests.support.registry import FakeRegistry

NODES = ("n0", "n1", "n2", "n3")
Until = "Callable[[Callable[[], bool]], None]"
Start = "Callable[..., subprocess.Popen[str]]"


def given(source: Origin, path: str) -> int:
    """Return how many bytes of a blob the origin has sent."""
    blob = path.removeprefix("/blobs/")
    return sum(one.end - one.start for one in source.sent if one.digest == blob)


def has_all_that_is_given(workspace: Path) -> bool:
    return all(arrived(workspace, name) >= HELD * 2 // 3 for name in NODES)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda one: one.name)
def test_a_signal_ends_the_command_with_a_report_and_leaves_nothing(
    start: Start,
    registry: FakeRegistry,
    source: Origin,
    four_nodes: RayCluster,
    workspace: Path,
    until: Until,
    number: signal.Signals,
) -> None:
    reference, path = add_held(registry, source)
    record = workspace / "r.json"
    process = start("--json", "prewarm", reference, "--report", record)
    until(lambda: has_all_that_is_given(workspace))
    process.send_signal(number)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, err
    results = [json.loads(line) for line in out.splitlines()]
    assert [(one["node"], one["error"]["type"]) for one in results] == [
        (name, "CancelledError") for name in NODES
    ]
    report = json.loads(record.read_text())
    assert report["interrupted"]
    assert report["origin_bytes"] == given(source, path)
    until(lambda: is_gone(four_nodes))
    for name in NODES:
        assert not list((workspace / name / "leases").iterdir())


def test_a_second_signal_does_not_wait_for_the_report(
    start: Start,
    registry: FakeRegistry,
    source: Origin,
    four_nodes: RayCluster,
    workspace: Path,
    until: Until,
) -> None:
    reference, _ = add_held(registry, source)
    process = start("prewarm", reference)
    until(lambda: has_all_that_is_given(workspace))
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "again to leave at once" not in (line := process.stderr.readline()):
        assert line, "the command ended without a word"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    until(lambda: is_gone(four_nodes))
    source.hold_after(None)
    process = start("prewarm", reference)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err


CANCEL = """
import json, sys, ray, stowray
address, store, reference = sys.argv[1:]
ray.init(address, log_to_driver=False)
with stowray.prewarm(reference, store=store) as job:
    print("begun", flush=True)
    sys.stdin.readline()
    job.cancel()
    report = job.result()
print(json.dumps([report.exit_code, report.interrupted, report.origin_bytes, job.is_done]))
"""
IN_A_TASK = """
import json, sys, ray
address, store, reference = sys.argv[1:]
ray.init(address, log_to_driver=False)

@ray.remote(num_cpus=0)
def warm():
    import stowray
    with stowray.prewarm(reference, store=store) as job:
        report = job.result()
    return report.exit_code, [node.name for node in report.nodes if node.state == "ready"]

print(json.dumps(ray.get(warm.remote())))
"""
Program = "Callable[..., subprocess.Popen[str]]"


@pytest.fixture
def program(four_nodes: RayCluster, workspace: Path) -> Iterator[Program]:
    """Begin a Python program that gets the cluster, a place for stores, and a reference."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    begun: list[subprocess.Popen[str]] = []

    def begin(text: str, reference: str) -> subprocess.Popen[str]:
        arguments = [four_nodes.address, str(workspace / "{node}"), reference]
        begun.append(
            subprocess.Popen(
                [sys.executable, "-c", text, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**kept, **four_nodes.environment, "XDG_RUNTIME_DIR": str(workspace)},
            )
        )
        return begun[-1]

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


def answer(process: subprocess.Popen[str], said: str | None = None) -> Any:
    out, err = process.communicate(said, timeout=SECONDS)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def test_a_job_that_is_cancelled_says_what_came_and_leaves_nothing(
    program: Program,
    registry: FakeRegistry,
    source: Origin,
    four_nodes: RayCluster,
    workspace: Path,
    until: Until,
) -> None:
    reference, path = add_held(registry, source)
    process = program(CANCEL, reference)
    until(lambda: has_all_that_is_given(workspace))
    assert answer(process, "\n") == [130, True, given(source, path), True]
    until(lambda: is_gone(four_nodes))


def test_a_task_of_somebody_s_job_warms_the_cluster_that_it_runs_in(
    program: Program, registry: FakeRegistry, four_nodes: RayCluster, until: Until
) -> None:
    reference = add_image(registry, "within", 300_000)
    assert answer(program(IN_A_TASK, reference)) == [0, list(NODES)]
    until(lambda: is_gone(four_nodes))
