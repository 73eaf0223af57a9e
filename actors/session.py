"""A warm Ray of one's own that outlives a command: started, found, described and ended.

Invariant: only processes that the state file names, with their start time, boot and pid namespace,
are ever signalled.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stowray.actors import processes, scratch
from stowray.actors.processes import Process
from stowray.actors.session_state import (
    Session,
    SessionStatus,
    file_of,
    find_session,
    is_private,
    state_folder,
    state_path,
)
from stowray.pipeline.errors import (
    DeadlineError,
    NodeError,
    StorageError,
    from_wire,
)
from stowray.pipeline.files import translated
from stowray.pipeline.locks import locked

if TYPE_CHECKING:
    import subprocess
    from contextlib import AbstractContextManager

    from stowray.pipeline.settings import Settings

START_SECONDS = 60.0
STOP_SECONDS = 10.0
# A session that nobody uses must not hold its memory for ever.
IDLE_SECONDS = 8 * 3600.0
CONNECT_SECONDS = 1.0


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
        if not is_private(folder):
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
    return locked(file_of(folder, "lock"), what="the session", wait_seconds=2 * START_SECONDS)


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

    log = file_of(folder, "log")
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
