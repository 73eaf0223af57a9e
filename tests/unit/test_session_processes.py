"""Processes and private folders: nothing is taken for ours because of a number or a name."""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/
from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

from stowray.actors import processes, scratch
from stowray.actors.processes import Process

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_a_process_is_known_by_its_start_too() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        process = Process.find(child.pid)
        assert process is not None
        assert process.is_alive
        assert Process.from_dict(process.to_dict()) == process
        impostor = Process(process.pid, process.start + 1, process.name)
        assert not impostor.is_alive
        assert not impostor.send(signal.SIGKILL)
        assert process.send(signal.SIGKILL)
        child.wait()
    assert not process.is_alive
    assert not process.send(signal.SIGKILL)


def test_a_zombie_counts_as_gone() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert Process.find(child.pid) is None
    child.wait()


def test_a_name_with_parentheses_and_spaces_is_read_right(tmp_path: Path) -> None:
    program = tmp_path / "a) S 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "60"]) as child:
        try:
            children = {found.pid: found.name for found in processes.children(os.getpid())}
        finally:
            child.kill()
    assert children[child.pid] == "a) S 1 (b"


def test_descendants_are_all_below_and_no_others() -> None:
    program = "import subprocess, sys; subprocess.run(['sleep', '600'])"
    with (
        subprocess.Popen(["sleep", "60"]) as other,
        subprocess.Popen([sys.executable, "-c", program]) as parent,
    ):
        while not (below := processes.descendants(parent.pid)):
            pass
        assert other.pid not in [process.pid for process in below]
        assert processes.end(below, grace_seconds=5.0) == []
        parent.kill()
        other.kill()


def test_a_scratch_folder_is_private_short_and_removed() -> None:
    with scratch.scratch_directory() as directory:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        # Ray puts up to 66 bytes behind it, and a socket's path has 108 with its final NUL.
        assert len(os.fsencode(directory)) + 66 < 108
        token = scratch.write_token(directory)
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        assert len(token.read_text()) == 64
    assert not directory.exists()


def test_a_long_folder_for_temporary_files_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with scratch.scratch_directory() as directory:
        assert long not in directory.parents


def test_the_sweep_takes_only_what_nobody_holds(tmp_path: Path) -> None:
    left, held, foreign = (tmp_path / f"{scratch.PREFIX}{name}" for name in ("left", "held", "x"))
    for directory in (left, held, foreign):
        (directory / "session").mkdir(parents=True)
    for directory in (left, held):
        (directory / "lock").touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "lock").touch()
    (tmp_path / f"{scratch.PREFIX}link").symlink_to(outside)
    with (held / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert scratch.sweep(tmp_path) == [left]
    assert held.exists()
    assert foreign.exists(), "its maker may be about to lock it"
    assert outside.exists()
    assert scratch.sweep(tmp_path) == [held]
    os.utime(foreign, (0, 0))
    assert scratch.sweep(tmp_path) == [foreign]
    assert outside.exists()
