"""Completion as it is typed: a shell at a terminal, the tab key, and what stands there then."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.engine import PullOptions
from stowray.pipeline.source import parse_source
from tests.support.registry import FakeRegistry
from tests.support.small import local_engine, small_tar

if TYPE_CHECKING:
    from collections.abc import Iterator

SECONDS = 60.0
PROMPT = "READY:"
_ESCAPES = re.compile(
    r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[()].|[=>78]|P[^\x1b]*\x1b\\)"
)

# In two parts, so that what is typed is not taken for the prompt.
_PS1 = f'PS1="{PROMPT[:3]}""{PROMPT[3:]} "'
SHELLS = {
    "bash": (
        ["bash", "--norc", "--noprofile", "-i"],
        ['eval "$(stowray completion bash)"', _PS1],
    ),
    "zsh": (
        ["zsh", "-f", "-i"],
        ["autoload -U compinit", "compinit -u -D", 'eval "$(stowray completion zsh)"', _PS1],
    ),
    "fish": (
        ["fish", "--no-config", "-i"],
        [
            "stowray completion fish | source",
            f"function fish_prompt; echo -n {PROMPT[:3]}''{PROMPT[3:]}' '; end",
        ],
    ),
}


class Terminal:
    """A shell with a terminal of its own."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.seen = ""
        self._master, theirs = pty.openpty()
        self._process = subprocess.Popen(
            ["setsid", "--ctty", *command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            cwd=environment["HOME"],
        )
        os.close(theirs)

    def type(self, text: str) -> None:
        """Type ``text``; what was seen before is forgotten."""
        self.seen = ""
        os.write(self._master, text.encode())

    def until(self, pattern: str) -> str:
        """Wait until something stands on the screen."""
        deadline = time.monotonic() + SECONDS
        while not re.search(pattern, self.text):
            left = deadline - time.monotonic()
            assert left > 0, f"never seen: {pattern!r} in {self.text!r}"
            if select.select([self._master], [], [], min(left, 1.0))[0]:
                data = os.read(self._master, 65536).decode(errors="replace")
                self.seen += data
                # A terminal answers who it is (primary device attributes) and where its cursor is.
                if "\x1b[c" in data or "\x1b[0c" in data:
                    os.write(self._master, b"\x1b[?62;c")
                if "\x1b[6n" in data:
                    os.write(self._master, b"\x1b[1;1R")
        return self.text

    @property
    def text(self) -> str:
        return _ESCAPES.sub("", self.seen)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._master)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    with FakeRegistry() as registry, local_engine(folder / "store") as engine:
        registry.add_image("a/b", "1", [small_tar({"x": b""})])
        engine.pull(parse_source(f"{registry.host}/a/b:1"), PullOptions())
        (folder / "host").write_text(registry.host)
    return folder


@pytest.fixture(params=list(SHELLS))
def terminal(request: pytest.FixtureRequest, store: Path) -> Iterator[Terminal]:
    command, setup = SHELLS[request.param]
    if shutil.which(command[0]) is None:
        pytest.skip(f"not installed: {command[0]} (make deps)")
    terminal = Terminal(
        command,
        {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(store),
            "XDG_CONFIG_HOME": str(store / "config"),
            "XDG_DATA_HOME": str(store / "data"),
            "STOWRAY_STORE": str(store / "store"),
            "TERM": "xterm",
            "COLUMNS": "200",
            "LINES": "40",
        },
    )
    try:
        terminal.type("; ".join(setup) + "\n")
        terminal.until(PROMPT)
        yield terminal
    finally:
        terminal.close()


def test_the_tab_key_completes_commands_options_and_references(
    terminal: Terminal, store: Path
) -> None:
    host = (store / "host").read_text()
    terminal.type("stowray unpi\t")
    terminal.until(r"stowray unpin ")
    # Its only reference, after a colon as well.
    terminal.type(f"{host[:-1]}\t")
    terminal.until(rf"{re.escape(host)}/a/b:1")
    terminal.type("\x15")  # the line is taken back
    terminal.type("stowray pull --polic\t")
    terminal.until(r"--policy")
    terminal.type(" alw\t")
    terminal.until(r"always")
