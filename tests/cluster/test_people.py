"""What people look at on a cluster of four nodes: the live page of a run, and `doctor`."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from tests.cluster.prewarm import add_image

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.origin import Origin
    from tests.support.ray_cluster import RayCluster
    from tests.support.registry import FakeRegistry

PROGRAM = Path(sys.executable).parent / "stowray"
NODES = ["n0", "n1", "n2", "n3"]
SECONDS = 240.0


@pytest.fixture
def start(four_nodes: RayCluster, workspace: Path) -> Callable[..., subprocess.Popen[str]]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "XDG_", "STOWRAY_", "OTEL_"))
    }

    def begin(*arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
        common = ["--address", four_nodes.address, "--store", str(workspace / "{node}")]
        return subprocess.Popen(
            [str(PROGRAM), *common, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **kept,
                **four_nodes.environment,
                "XDG_RUNTIME_DIR": str(workspace),
                "HOME": str(workspace),
                **variables,
            },
        )

    return begin


def test_a_browser_watches_a_run_from_its_middle_to_its_end(
    start: Callable[..., subprocess.Popen[str]], registry: FakeRegistry, source: Origin
) -> None:
    reference = add_image(registry, "seen", 2_000_000, 50_000)
    reference = reference.replace(registry.host, source.host)
    source.hold_after(600_000)
    process = start("--log-json", "prewarm", reference, "--ui", "127.0.0.1:0")
    assert process.stderr
    url = next(line["url"] for line in map(json.loads, process.stderr) if line.get("event") == "ui")
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc, timeout=SECONDS)
    try:
        connection.request("GET", f"{address.path}events")
        stream = connection.getresponse()
        parts: dict[str, str] = {}

        def read() -> bool:
            while line := stream.readline().decode():
                if line.startswith("data: "):
                    message = json.loads(line[6:])
                    parts.update(message["parts"])
                    return not message["over"]
            raise AssertionError("the stream has ended before the run")

        while not all("working" in parts.get(f"row-{slot}", "") for slot in range(4)):
            assert read()
        # Bars of the timeline for bytes that are on their way, told from where or not yet.
        bars = [f'class="fill-{kind}" x=' for kind in ("coming", "origin", "peer")]
        while not any(bar in parts.get("time", "") for bar in bars):
            assert read()
        source.hold_after(None)
        while read():
            pass
    finally:
        connection.close()
    assert "Every image is on every node" in parts["final"]
    for slot, node in enumerate(NODES):
        assert node in parts[f"row-{slot}"]
        assert "pulled" in parts[f"row-{slot}"]
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    events = [json.loads(line)["event"] for line in errors.splitlines()]
    assert events.count("image.pulled") == 4
    assert events[-1] == "run.done"


def test_a_run_leaves_figures_and_spans_without_a_secret(
    start: Callable[..., subprocess.Popen[str]], registry: FakeRegistry, workspace: Path
) -> None:
    reference = add_image(registry, "counted", 300_000, 2000)
    figures = workspace / "run.prom"
    process = start(
        *("-v", "--log-json", "prewarm", reference, "--metrics", figures),
        OTEL_TRACES_EXPORTER="console",
    )
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    text = figures.read_text()
    assert 'stowray_prewarm_nodes{state="ready"} 4' in text
    assert 'stowray_prewarm_runs_total{result="done"} 1' in text
    assert f'stowray_prewarm_bytes_total{{source="{registry.host}"}}' in text
    assert 'stowray_prewarm_bytes_total{source="nodes"}' in text
    assert errors.count('"name": "prewarm node"') == 4
    # With -v blobs are logged too.
    assert '"event": "blob.done"' in errors


def findings(process: subprocess.Popen[str]) -> tuple[int, dict[str, Any]]:
    out, err = process.communicate(timeout=SECONDS)
    assert "Traceback" not in err
    return process.returncode, {line["check"]: line for line in map(json.loads, out.splitlines())}


def test_doctor_looks_at_every_node_of_a_cluster(
    start: Callable[..., subprocess.Popen[str]], registry: FakeRegistry
) -> None:
    reference = add_image(registry, "asked", 1000)
    code, found = findings(start("--json", "doctor", reference))
    assert code == 0, found
    assert "4 nodes" in found["ray"]["found"]
    for node in NODES:
        assert found[f"node {node}"]["state"] == "ok"
        assert f"Python {sys.version.split()[0]}" in found[f"node {node}"]["found"]
    assert found["registry"]["state"] == "ok"


def test_doctor_misses_a_node_that_was_lost(
    start: Callable[..., subprocess.Popen[str]], four_nodes: RayCluster
) -> None:
    four_nodes.kill("n3")
    try:
        # Ray takes some seconds to know; until then the node may be asked, and is no crash.
        while True:
            code, found = findings(start("--json", "doctor"))
            told = found.get("node n3")
            assert told is None or told["state"] == "problem"
            if "3 nodes" in found["ray"]["found"]:
                break
        assert code == 0
        left = {name for name in found if name.startswith("node ")}
        assert left == {"node n0", "node n1", "node n2"}
    finally:
        four_nodes.add("n3")


def test_doctor_at_a_cluster_that_is_none_says_what_to_do(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    code, found = findings(start("--json", "doctor", "--address", "127.0.0.1:1"))
    assert code == 1
    assert found["ray"]["state"] == "problem"
    assert found["ray"]["advice"]
