from __future__ import annotations

import dataclasses
import os
import socket
import tomllib
from pathlib import Path

import pytest

from stowray.pipeline.errors import UsageError
from stowray.pipeline.settings import Settings, load_settings

DEFAULT = Path(__file__).parents[2] / "configs" / "default.toml"


def test_the_default_file_lists_every_key_with_its_default() -> None:
    document = tomllib.loads(DEFAULT.read_text())
    expected = dataclasses.asdict(Settings())
    expected["registry"]["plain_http"] = list(expected["registry"]["plain_http"])
    assert document == expected
    assert load_settings(config=str(DEFAULT)) == Settings()


def test_every_key_of_the_default_file_is_explained() -> None:
    lines = DEFAULT.read_text().splitlines()
    for number, line in enumerate(lines):
        if "=" in line and not line.startswith("#"):
            above = number - 1
            while "=" in lines[above] and not lines[above].startswith("#"):
                above -= 1
            assert lines[above].startswith("#"), f"{line!r} has no comment"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        pytest.param("stores = 'x'", "stores", id="unknown key"),
        pytest.param("[registry]\nattempts = 'six'", "registry.attempts", id="wrong type"),
        pytest.param("[registry]\nattempts = true", "registry.attempts", id="bool is no number"),
        pytest.param("[registry]\nattempts = -1", "registry.attempts", id="negative"),
        pytest.param(
            "[registry]\nconnect_timeout_seconds = nan",
            "registry.connect_timeout_seconds",
            id="no number",
        ),
        pytest.param(
            "[registry]\nstall_timeout_seconds = inf", "registry.stall_timeout", id="endless"
        ),
        pytest.param(
            "[registry]\nstall_timeout_seconds = 0", "registry.stall_timeout", id="no time"
        ),
        pytest.param("[unpack]\nworkers = 100000", "unpack.workers", id="too many processes"),
        pytest.param("[registry]\nplain_http = ['http://a']", "http://a", id="a URL for a host"),
        pytest.param("[registry]\nplain_http = ['']", "registry.plain_http", id="an empty host"),
        pytest.param("registry = 1", "registry", id="section is no table"),
        pytest.param("engine = 'fast'", "engine", id="unknown choice"),
        pytest.param("[registry]\nplain_http = 'host'", "registry.plain_http", id="no list"),
        pytest.param("engine = ", "TOML", id="not TOML"),
        pytest.param(f"engine = {'[' * 5000}", "TOML", id="nested too deeply"),
        pytest.param(
            f"[registry]\ndeadline_seconds = 1{'0' * 400}", "64 bits", id="larger than a float"
        ),
    ],
)
def test_a_bad_setting_is_named(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_settings(config=str(file))
    assert named in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        load_settings(config=str(tmp_path / "none.toml"))


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    logins = tmp_path / "auth.json"
    logins.touch()
    file.write_text(f"store = '/a'\n[registry]\nauthfile = '{logins}'\nattempts = 3\n")
    settings = load_settings(
        config=str(file), overrides={"store": "/b", "authfile": "", "platform": "linux/arm64"}
    )
    assert settings.store == "/b"
    assert settings.registry.authfile == str(logins)
    assert settings.registry.attempts == 3
    assert settings.resolve.platform == "linux/arm64"


def test_paths_hold_in_any_directory(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(
        "[registry]\nca_file = 'ca.pem'\npolicy_file = 'system'\nregistries_conf = '~/r.conf'\n"
    )
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    registry = load_settings(config=str(file), overrides={"hosts_dir": "hosts"}).registry
    assert registry.ca_file == str(tmp_path / "ca.pem")
    assert registry.hosts_dir == str(tmp_path / "hosts")
    assert registry.registries_conf == "/home/me/r.conf"
    assert (registry.policy_file, registry.authfile) == ("system", "")


def test_the_store_path_takes_the_node_name_and_the_environment(monkeypatch) -> None:
    assert Settings(store="/s/{node}", node="n7").store_path() == Path("/s/n7")
    monkeypatch.setenv("STOWRAY_STORE", "/e")
    assert Settings().store_path() == Path("/e")
    assert Settings(store="/s").store_path() == Path("/s")
    monkeypatch.delenv("STOWRAY_STORE")
    monkeypatch.setenv("XDG_DATA_HOME", "/x")
    expected = "/var/lib/stowray" if os.geteuid() == 0 else "/x/stowray"
    assert Settings().store_path() == Path(expected)


def test_a_node_is_called_as_configured_else_as_its_environment_says(monkeypatch) -> None:
    monkeypatch.setenv("STOWRAY_NODE", "n8")
    assert Settings().node_name == "n8"
    assert Settings(store="/s/{node}").store_path() == Path("/s/n8")
    assert Settings(node="n7").node_name == "n7"
    monkeypatch.delenv("STOWRAY_NODE")
    assert Settings().node_name == socket.gethostname()


@pytest.mark.parametrize(
    "store", ["~no-such-user/x", b"/s/\xe9".decode("utf-8", "surrogateescape")]
)
def test_a_store_that_cannot_be_named_is_a_usage_error(store: str) -> None:
    with pytest.raises(UsageError):
        Settings(store=store).store_path()


@pytest.mark.parametrize("host", ["a", "a.example:5000", "10.0.0.1", "[::1]:5000", "[fe80::1]"])
def test_hosts_without_tls(host: str) -> None:
    assert load_settings(overrides={"plain_http": [host]}).registry.plain_http == (host,)
