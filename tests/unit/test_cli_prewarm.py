from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stowray.cli.app import run
from stowray.cli.context import Context
from stowray.cli.look import plan_command
from stowray.cli.prewarm import Outputs, _overrides, prewarm_command, tell
from stowray.cli.running import Running
from stowray.pipeline.errors import UsageError
from stowray.pipeline.prewarm_plan_file import load_plan, wishes
from stowray.pipeline.prewarm_report import PrewarmReport
from tests.support.prewarm import make_report, make_spans

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stowray.pipeline.prewarm_plan import PrewarmPlan

EXAMPLE = Path(__file__).parents[2] / "configs" / "prewarm.toml"
IMAGES = ("docker.io/library/debian:12", "ghcr.io/acme/app:1")


def planned(*arguments: str) -> PrewarmPlan:
    """Return the plan that a command line makes."""
    # Click keeps the option for help that it makes first.
    names = ["-h", "--help"]
    with prewarm_command.make_context(
        "prewarm", list(arguments), help_option_names=names
    ) as context:
        options: dict[str, Any] = dict(context.params)
    file, references = options.pop("file"), options.pop("references")
    return load_plan(file, references=references, overrides=_overrides(options))


def test_the_example_plan_is_one() -> None:
    plan = load_plan(EXAMPLE)
    assert len(plan.images) == 2
    assert plan.limits.bandwidth == 200_000_000
    assert plan.failure.minimum_ready == 0.95
    assert plan.lock_path(EXAMPLE) == EXAMPLE.parent / "prewarm.lock"


def test_options_become_the_keys_of_a_plan() -> None:
    plan = planned(
        *("a/b:1", "--nodes", "w-*", "--nodes", "x", "--exclude-head"),
        *("--label", "zone=a", "--label", "zone=b", "--label", "kind=gpu"),
        *("--resource", "GPU", "--resource", "CPU=4"),
        *("--nodes-at-once", "7", "--origin-connections", "3", "--fan-out", "2"),
        *("--bandwidth", "10MiB/s", "--waves", "1,10%,100%", "--min-ready", "90%"),
        *("--tries", "5", "--node-timeout", "60", "--deadline", "600", "--deliver", "podman"),
    )
    assert plan.nodes.names == ("w-*", "x")
    assert plan.nodes.exclude_head
    assert plan.nodes.labels == {"zone": ("a", "b"), "kind": ("gpu",)}
    assert plan.nodes.resources["CPU"] == 4
    assert 0 < plan.nodes.resources["GPU"] < 1
    assert (plan.limits.nodes_at_once, plan.limits.origin_connections) == (7, 3)
    assert (plan.limits.fan_out, plan.limits.bandwidth) == (2, 10 << 20)
    assert [(wave.count, wave.fraction) for wave in plan.waves] == [(1, 0), (0, 0.1), (0, 1.0)]
    assert (plan.failure.minimum_ready, plan.failure.tries) == (0.9, 5)
    assert (plan.failure.node_timeout_seconds, plan.failure.deadline_seconds) == (60, 600)
    assert plan.deliver == ("podman",)


def test_options_win_over_the_file_and_leave_the_rest() -> None:
    plan = planned("-f", str(EXAMPLE), "more/image:1", "--fan-out", "9", "--min-ready", "0.5")
    assert len(plan.images) == 3
    assert plan.limits.fan_out == 9
    assert plan.limits.bandwidth == 200_000_000
    assert plan.failure.minimum_ready == 0.5
    assert plan.nodes.names == ("worker-*",)


def test_a_dry_run_takes_the_options_of_the_run() -> None:
    own = {"-h", "--help", "--watch", "--report", "--receipts", "--ui", "--metrics"}
    wanted = {option for entry in prewarm_command.params for option in entry.opts} - own
    assert wanted <= {option for entry in plan_command.params for option in entry.opts} | {
        "references"
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["prewarm"],
        ["status"],
        ["plan"],
        ["prewarm", "a", "--label", "zone"],
        ["prewarm", "a", "--resource", "CPU=many"],
        ["prewarm", "a", "--waves", "5,1"],
        ["prewarm", "a", "--bandwidth", "fast"],
        ["prewarm", "a", "--min-ready", "90"],
        ["prewarm", "a", "--report", "r.pdf"],
        ["prewarm", "a", "--report", "/no/such/place/r.html"],
        ["prewarm", "oci:/tmp/layout"],
        ["prewarm", "-f", "/no/such/plan.toml"],
        ["plan", "-f", "/no/such/plan.toml"],
        ["plan", "-f", str(EXAMPLE), "--offline"],
        ["plan", "a", "--nodes", "n*"],
        ["plan", "a", "--lock", "images.lock"],
        ["plan", "-f", str(EXAMPLE), "--label", "zone"],
    ],
    ids=" ".join,
)
def test_a_mistake_is_told_before_any_ray_is_looked_for(arguments: list[str]) -> None:
    assert run(["-q", *arguments]) == 2


