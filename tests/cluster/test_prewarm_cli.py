"""The `stowray` command on a cluster of four nodes, judged by what it prints and writes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from stowray.pipeline.digest import Digest
from stowray.pipeline.lock_file import read_lock
from stowray.pipeline.prewarm_report import PrewarmReport
from stowray.pipeline.progress import FINAL
from stowray.pipeline.store import Store
from tests.cluster.prewarm import add_image, layer
from tests.support import peers, runtimes

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.ray_cluster import RayCluster
    from tests.support.registry import FakeRegistry

NODES = ["n0", "n1", "n2", "n3"]
SECONDS = 240.0


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, err


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_plan_prewarm_status_and_repair(
    start: Callable[..., subprocess.Popen[str]], registry: FakeRegistry, workspace: Path
) -> None:
    reference = add_image(registry, "cli", 300_000, 2000)
    plan = workspace / "plan.toml"
    plan.write_text(f'images = ["{reference}"]\nlock = "images.lock"\nwaves = [1, "100%"]\n')

    code, out, err = finish(start("--json", "plan", "-f", plan))
    assert code == 0, err
    *needs, total = lines_of(out)
    assert [line["node"] for line in needs] == NODES
    # n0, where the command runs, has looked at the documents, and so has the config already.
    size, *rest = [line["fetch_bytes"] for line in needs]
    assert size > 302_000
    assert {blob["blob"] for line in needs[1:] for blob in line["blobs"]} == {"need"}
    assert (total["plan"]["origin_bytes"], total["plan"]["peer_bytes"]) == (size, sum(rest))
    assert registry.count("/blobs/") <= 1, "a dry run fetched layers"

    code, _, err = finish(start("--json", "status", "-f", plan))
    assert code == 3, err

    html, record = workspace / "r.html", workspace / "r.json"
    command = ("--json", "prewarm", "-f", plan, "--report", html, "--report", record)
    code, out, err = finish(start(*command, "--receipts", workspace / "receipts"))
    assert code == 0, err
    results = lines_of(out)
    assert [line["node"] for line in results] == NODES
    assert all(line["present"] and line["layers"] for line in results)
    sources = {layer["source"] for line in results for layer in line["layers"]}
    assert registry.host in sources
    assert any(source.startswith("peer:") for source in sources)
    assert all(node in err for node in NODES)
    report = PrewarmReport.from_dict(json.loads(record.read_text()))
    assert report.origin_bytes == size
    assert "http-equiv" in html.read_text()
    assert sorted(path.stem for path in (workspace / "receipts").iterdir()) == NODES
    lock = read_lock(workspace / "images.lock")
    assert lock is not None
    assert [image.digest for image in lock.images.values()] == [results[0]["resolved"]]

    code, out, err = finish(start("status", "-f", plan))
    assert code == 0, err
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["ready"] * 4

    digest = results[0]["layers"][0]["digest"].partition(":")[2]
    blobs = registry.count("/blobs/")
    rotten = workspace / "n2" / "blobs" / "sha256" / digest
    rotten.chmod(0o600)
    with rotten.open("r+b") as file:
        file.write(b"rotten")
    with contextlib.closing(Store.open(workspace / "n2")) as store:
        # As the node does itself when a peer doubts what it sent.
        assert not store.prove(Digest(f"sha256:{digest}"))
    assert not rotten.exists(), "what is not the blob has its name"
    code, out, err = finish(start("--json", "status", "-f", plan))
    assert code == 1, err
    assert {line["node"] for line in lines_of(out) if not line["present"]} == {"n2"}
    code, _, err = finish(start("status", "-f", plan, "--repair"))
    assert code == 0, err
    assert registry.count("/blobs/") == blobs, "what other nodes have was fetched again"


def test_what_does_not_exist_is_said_per_reference(
    start: Callable[..., subprocess.Popen[str]], registry: FakeRegistry
) -> None:
    good = add_image(registry, "good", 1000)
    code, out, err = finish(start("--json", "prewarm", good, f"{registry.host}/a/none:1"))
    assert code == 1, err
    failed = [line for line in lines_of(out) if "error" in line]
    assert {line["error"]["type"] for line in failed} == {"NotFoundError"}
    assert sum(bool(line.get("present")) for line in lines_of(out)) == 4
    # Where it is wanted first stands first, and what failed on all nodes is said once, of all.
    references = [line["reference"] for line in lines_of(out)]
    assert references == [good] * 4 + [failed[0]["reference"]] * 4
    assert sum("not found" in line for line in err.splitlines()) == 1
    assert "n0, n1, n2 and 1 more" in err
    missing = f"{registry.host}/a/none:1"
    code, _, err = finish(start("prewarm", missing, progress="json"))
    assert code == 3, err
    events = [json.loads(line) for line in err.splitlines() if line.startswith('{"time"')]
    assert [event["status"] for event in events if event["kind"] == "job"][-1] == "failed"


def test_nodes_are_selected_and_events_are_told(
    start: Callable[..., subprocess.Popen[str]], registry: FakeRegistry
) -> None:
    reference = add_image(registry, "some", 1000)
    command = ("-q", "--json", "prewarm", reference, "--nodes", "n[13]")
    code, out, err = finish(start(*command))
    assert code == 0, err
    assert [line["node"] for line in lines_of(out)] == ["n1", "n3"]
    code, _, err = finish(start("prewarm", reference, "--nodes", "n3", progress="json"))
    assert code == 0, err
    events = [json.loads(line) for line in err.splitlines() if line.startswith('{"time"')]
    assert "n3" in {event["node"] for event in events}
    last: dict[tuple[str, ...], dict[str, Any]] = {}
    for event in events:
        key = tuple(event[name] for name in ("node", "reference", "kind", "id"))
        assert event["current"] >= last.get(key, event)["current"], "progress fell"
        last[key] = event
    assert {event["status"] for event in last.values()} <= FINAL, "something never ended"
    (job,) = [event for event in last.values() if event["kind"] == "job"]
    assert (job["status"], job["current"], job["total"]) == ("done", 1, 1)


ANOTHER_MACHINE = """
import os
real = os.uname
os.uname = lambda: os.uname_result((*real()[:4], "aarch64"))
"""


@pytest.mark.peers
@pytest.mark.root
def test_a_node_of_another_platform_gets_its_own_and_hands_it_to_its_runtimes(
    start: Callable[..., subprocess.Popen[str]],
    four_nodes: RayCluster,
    registry: FakeRegistry,
    workspace: Path,
) -> None:
    peers.require("podman", "containerd", "ctr")
    images = {
        f"linux/{name}": registry.add_image("a/both", None, [layer(name)], architecture=name)
        for name in ("amd64", "arm64")
    }
    registry.add_index("a/both", "1", images)
    registry.add_image("a/arm", "1", [layer("only")], architecture="arm64")
    both, only = f"{registry.host}/a/both:1", f"{registry.host}/a/arm:1"
    plan = workspace / "plan.toml"
    plan.write_text(
        f'images = ["{both}", {{reference = "{only}", platforms = ["linux/arm64"]}}]\n'
        'nodes = {names = ["n1", "arm"]}\n'
    )
    handing, record = workspace / "handing.toml", workspace / "r.json"
    # This machine's containerd takes what is for this machine only.
    handed = {("arm", only, "podman"), ("n1", both, "containerd")}
    other = workspace / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text(ANOTHER_MACHINE)
    with (
        runtimes.podman(workspace / "podman") as podman,
        runtimes.containerd(four_nodes.containerd.parent) as containerd,
    ):
        four_nodes.add("arm", PYTHONPATH=str(other), **podman.environment)
        try:
            code, out, err = finish(start("--json", "plan", "-f", plan))
            assert code == 0, err
            *needs, _ = lines_of(out)
            wanted = {(line["node"], line["reference"], line["platform"]) for line in needs}
            ours = {("n1", both, "linux/amd64")}
            theirs = {("arm", both, "linux/arm64"), ("arm", only, "linux/arm64")}
            assert wanted == ours | theirs, out
            for node, reference, runtime in handed:
                handing.write_text(
                    f'images = ["{reference}"]\n'
                    f'nodes = {{names = ["{node}"]}}\ndeliver = ["{runtime}"]\n'
                )
                code, _, err = finish(start("prewarm", "-f", handing, "--report", record))
                assert code == 0, err
                report = PrewarmReport.from_dict(json.loads(record.read_text()))
                (told,) = report.deliveries
                assert (told.node, told.reference, told.runtime) == (node, reference, runtime)
            code, out, err = finish(start("--json", "prewarm", "-f", plan))
            assert code == 0, err
        finally:
            four_nodes.kill("arm")
        assert podman.inspect(only, "{{.Architecture}}") == "arm64"
        assert containerd.is_ready(both)
    got = {(line["node"], line["reference"]): line["digest"] for line in lines_of(out)}
    assert got["n1", both] == images["linux/amd64"]
    assert got["arm", both] == images["linux/arm64"]
    assert not got["n1", only], "what a node is not to have is told of it"


def test_a_signal_ends_a_run_with_its_report(
    start: Callable[..., subprocess.Popen[str]], registry: FakeRegistry
) -> None:
    reference = add_image(registry, "watched", 1000)
    process = start("--json", "prewarm", reference, "--watch", progress="plain")
    assert process.stderr is not None
    # All four are ready and the run waits for nodes that may join.
    seen = ""
    while seen.count(" pulled") < 4:
        line = process.stderr.readline()
        assert line, seen
        seen += line
    process.send_signal(signal.SIGINT)
    code, out, _ = finish(process)
    # 130 if the signal came before the run had begun to wait for others.
    assert code in (0, 130)
    assert [line["node"] for line in lines_of(out)] == NODES


PROGRAM_WITH_TASK = """
import json, sys, ray, stowray
address, store, reference = sys.argv[1:]
ray.init(address, log_to_driver=False)

@ray.remote(num_cpus=0)
def where():
    return ray.get_runtime_context().get_node_id()

with stowray.prewarm(reference, store=store, plan={"nodes.names": ["n2"]}) as job:
    kinds = {event.kind for event in job}
    report = job.result()
    ran = ray.get([where.options(label_selector=job.ready_nodes(reference)).remote()
                   for _ in range(4)])
print(json.dumps([sorted(kinds), report.exit_code, ran, [node.node_id for node in report.nodes]]))
"""


def test_work_is_placed_where_the_image_is(
    four_nodes: RayCluster, registry: FakeRegistry, workspace: Path
) -> None:
    reference = add_image(registry, "placed", 1000)
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    store = str(workspace / "{node}")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PROGRAM_WITH_TASK,
            four_nodes.address,
            store,
            reference,
        ],
        env={**kept, **four_nodes.environment, "XDG_RUNTIME_DIR": str(workspace)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    kinds, code, ran, nodes = json.loads(done.stdout.splitlines()[-1])
    assert code == 0
    assert {"blob", "layer", "image", "job"} <= set(kinds)
    assert len(nodes) == 1 and set(ran) == set(nodes)
