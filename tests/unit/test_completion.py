from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stowray.cli.app import COMMANDS
from stowray.cli.complete import SHELLS
from stowray.pipeline.engine import PullOptions
from stowray.pipeline.source import parse_source
from tests.support.registry import FakeRegistry
from tests.support.small import local_engine, small_tar

PROGRAMS = Path(sys.executable).parent
BASH = r"""
eval "$(stowray completion bash)"
# Only inside of a real completion; what it would set is told.
compopt() { COMPREPLY=("<$2>"); }
COMP_LINE="$1" COMP_POINT=${#1} COMP_WORDBREAKS="$2" COMPREPLY=()
_stowray_completion stowray
printf '%s\n' "${COMPREPLY[@]}"
"""
BREAKS = " \t\n\"'><=;|&(:"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """A store with an image whose reference has two colons."""
    folder = tmp_path_factory.mktemp("completion")
    with FakeRegistry() as registry, local_engine(folder / "store") as engine:
        registry.add_image("a/b", "1", [small_tar({"x": b""})])
        engine.pull(parse_source(f"{registry.host}/a/b:1"), PullOptions())
        (folder / "host").write_text(registry.host)
    return folder


def environment(store: Path) -> dict[str, str]:
    return {
        "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
        "HOME": str(store),
        "STOWRAY_STORE": str(store / "store"),
    }


def in_bash(store: Path, line: str, breaks: str = BREAKS) -> list[str]:
    answer = subprocess.run(
        ["bash", "--norc", "-c", BASH, "bash", line, breaks],
        env=environment(store),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert answer.stderr == ""
    return answer.stdout.split()


def test_commands_and_options(store: Path) -> None:
    assert in_bash(store, "stowray ") == list(COMMANDS)
    assert in_bash(store, "stowray ver") == ["verify"]
    assert "--policy" in in_bash(store, "stowray pull --p")
    assert in_bash(store, "stowray pull --policy ") == ["newer", "missing", "always", "never"]
    assert in_bash(store, "stowray --progress=t") == ["tty"]
    assert in_bash(store, "stowray completion ") == list(SHELLS)


def test_references_of_the_store(store: Path) -> None:
    host = (store / "host").read_text()
    reference = f"{host}/a/b:1"
    for line in ("stowray rm ", "stowray -q mount ", "stowray pull --policy never x "):
        assert in_bash(store, line) == [reference]
    # Bash replaces only what stands after the last colon, unless told not to break there.
    assert in_bash(store, f"stowray rm {host[:-2]}") == [reference.partition(":")[2]]
    assert in_bash(store, f"stowray rm {reference[:-1]}") == ["1"]
    assert in_bash(store, f"stowray rm {reference[:-1]}", breaks=" \t\n") == [reference]
    assert in_bash(store, "stowray rm other") == []


def test_files_and_directories_are_left_to_the_shell(store: Path) -> None:
    assert in_bash(store, "stowray --store ") == ["<dirnames>"]
    assert in_bash(store, "stowray --authfile ") == ["<default>"]
    assert in_bash(store, "stowray rootfs x ") == ["<dirnames>"]
    assert in_bash(store, "stowray trace ") == ["<default>"]


def test_a_missing_or_foreign_store_offers_nothing_and_says_nothing(store: Path) -> None:
    assert in_bash(store, "stowray --store /nowhere rm ") == []
    assert in_bash(store, f"stowray --store {store} rm ") == []
    assert sorted(path.name for path in store.iterdir()) == ["host", "store"]


@pytest.mark.skipif(shutil.which("fish") is None, reason="not installed: fish (make deps)")
def test_fish(store: Path) -> None:
    def complete(line: str) -> list[str]:
        code = "stowray completion fish | source; complete -C $argv[1]"
        answer = subprocess.run(
            ["fish", "--no-config", "-c", code, line],
            env=environment(store),
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return answer.stdout.splitlines()

    assert complete("stowray pul") == [f"pull\t{COMMANDS['pull'][1].replace(',', ';')}"]
    host = (store / "host").read_text()
    assert complete(f"stowray rm {host}") == [f"{host}/a/b:1"]
    assert sorted(complete("stowray pull --policy n")) == ["never", "newer"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="not installed: zsh (make deps)")
def test_zsh_reads_the_code(store: Path) -> None:
    code = 'autoload -U compinit; compinit -u -D; eval "$(stowray completion zsh)"; '
    code += "print ${_comps[stowray]}"
    answer = subprocess.run(
        ["zsh", "-f", "-c", code],
        env=environment(store),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert answer.stdout == "_stowray_completion\n"
