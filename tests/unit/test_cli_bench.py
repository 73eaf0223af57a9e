from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from stowray.cli.app import run
from stowray.pipeline.run_record import RunRecord
from tests.support.registry import FakeRegistry, Fault
from tests.support.small import small_tar
from tests.unit.test_metrics import samples

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = [small_tar({"etc/a": b"1"}), small_tar({"etc/b": b"2"})]


@pytest.fixture
def registry():
    with FakeRegistry() as made:
        made.add_image("a/b", "1", LAYERS)
        made.add_image("c/d", "1", LAYERS)
        yield made


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("STOWRAY_STORE", raising=False)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        store = str(tmp_path / "place" / "store")
        status = run(["--store", store, "--engine", "local", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_bench_measures_cold_and_warm_and_leaves_nothing(
    cli, registry: FakeRegistry, tmp_path: Path
) -> None:
    kept, page = tmp_path / "kept", tmp_path / "page.html"
    reference = f"{registry.host}/a/b:1"
    status, out, err = cli(
        "bench", reference, "--runs", "2", "--json", "--record", kept, "--html", page
    )
    assert status == 0, err
    cold, warm = map(json.loads, out.splitlines())
    assert (cold["mode"], warm["mode"]) == ("cold", "warm")
    assert (cold["reference"], cold["runs"], cold["failed"]) == (reference, 2, 0)
    assert cold["fetched_bytes"] > 0
    assert warm["fetched_bytes"] == 0
    for line in (cold, warm):
        assert set(line["seconds"]) == {"resolve", "fetch", "apply", "total", "process"}
        for stage in line["seconds"].values():
            assert stage["low"] <= stage["median"] <= stage["high"]
            assert len(stage["values"]) == 2
        assert line["seconds"]["process"]["low"] >= line["seconds"]["total"]["low"]
        assert line["cpu_seconds"]["median"] > 0
        assert line["max_rss"] > 1 << 20
    assert len(registry.seen("/blobs/")) == 2 * 3  # each cold run fetched config and two layers
    record = RunRecord.read(kept)
    assert [(run.mode, run.number) for run in record.runs] == [
        ("cold", 1),
        ("warm", 1),
        ("cold", 2),
        ("warm", 2),
    ]
    kinds = {span.kind for span in record.runs[0].spans}
    assert {"resolve", "blob", "layer", "commit"} <= kinds
    assert page.read_text().startswith("<!doctype html>")
    # Neither stores nor anything else is left; the user's own store was not even made.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "page.html"]


def test_bench_leaves_figures_and_spans_of_its_own(
    cli, registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    usual, figures = tmp_path / "usual.prom", tmp_path / "bench.prom"
    settings = tmp_path / "settings.toml"
    settings.write_text(f"metrics = '{usual}'\n")
    bad = f"{registry.host}/none:1"
    status, out, err = cli(
        *("--config", settings, "bench", f"{registry.host}/a/b:1", bad, "--runs", "2", "--json"),
        *("--metrics", figures),
    )
    assert status == 1
    assert not usual.exists(), "pulls that are measured are nobody's pulls"
    found = samples(figures.read_text())
    (cold, warm) = [line for line in map(json.loads, out.splitlines()) if not line["failed"]]
    assert (cold["mode"], warm["mode"]) == ("cold", "warm")
    for line in (cold, warm):
        about = (("mode", line["mode"]), ("registry", registry.host))
        assert found["stowray_bench_pulls_total", (*about, ("result", "done"))] == 2
        for stage, seconds in line["seconds"].items():
            key = *about, ("stage", stage)
            assert found["stowray_bench_duration_seconds_count", key] == 2
            total = found["stowray_bench_duration_seconds_sum", key]
            assert total == pytest.approx(sum(seconds["values"]), abs=1e-5)
    assert found["stowray_failures_total", (("type", "NotFoundError"),)] == 1
    spans, rest = [], err[err.index("{") :]
    while rest.startswith("{"):
        span, end = json.JSONDecoder().raw_decode(rest)
        spans.append(span)
        rest = rest[end:].lstrip()
    (whole,) = [span for span in spans if span["name"] == "bench"]
    pulls = [span for span in spans if span["name"] == "pull"]
    assert {span["parent_id"] for span in pulls} == {whole["context"]["span_id"]}
    modes = [span["attributes"]["stowray.mode"] for span in pulls]
    assert sorted(modes) == ["cold", "cold", "cold", "warm", "warm"]
    for span in spans:
        if span["name"] not in ("bench", "pull"):
            (pull,) = [one for one in pulls if one["context"]["span_id"] == span["parent_id"]]
            assert whole["start_time"] <= span["start_time"] <= span["end_time"]
            assert span["end_time"] <= pull["end_time"] <= whole["end_time"]


def test_two_references_take_turns_and_are_compared(cli, registry: FakeRegistry) -> None:
    one, other = (f"{registry.host}/{name}:1" for name in ("a/b", "c/d"))
    status, out, err = cli("bench", one, other, "--runs", "2", "--cold")
    assert status == 0
    order = [line.split(": ")[1] for line in err.splitlines() if ": cold " in line]
    assert order == [one, other, other, one]
    assert f"{other}  cold\n  to {one}\n" in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_warm_runs_are_preceded_by_one_that_does_not_count(cli, registry: FakeRegistry) -> None:
    status, out, _ = cli("bench", f"{registry.host}/a/b:1", "--runs", "2", "--warm", "--json")
    assert status == 0
    line = json.loads(out)
    assert (line["mode"], line["runs"], line["fetched_bytes"]) == ("warm", 2, 0)
    assert len(registry.seen("/blobs/")) == 3


def test_a_reference_that_fails_is_not_tried_again_and_gives_the_status(
    cli, registry: FakeRegistry, tmp_path: Path
) -> None:
    registry.fault("/c/d/blobs/", Fault(status=404), repeat=True)
    bad, good = f"{registry.host}/c/d:1", f"{registry.host}/a/b:1"
    status, out, err = cli("bench", bad, "--runs", "3", "--json")
    assert status == 3
    assert json.loads(out)["error"]["type"] == "NotFoundError"
    assert "not found" in err
    status, out, _ = cli("bench", bad, good, "--runs", "2", "--cold", "--json")
    assert status == 1
    lost, fine = map(json.loads, out.splitlines())
    assert (lost["runs"], lost["failed"]) == (0, 1)
    assert fine["runs"] == 2
    assert list(tmp_path.iterdir()) == []


def test_records_are_compared(cli, registry: FakeRegistry, tmp_path: Path) -> None:
    for name in ("one", "two"):
        cli("bench", f"{registry.host}/a/b:1", "--runs", "1", "--record", tmp_path / name, "-q")
    status, out, _ = cli("bench", "--compare", tmp_path / "one", tmp_path / "two", "--json")
    assert status == 0
    lines = list(map(json.loads, out.splitlines()))
    assert [line["mode"] for line in lines] == ["cold", "warm"]
    assert {stage["stage"] for stage in lines[0]["stages"]} >= {"total", "process"}
    status, out, _ = cli("bench", "--compare", tmp_path / "one", tmp_path / "two")
    assert "may be chance" in out
    page = tmp_path / "compared.html"
    records = tmp_path / "one", tmp_path / "two"
    assert cli("bench", "--compare", *records, "--html", page)[0] == 0
    shown = page.read_text()
    for stage in ("resolve", "fetch", "apply", "total", "process"):
        for side in ("first", "second"):
            assert f">{stage} · {side}<" in shown
    assert shown.count("may be chance") == out.count("may be chance")
    assert cli("bench", "--compare", *records, "--record", tmp_path / "no")[0] == 2
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("bench", "--record"),
        ("bench", "--html"),
        ("bench", "--metrics"),
        ("pull", "--record"),
        ("pull", "--metrics"),
        ("prewarm", "--metrics"),
    ],
)
def test_a_file_that_has_no_place_is_told_before_the_work(
    cli, registry: FakeRegistry, tmp_path: Path, words: tuple[str, str]
) -> None:
    status, out, err = cli(*words, tmp_path / "none" / "file", f"{registry.host}/a/b:1")
    assert (status, out) == (2, "")
    assert "its directory does not exist" in err
    assert registry.requests == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("Not A Reference",)])
