"""What docs/registries.md tells of files, settings and options is what the program understands."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stowray.cli.app import cli
from stowray.pipeline.credentials import Credentials
from stowray.pipeline.hosts_toml import parse_hosts
from stowray.pipeline.policy_json import parse_policy
from stowray.pipeline.reference import Reference
from stowray.pipeline.registries_conf import load
from stowray.pipeline.settings import RegistrySettings, load_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = (Path(__file__).parents[2] / "docs" / "registries.md").read_text(encoding="utf-8")
KNOWN = {field.name for field in fields(RegistrySettings)}
FENCE = re.compile(r"```(\w+)[^\n]*\n(.*?)```", re.DOTALL)
KEYS_ELSEWHERE = {"skip_verify", "override_path", "dial_timeout"}


def blocks(language: str, told_by: str) -> Iterator[str]:
    """Yield the blocks whose paragraph above names the kind of file."""
    for found in FENCE.finditer(PAGE):
        paragraph = PAGE[: found.start()].rstrip().rpartition("\n\n")[2]
        if found[1] == language and told_by in " ".join(paragraph.split()):
            yield found[2]


def test_settings_files_are_loaded_and_the_defaults_are_these(tmp_path: Path) -> None:
    found = list(blocks("toml", "settings file"))
    assert len(found) == 2
    path = tmp_path / "settings.toml"
    for text in found:
        path.write_text(text)
        load_settings(config=str(path))
    told = tomllib.loads(found[0])["registry"]
    assert told == {name: getattr(RegistrySettings(), name) for name in told}


def test_every_setting_and_option_that_is_named_exists() -> None:
    prose = FENCE.sub("", PAGE)
    named = {word.partition(" ")[0] for word in re.findall(r"`([a-z_]+(?: = [^`]+)?)`", prose)}
    settings = {word for word in named if "_" in word} - KEYS_ELSEWHERE
    assert settings <= KNOWN, settings - KNOWN
    assert {name for name in KNOWN if not re.search(rf"(`|^){name}\b", PAGE, re.MULTILINE)} == set()
    options = set(re.findall(r"`(--[a-z-]+)", prose))
    known = {name for option in cli.params for name in option.opts}
    assert options
    assert options <= known


def test_a_file_of_hosts() -> None:
    (text,) = blocks("toml", "A `hosts.toml`:")
    found = parse_hosts(text, Path("/etc/hosts.d/registry.example"))
    assert [host.address for host in found.hosts] == ["mirror.example:5443", "cache.example"]
    first = found.hosts[0].connection
    assert (first.connect_seconds, first.proxy) == (2.0, "http://proxy.example:3128")
    assert found.hosts[1].path == "/v2/hub"


def test_a_registries_conf(tmp_path: Path) -> None:
    (text,) = blocks("toml", "A `registries.conf`:")
    (tmp_path / "registries.conf").write_text(text)
    conf = load(str(tmp_path / "registries.conf"), {})
    team = conf.find(Reference.parse("registry.example/team/app:1"))
    assert team is not None
    assert len(team.mirrors) == 1
    old = conf.find(Reference.parse("old.example/app:1"))
    assert old is not None
    assert old.blocked


def test_a_file_of_logins(tmp_path: Path) -> None:
    (text,) = blocks("json", "An `auth.json`:")
    (tmp_path / "auth.json").write_text(text)
    logins = Credentials({}, str(tmp_path / "auth.json"))
    for repository, name in (("other", "name"), ("team/app", "other")):
        found = logins.find("registry.example", repository)
        assert found is not None
        assert found.username == name
    assert list(json.loads(text)) == ["auths", "credHelpers"]


@pytest.mark.parametrize(
    ("name", "requirement"),
    [("registry.example/app", "insecureAcceptAnything"), ("other.example/app", "reject")],
)
def test_a_policy(name: str, requirement: str) -> None:
    (text,) = blocks("json", "policy.json")
    policy = parse_policy(text.encode(), "policy.json")
    assert policy.requirements(Reference.parse(name))[1] == (requirement,)
