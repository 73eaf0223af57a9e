"""Running another tool's command with a deadline, and saying what its failure means.

Invariant: no shell, no inherited input; a program that outlives its deadline or its caller is
killed; what it said goes into an error escaped, shortened and without credentials.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from typing import IO, TYPE_CHECKING

from stowray.pipeline.errors import (
    CancelledError,
    DeadlineError,
    NodeError,
    StorageError,
    StowrayError,
    escape,
)
from stowray.pipeline.redact import redact_text
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_POLL_SECONDS = 0.02
_END_SECONDS = 5.0
_SAID_LIMIT = 1 << 20
_SHOWN_LIMIT = 600
# Where Debian and others keep what only root runs.
_MORE_PATH = "/usr/local/sbin:/usr/sbin:/sbin"


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended and what it said."""

    status: int
    output: str
    errors: str

    @property
    def said(self) -> str:
        """The end of what it said, fit to be shown."""
        text = (self.errors.strip() or self.output.strip())[-_SHOWN_LIMIT:]
        return redact_text(" / ".join(line.strip() for line in text.splitlines() if line.strip()))


def find_program(name: str, advice: str) -> str:
    """Return the path of an installed program; NodeError with ``advice`` when there is none."""
    path = os.environ.get("PATH", os.defpath) + ":" + _MORE_PATH
    found = shutil.which(name, path=path)
    if found is None:
        raise NodeError(name, f"not installed on this machine: {advice}")
    return found


def run_program(
    command: Sequence[str],
    *,
    seconds: float,
    cancelled: Callable[[], bool],
    feed: Callable[[int], object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Ended:
    """Run ``command`` to its end; ``feed`` writes its input from a thread.

    A failing program is returned, not raised. DeadlineError, CancelledError, NodeError, and what
    ``feed`` raised unless the program has hung up on it.
    """
    name = os.path.basename(command[0])
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE if feed is not None else subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env={**os.environ, **(environment or {})},
                # Ctrl-C at a terminal is for us, who then end the program in order.
                start_new_session=True,
            )
        except OSError as error:
            raise NodeError(name, f"cannot be run: {error.strerror or error}") from error
        try:
            feeder = _Feeder(process, feed) if feed is not None else None
            _await(process, name, seconds, cancelled)
            if feeder is not None:
                feeder.join()
        except BaseException:
            _end(process)
            raise
        ended = Ended(process.returncode, _read(output), _read(errors))
        if feeder is not None and feeder.error is not None and not feeder.hung_up:
            raise feeder.error
        return ended


def failure(name: str, ended: Ended, doing: str) -> StowrayError:
    """Return the error that a program's failure is to the user."""
    said = ended.said or f"exit status {ended.status}"
    lower = said.lower()
    if "no space left" in lower or "disk quota" in lower:
        return StorageError(name, f"cannot {doing}: its disk is full ({said})")
    if "permission denied" in lower or "operation not permitted" in lower:
        return StorageError(name, f"cannot {doing}: {said} (run as root or as its user)")
    return NodeError(name, f"cannot {doing}: {said}")


class _Feeder:
    """The thread that writes a program's input."""

    def __init__(self, process: subprocess.Popen[bytes], feed: Callable[[int], object]) -> None:
        self.error: StowrayError | None = None
        self.hung_up = False
        self._process = process
        self._feed = feed
        self._thread = threading.Thread(target=self._run, name="deliver", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread; the program has ended, so that no write blocks any more."""
        self._thread.join(_END_SECONDS)

    def _run(self) -> None:
        pipe = self._process.stdin
        if pipe is None:
            return
        try:
            self._feed(pipe.fileno())
        except BrokenPipeError:
            self.hung_up = True  # its exit status and words say why
        except OSError as error:
            self.error = StorageError("pipe", f"cannot be written to: {escape(str(error))}")
        except StowrayError as error:
            self.error = error
            # Its input must not look complete.
            _signal(self._process, signal.SIGKILL)
        finally:
            with contextlib.suppress(OSError):
                pipe.close()


def _await(
    process: subprocess.Popen[bytes], name: str, seconds: float, cancelled: Callable[[], bool]
) -> None:
    give_up = time.monotonic() + seconds
    while True:
        try:
            process.wait(_POLL_SECONDS)
            return
        except subprocess.TimeoutExpired:
            if cancelled():
                raise CancelledError(name) from None
            if time.monotonic() >= give_up:
                raise DeadlineError(name, seconds) from None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and what it started: by request first, so that it can clean up."""
    _signal(process, signal.SIGTERM)
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal the program's process group, which is its own and named by its process ID."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def _read(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _SAID_LIMIT))
    return file.read().decode("utf-8", "replace")
