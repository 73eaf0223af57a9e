"""Ends a process for whom nobody works any more, whatever has become of Ray.

Ray ends actors for a dead driver only as long as its head lives, and raylets outlive a dead head by
a minute. Invariant: a process that nobody asked to stay for as long as it was told to wait, or
whose owner's process is gone, ends itself, what it works on given up in order first.

Silence is counted in looks, and a late look counts little more than one in time: a process that
stood still itself (a debugger, a sleeping machine) does not take that for the silence of others.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.actors.processes import Process

LOOK_SECONDS = 1.0
# What a process has for giving its work up in order.
LEAVE_SECONDS = 3.0


class Silence:
    """Counts for how long nothing was heard, from look to look."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.seconds = 0.0
        self._now = monotonic
        self._looked = monotonic()

    def end(self) -> None:
        """Note that something was heard."""
        self.seconds = 0.0
        self._looked = self._now()

    def look(self, usual: float = LOOK_SECONDS) -> float:
        """Return for how long nothing was heard; ``usual`` seconds pass between two looks."""
        now = self._now()
        self.seconds += min(now - self._looked, 2 * usual)
        self._looked = now
        return self.seconds


class Lifeline:
    """Calls ``lost`` once, on a thread of its own, when nobody has called ``hold`` for too long."""

    def __init__(self, lost: Callable[[], None], *, seconds: float) -> None:
        self._lost = lost
        self._silence = Silence()
        self._seconds = seconds
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def hold(self, seconds: float) -> None:
        """Stay for so long from now on; each call begins that time anew."""
        self._seconds = seconds
        self._silence.end()

    def close(self) -> None:
        """Wait for nobody any more."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            if self._silence.look() > self._seconds:
                self._lost()
                return


def outlive_not(owner: Process) -> None:
    """Wait until ``owner``, of the same machine, is gone, and end this process.

    Returns never; an owner that cannot be told apart (no /proc) is waited for for ever.
    """
    gone = threading.Event()
    while owner.start < 0 or owner.is_alive:
        gone.wait(LOOK_SECONDS)
    leave_now()


def leave_now() -> None:
    """End this process without a word to Ray, whose head may be dead."""
    os._exit(1)
