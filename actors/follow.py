"""Takes a run's events over from its ProgressActor, on a thread of its own.

Invariant: losing the ProgressActor fails nothing; whoever waits for the run's results gets the
final events with them. Once it is closed the thread asks Ray for nothing: Ray ends the process of
whoever does so when it has been shut down.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from stowray.pipeline.errors import CancelledError, StowrayError

if TYPE_CHECKING:
    from collections.abc import Callable

POLL_SECONDS = 1.0
END_SECONDS = 10.0


class Follower:
    """Takes a run's events over from the ProgressActor while the run goes on."""

    def __init__(self, actor: Any, run: str, take: Callable[[bytes], None]) -> None:
        """Give each frame of events to ``take``, on a thread of the follower's own."""
        self._actor = actor
        self._run = run
        self._take = take
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop following; the result brings what is still missing."""
        self._closed.set()
        self._actor.close.remote(self._run)
        self._thread.join(END_SECONDS)

    def _follow(self) -> None:
        from stowray.actors import cluster

        version = 0
        while not self._closed.is_set():
            call = self._actor.poll.remote(self._run, version, POLL_SECONDS)
            try:
                version, frame, is_closed = cluster.wait(
                    call, "progress", seconds=30.0, look=self._look
                )
            except StowrayError:
                # Losing the ProgressActor fails nothing: the display waits for the result.
                return
            self._take(frame)
            if is_closed:
                return

    def _look(self) -> None:
        """End a wait for news that nobody wants any more."""
        if self._closed.is_set():
            raise CancelledError(self._run)
