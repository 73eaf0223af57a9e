"""Looks after a cluster from a thread of its own: who lives, and whether the head does.

Invariant: whoever waits for a run never waits for Ray itself: Ray's own calls hang with a dead
head, and 60 s later the program would end without a word.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from stowray.actors import cluster
from stowray.pipeline.errors import StowrayError

if TYPE_CHECKING:
    from stowray.actors.headwatch import HeadWatch

LOOK_SECONDS = 1.0
END_SECONDS = 2.0


class ClusterWatch:
    """Looks every second; with many nodes less often, for the answer names all of them.

    ``nodes`` are Ray's descriptions of the living ones by ID, None until the first look;
    ``failure`` is why the head is given up.
    """

    def __init__(self, head: HeadWatch) -> None:
        self.nodes: dict[str, dict[str, Any]] | None = None
        self.failure: StowrayError | None = None
        self._head = head
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=look, name="cluster-watch", daemon=True)
            for look in (self._look_at_head, self._look_at_nodes)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Look no more; afterwards Ray may be left, which asking for nodes would begin again."""
        self._closed.set()
        for thread in self._threads:
            thread.join(END_SECONDS)

    def _look_at_head(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            try:
                self._head.look()
            except StowrayError as error:
                self.failure = error
                return

    def _look_at_nodes(self) -> None:
        while not self._closed.is_set() and self.failure is None:
            try:
                found = cluster.alive_nodes()
            except StowrayError:
                # A head that is slow to answer may answer the next time; one that is dead the
                # other thread notices.
                found = []
            if found:
                self.nodes = {str(node["NodeID"]): node for node in found}
            self._closed.wait(max(LOOK_SECONDS, len(found) / 1000))
