"""Notices that the head of a Ray cluster has died, before Ray ends the program for it.

Ray's own calls wait for a dead head, and after 60 s the driver exits without an exception.
Invariant: a head that does not answer for ``PATIENCE_SECONDS`` becomes one NodeError.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.errors import NodeError

if TYPE_CHECKING:
    from collections.abc import Callable

LOOK_SECONDS = 2.0
CONNECT_SECONDS = 2.0
PATIENCE_SECONDS = 12.0


def connects(address: str) -> bool:
    """Return whether something listens at ``address``; one that names no port counts as it does."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError):
        return False
    return True


class HeadWatch:
    """Looked at from a waiting loop; connects to the head now and then."""

    def __init__(
        self,
        address: str,
        *,
        is_there: Callable[[str], bool] = connects,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._address = address
        self._is_there = is_there
        self._clock = clock
        self._looked = self._answered = clock.monotonic()

    @property
    def is_silent(self) -> bool:
        """Return whether the head has been given up."""
        return self._looked - self._answered > PATIENCE_SECONDS

    def look(self) -> None:
        """Raise NodeError when the head has been silent for too long."""
        now = self._clock.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        if self._is_there(self._address):
            self._answered = now
        elif now - self._answered > PATIENCE_SECONDS:
            raise NodeError(
                self._address,
                "the head of the Ray cluster does not answer any more; what was fetched is kept, "
                "run the command again when the cluster is back",
            )