def test_bad_usage_measures_nothing(cli, arguments: tuple[str, ...]) -> None:
    assert cli("bench", *arguments)[0] == 2


def test_a_pull_is_recorded_and_drawn(cli, registry: FakeRegistry, tmp_path: Path) -> None:
    kept, page = tmp_path / "kept", tmp_path / "page.html"
    reference = f"{registry.host}/a/b:1"
    # Of its own: what the other pull brings would serve this one too.
    registry.add_image("fails", "1", [small_tar({"fails": b"1"})])
    registry.fault("/fails/blobs/", Fault(status=404), repeat=True)
    status, _, _ = cli("pull", reference, f"{registry.host}/fails:1", "-q", "--record", kept)
    assert status == 1
    record = RunRecord.read(kept)
    runs = {run.reference: run for run in record.runs}
    assert runs[reference].result["reference"] == reference
    assert {span.reference for span in runs[reference].spans} == {reference}
    assert runs[f"{registry.host}/fails:1"].error["type"] == "NotFoundError"
    assert cli("trace", kept, "-o", page)[:2] == (0, f"{page}\n")
    assert reference in page.read_text()
    status, out, _ = cli("trace", kept)
    assert status == 0
    assert {event["ph"] for event in json.loads(out)["traceEvents"]} >= {"X", "M", "C"}


def test_a_record_of_a_pull_that_finds_everything_says_so(
    cli, registry: FakeRegistry, tmp_path: Path
) -> None:
    reference = f"{registry.host}/a/b:1"
    cli("pull", reference, "-q")
    status, _, _ = cli(
        "pull", reference, "--policy", "missing", "-q", "--record", tmp_path / "kept"
    )
    assert status == 0
    (recorded,) = RunRecord.read(tmp_path / "kept").runs
    assert recorded.result["fetched_bytes"] == 0
    assert {span.status for span in recorded.spans} <= {"exists", "resolved", "done"}
    assert cli("trace", tmp_path / "kept", "--format", "html")[0] == 0


def test_trace_refuses_what_is_no_record(cli, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hello")
    status, out, err = cli("trace", tmp_path / "x")
    assert (status, out) == (2, "")
    assert "not a run record" in err
    assert cli("trace", tmp_path / "none")[0] == 7
