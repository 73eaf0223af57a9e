"""The pulls and deliveries of one node that the driver waits for.

Invariant: what nobody waits for any more, because its time is up or the run has ended, the node has
been told to give up.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from stowray.pipeline.errors import DeadlineError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from stowray.actors.prewarm_link import NodeLink


class Awaited:
    """Those that are under way by their names; ``link`` leads to the node."""

    def __init__(self, link: NodeLink) -> None:
        self._link = link
        self._runs: set[str] = set()

    @contextlib.contextmanager
    def waiting(self, run: str) -> Iterator[None]:
        """Count ``run`` as waited for; whoever is cancelled meanwhile waits no more."""
        self._runs.add(run)
        try:
            yield
        except asyncio.CancelledError:
            self._give_up(run)
            raise
        finally:
            self._runs.discard(run)

    def give_up(self) -> None:
        """Have the node give up all of them, without waiting for it."""
        for run in list(self._runs):
            self._give_up(run)

    def _give_up(self, run: str) -> None:
        if run in self._runs and not self._link.is_dead:
            self._link.tell("cancel", run)
        self._runs.discard(run)


@contextlib.asynccontextmanager
async def in_time(what: str, seconds: float) -> AsyncIterator[None]:
    """Cancel what is done within, and raise DeadlineError, when it takes longer than it may."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise DeadlineError(what, seconds) from None
