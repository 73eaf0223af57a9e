from __future__ import annotations

import base64
import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from stowray import doctor
from stowray.cli.app import run
from stowray.doctor_remote import is_host
from stowray.pipeline.store import Store
from tests.support.registry import FakeRegistry
from tests.support.small import small_tar

SECRET = "hunter2-and-more"


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    for name in ("STOWRAY_STORE", "RAY_ADDRESS", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("HOME", str(tmp_path))

    def call(*arguments: str) -> tuple[int, dict[str, dict[str, str]], str]:
        store = str(tmp_path / "store")
        status = run(["--store", store, "doctor", "--json", *arguments])
        captured = capsys.readouterr()
        lines = [json.loads(line) for line in captured.out.splitlines()]
        return status, {line["check"]: line for line in lines}, captured.out + captured.err

    return call


def test_a_sound_machine_has_no_problem_and_nothing_is_left(cli, tmp_path: Path) -> None:
    status, found, _ = cli()
    assert status == 0
    assert set(found) >= {
        "versions",
        "store",
        "privileges",
        "file system",
        "disk space",
        "namespaces",
        "overlay",
        "open files",
        "clock",
        "programs",
        "logins",
        "ray",
    }
    for line in found.values():
        assert bool(line["advice"]) == (line["state"] != "ok")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.root
def test_overlay_is_found_as_mount_finds_it(tmp_path: Path) -> None:
    # Both mount in a namespace of their own: this is the same kernel and the same disk.
    finding = doctor.examine_overlay(tmp_path / "store")
    from stowray.pipeline.unshare import run_unshared

    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={tmp_path}/a:{tmp_path}/b"
    command = ["mount", "-t", "overlay", "x", "-o", options, str(tmp_path / "c")]
    assert (finding.state == "ok") == (run_unshared(None, None, None, command) == 0)


def test_a_store_that_cannot_be_made_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (finding, *_) = doctor.examine_store(Path("/proc/store"))
    assert (finding.check, finding.state) == ("store", "problem")
    assert "--store" in finding.advice


@pytest.mark.parametrize(
    ("text", "is_registry"),
    [
        ("debian", False),
        ("debian:12", False),
        ("ghcr.io", True),
        ("ghcr.io:443", True),
        ("127.0.0.1:5000", True),
        ("localhost", True),
        ("localhost:5000", True),
        ("[::1]:5000", True),
        ("library/debian:12", False),
        ("ghcr.io/a/b", False),
        ("a.b:latest", False),
    ],
)
def test_registries_are_told_from_images(text: str, is_registry: bool) -> None:
    assert is_host(text) == is_registry


def test_registries_and_images_are_asked(cli) -> None:
    with FakeRegistry() as registry:
        digest = registry.add_image("a/b", "1", [small_tar({"x": b""})])
        status, found, _ = cli(f"{registry.host}/a/b:1")
        assert status == 0
        assert digest in found["registry"]["found"]
        status, found, _ = cli(registry.host)
        assert (status, found["registry"]["state"]) == (0, "ok")
        status, found, _ = cli(f"{registry.host}/a/none:1")
        assert (status, found["registry"]["state"]) == (1, "problem")
        gone = registry.host
    status, found, _ = cli(gone)
    assert (status, found["registry"]["state"]) == (1, "problem")
    assert "firewall" in found["registry"]["advice"]


def test_a_login_is_used_and_never_shown(cli, tmp_path: Path) -> None:
    with FakeRegistry(auth="basic", users={"me": SECRET}, anonymous=False) as registry:
        registry.add_image("a/b", "1", [small_tar({"x": b""})])
        reference = f"{registry.host}/a/b:1"
        status, found, _ = cli(reference)
        assert (status, found["registry"]["state"]) == (1, "problem")
        assert "log in" in found["registry"]["advice"]
        # A registry that wants a login is as it should be.
        assert cli(registry.host)[0] == 0
        auth = base64.b64encode(f"me:{SECRET}".encode()).decode()
        (tmp_path / "docker").mkdir()
        (tmp_path / "docker" / "config.json").write_text(
            json.dumps(
                {
                    "auths": {registry.host: {"auth": auth}, "https://index.docker.io/v1/": {}},
                    "credHelpers": {"ecr.example.com": "no-such-helper"},
                }
            )
        )
        status, found, output = cli(reference)
    assert status == 0
    assert f"{registry.host}, docker.io, ecr.example.com" in found["logins"]["found"]
    assert "docker-credential-no-such-helper" in found["logins"]["advice"]
    for secret in (SECRET, auth, "me:"):
        assert secret not in output


def test_a_damaged_file_of_logins_is_a_problem(cli, tmp_path: Path) -> None:
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "config.json").write_text("{")
    status, found, _ = cli()
    assert (status, found["logins"]["state"]) == (1, "problem")


def test_programs_are_named_with_what_they_are_for(tmp_path: Path, monkeypatch) -> None:
    program = tmp_path / "skopeo"
    program.write_text("#!/bin/sh\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = doctor.examine_programs().found
    assert "skopeo" in found.partition(" here")[0]
    absent = [
        name for name in doctor.PROGRAMS if shutil.which(name, path="/usr/sbin:/sbin") is None
    ]
    assert all(name in found for name in absent)


def test_text_gives_advice_on_a_line_of_its_own(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert run(["--store", str(tmp_path / "s"), "doctor", "127.0.0.1:1", "-q"]) == 1
    lines = capsys.readouterr().out.splitlines()
    place = next(n for n, line in enumerate(lines) if line.startswith("problem registry: "))
    assert lines[place + 1].strip().startswith("→ check name, port")
    assert not any(line.startswith("ok ") for line in lines)


@pytest.mark.root
def test_the_store_of_another_user_is_a_problem_for_root(cli, tmp_path: Path) -> None:
    Store.open(tmp_path / "store").close()
    assert cli()[1]["store"]["state"] == "ok"
    before = {path.name for path in (tmp_path / "store").iterdir()}
    os.chown(tmp_path / "store", 65534, -1)
    status, found, _ = cli()
    assert (status, found["store"]["state"]) == (1, "problem")
    assert "user 65534" in found["store"]["advice"]
    assert {path.name for path in (tmp_path / "store").iterdir()} == before
