"""Nodes that were given up because they were silent, and that may come back.

Invariant: a node is back when it has carried out something, not when its kernel takes connections;
each comes back a bounded number of times, and nobody waits for it before that.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

from stowray.actors import cluster, foreign
from stowray.pipeline.errors import StowrayError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from stowray.actors.prewarm_node import RunNode

POLL_SECONDS = 2.0


class SilentNodes:
    """Looks for nodes; ``on_return`` is called when one is back, at most ``returns`` times each."""

    def __init__(self, returns: int, *, on_return: Callable[[], None]) -> None:
        self._limit = returns
        self._on_return = on_return
        self._counts: Counter[str] = Counter()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._returned: list[RunNode] = []

    def look_for(self, node: RunNode) -> None:
        """Begin to look for a node that was given up."""
        if self._counts[node.name] < self._limit:
            self._counts[node.name] += 1
            self._tasks[node.node_id] = asyncio.ensure_future(self._look_for(node))

    def look(self, alive: Collection[str]) -> None:
        """Look no more for those that Ray has given up as well: it does not take them back."""
        for node_id in [node_id for node_id in self._tasks if node_id not in alive]:
            self._tasks.pop(node_id).cancel()

    def take_returned(self) -> list[RunNode]:
        """Return those that came back since the last call."""
        found, self._returned = self._returned, []
        return found

    def close(self) -> None:
        """Look no more."""
        for task in self._tasks.values():
            task.cancel()

    async def _look_for(self, node: RunNode) -> None:
        while True:
            try:
                await cluster.ask(foreign.ask(node.node_id), node.name, foreign.PROBE_SECONDS)
            except StowrayError:
                await asyncio.sleep(POLL_SECONDS)
            else:
                break
        del self._tasks[node.node_id]
        self._returned.append(node)
        self._on_return()
