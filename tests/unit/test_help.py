from __future__ import annotations

import shlex
from itertools import takewhile

import click
import pytest

from stowray.cli.app import COMMANDS, cli, run
from stowray.cli.help import EXAMPLES, GROUPS, HelpfulCommand


def shown(capsys, monkeypatch, *arguments: str, columns: int = 80) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert run([*arguments, "--help"]) == 0
    return capsys.readouterr().out


def test_every_command_is_in_one_group_and_listed_once(capsys, monkeypatch) -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(COMMANDS)
    listed = [line.split()[0] for line in shown(capsys, monkeypatch).splitlines() if line.strip()]
    for name in COMMANDS:
        assert listed.count(name) == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_80_columns_and_begins_with_what_is_the_commands_own(
    name: str, capsys, monkeypatch
) -> None:
    text = shown(capsys, monkeypatch, name)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "Examples:" in text
    assert text.index("-h, --help") < text.index("Options of every command:")
    common = text.partition("Options of every command:")[2]
    assert "--store" in common
    assert "--json" in common


def parse(words: list[str]) -> click.Context:
    """What click makes of a command line, without carrying it out."""
    context = click.Context(cli, info_name="stowray")
    command = cli.get_command(context, words[0])
    assert isinstance(command, HelpfulCommand)
    return command.make_context(words[0], words[1:], parent=context)


@pytest.mark.parametrize(
    "line", [line for lines in EXAMPLES.values() for line in lines if "stowray" in line]
)
def test_examples_are_commands_that_exist(line: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("before.run", "after.run"):
        (tmp_path / name).touch()
    words = shlex.split(line.replace('"$(', " ").replace(')"', " "))
    while "stowray" in words:
        words = words[words.index("stowray") + 1 :]
        own = list(takewhile(lambda word: word not in ("|", "&&", ">"), words))
        assert parse(own).command.name == own[0]
