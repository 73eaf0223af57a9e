"""Limits, waves, failures, locks and shared stores of a pre-warm over four nodes."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.lock_file import read_lock
from tests.cluster.prewarm import SECONDS, Driver, add_image, layer, states, statuses
from tests.support.registry import FakeRegistry, Fault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NODES = {"n0", "n1", "n2", "n3"}
SLOW = Fault(trickle=(32 * 1024, 0.05))


def sizes(report: dict, reference: str) -> int:
    (image,) = [row for row in report["images"] if row["reference"] == reference]
    return int(image["size"])


def errors(report: dict, node: str) -> set[str]:
    return {cell["error"]["type"] for cell in report["cells"] if cell["node"] == node}


def test_with_every_limit_at_one_many_blobs_with_different_roots_come_through(
    drive: Callable[..., Driver], registry: FakeRegistry
) -> None:
    reference = add_image(registry, "many", *(2000 + number for number in range(50)))
    one = dict.fromkeys(("limits.origin_connections", "limits.fan_out"), 1)
    code, report = drive(
        reference,
        plan=one,
        settings={"registry": {"connections": 1}, "unpack": {"workers": 1}},
    ).finish()
    assert code == 0
    assert states(report) == dict.fromkeys(NODES, "ready")
    roots = {
        span["node"]
        for span in report["spans"]
        if any(not source.startswith("peer:") for source in span["by_source"])
    }
    # One whose actors are slow to start may find that others have read its share.
    assert len(roots) > 1
    blobs = [request.path for request in registry.seen("/blobs/")]
    assert len(blobs) == len(set(blobs))


def test_a_rate_of_requests_is_that_of_all_nodes_together(
    drive: Callable[..., Driver], registry: FakeRegistry
) -> None:
    """Blobs with different roots: each node asks the registry for some of them."""
    rate = 2.0
    reference = add_image(registry, "rated", *(3000 + number for number in range(15)))
    code, report = drive(reference, settings={"registry": {"requests_per_second": rate}}).finish()
    assert code == 0
    assert states(report) == dict.fromkeys(NODES, "ready")
    # The config comes with the plan. Three nodes and more share the line, each of which would
    # otherwise have one of its own.
    asked = [request.time for request in registry.seen("/blobs/")][1:]
    assert len(asked) >= 15
    assert max(asked) - min(asked) >= 0.8 * (len(asked) - 1) / rate


def test_a_rate_of_bytes_is_that_of_all_nodes_together(
    drive: Callable[..., Driver], registry: FakeRegistry
) -> None:
    """Blobs with different roots, so that several nodes read from the registry at once."""
    rate = 600_000
    reference = add_image(registry, "line", *(200_000 + number for number in range(20)))
    code, report = drive(reference, settings={"registry": {"bytes_per_second": rate}}).finish()
    assert code == 0
    assert states(report) == dict.fromkeys(NODES, "ready")
    read = [
        span
        for span in report["spans"]
        if any(not source.startswith("peer:") for source in span["by_source"])
    ]
    assert len({span["node"] for span in read}) > 1
    begun = min(span["started"] for span in read)
    ended = max(span["completed"] for span in read)
    # Each of sixteen connections may be a piece ahead, of a thirty-second of a second.
    assert ended - begun >= report["origin_bytes"] / rate - 0.5


def test_a_pause_that_a_node_was_asked_for_holds_all(
    drive: Callable[..., Driver], registry: FakeRegistry
) -> None:
    reference = add_image(registry, "paused", *(3000 + number for number in range(12)))
    pause = 6.0
    told: list[float] = []
    first = Fault(
        status=429,
        headers=(("Retry-After", f"{pause:.0f}"),),
        then=lambda: told.append(time.monotonic()),
    )
    # The config comes with the plan; then the first of all layers, so that others are left.
    registry.fault("/blobs/", Fault(), first)
    code, report = drive(reference, settings={"registry": {"requests_per_second": 2.0}}).finish()
    assert code == 0
    assert states(report) == dict.fromkeys(NODES, "ready")
    (begun,) = told
    # Nodes look at what others were told twice a second.
    during = [
        request.time - begun
        for request in registry.seen("/blobs/")
        if 2.0 < request.time - begun < pause - 0.5
    ]
    assert during == []


def test_waves_go_on_while_enough_are_ready_and_no_further(
    drive: Callable[..., Driver], registry: FakeRegistry, workspace: Path
) -> None:
    reference = add_image(registry, "waves", 100_000)
    # No store can be where a file is.
    (workspace / "n1").write_bytes(b"")
    waves = {"waves": [1, "50%", "100%"]}
    code, report = drive(reference, plan=waves).finish()
    assert code == 1
    assert states(report) == {"n0": "ready", "n1": "failed", "n2": "skipped", "n3": "skipped"}
    assert [(wave["nodes"], wave["ready"], wave["passed"]) for wave in report["waves"]] == [
        (["n0"], 1, True),
        (["n1"], 0, False),
    ]
    assert errors(report, "n2") == errors(report, "n3") == {"NodeError"}
    # Documents may be there: they travel with the plan. No layer does.
    layers = {span["digest"].removeprefix("sha256:") for span in report["spans"]}
    assert layers
    for name in ("n2", "n3"):
        assert not layers & {path.name for path in (workspace / name).glob("blobs/sha256/*")}

    enough = waves | {"failure.minimum_ready": "50%", "limits.nodes_at_once": 1}
    code, report = drive(reference, plan=enough).finish()
    assert code == 0, "the plan asks for half of them"
    assert states(report) == {"n0": "ready", "n1": "failed", "n2": "ready", "n3": "ready"}
    assert report["enough"]
    assert [(wave["ready"], wave["passed"]) for wave in report["waves"]] == [
        (1, True),
        (0, True),
        (2, True),
    ]
    assert report["origin_bytes"] == 0, "those that are ready serve the next wave"


def test_what_fails_fails_alone(drive: Callable[..., Driver], registry: FakeRegistry) -> None:
    good = add_image(registry, "good", 5000)
    bad = add_image(registry, "bad", 7000)
    (blob,) = [d for d, data in registry.blobs.items() if 6900 < len(data) < 8000]
    registry.fault(f"/blobs/{blob}", Fault(corrupt=100), repeat=True)
    missing = f"{registry.host}/a/none:1"
    code, report = drive(good, bad, missing, plan={"nodes.names": ["n1", "n[23]"]}).finish()
    assert code == 1
    assert states(report) == dict.fromkeys(("n1", "n2", "n3"), "partial")
    for cell in report["cells"]:
        kind = cell["error"] and cell["error"]["type"]
        # Whether the unpacking or the hashing is first to find out is a matter of chance.
        expected = {
            good: (None,),
            bad: ("DigestMismatchError", "LayerError"),
            missing: ("NotFoundError",),
        }
        assert kind in expected[cell["reference"]], cell
    assert {image["reference"]: bool(image["error"]) for image in report["images"]} == {
        good: False,
        bad: False,
        missing: True,
    }


def test_time_that_is_up_ends_the_run_with_a_report(
    drive: Callable[..., Driver],
    start: Callable[..., subprocess.Popen[str]],
    registry: FakeRegistry,
) -> None:
    quick, slow = add_image(registry, "quick", 1000), add_image(registry, "slow", 3 << 20)
    (blob,) = [digest for digest, data in registry.blobs.items() if len(data) > 1 << 20]
    registry.fault(f"/blobs/{blob}", Fault(stall=1000), repeat=True)
    nodes = {"nodes.names": ["n1"]}
    code, report = drive(quick, slow, plan=nodes | {"failure.node_timeout_seconds": 8}).finish()
    assert code == 1
    assert statuses(report) == {"n1": {"done", "failed"}}
    assert [cell["error"]["type"] for cell in report["cells"] if cell["error"]] == ["DeadlineError"]

    # As an option, of the whole run.
    process = start("--json", "prewarm", slow, "--nodes", "n1", "--deadline", "12")
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 6, err
    (line,) = [json.loads(text) for text in out.splitlines()]
    assert (line["node"], line["error"]["type"]) == ("n1", "DeadlineError")


def test_a_lock_pins_what_a_tag_named_and_drift_is_told(
    drive: Callable[..., Driver], registry: FakeRegistry, workspace: Path
) -> None:
    reference = add_image(registry, "moving", 1000)
    lock = workspace / "images.lock"
    nodes = {"nodes.names": ["n0", "n1"]}
    code, first = drive(reference, plan=nodes, lock=str(lock)).finish()
    assert (code, first["drift"]) == (0, [])
    locked = read_lock(lock)
    assert locked is not None
    digest = first["images"][0]["resolved"]
    assert [str(image.digest) for image in locked.images.values()] == [digest]
    written = lock.read_bytes()

    registry.add_image("a/moving", "1", [layer("new", 2000)])
    both = {"nodes.names": ["n1", "n2"]}
    code, again = drive(reference, plan=both, lock=str(lock)).finish()
    assert code == 0
    assert {cell["digest"] for cell in again["cells"]} == {first["cells"][0]["digest"]}
    assert {cell["result"]["reference"] for cell in again["cells"]} == {reference}
    (drift,) = again["drift"]
    assert (drift["reference"], drift["locked"]) == (reference, digest)
    assert drift["now"] not in ("", digest)
    assert lock.read_bytes() == written

    code, moved = drive(reference, plan=nodes).finish()
    assert (code, moved["drift"]) == (0, [])
    assert moved["images"][0]["resolved"] == drift["now"]


def test_nodes_that_share_a_store_fill_it_once(
    drive: Callable[..., Driver], registry: FakeRegistry, workspace: Path
) -> None:
    reference = add_image(registry, "shared", 300_000, 1000)
    code, report = drive(reference, settings={"store": str(workspace / "one")}).finish()
    assert code == 0
    assert states(report) == dict.fromkeys(NODES, "ready")
    assert {node["name"]: node["shares_with"] for node in report["nodes"]} == {
        "n0": "",
        "n1": "n0",
        "n2": "n0",
        "n3": "n0",
    }
    assert {span["node"] for span in report["spans"]} == {"n0"}
    assert report["peer_bytes"] == 0
    assert all(cell["present"] for cell in report["cells"])


@pytest.fixture
def small_disk(workspace: Path) -> Iterator[Path]:
    """A disk for n2's store that has little more than the reserve."""
    place = workspace / "n2"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=72m", "small", str(place)], check=True)
    yield place
    with contextlib.suppress(subprocess.CalledProcessError):
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def sealed_disk(workspace: Path) -> Iterator[Path]:
    """A disk for n3's store that cannot be written."""
    place = workspace / "n3"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "sealed", str(place)], check=True)
    yield place
    with contextlib.suppress(subprocess.CalledProcessError):
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.root
def test_a_node_without_room_is_refused_before_the_first_byte(
    drive: Callable[..., Driver], registry: FakeRegistry, small_disk: Path, sealed_disk: Path
) -> None:
    """One whose disk cannot be written fails alone."""
    reference = add_image(registry, "large", 16 << 20)
    planned = drive(reference, do="plan").finish()[1]
    assert planned["totals"]["refused"] == ["n2"]
    assert planned["totals"]["origin_bytes"] > 16 << 20
    assert registry.count("/blobs/") == 1, "a plan fetches the config and nothing else"
    code, report = drive(reference).finish()
    assert code == 1
    assert states(report) == {"n0": "ready", "n1": "ready", "n2": "refused", "n3": "failed"}
    assert errors(report, "n2") == {"StorageError"}
    rows = {node["name"]: node for node in report["nodes"]}
    assert rows["n3"]["error"]["type"] == "StorageError"
    assert list(sealed_disk.iterdir()) == []
    assert list((small_disk / "ingest").iterdir()) == []
    row = next(node for node in report["nodes"] if node["name"] == "n2")
    assert row["disk_needed"] > row["disk_free"]


def test_a_node_receives_no_more_than_its_bandwidth(
    drive: Callable[..., Driver], registry: FakeRegistry
) -> None:
    rate, sizes = 200_000, (400_000,) * 3
    reference = add_image(registry, "narrow", *sizes)
    code, report = drive(
        reference,
        plan={"limits.bandwidth": rate, "nodes.names": ["n1", "n2"]},
        # Two processes that fetch on each node: together they are one node.
        settings={"unpack": {"workers": 8}},
    ).finish()
    assert code == 0
    for node in ("n1", "n2"):
        spans = [span for span in report["spans"] if span["node"] == node]
        seconds = max(span["completed"] for span in spans) - min(span["started"] for span in spans)
        # What one read brings is paid for after it has come.
        assert seconds >= 0.8 * sum(sizes) / rate, node
