from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from stowray.display import LiveView, Pace, lively
from stowray.pipeline.progress import Event
from tests.support.registry import FakeRegistry
from tests.support.small import small_tar

if TYPE_CHECKING:
    from pathlib import Path

NAME = "docker.io/library/debian:12"
DIGEST = "sha256:" + "ab" * 32


def picture(width: int, *events: Event) -> list[str]:
    view = LiveView(io.StringIO())
    for event in events:
        view._events[event.key] = event
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(view.render(width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def at_work(current: int, status: str = "downloading") -> Event:
    return Event(
        12.0, NAME, "n", DIGEST, "blob", status, current, 100 << 20, started=0.0, begun=10.0
    )


RESOLVED = Event(1.0, NAME, "n", NAME, "resolve", "resolved", started=0.5, completed=1.0)


@pytest.mark.parametrize("width", [40, 60, 80, 160])
def test_a_picture_keeps_to_its_terminal(width: int) -> None:
    lines = picture(width, RESOLVED, at_work(50 << 20))
    assert len(lines) == 2
    assert all(len(line) <= width for line in lines)
    assert lines[0].startswith("debian:12")
    assert "abababababab" in lines[1]
    assert ("50.0 MiB / 100.0 MiB" in lines[1]) is (width >= 60)
    # Two seconds at work, ten in a queue.
    assert ("25.0 MiB/s" in lines[1]) is (width >= 80)


@pytest.mark.parametrize("width", [40, 80])
def test_a_long_name_leaves_room_for_how_far_it_is(width: int) -> None:
    name = "registry.example:5000/team/some/long/name/application:2026.11-release"
    work = replace(at_work(50 << 20), reference=name)
    (line, _) = picture(width, replace(RESOLVED, reference=name), work)
    assert len(line) <= width
    assert line.startswith("…")
    assert line.endswith("2026.11-release  pulling  50%")
    done = Event(9.0, name, "n", name, "image", "done", started=0.5, completed=9.0)
    (line,) = picture(40, work, done)
    assert line.startswith("…")
    assert line.endswith("2026.11-release  done  9.00 s")
    assert len(line) <= 40


def test_names_cannot_steer_the_terminal() -> None:
    lines = picture(80, Event(1.0, "oci:/\x1b[2J", "n", "x", "resolve", "resolving"))
    assert "\x1b" not in "".join(lines)
    assert "\\x1b[2J" in lines[0]


def test_an_image_that_ended_is_one_line() -> None:
    done = Event(9.0, NAME, "n", NAME, "image", "done", started=0.5, completed=9.0)
    assert len(picture(80, RESOLVED, at_work(1), done)) == 1


def test_the_rest_is_guessed_from_the_last_seconds() -> None:
    pace = Pace()
    pace.note(0.0, 0)
    assert pace.seconds_for(10) is None
    for second in range(1, 20):
        pace.note(float(second), 100 * second)
    for second in range(20, 40):
        pace.note(float(second), 2000 + 10 * (second - 20))
    assert pace.seconds_for(100) == 10.0


@pytest.mark.parametrize(
    ("variables", "is_lively"), [({}, True), ({"CI": "true"}, False), ({"TERM": "dumb"}, False)]
)
def test_only_a_terminal_is_drawn_on(
    variables: dict[str, str], is_lively: bool, monkeypatch
) -> None:
    for name in ("CI", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    main, side = pty.openpty()
    with open(main, "rb"), open(side, "w") as terminal:
        assert lively(terminal) is is_lively
    assert not lively(io.StringIO())


@pytest.mark.parametrize("colours", [True, False])
def test_no_color_leaves_no_colours(tmp_path: Path, colours: bool) -> None:
    main, side = pty.openpty()
    with FakeRegistry() as registry:
        registry.add_image("a/b", "1", [small_tar({"a": b"1"})])
        name = f"{registry.host}/a/b:1"
        environment = {"PATH": os.environ["PATH"], "TERM": "xterm-256color", "COLUMNS": "80"}
        if not colours:
            environment["NO_COLOR"] = "1"
        words = ["--store", str(tmp_path / "s"), "--engine", "local", "pull", name]
        with open(side, "wb", buffering=0) as terminal:
            subprocess.run(
                [sys.executable, "-m", "stowray", *words],
                stderr=terminal,
                stdout=subprocess.DEVNULL,
                env=environment,
                check=True,
                timeout=120,
            )
    with open(main, "rb", buffering=0) as seen:
        shown = seen.read(1 << 16)
    assert b"done" in shown
    assert (b"\x1b[32m" in shown) is colours


@pytest.mark.parametrize("count", [1, 2])
def test_an_answer_goes_where_it_should_beside_a_live_view(tmp_path: Path, count: int) -> None:
    """As in ``D=$(stowray pull …)`` at a prompt: the view is the terminal's, the answer is not."""
    main, side = pty.openpty()
    with FakeRegistry() as registry:
        names = []
        for number in range(count):
            registry.add_image("a/b", str(number), [small_tar({"a": b"1" * (number + 1)})])
            names.append(f"{registry.host}/a/b:{number}")
        words = ["--store", str(tmp_path / "s"), "--engine", "local", "--json", "pull", *names]
        with open(side, "wb", buffering=0) as terminal:
            done = subprocess.run(
                [sys.executable, "-m", "stowray", *words],
                stderr=terminal,
                stdout=subprocess.PIPE,
                env={"PATH": os.environ["PATH"], "TERM": "xterm-256color"},
                check=True,
                timeout=120,
            )
    with open(main, "rb", buffering=0) as seen:
        shown = seen.read(1 << 16)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["reference"] for answer in answers] == names
    # The terminal has its cursor back.
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l") >= 0
