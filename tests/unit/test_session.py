"""The session's state file: it is believed only while the processes that it names are there."""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/
from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

import stowray
from stowray.actors import processes, session, session_state
from stowray.actors.processes import Process
from stowray.actors.session_state import Session
from stowray.pipeline.clock import Boot
from stowray.pipeline.errors import StorageError
from stowray.pipeline.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def start() -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def begin() -> subprocess.Popen[bytes]:
        process = subprocess.Popen(["sleep", "600"])
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = session_state.state_folder()
    path.mkdir(0o700)
    return path


SETTINGS = Settings()


def found(pid: int) -> Process:
    process = Process.find(pid)
    assert process is not None
    return process


def describe(
    folder: Path, host: Process, *others: Process, address: str = "127.0.0.1:1"
) -> Session:
    return Session(
        address=address,
        token_path=str(folder / "gone" / "token"),
        directory=str(folder / "gone"),
        door=str(folder / "gone" / "door"),
        version=stowray.__version__,
        protocol=session_state.PROTOCOL,
        python=sys.executable,
        boot_id=Boot.read().boot_id,
        pid_namespace=processes.pid_namespace(),
        created=1.0,
        host=host,
        processes=others,
    )


def test_what_is_written_is_found_again_and_private(folder: Path) -> None:
    written = describe(folder, Process.own(), Process(1, 2, "a (b) c"))
    session_state.write_state(folder, written)
    path = session_state.state_path(folder)
    assert session_state.find_session(folder) == written
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert session_state.is_warm(SETTINGS)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut off"),
        pytest.param(b"[]", id="another document"),
        pytest.param(b'{"format": 2}', id="a later format"),
        pytest.param(b'{"format": 1}', id="fields missing"),
        pytest.param(b"[" * 200_000, id="nested too deep"),
        pytest.param(b"\xff\xfe", id="not text"),
    ],
)
def test_an_unreadable_state_is_no_session(folder: Path, text: bytes) -> None:
    session_state.state_path(folder).write_bytes(text)
    assert session_state.find_session(folder) is None
    assert not session_state.is_warm(SETTINGS)
    assert session.status(SETTINGS).state == "none"
    session.stop(SETTINGS)


def test_a_folder_that_others_may_write_to_is_not_believed(folder: Path) -> None:
    session_state.write_state(folder, describe(folder, Process.own()))
    folder.chmod(0o722)
    assert session_state.find_session(folder) is None
    with pytest.raises(StorageError, match="others may write there"):
        session.start(SETTINGS)


def test_a_planted_link_or_fifo_is_no_session(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(json.dumps(describe(folder, Process.own()).to_dict()))
    session_state.state_path(folder).symlink_to(elsewhere)
    assert session_state.find_session(folder) is None
    session_state.state_path(folder).unlink()
    os.mkfifo(session_state.state_path(folder))
    assert session_state.find_session(folder) is None


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda known: replace(known, version="0.0.1"), id="another version"),
        pytest.param(lambda known: replace(known, protocol=0), id="another protocol"),
        pytest.param(lambda known: replace(known, python="/usr/bin/other"), id="another python"),
        pytest.param(lambda known: replace(known, boot_id="before"), id="before a reboot"),
        pytest.param(lambda known: replace(known, pid_namespace="pid:[1]"), id="a container's"),
        pytest.param(
            lambda known: replace(known, host=replace(known.host, start=known.host.start - 1)),
            id="the number was given to another",
        ),
    ],
)
def test_what_does_not_fit_is_not_warm(folder: Path, change: Callable[[Session], Session]) -> None:
    session_state.write_state(folder, change(describe(folder, Process.own())))
    assert session_state.find_session(folder) is not None
    assert not session_state.is_warm(SETTINGS)


def test_status_tells_running_from_dead(
    folder: Path, start: Callable[[], subprocess.Popen[bytes]]
) -> None:
    assert session.status(SETTINGS).state == "none"
    host = start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        session_state.write_state(folder, describe(folder, found(host.pid), address=address))
        assert session.status(SETTINGS).state == "running"
    status = session.status(SETTINGS)
    assert (status.state, status.detail) == ("dead", f"nothing answers at {address}")
    host.kill()
    host.wait()
    status = session.status(SETTINGS)
    assert status.state == "dead"
    assert status.to_dict()["pid"] == host.pid
    assert session_state.find_session(folder) is not None, "status must touch nothing"


def test_stop_ends_the_recorded_processes_and_no_others(
    folder: Path, start: Callable[[], subprocess.Popen[bytes]]
) -> None:
    host, member, stranger = start(), start(), start()
    ours = found(host.pid), found(member.pid)
    # The number of a process that has ended may belong to somebody else by now.
    reused = replace(found(stranger.pid), start=found(stranger.pid).start - 1)
    session_state.write_state(folder, describe(folder, *ours, reused))
    session.stop(SETTINGS)
    assert not any(process.is_alive for process in ours)
    assert stranger.poll() is None, "A STRANGER WAS ENDED"
    assert session.status(SETTINGS).state == "none"
    session.stop(SETTINGS)


def test_stop_ends_one_that_ignores_sigterm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "STOP_SECONDS", 0.2)
    program = "import signal, sys; signal.signal(15, signal.SIG_IGN); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as host:
        assert host.stdout is not None
        host.stdout.readline()
        process = found(host.pid)
        session_state.write_state(folder, describe(folder, process))
        session.stop(SETTINGS)
        assert not process.is_alive


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda known: replace(known, boot_id="before"), id="before a reboot"),
        pytest.param(lambda known: replace(known, pid_namespace="pid:[1]"), id="a container's"),
    ],
)
def test_stop_of_another_boots_session_signals_nobody(
    folder: Path,
    start: Callable[[], subprocess.Popen[bytes]],
    change: Callable[[Session], Session],
) -> None:
    bystander = start()
    session_state.write_state(folder, change(describe(folder, found(bystander.pid))))
    session.stop(SETTINGS)
    assert bystander.poll() is None, "A STRANGER WAS ENDED"
    assert session.status(SETTINGS).state == "none"


def test_a_session_that_ends_leaves_its_successors_state(folder: Path) -> None:
    successor = describe(folder, Process.own())
    session_state.write_state(folder, successor)
    session_state.remove_state(folder, Process(1, 1))
    assert session_state.find_session(folder) == successor
    session_state.remove_state(folder, Process.own())
    assert session_state.find_session(folder) is None


def test_asking_whether_a_session_is_warm_imports_no_ray(folder: Path) -> None:
    program = (
        "import sys\n"
        "from stowray.actors.session_state import is_warm\n"
        "from stowray.pipeline.settings import Settings\n"
        "assert not is_warm(Settings())\n"
        "print(*sorted({'ray', 'urllib3', 'msgpack', 'subprocess'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


def test_a_session_from_before_there_were_doors_is_found_and_not_used(
    folder: Path, start: Callable[[], subprocess.Popen[bytes]]
) -> None:
    known = describe(folder, found(start().pid))
    fields = {**known.to_dict(), "protocol": 1}
    del fields["door"]
    session_state.state_path(folder).write_text(json.dumps(fields))
    old = session_state.find_session(folder)
    assert old is not None
    assert old.is_alive
    assert not old.fits
    assert session_state.warm_session() is None
