"""Whether the nodes of a run live, and their word that the driver does.

Invariant: a node that does not answer for ``SILENCE_SECONDS`` is told as silent once; an actor that
is not asked for ``STAY_SECONDS`` longer than that ends itself. With many nodes both are asked less
often, so that the driver never sends more than ``BEATS_PER_SECOND``.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from stowray.actors import cluster
from stowray.actors.lifeline import Silence
from stowray.pipeline.errors import StowrayError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from stowray.actors.prewarm_node import RunNode

BEAT_SECONDS = 2.0
BEATS_PER_SECOND = 500
SILENCE_SECONDS = 15.0
# In silent intervals: with many nodes one that misses two questions is not yet given up.
SILENCE_BEATS = 3
STAY_SECONDS = 10.0


class Pulse:
    """Asks all ``nodes()`` of a run; ``on_silent`` gets one that has been silent and for how long.

    ``on_restart`` is called when the owner of the leases was started anew.
    """

    def __init__(
        self,
        nodes: Callable[[], Iterable[RunNode]],
        resolver: Any,
        board: Any,
        *,
        on_silent: Callable[[RunNode, float], None],
        on_restart: Callable[[], None],
    ) -> None:
        self._nodes = nodes
        self._resolver = resolver
        self._board = board
        self._on_silent = on_silent
        self._on_restart = on_restart
        self._silence = Silence()
        self._beat: asyncio.Task[None] | None = None
        self._epoch = ""
        self._is_up = False

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            nodes = [node for node in self._nodes() if not node.is_dead]
            interval, patience = intervals(len(nodes))
            stay = patience + STAY_SECONDS
            cluster.forget(self._board.beat.remote(stay))
            if self._beat is None or self._beat.done():
                self._beat = asyncio.ensure_future(self._ask_resolver(stay))
            # Before its first answer it is being started, which may take long.
            if self._is_up and self._silence.look(interval) > patience:
                # It stands still: Ray starts it anew, and all that it was asked is asked again.
                self._is_up = False
                cluster.restart(self._resolver)
            for node in nodes:
                node.link.beat(stay)
                silent = node.link.silence.look(interval)
                if silent > patience:
                    self._on_silent(node, silent)
            await asyncio.sleep(interval)

    async def _ask_resolver(self, stay: float) -> None:
        try:
            epoch = await cluster.ask(self._resolver.beat.remote(stay), "resolver")
        except StowrayError:
            self._is_up = False
            return
        self._silence.end()
        self._is_up = True
        before, self._epoch = self._epoch, epoch
        if before and before != epoch:
            self._on_restart()


def intervals(nodes: int) -> tuple[float, float]:
    """Return the seconds between two questions, and after how many a silent node is given up."""
    interval = max(BEAT_SECONDS, nodes / BEATS_PER_SECOND)
    return interval, max(SILENCE_SECONDS, SILENCE_BEATS * interval)
