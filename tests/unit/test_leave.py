"""The command leaves without taking the interpreter apart: nothing may be lost by that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def leave(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    program = f"from stowray.__main__ import leave\n{code}"
    # Unbuffered, nothing would be left to write at the end.
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-P", "-c", program]
    return subprocess.run(
        command, env=environment, text=True, stderr=subprocess.PIPE, check=False, **options
    )


def test_what_was_registered_is_called_and_what_was_printed_arrives() -> None:
    ended = leave(
        "import atexit, sys\n"
        "atexit.register(print, 'last words')\n"
        "print('x' * 100_000); print('to stderr', end='', file=sys.stderr)\n"
        "leave(3)",
        stdout=subprocess.PIPE,
    )
    assert ended.returncode == 3
    assert ended.stdout == "x" * 100_000 + "\nlast words\n"
    assert ended.stderr == "to stderr"


def test_threads_are_waited_for() -> None:
    ended = leave(
        "import threading\n"
        "going = threading.Event()\n"
        "def late():\n"
        "    going.wait()\n"
        "    print('late')\n"
        "thread = threading.Thread(target=late); thread.start()\n"
        "threading.Timer(0.05, going.set).start()\n"
        "leave(0)",
        stdout=subprocess.PIPE,
    )
    assert (ended.returncode, ended.stdout) == (0, "late\n")


def test_threads_that_nothing_waits_for_do_not_keep_it() -> None:
    ended = leave(
        "import threading\n"
        "threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "print('done'); leave(4)",
        stdout=subprocess.PIPE,
    )
    assert (ended.returncode, ended.stdout) == (4, "done\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_that_finds_no_room_is_told_as_ever() -> None:
    with Path("/dev/full").open("w") as full:
        ended = leave("print('lost'); leave(0)", stdout=full)
    assert ended.returncode == 120
    assert "No space left on device" in ended.stderr