def test_a_lock_file_that_is_none_is_told_before_any_ray_is_looked_for(tmp_path: Path) -> None:
    lock = tmp_path / "images.lock"
    lock.write_text("nonsense")
    assert run(["-q", "--store", str(tmp_path), "prewarm", "a", "--lock", str(lock)]) == 2


def test_reports_and_receipts_are_written(tmp_path: Path) -> None:
    nodes = ["worker-1", "../..", "a/b"]
    report = make_report(nodes, IMAGES, spans=make_spans(nodes))
    outputs = Outputs([tmp_path / "r.json", tmp_path / "r.html"], tmp_path / "receipts")
    outputs.write(report)
    assert PrewarmReport.from_dict(json.loads((tmp_path / "r.json").read_text())) == report
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    receipts = {
        json.loads(path.read_text())["node"]["name"] for path in (tmp_path / "receipts").iterdir()
    }
    assert receipts == set(nodes)
    assert {path.name for path in tmp_path.iterdir()} == {"r.json", "r.html", "receipts"}


def test_a_report_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        Outputs([tmp_path / "r.txt"], None)


@pytest.mark.parametrize("as_json", [True, False], ids=["json", "text"])
def test_stdout_has_the_answer_and_stderr_what_people_read(
    capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    context = Context()
    context.merge({"json": as_json})
    report = make_report(["a", "b"], IMAGES)
    assert tell(context, report, Outputs([], None)) == 0
    out, err = capsys.readouterr()
    if as_json:
        lines = [json.loads(line) for line in out.splitlines()]
        assert [(line["reference"], line["node"]) for line in lines] == [
            (image, node) for image in IMAGES for node in "ab"
        ]
    else:
        digest = report.images[0].resolved
        assert out.splitlines() == [f"{image}@{digest}" for image in IMAGES]
    assert "debian:12" in err
    assert "2 ready" in err


def test_status_answers_with_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    report = make_report(["a"], IMAGES, status="missing", command="status")
    assert tell(Context(), report, Outputs([], None)) == 3
    assert capsys.readouterr().out.splitlines()[1].split() == ["a", "missing", "missing", "missing"]


@pytest.fixture
def ray_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """What `ray start` leaves on a node: its address in a file, and somebody who answers there."""
    for name in ("RAY_ADDRESS", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"{address}\n")
        yield server


def warned(capsys: pytest.CaptureFixture[str], **options: str) -> str:
    """Return what is said when a run is made that nobody runs."""
    context = Context()
    context.merge(options)
    with Running(context) as running:
        running.make(load_plan(None, references=wishes(IMAGES)), None, None, watch=False)
    return capsys.readouterr().err


def test_a_ray_beside_which_a_private_one_is_taken_is_told_of(
    ray_here: socket.socket, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = ray_here.getsockname()[1]
    said = warned(capsys)
    assert f"a Ray runs here at 127.0.0.1:{port}" in said
    assert "--address auto" in said
    assert warned(capsys, address="auto") == ""
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert warned(capsys) == ""


@pytest.mark.parametrize(
    "text", ["", "nonsense", "\x1b[2J:1", "127.0.0.1:99999999", "fifo", "none"]
)
def test_what_names_no_ray_that_answers_is_passed_over(
    ray_here: socket.socket, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    file = tmp_path / "ray" / "ray_current_cluster"
    if text in ("fifo", "none"):
        file.unlink()
    else:
        file.write_text(text)
    if text == "fifo":
        os.mkfifo(file)
    assert warned(capsys) == ""


def test_a_ray_that_has_ended_is_passed_over(
    ray_here: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    ray_here.close()
    assert warned(capsys) == ""
