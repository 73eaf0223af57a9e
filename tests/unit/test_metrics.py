from __future__ import annotations

import base64
import json
import random
import subprocess
import sys
import threading
import urllib.request
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stowray.cli.app import run
from stowray.metrics import Metrics
from stowray.pipeline.progress import Progress
from stowray.pipeline.run_record import RunRecord
from stowray.pipeline.serve import BlobServer
from stowray.pipeline.serve_limits import Served
from stowray.pipeline.store import Store
from tests.support.registry import FakeRegistry, Fault
from tests.support.small import small_tar

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = [small_tar({"etc/a": b"1"}), small_tar({"etc/b": b"2"})]


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """What Prometheus' own parser reads, every family with help and a type."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        assert family.type in ("counter", "gauge", "summary"), family.name
        for sample in family.samples:
            key = sample.name, tuple(sorted(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def pull(store: Path, *words: str) -> int:
    return run(["--store", str(store), "--engine", "local", "-q", "pull", *words])


def test_a_file_adds_up_over_runs(tmp_path: Path, capsys) -> None:
    file = tmp_path / "stowray.prom"
    with FakeRegistry() as registry:
        registry.add_image("a/b", "1", LAYERS)
        name = f"{registry.host}/a/b:1"
        assert pull(tmp_path / "s", "--metrics", str(file), name) == 0
        first = samples(file.read_text())
        assert pull(tmp_path / "s", "--metrics", str(file), name) == 0
        assert pull(tmp_path / "s", "--metrics", str(file), name, f"{registry.host}/no:1") == 1
        last = samples(file.read_text())
        fetched = "stowray_fetched_bytes_total", (("source", registry.host),)
        blobs = list((tmp_path / "s" / "blobs" / "sha256").iterdir())
    pulls = "stowray_pulls_total", (("result", "done"),)
    failed = "stowray_failures_total", (("type", "NotFoundError"),)
    count = "stowray_stage_duration_seconds_count", (("stage", "total"),)
    assert (first[pulls], last[pulls], last[failed], last[count]) == (1, 3, 1, 3)
    assert failed not in first
    assert first[fetched] == last[fetched] > 0
    assert last["stowray_store_blobs", ()] == len(blobs)
    assert last["stowray_store_size_bytes", ()] == sum(path.stat().st_size for path in blobs)
    assert last["stowray_store_references", ()] == 1
    assert capsys.readouterr().out.count("@sha256:") == 3


def test_the_settings_may_name_the_file(tmp_path: Path, capsys) -> None:
    settings = tmp_path / "s.toml"
    settings.write_text(f"metrics = '{tmp_path}/m.prom'\n")
    with FakeRegistry() as registry:
        registry.add_image("a/b", "1", LAYERS)
        name = f"{registry.host}/a/b:1"
        assert pull(tmp_path / "s", "--config", str(settings), name) == 0
    assert samples((tmp_path / "m.prom").read_text())


def test_retries_are_counted_once_each() -> None:
    metrics = Metrics()
    progress = Progress()
    for status in ("downloading", "retrying", "downloading", "retrying", "done"):
        progress.record("r", "blob", "sha256:x", status)
        if status != "retrying":
            # Looks come every 100 ms at best: what is between two of them counts all the same.
            metrics.watch(progress.events())
    metrics.watch(progress.events())
    assert samples(metrics.text())["stowray_retries_total", ()] == 2


@pytest.mark.parametrize("fault", [Fault(cut="reset", after=200_000), Fault(status=503)])
def test_a_retry_is_in_figures_log_and_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: Fault
) -> None:
    files = [tmp_path / "m.prom", tmp_path / "r.run"]
    with FakeRegistry() as registry:
        registry.add_image("a/b", "1", [small_tar({"a": random.Random(1).randbytes(400_000)})])
        (layer,) = [digest for digest, data in registry.blobs.items() if len(data) > 300_000]
        registry.fault(str(layer), fault)
        words = ["--metrics", str(files[0]), "--record", str(files[1]), f"{registry.host}/a/b:1"]
        assert (
            run(["--store", str(tmp_path / "s"), "--engine", "local", "--log-json", "pull", *words])
            == 0
        )
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    again = [line for line in lines if line["event"] == "blob.retrying"]
    assert [(line["level"], line["id"]) for line in again] == [("warning", str(layer))]
    (done,) = [line for line in lines if line["event"] == "blob.done" and line["id"] == str(layer)]
    assert done["retries"] == 1
    assert samples(files[0].read_text())["stowray_retries_total", ()] == 1
    (pulled,) = RunRecord.read(files[1]).runs
    found = {(span.kind, span.id) for span in pulled.spans if span.retries == 1}
    assert found == {("blob", str(layer))}


def test_labels_are_escaped_and_hold_no_path() -> None:
    metrics = Metrics()
    layer = {"fetched_bytes": 1, "source": '/srv/"secret".tar'}
    metrics.pulled({"manifest_requests": 0, "layers": [layer], "seconds": {}})
    metrics.failed('a"b\\c\nd')
    assert "secret" not in metrics.text()
    found = samples(metrics.text())
    assert found["stowray_failures_total", (("type", 'a"b\\c\nd'),)] == 1


@pytest.mark.parametrize("text", ["", "not metrics\n", 'stowray_pulls_total{result="done"} 1e1e\n'])
def test_a_file_of_another_kind_is_replaced(tmp_path: Path, text: str) -> None:
    file = tmp_path / "m.prom"
    file.write_text(text)
    Metrics().write(file)
    assert samples(file.read_text())


def test_runs_that_end_together_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "m.prom"

    def write() -> None:
        metrics = Metrics()
        metrics.failed("X")
        metrics.write(file)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert samples(file.read_text())["stowray_failures_total", (("type", "X"),)] == 8


def test_a_mirror_answers_with_its_figures(tmp_path: Path) -> None:
    metrics = Metrics()
    store = Store.open(tmp_path / "s")

    def figures() -> str:
        metrics.measure(store)
        return metrics.text()

    with BlobServer(store, report=metrics.served, metrics=figures) as server:
        urllib.request.urlopen(f"{server.url}/v2/", timeout=30).close()
        with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            found = samples(answer.read().decode())
    served = "stowray_served_requests_total", (("code", "200"), ("method", "GET"))
    assert found[served] == 1
    assert found["stowray_store_blobs", ()] == 0


def test_what_clients_make_up_is_no_label() -> None:
    metrics = Metrics()
    metrics.served(Served("BREW", "/v2/x?secret", 405, 10, True, 0.1))
    assert "BREW" not in metrics.text()
    assert "secret" not in metrics.text()


def test_logs_are_json_by_level(tmp_path: Path, capsys) -> None:
    def logged(*words: str) -> list[dict[str, object]]:
        common = ["--store", str(tmp_path / "s"), "--engine", "local", "--log-json"]
        run([*common, *words])
        return [json.loads(line) for line in capsys.readouterr().err.splitlines()]

    with FakeRegistry() as registry:
        registry.add_image("a/b", "1", LAYERS)
        name = f"{registry.host}/a/b:1"
        lines = logged("pull", name)
        assert {line["level"] for line in lines} == {"info"}
        done = {line["event"]: line for line in lines}
        assert {"resolve.resolved", "blob.done", "layer.applied", "image.done"} <= set(done)
        assert done["image.done"]["reference"] == name
        assert "debug" in {line["level"] for line in logged("-v", "pull", name)}
        (quiet,) = logged("-q", "pull", f"{registry.host}/no:1")
        assert (quiet["level"], quiet["type"], quiet["exit_code"]) == ("error", "NotFoundError", 3)
        (usage,) = logged("pull", "--policy", "loud", name)
        assert usage["level"] == "error"
    for line in lines:
        assert {"time", "level", "event", "message"} <= set(line)


def test_the_command_serves_its_figures(tmp_path: Path) -> None:
    words = ["--store", str(tmp_path / "s"), "--json", "-q", "serve", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(
        [sys.executable, "-m", "stowray", *words], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            urllib.request.urlopen(f"{url}/v2/", timeout=30).close()
            with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
                found = samples(answer.read().decode())
        finally:
            process.terminate()
    assert process.returncode == 0
    assert found["stowray_served_requests_total", (("code", "200"), ("method", "GET"))] == 1
    assert ("stowray_store_references", ()) in found


@pytest.mark.parametrize("password", ["s3cret-word-of-mine", "wr0ng-word-of-mine"])
def test_logins_are_in_no_log_metric_or_record(password: str, tmp_path: Path, capsys) -> None:
    with FakeRegistry(auth="basic", users={"me": "s3cret-word-of-mine"}) as registry:
        registry.add_image("a/b", "1", LAYERS)
        login = base64.b64encode(f"me:{password}".encode()).decode()
        logins = tmp_path / "auth.json"
        logins.write_text(json.dumps({"auths": {registry.host: {"auth": login}}}))
        files = [tmp_path / "m.prom", tmp_path / "r.run"]
        words = ["--store", str(tmp_path / "s"), "--engine", "local", "--log-json", "-v", "pull"]
        words += ["--authfile", str(logins), "--metrics", str(files[0]), "--record", str(files[1])]
        status = run([*words, f"{registry.host}/a/b:1"])
    assert status == (0 if password.startswith("s3cret") else 4)
    told = [*capsys.readouterr(), files[0].read_text(), repr(RunRecord.read(files[1]))]
    assert not any(password in text or login in text for text in told)
