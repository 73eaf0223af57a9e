"""Processes that are known for certain: a number alone may have been given to another meanwhile.

Invariant: a signal goes only to a process whose start time is the recorded one, through a pidfd
that was opened before the start time was read, so that no reuse of the number can come between.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_PROC = Path("/proc")
POLL_SECONDS = 0.02
# proc(5), /proc/pid/stat, counted behind the command's closing parenthesis: state, ppid, …,
# starttime (field 22).
_STATE, _PARENT, _START = 0, 1, 19


@dataclass(frozen=True, slots=True)
class Process:
    """One process of this boot and pid namespace; ``start`` is in clock ticks since boot."""

    pid: int
    start: int
    name: str = ""

    @classmethod
    def find(cls, pid: int) -> Process | None:
        """Return the process that has this number now, zombies excepted."""
        found = _read(pid)
        return None if found is None else found[1]

    @classmethod
    def own(cls) -> Process:
        """Return the calling process."""
        found = cls.find(os.getpid())
        if found is None:
            # Without /proc nothing can be told apart: a start that equals no other.
            return cls(os.getpid(), -1)
        return found

    @property
    def is_alive(self) -> bool:
        """Return whether it still runs, zombies excepted."""
        found = Process.find(self.pid)
        return found is not None and found.start == self.start

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for a record."""
        return {"pid": self.pid, "start": self.start, "name": self.name}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Process:
        """Return the process that :meth:`to_dict` described."""
        return cls(pid=int(data["pid"]), start=int(data["start"]), name=str(data["name"]))

    def send(self, number: signal.Signals) -> bool:
        """Send a signal to exactly this process; return whether it was there to take it."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except OSError:
            return False
        try:
            if not self.is_alive:
                return False
            signal.pidfd_send_signal(descriptor, number)
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True


def children(pid: int) -> list[Process]:
    """Return the processes that ``pid`` started and that still are its children."""
    return [process for parent, process in _all() if parent == pid]


def arguments(pid: int) -> bytes:
    """Return the command line of ``pid``, NUL-separated; empty when it is gone."""
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return b""


def descendants(pid: int) -> list[Process]:
    """Return all processes below ``pid``, parents before their children."""
    by_parent: dict[int, list[Process]] = {}
    for parent, process in _all():
        by_parent.setdefault(parent, []).append(process)
    found: list[Process] = []
    waiting = [pid]
    while waiting:
        below = by_parent.get(waiting.pop(), [])
        found += below
        waiting += [process.pid for process in below]
    return found


def wait_gone(processes: Sequence[Process], seconds: float) -> list[Process]:
    """Wait until none of ``processes`` runs; return those that do after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        left = [process for process in processes if process.is_alive]
        if not left or time.monotonic() >= deadline:
            return left
        time.sleep(POLL_SECONDS)


def end(processes: Sequence[Process], *, grace_seconds: float) -> list[Process]:
    """End exactly ``processes``: SIGTERM, after ``grace_seconds`` SIGKILL; return the survivors."""
    for process in processes:
        process.send(signal.SIGTERM)
    left = wait_gone(processes, grace_seconds)
    for process in left:
        process.send(signal.SIGKILL)
    return wait_gone(left, 5.0)


def pid_namespace() -> str:
    """Return which pid namespace the numbers of this process belong to; empty when unknown."""
    with contextlib.suppress(OSError):
        return os.readlink(_PROC / "self/ns/pid")
    return ""


def _all() -> Iterable[tuple[int, Process]]:
    names: Iterator[str] = iter(())
    with contextlib.suppress(OSError):
        names = iter(os.listdir(_PROC))
    for name in names:
        if name.isdecimal():
            found = _read(int(name))
            if found is not None:
                yield found


def _read(pid: int) -> tuple[int, Process] | None:
    try:
        text = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    # The command may hold spaces and parentheses; the last one ends it.
    name = text[text.find(b"(") + 1 : text.rfind(b")")]
    fields = text[text.rfind(b")") + 2 :].split()
    if fields[_STATE] in (b"Z", b"X"):
        return None
    process = Process(pid, int(fields[_START]), name.decode("utf-8", "backslashreplace"))
    return int(fields[_PARENT]), process
