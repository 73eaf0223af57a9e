"""Runs the `stowray` command as a user does: a process of its own, judged by what it prints.

Invariant: no setting, credential or session of the machine reaches the command, only what the test
gives it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = Path(sys.executable).parent / "stowray"
COMMAND_SECONDS = float(os.environ.get("STOWRAY_TEST_COMMAND_SECONDS", "120"))
Json = dict[str, Any]
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "TMPDIR")


@dataclass(frozen=True)
class Answer:
    """What a finished command gave."""

    status: int
    stdout: bytes
    stderr: str

    @property
    def text(self) -> str:
        return self.stdout.decode()

    @property
    def lines(self) -> list[Json]:
        return [json.loads(line) for line in self.text.splitlines()]

    @property
    def json(self) -> Json:
        (line,) = self.lines
        return line


class Stowray:
    """The command with one store and one engine."""

    def __init__(self, store: Path, home: Path, engine: str = "local") -> None:
        self.store = store
        self.home = home
        self.engine = engine

    def environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        kept["PATH"] = kept.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"
        return {
            **kept,
            "HOME": str(self.home),
            "DOCKER_CONFIG": str(self.home / "no-docker"),
            "XDG_RUNTIME_DIR": str(self.home),
            "XDG_DATA_HOME": str(self.home / "data"),
            "XDG_CONFIG_HOME": str(self.home / "config"),
            "XDG_CACHE_HOME": str(self.home / "cache"),
            "XDG_STATE_HOME": str(self.home / "state"),
            "STOWRAY_STORE": str(self.store),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
        }

    def command(self, name: str, *arguments: str | Path) -> list[str]:
        common = [] if name in ("session", "demo") else ["--engine", self.engine]
        return [str(PROGRAM), *common, "--progress", "none", name, *map(str, arguments)]

    def attempt(
        self,
        name: str,
        *arguments: str | Path,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        seconds: float = COMMAND_SECONDS,
    ) -> Answer:
        """Run a command to its end, whatever that is; one that hangs tells where."""
        process = subprocess.Popen(
            self.command(name, *arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd or self.home,
            env={**self.environment(), **(env or {})},
        )
        try:
            stdout, stderr = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # the fault handler writes every thread's stack
            stdout, stderr = process.communicate()
            stacks = stderr.decode(errors="replace")[-8000:]
            raise AssertionError(f"stowray {name} hangs after {seconds} s:\n{stacks}") from None
        return Answer(process.returncode, stdout, stderr.decode(errors="replace"))

    def run(self, name: str, *arguments: str | Path, cwd: Path | None = None) -> Answer:
        """Run a command that must succeed."""
        answer = self.attempt(name, *arguments, cwd=cwd)
        if answer.status:
            raise AssertionError(
                f"stowray {name} {' '.join(map(str, arguments))}: exit {answer.status}\n"
                f"{answer.text}\n{answer.stderr[-4000:]}"
            )
        return answer

    def pull(self, reference: str, *arguments: str) -> Json:
        return self.run("pull", "--json", *arguments, reference).json

    @contextlib.contextmanager
    def running(self, name: str, *arguments: str | Path) -> Iterator[subprocess.Popen[bytes]]:
        """Start a command in a process group of its own; what is left at the end is killed."""
        process = subprocess.Popen(
            self.command(name, *arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.home,
            env=self.environment(),
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()

    def blobs(self) -> set[str]:
        """Digests of the committed blobs."""
        return {f"sha256:{path.name}" for path in (self.store / "blobs" / "sha256").glob("*")}
