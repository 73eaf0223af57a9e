"""Ends a process where an order says so; imported by each interpreter with this folder in its path.

The order is a file of three words: who (what Ray calls the process, `*` for any actor, `driver` for
what is none), where (the name of a failpoint, or the number of a call on the stores), and an id of
its own. Whoever carries it out renames it first: one process dies per order, the name tells who.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

ORDER = "STOWRAY_TEST_ORDER"
STORES = "STOWRAY_TEST_STORES"


class Armed:
    """What this process has seen of each order."""

    def __init__(self, order: Path) -> None:
        self._order = order
        self._rename = os.rename
        self._guard = threading.Lock()
        self._counts: dict[str, int] = {}

    def call(self, _number: int, _kind: str) -> None:
        """Count a call on a store."""
        who, where, name = self._read()
        if where.isdigit():
            with self._guard:
                self._counts[name] = count = self._counts.get(name, 0) + 1
            if count == int(where):
                self._die(who)

    def point(self, name: str) -> None:
        """Come to a failpoint."""
        who, where, _ = self._read()
        if where == name:
            self._die(who)

    def _read(self) -> tuple[str, str, str]:
        try:
            who, where, name = self._order.read_text().split()
        except (FileNotFoundError, ValueError):
            return "", "", ""
        return (who, where, name) if self._is(who) else ("", "", "")

    def _is(self, who: str) -> bool:
        own = _own_name()
        if who == "driver":
            return not own.startswith("ray::")
        return own.startswith("ray::") and (who == "*" or own == f"ray::{who}"[:15])

    def _die(self, who: str) -> None:
        own = _own_name().removeprefix("ray::")
        try:
            self._rename(self._order, f"{self._order}.{who if who != '*' else own}")
        except FileNotFoundError:
            return  # another process was first
        os.kill(os.getpid(), signal.SIGKILL)


def _own_name() -> str:
    """Return what Ray calls this process; prctl(2), PR_SET_NAME keeps 15 bytes of it."""
    return Path("/proc/self/comm").read_text().strip().partition(".")[0]


def _arm() -> None:
    from stowray.pipeline import failpoint
    from tests.support.interpose import CHANGES, Interposer

    armed = Armed(Path(os.environ[ORDER]))
    # Before any other module takes it from there.
    failpoint.failpoint = armed.point
    Interposer(Path(os.environ[STORES]), {*CHANGES, "create"}, armed.call).install()


if ORDER in os.environ:
    _arm()
