"""What a pre-warm run leaves for machines to read: log lines, figures, spans."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from stowray.cli.app import run
from stowray.cli.context import Context
from stowray.cli.observe import observe_run
from stowray.cli.prewarm import Outputs, tell
from stowray.cli.running import Running
from stowray.metrics import Metrics
from stowray.metrics_run import count_run
from stowray.pipeline.errors import NodeError, StorageError, describe
from stowray.pipeline.prewarm_rows import Remark, WaveRow
from stowray.spans_run import BLOBS, NODES, export_run
from tests.support.prewarm import ScriptedRun, make_report, make_spans
from tests.unit.test_metrics import samples

if TYPE_CHECKING:
    from pathlib import Path

    from stowray.pipeline.prewarm_report import PrewarmReport

IMAGES = ("docker.io/library/debian:12", "ghcr.io/acme/app:1")
FULL = describe(StorageError("/var/lib/stowray", "no room: 5 GiB needed"))


def failed_run() -> PrewarmReport:
    """Return a run of three nodes in which one has no room and one is dead."""
    nodes = ["a", "b", "c"]
    report = make_report(nodes, IMAGES, spans=make_spans(nodes), manifest_requests=2)
    cells = [
        replace(cell, status="failed", present=False, error=FULL) if cell.node == "b" else cell
        for cell in report.cells
        if cell.node != "c"
    ]
    dead = describe(NodeError("c", "c has left the cluster"))
    rows = (
        report.nodes[0],
        replace(report.nodes[1], state="failed", error=FULL),
        replace(report.nodes[2], state="dead", error=dead),
    )
    return replace(
        report,
        nodes=rows,
        cells=tuple(cells),
        remarks=(Remark("a", "peer:b", "slow"),),
        waves=(WaveRow(0, ("a", "b", "c"), 1, 0.0, 2.0, False),),
    )


def logged(report: PrewarmReport, err: list[str], **options: object) -> list[dict[str, Any]]:
    """Carry out a scripted run with a log, and return its lines."""
    context = Context()
    context.merge({"log_json": True, **options})
    begun = replace(report, nodes=(), cells=(), waves=(), spans=())
    with Running(context) as running:
        scripted = ScriptedRun([begun, report, report], running.progress)
        scripted.gate.set()
        running.take(scripted)
        assert tell(context, scripted.run(running.cancelled), Outputs([], None)) == report.exit_code
    return [json.loads(line) for line in err.pop(0)().splitlines()]  # type: ignore[operator]


@pytest.fixture
def err(capsys: pytest.CaptureFixture[str]) -> list[Any]:
    return [lambda: capsys.readouterr().err]


def test_a_log_says_once_what_became_of_each_image_and_of_the_run(err: list[Any]) -> None:
    lines = logged(failed_run(), err)
    found = [(line["level"], line["event"], line.get("node")) for line in lines]
    assert found[0] == ("info", "run.begun", None)
    assert found.count(("info", "image.pulled", "a")) == 2
    assert found.count(("warning", "image.failed", "b")) == 2
    assert found.count(("warning", "node.dead", "c")) == 1
    assert found.count(("warning", "wave.not_passed", None)) == 1
    (end,) = [line for line in lines if line["event"] == "run.failed"]
    assert (end["exit_code"], end["nodes"]) == (1, {"dead": 1, "failed": 1, "ready": 1})
    assert {line["type"] for line in lines if line["event"] == "image.failed"} == {"StorageError"}
    assert [line for line in lines if line["level"] == "error"]


def test_a_quiet_log_has_errors_only(err: list[Any]) -> None:
    assert {line["level"] for line in logged(failed_run(), err, quiet=True)} == {"error"}


def test_a_run_that_went_well_is_said_to_be_done(err: list[Any]) -> None:
    lines = logged(make_report(["a"], IMAGES), err)
    assert [line["event"] for line in lines] == ["run.begun", *["image.pulled"] * 2, "run.done"]


def test_figures_of_a_run_add_up_and_states_do_not_stay(tmp_path: Path) -> None:
    file = tmp_path / "m.prom"
    observe_run(Context(), failed_run(), file)
    first = samples(file.read_text())
    observe_run(Context(), make_report(["a", "b"], IMAGES), file)
    last = samples(file.read_text())

    def value(found: dict[Any, float], name: str, **labels: str) -> float:
        return found[f"stowray_prewarm_{name}", tuple(sorted(labels.items()))]

    for found, ready, dead in ((first, 1, 1), (last, 2, 0)):
        assert value(found, "nodes", state="ready") == ready
        assert value(found, "nodes", state="dead") == dead
    assert value(first, "images", status="failed") == 2
    assert value(last, "images", status="failed") == 0
    assert value(last, "runs_total", result="done") == value(last, "runs_total", result="failed")
    assert value(last, "duration_seconds_count") == 2
    spans = make_spans(["a", "b", "c"])
    assert value(last, "bytes_total", source="registry.example") == sum(
        span.by_source.get("registry.example", 0) for span in spans
    )
    assert value(last, "bytes_total", source="nodes") == sum(
        span.by_source.get("peer:a", 0) for span in spans
    )
    assert value(last, "blob_seconds_count", stage="fetch") == len(spans)
    assert value(last, "remarks_total", kind="slow") == 1
    assert last["stowray_failures_total", (("type", "StorageError"),)] == 2
    assert last["stowray_failures_total", (("type", "NodeError"),)] == 1
    assert last["stowray_manifest_requests_total", ()] == 2


def test_figures_name_no_node_image_or_path() -> None:
    names = [f"private-{number}" for number in range(40)]
    metrics = Metrics()
    count_run(metrics, make_report(names, IMAGES, spans=make_spans(names)))
    text = metrics.text()
    for word in ("private-", "debian", "acme", "/var"):
        assert word not in text
    assert len(text.splitlines()) < 80


def test_an_interrupted_run_is_counted_as_that() -> None:
    metrics = Metrics()
    count_run(metrics, replace(failed_run(), interrupted=True))
    found = samples(metrics.text())
    assert found["stowray_prewarm_runs_total", (("result", "interrupted"),)] == 1


def test_a_run_is_a_span_with_its_nodes_and_their_blobs_inside() -> None:
    exporter = InMemorySpanExporter()
    report = failed_run()
    export_run(report, environment={}, exporter=exporter)
    spans = exporter.get_finished_spans()
    (whole,) = [span for span in spans if span.parent is None]
    assert (whole.name, whole.attributes["stowray.exit_code"]) == ("prewarm", 1)
    assert not whole.status.is_ok
    nodes = {s.attributes["host.name"]: s for s in spans if s.name == "prewarm node"}
    assert set(nodes) == {"a", "b", "c"}
    assert nodes["b"].attributes["error.type"] == "StorageError"
    blobs = [span for span in spans if span.name == "fetch blob"]
    assert len(blobs) == len(report.spans)
    for blob in blobs:
        node = nodes[blob.attributes["host.name"]]
        assert blob.parent.span_id == node.context.span_id
        assert node.start_time <= blob.start_time <= blob.end_time <= node.end_time
    assert whole.end_time - whole.start_time == pytest.approx(report.seconds * 1e9, abs=1e3)


def test_spans_of_many_nodes_fit_the_queue_of_an_exporter() -> None:
    names = [f"n{number}" for number in range(NODES + 500)]
    report = make_report(names, IMAGES, spans=make_spans(names))
    late = replace(report.nodes[-1], state="failed", error=FULL)
    exporter = InMemorySpanExporter()
    export_run(replace(report, nodes=(*report.nodes[:-1], late)), environment={}, exporter=exporter)
    spans = exporter.get_finished_spans()
    assert len(spans) == 1 + NODES + BLOBS < 2048
    assert "StorageError" in {span.attributes.get("error.type") for span in spans}


def test_doctor_leaves_figures_of_its_findings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    file = tmp_path / "doctor.prom"
    words = ["--store", str(tmp_path / "s"), "doctor", "--json", "--metrics", str(file)]
    assert run([*words, "127.0.0.1:1"]) == 1
    states = [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()]
    found = samples(file.read_text())
    for state in ("ok", "warn", "problem"):
        assert found["stowray_doctor_findings", (("state", state),)] == states.count(state)
