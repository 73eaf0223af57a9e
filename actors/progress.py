"""The picture of a run that any number of watchers share, and the way reports get to it.

Invariant: what travels is msgpack frames of changed events, at most one under way per sender; a
watcher that attaches late is first given the present state; nothing waits for this actor and losing
it fails nothing, because every result brings its final events along.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import ray

from stowray.actors.frames import pack, unpack
from stowray.actors.lifeline import Lifeline, leave_now
from stowray.pipeline.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stowray.pipeline.progress import Event

RUNS_LIMIT = 256


class _Run:
    """All events of one run with the version at which each last changed."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.version = 0
        self.closed = False
        self._events: dict[tuple[str, str, str, str], tuple[int, Event]] = {}
        # One for each node, because the same blob is fetched on each of them.
        self._nodes: dict[str, Progress] = {}

    def note(self, events: Sequence[Event]) -> None:
        for event in events:
            with self.changed:
                progress = self._nodes.get(event.node)
                if progress is None:
                    progress = self._nodes[event.node] = Progress(node=event.node)
                    progress.watch(self._record)
            progress.merge(event)

    def since(self, version: int, wait_seconds: float) -> tuple[int, list[Event], bool]:
        with self.changed:
            self.changed.wait_for(lambda: self.version > version or self.closed, wait_seconds)
            changed = [event for at, event in self._events.values() if at > version]
            return self.version, changed, self.closed

    def close(self) -> None:
        for progress in list(self._nodes.values()):
            progress.close()
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def _record(self, events: Sequence[Event]) -> None:
        with self.changed:
            self.version += 1
            for event in events:
                key = (event.node, event.reference, event.kind, event.id)
                self._events[key] = (self.version, event)
            self.changed.notify_all()


class Board:
    """The runs under way and the last ones that ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[str, _Run] = {}

    def note(self, run: str, frame: bytes) -> None:
        """Take over one frame of events."""
        self._run(run).note(unpack(frame))

    def poll(self, run: str, since: int, wait_seconds: float) -> tuple[int, bytes, bool]:
        """Return ``(version, frame of what changed after since, closed)``.

        Waits for a change at most ``wait_seconds``; ``since=0`` asks for the present state.
        """
        version, events, closed = self._run(run).since(since, wait_seconds)
        return version, pack(events), closed

    def close(self, run: str) -> None:
        """End ``run``: watchers get what is left and learn that nothing follows."""
        self._run(run).close()

    def _run(self, name: str) -> _Run:
        with self._lock:
            run = self._runs.get(name)
            if run is None:
                run = self._runs[name] = _Run()
                self._forget()
            return run

    def _forget(self) -> None:
        ended = [name for name, run in self._runs.items() if run.closed]
        for name in ended[: max(0, len(self._runs) - RUNS_LIMIT)]:
            del self._runs[name]


class ProgressActor:
    """The shell round a :class:`Board`."""

    def __init__(self) -> None:
        self._board = Board()
        self._lifeline: Lifeline | None = None

    @ray.method(concurrency_group="notes")
    def note(self, run: str, frame: bytes) -> None:
        """Take over one frame; see :meth:`Board.note`."""
        self._board.note(run, frame)

    @ray.method(concurrency_group="watchers")
    def poll(self, run: str, since: int, wait_seconds: float) -> tuple[int, bytes, bool]:
        """Wait for news; see :meth:`Board.poll`."""
        return self._board.poll(run, since, wait_seconds)

    @ray.method(concurrency_group="life")
    def beat(self, seconds: float) -> None:
        """Stay for so many seconds from now on; without a driver who says so no longer."""
        if self._lifeline is None:
            self._lifeline = Lifeline(leave_now, seconds=seconds)
        self._lifeline.hold(seconds)

    @ray.method(concurrency_group="notes")
    def close(self, run: str) -> None:
        """End a run; see :meth:`Board.close`."""
        self._board.close(run)
