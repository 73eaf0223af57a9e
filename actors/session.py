"""A warm Ray of one's own that outlives a command: started, found, described and ended.

Invariant: the state file says which processes belong to the session, each with its start time, boot
and pid namespace; only those are ever signalled, and a file that speaks of processes which are gone
counts as no session. Nothing here imports Ray: whether a session is warm is asked by every command.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import stat
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import stowray
from stowray.actors import processes, scratch
from stowray.actors.processes import Process
from stowray.pipeline.clock import Boot
from stowray.pipeline.errors import (
    DeadlineError,
    NodeError,
    StorageError,
    from_wire,
)
from stowray.pipeline.files import read_regular, replace_file, translated
from stowray.pipeline.locks import locked

if TYPE_CHECKING:
    import subprocess
    from contextlib import AbstractContextManager

    from stowray.pipeline.settings import Settings

# Raised whenever what travels between a program and a session's actors changes its meaning.
PROTOCOL = 3
FORMAT = 1
STATE_LIMIT = 1 << 20
START_SECONDS = 60.0
STOP_SECONDS = 10.0
# A session that nobody uses must not hold its memory for ever.
IDLE_SECONDS = 8 * 3600.0
CONNECT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Session:
    """What the state file says; ``host`` is the process that holds all others.

    ``door`` is the path of the socket on which it takes calls for its crew.
    """

    address: str
    token_path: str
    directory: str
    door: str
    version: str
    protocol: int
    python: str
    boot_id: str
    pid_namespace: str
    created: float
    host: Process
    processes: tuple[Process, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the state file's object; the token itself is not in it."""
        return {
            "format": FORMAT,
            "address": self.address,
            "token_path": self.token_path,
            "directory": self.directory,
            "door": self.door,
            "version": self.version,
            "protocol": self.protocol,
            "python": self.python,
            "boot_id": self.boot_id,
            "pid_namespace": self.pid_namespace,
            "created": self.created,
            "host": self.host.to_dict(),
            "processes": [process.to_dict() for process in self.processes],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Session:
        """Return the session that :meth:`to_dict` described; ValueError, KeyError, TypeError."""
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']}")
        return cls(
            address=str(data["address"]),
            token_path=str(data["token_path"]),
            directory=str(data["directory"]),
            door=str(data.get("door", "")),
            version=str(data["version"]),
            protocol=int(data["protocol"]),
            python=str(data["python"]),
            boot_id=str(data["boot_id"]),
            pid_namespace=str(data["pid_namespace"]),
            created=float(data["created"]),
            host=Process.from_dict(data["host"]),
            processes=tuple(Process.from_dict(entry) for entry in data["processes"]),
        )

    @property
    def is_alive(self) -> bool:
        """Return whether the process that holds the session runs, here and in this boot."""
        return self.is_of_this_boot and self.host.is_alive

    @property
    def is_of_this_boot(self) -> bool:
        """Return whether the recorded process numbers mean anything to this process."""
        return (
            self.boot_id == Boot.read().boot_id and self.pid_namespace == processes.pid_namespace()
        )

    @property
    def fits(self) -> bool:
        """Return whether this program and the session's actors are of one make."""
        return (
            self.version == stowray.__version__
            and self.protocol == PROTOCOL
            and self.python == sys.executable
        )


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """``dead`` means that a state file speaks of a session that has ended without saying so."""

    state: Literal["running", "dead", "none"]
    detail: str
    session: Session | None = None

    @property
    def running(self) -> bool:
        """Return whether there is a session that answers."""
        return self.state == "running"

    def sentence(self) -> str:
        """Return the state for a human."""
        word = {"running": "a session runs", "dead": "the session is dead", "none": "no session"}
        return f"{word[self.state]}: {self.detail}"

    def to_dict(self) -> dict[str, Any]:
        """Return the answer of ``session status`` as plain data."""
        session = self.session
        return {
            "state": self.state,
            "detail": self.detail,
            "address": session.address if session else None,
            "pid": session.host.pid if session else None,
            "version": session.version if session else None,
            "created": session.created if session else None,
        }


def state_folder() -> Path:
    """Return this user's folder for the session's state file.

    ``$XDG_RUNTIME_DIR/stowray``, else ``stowray`` in ``$XDG_STATE_HOME`` (``~/.local/state``).
    A file that outlives a reboot does no harm: it names the boot that it speaks of.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime:
        return Path(runtime) / "stowray"
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if state else Path.home() / ".local" / "state") / "stowray"


def state_path(folder: Path) -> Path:
    """Return where the state of this host's session is kept."""
    return _path(folder, "json")


def door_path(folder: Path) -> Path:
    """Return where the host of this host's session listens."""
    return _path(folder, "door")


def find_session(folder: Path) -> Session | None:
    """Return what the state file says, None when there is none or it cannot be believed."""
    try:
        if not _is_private(folder):
            # Whoever else may write there could lead us to a Ray of theirs.
            return None
        data = json.loads(read_regular(state_path(folder), STATE_LIMIT))
        return Session.from_dict(data)
    except (OSError, StorageError, ValueError, KeyError, TypeError, RecursionError):
        # A half-made or foreign file is no session; start replaces it.
        return None


def is_warm(_settings: Settings) -> bool:
    """Return whether this user's session on this node can take a pull now, of any store."""
    return warm_session() is not None


def warm_session() -> Session | None:
    """Return this user's session on this node if it can take a pull now."""
    session = find_session(state_folder())
    return session if session is not None and session.fits and session.is_alive else None


def status(_settings: Settings) -> SessionStatus:
    """Describe this user's session; touches nothing."""
    return _status(state_folder())


def start(
    settings: Settings, *, seconds: float = START_SECONDS, idle_seconds: float = IDLE_SECONDS
) -> SessionStatus:
    """Start a session and return once its crew is warm; one that runs already is kept.

    It ends by itself when it has had nothing to do for ``idle_seconds``.
    Raises NodeError when it does not come up, DeadlineError when not in time; nothing of it is
    left running then.
    """
    folder = state_folder()
    with translated(folder, "make the session's folder"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(folder):
            raise StorageError(
                str(folder), "others may write there: remove it, or set XDG_RUNTIME_DIR"
            )
    with _alone(folder):
        known = _status(folder)
        if known.running and known.session is not None and known.session.fits:
            return known
        if known.session is not None:
            _end(known.session)
        _launch(settings, folder, seconds, idle_seconds)
        return _status(folder)


def stop(_settings: Settings) -> SessionStatus:
    """End the session's processes, those and no others."""
    folder = state_folder()
    if not folder.is_dir():
        return SessionStatus("none", "there was none")
    with _alone(folder):
        session = find_session(folder)
        if session is None:
            return SessionStatus("none", "there was none")
        was_alive = session.is_alive
        _end(session)
        with contextlib.suppress(FileNotFoundError):
            state_path(folder).unlink()
    detail = f"process {session.host.pid} ended" if was_alive else "it had ended already"
    return SessionStatus("none", detail)


def _status(folder: Path) -> SessionStatus:
    session = find_session(folder)
    if session is None:
        return SessionStatus("none", "none was started")
    if not session.is_alive:
        return SessionStatus("dead", f"its process {session.host.pid} is gone", session)
    if not _answers(session.address):
        return SessionStatus("dead", f"nothing answers at {session.address}", session)
    if not session.fits:
        return SessionStatus(
            "running", f"of stowray {session.version}: stop and start it to use it", session
        )
    return SessionStatus("running", f"at {session.address}, process {session.host.pid}", session)


def _alone(folder: Path) -> AbstractContextManager[None]:
    """Keep other starts and stops out."""
    return locked(_path(folder, "lock"), what="the session", wait_seconds=2 * START_SECONDS)


def write_state(folder: Path, session: Session) -> None:
    """Put the state file in its place, readable for its owner only."""
    path = state_path(folder)
    with translated(path, "write the session's state"):
        replace_file(path, json.dumps(session.to_dict(), indent=1).encode(), mode=0o600)


def remove_state(folder: Path, host: Process) -> None:
    """Remove the state file if it is the one of ``host``."""
    session = find_session(folder)
    if session is not None and session.host == host:
        with contextlib.suppress(FileNotFoundError):
            state_path(folder).unlink()


def _end(session: Session) -> None:
    if not session.is_of_this_boot:
        # After a reboot, or from another container, the numbers name strangers.
        return
    members = dict.fromkeys(session.processes)
    if session.host.is_alive:
        members |= dict.fromkeys(processes.descendants(session.host.pid))
        session.host.send(signal.SIGTERM)
        # It ends its Ray in order, which takes a second or two.
        processes.wait_gone([session.host], STOP_SECONDS)
    left = processes.end([session.host, *members], grace_seconds=1.0)
    if left:
        numbers = ", ".join(str(process.pid) for process in left)
        raise NodeError("session", f"processes {numbers} do not end")
    with contextlib.suppress(ChildProcessError):
        # Only where the same process started it: leave no zombie.
        os.waitpid(session.host.pid, os.WNOHANG)
    scratch.sweep(Path(session.directory).parent)


def _launch(settings: Settings, folder: Path, seconds: float, idle_seconds: float) -> None:
    import subprocess

    log = _path(folder, "log")
    with translated(log, "write the session's log"):
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    try:
        host = subprocess.Popen(
            # -P: a module of the user's working directory must not be imported in place of ours.
            [sys.executable, "-P", "-m", "stowray.actors.session_host"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=descriptor,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise NodeError("session", f"cannot start: {error}") from error
    finally:
        os.close(descriptor)
    config = {
        "folder": str(folder),
        "node": settings.node_name,
        "unpackers": settings.worker_count(),
        "idle_seconds": idle_seconds,
    }
    try:
        answer = _converse(host, json.dumps(config).encode(), seconds)
    except BaseException:
        # Not waited for yet, so that the number is still its own.
        started = Process.find(host.pid)
        if started is not None:
            processes.end([started, *processes.descendants(host.pid)], grace_seconds=1.0)
        host.wait()
        raise
    if not answer.get("ready"):
        host.wait()
        told = answer.get("error")
        if told:
            raise from_wire(*told)
        raise NodeError("session", f"ended while starting; see {log}")
    # It belongs to nobody now: this process must not wait for it.
    host.returncode = 0


def _converse(host: subprocess.Popen[bytes], config: bytes, seconds: float) -> dict[str, Any]:
    """Send the configuration, return the host's one line; an empty object when it ended."""
    stdin, stdout = host.stdin, host.stdout
    if stdin is None or stdout is None:
        raise NodeError("session", "no pipes to its process")
    with stdin, stdout:
        with contextlib.suppress(BrokenPipeError):
            stdin.write(config)
            stdin.close()
        deadline = time.monotonic() + seconds
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise DeadlineError("starting the session", seconds)
            piece = os.read(stdout.fileno(), 1 << 16)
            if not piece:
                return {}
            line += piece
    try:
        answer = json.loads(line)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError, OverflowError):
        return False
    return True


def _is_private(folder: Path) -> bool:
    found = folder.lstat()
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.geteuid()
        and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


def _path(folder: Path, suffix: str) -> Path:
    # A home directory may be mounted on several hosts, each with a session of its own.
    host = re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname()) or "localhost"
    return folder / f"session-{host}.{suffix}"
