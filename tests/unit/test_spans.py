from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from stowray.pipeline.engine import LocalEngine, PullOptions
from stowray.pipeline.progress import Progress
from stowray.pipeline.run_record import Recorder, Run, Span
from stowray.pipeline.settings import Settings
from stowray.pipeline.source import parse_source
from stowray.spans import QUEUE, export, wanted
from tests.support.registry import FakeRegistry
from tests.support.small import small_tar

if TYPE_CHECKING:
    from pathlib import Path

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize(
    ("environment", "is_wanted"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "x"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "console"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, False),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, False),
    ],
)
def test_the_environment_says_whether(environment: dict[str, str], is_wanted: bool) -> None:
    assert wanted(environment) is is_wanted


def test_a_pull_is_a_span_with_its_parts_inside(tmp_path: Path) -> None:
    recorder = Recorder()
    progress = Progress(node="n1")
    progress.watch(recorder)
    with FakeRegistry() as registry:
        registry.add_image("a/b", "1", [small_tar({"a": b"1"})])
        source = parse_source(f"{registry.host}/a/b:1")
        engine = LocalEngine(Settings(store=str(tmp_path)), progress=progress)
        result = engine.pull(source, PullOptions()).to_dict()
        engine.close()
    progress.close()
    name = source.canonical
    failed = {"type": "NotFoundError", "message": "none here"}
    runs = [
        Run(name, "pull", 1, 0.0, recorder.now(), result, spans=recorder.spans(name)),
        Run("none", "pull", 2, 0.0, 1.0, error=failed),
    ]
    exporter = InMemorySpanExporter()
    export(runs, recorder.started, environment={"TRACEPARENT": PARENT}, exporter=exporter)
    spans = exporter.get_finished_spans()
    whole, lost = [span for span in spans if span.name == "pull"]
    assert whole.attributes["container.image.name"] == name
    assert whole.attributes["oci.manifest.digest"] == result["digest"]
    assert f"{whole.parent.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{whole.parent.span_id:016x}" == PARENT.split("-")[2]
    assert whole.resource.attributes["service.name"] == "stowray"
    parts = [span for span in spans if span.name != "pull"]
    assert {"resolve", "fetch blob", "apply layer"} <= {span.name for span in parts}
    for part in parts:
        assert part.parent.span_id == whole.context.span_id
        assert part.context.trace_id == whole.context.trace_id
        assert whole.start_time - 50_000_000 <= part.start_time <= part.end_time
    assert not lost.status.is_ok
    assert lost.attributes["error.type"] == "NotFoundError"


def test_no_span_of_many_pulls_is_dropped() -> None:
    part = Span("r", "n", "sha256:x", "blob", "done", 1, 0.0, 1.0)
    runs = [Run("r", "pull", number, 0.0, 1.0, spans=(part,) * 30) for number in range(QUEUE // 10)]
    exporter = InMemorySpanExporter()
    export(runs, 0.0, environment={}, exporter=exporter)
    assert len(exporter.get_finished_spans()) == 31 * len(runs) > QUEUE


def test_the_command_exports_when_asked_and_never_fails_for_it(tmp_path: Path) -> None:
    with FakeRegistry() as registry:
        registry.add_image("a/b", "1", [small_tar({"a": b"1"})])
        name = f"{registry.host}/a/b:1"

        def pull(exporter: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "stowray",
                    "--store",
                    str(tmp_path / exporter),
                    "pull",
                    name,
                ],
                env={"PATH": "/usr/bin:/bin", "OTEL_TRACES_EXPORTER": exporter},
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )

        shown = pull("console")
        odd = pull("carrier-pigeon")
    assert shown.returncode == 0
    assert '"name": "fetch blob"' in shown.stderr
    assert odd.returncode == 0
    assert "no spans were sent" in odd.stderr


def test_nothing_is_imported_when_not_asked_for() -> None:
    code = (
        "import sys; from stowray.cli.app import run; run(['pull', '--help']);"
        "sys.exit(any(n.split('.')[0] in ('opentelemetry', 'prometheus_client', 'rich', 'ray')"
        " or n in ('stowray.metrics', 'stowray.spans', 'logging') for n in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, timeout=60, stdout=subprocess.DEVNULL
    )
    assert done.returncode == 0
