from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from typing import TYPE_CHECKING

import pytest

from stowray.cli.app import COMMANDS, run
from tests.support.plain_user import run_plain
from tests.support.registry import FakeRegistry, Fault
from tests.support.small import small_tar

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = [small_tar({"etc/a": b"1"}), small_tar({"etc/b": b"2"})]


class Cli:
    """The command in this process: what it prints and its exit status."""

    def __init__(self, capsys, store: Path) -> None:
        self._capsys = capsys
        self.store = store

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        status = run(["--store", str(self.store), "--engine", "local", *arguments])
        captured = self._capsys.readouterr()
        return status, captured.out, captured.err

    def json(self, *arguments: str):
        status, out, err = self("--json", *arguments)
        assert status == 0, err
        lines = [json.loads(line) for line in out.splitlines()]
        return lines[0] if len(lines) == 1 else lines


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("STOWRAY_STORE", raising=False)
    return Cli(capsys, tmp_path / "store")


@pytest.fixture
def registry():
    with FakeRegistry() as made:
        yield made


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys) -> None:
    assert run([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert name in out
    assert "--store" in out


def test_pull_answers_with_the_result_line(cli: Cli, registry: FakeRegistry) -> None:
    digest = registry.add_image("a/b", "1", LAYERS)
    result = cli.json("pull", f"{registry.host}/a/b:1", "-q")
    assert result["reference"] == f"{registry.host}/a/b:1"
    assert result["digest"] == result["resolved"] == digest
    assert result["platform"] == "linux/amd64"
    assert result["engine"] == "local"
    assert len(result["layers"]) == 2
    for layer in result["layers"]:
        assert layer["source"] == registry.host
        assert layer["fetched_bytes"] == layer["size"]
    assert result["layers"][-1]["chain_id"] == result["chain_id"]
    assert set(result["seconds"]) == {"resolve", "fetch", "apply", "total"}
    again = cli.json("pull", f"{registry.host}/a/b:1", "-q")
    assert again["fetched_bytes"] == 0
    assert {layer["source"] for layer in again["layers"]} == {"store"}


def test_stdout_has_the_answer_alone_and_stderr_the_rest(cli: Cli, registry: FakeRegistry) -> None:
    digest = registry.add_image("a/b", "1", LAYERS)
    status, out, err = cli("pull", f"{registry.host}/a/b:1")
    assert (status, out) == (0, f"{registry.host}/a/b:1@{digest}\n")
    assert "fetched" in err
    assert "unpacked" in err


@pytest.mark.parametrize("before", [True, False])
def test_common_options_stand_before_or_after_the_command(
    registry: FakeRegistry, tmp_path: Path, capsys, before: bool
) -> None:
    registry.add_image("a/b", "1", LAYERS)
    common = ["--store", str(tmp_path / "s"), "--engine", "local", "--json", "-q"]
    command = ["pull", f"{registry.host}/a/b:1"]
    assert run([*common, *command] if before else [*command, *common]) == 0
    assert json.loads(capsys.readouterr().out)["digest"]


def test_some_of_several_failed(cli: Cli, registry: FakeRegistry) -> None:
    registry.add_image("a/b", "1", LAYERS)
    good, bad = f"{registry.host}/a/b:1", f"{registry.host}/a/b:none"
    status, out, err = cli("pull", good, bad, "--json", "-q")
    assert status == 1
    first, second = (json.loads(line) for line in out.splitlines())
    assert first["reference"] == good
    assert second["reference"] == bad
    assert second["error"]["type"] == "NotFoundError"
    assert second["error"]["retryable"] is False
    assert bad in err


@pytest.mark.parametrize(
    ("fault", "status", "kind"),
    [
        pytest.param(Fault(status=404), 3, "NotFoundError", id="not found"),
        pytest.param(Fault(status=403), 4, "UnauthorizedError", id="forbidden"),
        pytest.param(Fault(status=418), 6, "RegistryError", id="teapot"),
    ],
)
def test_a_failed_pull_has_its_class_and_status(
    cli: Cli, registry: FakeRegistry, fault: Fault, status: int, kind: str
) -> None:
    registry.add_image("a/b", "1", LAYERS)
    registry.fault("/manifests/1", fault, repeat=True)
    code, out, err = cli("pull", f"{registry.host}/a/b:1", "--json", "-q")
    assert code == status
    assert json.loads(out)["error"]["type"] == kind
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["pull"],
        ["pull", "Upper"],
        ["dance"],
        ["pull", "a", "--platform", "a/b/c/d/e"],
        ["pull", "a", "--progress", "loud"],
        ["pull", "a", "--config", "/does/not/exist"],
        ["gc", "--max-size", "many"],
        ["gc", "--max-size=-1"],
        ["gc", "--min-free", "1e400"],
        ["pull", "a", "--plain-http", "http://a"],
        ["pull", "oci:\udce9"],
        ["rootfs", "a", ""],
        ["unshare"],
        ["unshare", "id"],
        ["unshare", "a", "b", "ls"],
        ["unshare", "a", "b", "--"],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_with_2(cli: Cli, tmp_path: Path, arguments: list[str]) -> None:
    cli.store.mkdir()
    status, out, err = cli(*arguments)
    assert status == 2
    assert out == ""
    assert err


@pytest.mark.parametrize("engine", ["local", "ray"])
@pytest.mark.parametrize("command", ["pull", "resolve", "config", "key", "plan", "prewarm"])
@pytest.mark.parametrize("how", ["option", "setting", "directory"])
def test_a_file_of_logins_that_is_not_there_is_an_error_though_nobody_asks_for_a_login(
    cli: Cli, registry: FakeRegistry, tmp_path: Path, engine: str, command: str, how: str
) -> None:
    registry.add_image("a/b", "1", LAYERS)
    missing = tmp_path / "none" / "auth.json"
    words = ["--authfile", str(tmp_path if how == "directory" else missing)]
    if how == "setting":
        config = tmp_path / "settings.toml"
        config.write_text(f"[registry]\nauthfile = '{missing}'\n")
        words = ["--config", str(config)]
    status, out, err = cli(command, "--engine", engine, *words, f"{registry.host}/a/b:1")
    assert status == 2, err
    assert words[1] in err or str(missing) in err
    assert not registry.requests
    assert not out or "error" in out


def test_an_unknown_command_gets_a_hint(capsys) -> None:
    assert run(["pul", "a"]) == 2
    assert "pull" in capsys.readouterr().err


def test_resolve_config_and_key(cli: Cli, registry: FakeRegistry) -> None:
    manifest = registry.add_image("a/b", None, LAYERS)
    index = registry.add_index("a/b", "1", {"linux/amd64": manifest})
    reference = f"{registry.host}/a/b:1"
    answer = cli.json("resolve", reference)
    assert answer == {
        "reference": reference,
        "digest": index,
        "media_type": "application/vnd.oci.image.index.v1+json",
        "size": len(registry.manifests["a/b", index][1]),
    }
    assert cli("resolve", reference)[1] == f"{index}\n"
    config = json.loads(registry.manifests["a/b", manifest][1])["config"]["digest"]
    assert cli("config", reference)[1].encode() == registry.blobs[config]
    assert cli.json("key", reference).keys() == {"manifest_key", "chain_id"}


def test_plan_prints_the_dag_and_fetches_no_layer(cli: Cli, registry: FakeRegistry) -> None:
    registry.add_image("a/b", "1", LAYERS)
    plan = cli.json("plan", f"{registry.host}/a/b:1")
    assert [layer["blob"] for layer in plan["layers"]] == ["need", "need"]
    assert plan["fetch_bytes"] == sum(layer["size"] for layer in plan["layers"])
    kinds = [step["kind"] for step in plan["steps"]]
    assert kinds == ["fetch", "fetch", "stage", "stage", "commit", "commit"]
    # Only the config, which is no layer.
    assert registry.count("/blobs/") == 1


def test_images_inspect_rm_and_gc(cli: Cli, registry: FakeRegistry) -> None:
    digest = registry.add_image("a/b", "1", LAYERS)
    reference = f"{registry.host}/a/b:1"
    assert cli("images")[:2] == (0, "")
    pulled = cli.json("pull", reference, "-q")
    row = cli.json("images")
    assert (row["reference"], row["digest"], row["unpacked"]) == (reference, digest, True)
    inspected = cli.json("inspect", reference)
    assert inspected["blob_mapping"] == {
        layer["chain_id"]: layer["digest"] for layer in pulled["layers"]
    }
    assert cli("rm", reference)[0] == 0
    assert cli("rm", reference)[0] == 3
    assert cli("images")[1] == ""
    status, _, _ = cli("gc")
    assert status == 0
    left = [path for path in (cli.store / "blobs").rglob("*") if path.is_file()]
    assert left == []
    assert list((cli.store / "snapshots").iterdir()) == []


def test_a_pinned_image_outlives_pressure(cli: Cli, registry: FakeRegistry) -> None:
    for tag in ("1", "2"):
        registry.add_image("a/b", tag, [small_tar({tag: tag.encode()})])
        cli("pull", f"{registry.host}/a/b:{tag}", "-q")
    assert cli("pin", f"{registry.host}/a/b:1")[0] == 0
    assert cli("gc", "--max-size", "0")[0] == 0
    assert cli.json("images")["reference"] == f"{registry.host}/a/b:1"
    assert cli("unpin", f"{registry.host}/a/b:1")[0] == 0
    cli("gc", "--max-size", "0")
    assert cli("images")[1] == ""


def test_rootfs_pulls_what_is_missing_and_refuses_a_full_destination(
    cli: Cli, registry: FakeRegistry, tmp_path: Path
) -> None:
    registry.add_image("a/b", "1", LAYERS)
    tree = tmp_path / "tree"
    assert cli("rootfs", f"{registry.host}/a/b:1", str(tree), "--offline")[0] == 3
    assert not tree.exists()
    assert cli("rootfs", f"{registry.host}/a/b:1", str(tree))[0] == 0
    assert (tree / "etc" / "a").read_bytes() == b"1"
    assert (tree / "etc" / "b").read_bytes() == b"2"
    status, _, err = cli("rootfs", f"{registry.host}/a/b:1", str(tree))
    assert status == 7
    assert str(tree) in err


def test_events_are_json_lines_that_end(cli: Cli, registry: FakeRegistry) -> None:
    registry.add_image("a/b", "1", LAYERS)
    status, _, err = cli("pull", f"{registry.host}/a/b:1", "--progress", "json")
    assert status == 0
    last = {}
    for line in err.splitlines():
        event = json.loads(line)
        previous = last.get((event["kind"], event["id"]))
        assert previous is None or event["current"] >= previous["current"]
        last[event["kind"], event["id"]] = event
    kinds = {kind for kind, _ in last}
    assert {"resolve", "blob", "layer", "commit", "image"} <= kinds
    final = {"resolved", "done", "exists", "applied", "committed"}
    assert {event["status"] for event in last.values()} <= final


def test_a_failed_pull_ends_every_event(cli: Cli, registry: FakeRegistry) -> None:
    registry.add_image("a/b", "1", LAYERS)
    registry.fault("/blobs/", Fault(status=404), repeat=True)
    status, _, err = cli("pull", f"{registry.host}/a/b:1", "--progress", "json")
    assert status == 3
    last = {}
    for line in err.splitlines():
        if line.startswith("{"):
            event = json.loads(line)
            last[event["kind"], event["id"]] = event["status"]
    assert last["image", f"{registry.host}/a/b:1"] == "failed"
    assert not {"downloading", "waiting", "applying", "retrying", "resolving"} & set(last.values())


def test_reference_and_platform_answer_in_order(cli: Cli) -> None:
    status, out, _ = cli("reference", "debian", "A b", "--", "-x")
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 1
    assert [answer["input"] for answer in answers] == ["debian", "A b", "-x"]
    assert answers[0]["canonical"] == "docker.io/library/debian:latest"
    assert "error" in answers[1]
    status, out, _ = cli("platform", "linux/arm/v7")
    assert json.loads(out)["formatted"] == "linux/arm/v7"


def test_rootfs_goes_to_stdout_as_a_tar_and_nothing_else_does(
    registry: FakeRegistry, tmp_path: Path
) -> None:
    registry.add_image("a/b", "1", LAYERS)
    command = [sys.executable, "-m", "stowray", "--store", str(tmp_path / "store"), "rootfs"]
    made = subprocess.run(
        [*command, "--format", "tar", f"{registry.host}/a/b:1", "-"],
        capture_output=True,
        check=True,
        timeout=120,
    )
    with tarfile.open(fileobj=io.BytesIO(made.stdout)) as archive:
        assert archive.extractfile("etc/b").read() == b"2"
    refused = subprocess.run(
        [*command, f"{registry.host}/a/b:1", "-"], capture_output=True, check=False, timeout=120
    )
    assert (refused.returncode, refused.stdout) == (2, b"")


def test_rootfs_answers_with_what_it_made(cli: Cli, registry: FakeRegistry, tmp_path: Path) -> None:
    registry.add_image("a/b", "1", LAYERS)
    reference = f"{registry.host}/a/b:1"
    answer = cli.json("rootfs", reference, str(tmp_path / "tree"), "-q")
    assert (answer["format"], answer["skipped"], answer["size"]) == ("dir", [], 2)
    answer = cli.json("rootfs", "--format", "tar", reference, str(tmp_path / "tree.tar"), "-q")
    assert answer["path"] == str(tmp_path / "tree.tar")
    assert (answer["format"], answer["skipped"], answer["size"]) == ("tar", [], 2)


def test_what_follows_the_first_dashes_is_the_commands_own(tmp_path: Path, capfd) -> None:
    assert run(["--store", str(tmp_path), "unshare", "--", "echo", "a", "--", "--json"]) == 0
    assert capfd.readouterr().out == "a -- --json\n"


def test_references_that_are_pinned_answer_one_by_one(cli: Cli, registry: FakeRegistry) -> None:
    registry.add_image("a/b", "1", LAYERS)
    name = f"{registry.host}/a/b:1"
    cli.json("pull", name)
    status, out, _ = cli("--json", "pin", f"{registry.host}/none:1", name)
    assert status == 1
    failed, pinned = map(json.loads, out.splitlines())
    assert failed["error"]["type"] == "NotFoundError"
    assert pinned == {"reference": name, "pinned": True}
    assert cli.json("images")["pinned"]
    assert cli.json("unpin", name) == {"reference": name, "pinned": False}


def test_a_failed_look_names_its_reference(cli: Cli, registry: FakeRegistry) -> None:
    registry.add_image("a/b", "1", LAYERS)
    cli.json("pull", f"{registry.host}/a/b:1")
    status, out, _ = cli("--json", "inspect", "none")
    assert status == 3
    assert json.loads(out)["reference"] == "none"


def test_layers_that_are_here_keep_their_unpacked_size(cli: Cli, registry: FakeRegistry) -> None:
    registry.add_image("a/b", "1", LAYERS)
    name = f"{registry.host}/a/b:1"
    first, second = cli.json("pull", name), cli.json("pull", name)
    assert second["fetched_bytes"] == 0
    assert [layer["unpacked_size"] for layer in first["layers"]] == [1, 1]
    assert [layer["unpacked_size"] for layer in second["layers"]] == [1, 1]


def test_a_store_that_may_not_be_looked_at(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    code = """
import sys
import click.shell_completion, stowray.cli.app, stowray.cli.stock, stowray.pipeline.settings
become_plain()
print(stowray.cli.app.run(["--store", sys.argv[1], "images"]))
"""
    assert run_plain(code, closed / "store") == "7\n"


@pytest.mark.parametrize(
    "words", [["--help"], ["pull", "--json", "Bad!"], ["reference", "a"]], ids=" ".join
)
def test_an_answer_that_cannot_be_written_is_an_error(words: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "stowray", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
    assert done.returncode == 7, done.stderr
    assert b"the answer cannot be written" in done.stderr
    assert b"Traceback" not in done.stderr


def test_an_answer_and_what_else_is_said_share_a_file_line_by_line(
    registry: FakeRegistry, tmp_path: Path
) -> None:
    """A line longer than a buffer once lost its end to what was said after it."""
    registry.add_image("a/tall", "1", [small_tar({f"layer{number}": b""}) for number in range(40)])
    good, bad = f"{registry.host}/a/tall:1", f"{registry.host}/a/none:1"
    words = [
        "--engine",
        "local",
        "--store",
        str(tmp_path / "store"),
        "--json",
        "--progress",
        "none",
    ]
    with (tmp_path / "log").open("wb") as log:
        done = subprocess.run(
            [sys.executable, "-m", "stowray", *words, "pull", good, bad],
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    assert done.returncode == 1
    first, second, said = (tmp_path / "log").read_text().splitlines()
    assert len(first) > io.DEFAULT_BUFFER_SIZE
    assert json.loads(first)["reference"] == good
    assert json.loads(second)["reference"] == bad
    assert said.startswith("stowray: ")


def test_closed_streams_are_none_of_the_stores_files(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    registry.add_image("a/b", "1", LAYERS)
    store = tmp_path / "store"
    words = f"-m stowray --engine local --store {store} pull {registry.host}/a/b:1"
    script = f"exec {sys.executable} {words} <&- >&- 2>&-"
    done = subprocess.run(["sh", "-c", script], check=False, timeout=60, cwd=tmp_path)
    assert done.returncode == 0
    assert run(["--store", str(store), "verify", "--deep"]) == 0


def test_a_working_directory_that_is_gone_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd {gone} && rmdir {gone} && exec {sys.executable} -m stowray --store s images"
    done = subprocess.run(["sh", "-c", script], capture_output=True, check=False, timeout=60)
    assert done.returncode == 2
    assert b"working directory" in done.stderr


def test_the_answer_of_a_pull_is_a_reference_again(cli: Cli, registry: FakeRegistry) -> None:
    registry.add_image("a/b", "1", LAYERS)
    status, pinned, _ = cli("pull", f"{registry.host}/a/b:1")
    assert status == 0
    status, again, _ = cli("pull", pinned.strip())
    assert (status, "@sha256:" in again) == (0, True)
    assert cli("pull", again.strip())[:2] == (0, again)
