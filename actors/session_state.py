"""What is known of a session from its state file, and where that lies.

Invariant: the file says which processes belong to the session, each with its start time, boot and
pid namespace; one that speaks of processes which are gone counts as no session. Nothing here
imports Ray: whether a session is warm is asked by every command.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import stowray
from stowray.actors import processes
from stowray.actors.processes import Process
from stowray.pipeline.clock import Boot
from stowray.pipeline.errors import StorageError
from stowray.pipeline.files import read_regular, replace_file, translated

if TYPE_CHECKING:
    from stowray.pipeline.settings import Settings

# Raised whenever what travels between a program and a session's actors changes its meaning.
PROTOCOL = 3
FORMAT = 1
STATE_LIMIT = 1 << 20


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
    return file_of(folder, "json")


def door_path(folder: Path) -> Path:
    """Return where the host of this host's session listens."""
    return file_of(folder, "door")


def find_session(folder: Path) -> Session | None:
    """Return what the state file says, None when there is none or it cannot be believed."""
    try:
        if not is_private(folder):
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


def is_private(folder: Path) -> bool:
    """Tell whether nobody but this user can write in ``folder``."""
    found = folder.lstat()
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.geteuid()
        and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


def file_of(folder: Path, suffix: str) -> Path:
    """Return this host's file of a kind."""
    # A home directory may be mounted on several hosts, each with a session of its own.
    host = re.sub(r"[^A-Za-z0-9.-]", "_", socket.gethostname()) or "localhost"
    return folder / f"session-{host}.{suffix}"
