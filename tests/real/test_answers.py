"""Commands that look: their answers, their events, and what they import to give them."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support import peers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.real.conftest import Published
    from tests.support.command import Stowray

pytestmark = pytest.mark.peers

FINAL = {"done", "exists", "resolved", "applied", "committed", "failed"}


def test_resolve_says_what_the_tag_points_to(
    stowray: Stowray, publish: Callable[[str], Published]
) -> None:
    image = publish("multi")
    assert stowray.run("resolve", image.reference).text == image.resolved["digest"] + "\n"
    assert stowray.run("resolve", "--json", image.reference).json == {
        "reference": image.reference,
        "digest": image.resolved["digest"],
        "media_type": image.resolved["mediaType"],
        "size": image.resolved["size"],
    }
    said = peers.skopeo_inspect(f"docker://{image.reference}", "--format", "{{.Digest}}")
    assert said.strip() == image.resolved["digest"]


@pytest.mark.parametrize("name", ["small", "multi", "many"])
def test_config_is_byte_for_byte(
    stowray: Stowray, publish: Callable[[str], Published], name: str
) -> None:
    image = publish(name)
    raw = stowray.run("config", "--platform", "linux/amd64", image.reference).stdout
    assert raw == image.layout.blob(image.document["config"]["digest"])
    assert not stowray.blobs() & {layer["digest"] for layer in image.document["layers"]}


def test_keys(stowray: Stowray, publish: Callable[[str], Published]) -> None:
    image = publish("multi")
    wanted = {
        "linux/amd64": {"OS": "linux", "Arch": "amd64"},
        "linux/arm/v7": {"OS": "linux", "Arch": "arm", "Variant": "v7"},
    }
    for platform, parts in wanted.items():
        answer = stowray.run("key", "--platform", platform, image.reference).json
        document = {"Digest": image.resolved["digest"], **parts}
        text = json.dumps(document, separators=(",", ":")).encode()
        manifest = image.layout.image(image.resolved, platform)
        config = image.layout.document(
            image.layout.document(manifest["digest"])["config"]["digest"]
        )
        assert answer == {
            "manifest_key": f"sha256:{hashlib.sha256(text).hexdigest()}",
            "chain_id": config["rootfs"]["diff_ids"][0],
        }


def test_plan_tells_what_a_pull_would_do_and_does_nothing(
    stowray: Stowray, publish: Callable[[str], Published]
) -> None:
    image = publish("many")
    layers = {layer["digest"] for layer in image.document["layers"]}
    before = stowray.run("plan", "--json", image.reference).text
    assert not layers & stowray.blobs()
    assert all(digest in before for digest in layers)
    stowray.pull(image.reference)
    after = stowray.run("plan", "--json", image.reference).text
    assert before != after
    assert stowray.run("plan", image.reference).text


def test_inspect_maps_chain_ids_to_blobs(
    stowray: Stowray, publish: Callable[[str], Published]
) -> None:
    image = publish("many")
    result = stowray.pull(image.reference)
    text = stowray.run("inspect", "--json", image.reference).text
    for layer in result["layers"]:
        assert layer["digest"] in text
        assert layer["chain_id"] in text


def test_several_references_of_which_one_fails(
    stowray: Stowray, publish: Callable[[str], Published]
) -> None:
    image = publish("small")
    answer = stowray.attempt("pull", "--json", image.reference, f"{image.host}/no/such:1")
    assert answer.status == 1
    good, bad = sorted(answer.lines, key=lambda line: "error" in line)
    assert good["digest"] == image.manifest["digest"]
    assert bad["reference"] == f"{image.host}/no/such:1"
    assert bad["error"]["type"] == "NotFoundError"
    assert bad["error"]["retryable"] is False


@pytest.mark.parametrize("name", ["many", "debian"])
def test_events_rise_and_end(
    stowray: Stowray, publish: Callable[[str], Published], name: str
) -> None:
    image = publish(name)
    for expected in ("done", "exists"):
        answer = stowray.run("pull", "--progress", "json", image.reference)
        events = [json.loads(line) for line in answer.stderr.splitlines()]
        assert {"time", "reference", "id", "kind", "status", "current", "total"} <= set(events[0])
        by_id: dict[tuple[str, str], list[dict[str, object]]] = {}
        for event in events:
            by_id.setdefault((str(event["kind"]), str(event["id"])), []).append(event)
        for key, told in by_id.items():
            counted = [int(str(event["current"])) for event in told]
            assert counted == sorted(counted), f"{key} fell"
            assert told[-1]["status"] in FINAL, f"{key} does not end"
            assert told[-1]["started"] is not None
            assert told[-1]["completed"] is not None
        blobs = {event["id"]: event["status"] for event in events if event["kind"] == "blob"}
        layers = {layer["digest"] for layer in image.document["layers"]}
        if expected == "done":
            assert layers <= set(blobs)
        assert {blobs[digest] for digest in layers & set(blobs)} <= {expected}


def imported(stowray: Stowray, *arguments: str) -> set[str]:
    """Top-level modules that a run of the command imported."""
    answer = stowray.attempt(*arguments, env={"PYTHONPROFILEIMPORTTIME": "1"})
    assert answer.status == 0, answer.stderr
    names = re.findall(r"^import time:.*\|\s*([\w.]+)$", answer.stderr, re.MULTILINE)
    return {name.partition(".")[0] for name in names}


def test_a_pull_that_finds_everything_imports_little(
    local: Stowray, publish: Callable[[str], Published]
) -> None:
    local.engine = "auto"
    image = publish("many")
    result = local.pull(image.reference)
    by_digest = f"{image.host}/{image.repository}@{result['digest']}"
    for arguments in (["pull", by_digest], ["pull", "--policy", "missing", image.reference]):
        names = imported(local, *arguments)
        assert "stowray" in names
        assert not names & {"ray", "requests", "urllib3", "ssl", "asyncio", "aiohttp", "rich"}


@pytest.mark.parametrize("command", ["pull", "resolve", "rootfs", "images", "session", "demo"])
def test_help_needs_no_ray(local: Stowray, command: str) -> None:
    names = imported(local, command, "--help")
    assert not names & {"ray", "requests", "urllib3", "rich", "aiohttp"}


def test_a_folder_named_like_our_own_does_not_get_in_the_way(
    stowray: Stowray, publish: Callable[[str], Published], workspace: Path
) -> None:
    image = publish("small")
    for name in ("pipeline", "actors"):
        (workspace / name).mkdir()
        (workspace / name / "__init__.py").write_text(
            "raise SystemExit('the decoy was imported')\n"
        )
    assert stowray.run("pull", image.reference, cwd=workspace).status == 0
    command = [sys.executable, "-m", "stowray", *stowray.command("pull", image.reference)[1:]]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=workspace,
        env=stowray.environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_double_dash_ends_options(local: Stowray) -> None:
    answer = local.attempt("reference", "--", "--json", "debian")
    first, second = answer.lines
    assert first["input"] == "--json"
    assert "error" in first
    assert second["canonical"] == "docker.io/library/debian:latest"


def test_python_api_gives_the_same(
    local: Stowray, publish: Callable[[str], Published], home: Path
) -> None:
    image = publish("many")
    code = f"""
import json, stowray
with stowray.resolve({image.reference!r}, store={str(local.store)!r}) as handle:
    key = handle.cache_key()
    result = handle.pull()
    snapshot = handle.snapshot()
    print(json.dumps([str(result.digest), str(result.chain_id), str(snapshot.description)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=home,
        env=local.environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    digest, chain_id, description = json.loads(done.stdout)
    assert digest == image.manifest["digest"]
    assert chain_id == local.pull(image.reference)["chain_id"]
    assert description == f"pulled from {image.reference}"
