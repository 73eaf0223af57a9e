"""How a task in another process tells its NodeActor how far it is.

Invariant: at most ten frames a second per task; the final word comes with the task's result, so a
frame that is lost or late changes nothing.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from stowray.actors.frames import pack
from stowray.pipeline.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ray.actor import ActorProxy

    from stowray.actors.node import NodeActor
    from stowray.pipeline.progress import Event, Report


class TaskReport:
    """The reports of one task."""

    def __init__(self, progress: Progress, reference: str) -> None:
        self._progress = progress
        self.report: Report = progress.reporter(reference)

    def final_events(self) -> list[dict[str, Any]]:
        """Return the last state of everything reported, as plain data."""
        return [event.to_wire() for event in self._progress.events()]


class FirstByte:
    """Passes reports on and notes when the first byte came; wall-clock seconds, 0.0: not yet."""

    def __init__(self, report: Report) -> None:
        self.started = time.time()
        self.first_byte = 0.0
        self._report = report
        self._least = -1

    def __call__(
        self, kind: str, id: str, status: str, current: int = 0, total: int = 0, error: str = ""
    ) -> None:
        """Report; see :class:`Report`."""
        if kind == "blob" and not self.first_byte:
            if 0 <= self._least < current:
                self.first_byte = time.time()
            elif status == "downloading":
                # What an earlier run left is there before any source was asked.
                self._least = current
        self._report(kind, id, status, current, total, error)


@contextmanager
def task_report(
    node: ActorProxy[NodeActor],
    run: str,
    node_name: str,
    reference: str,
    way: Callable[[], dict[str, Any]] | None = None,
) -> Iterator[TaskReport]:
    """Yield what a task reports with; frames go to ``node`` meanwhile.

    With each goes how a blob has come so far, as ``way`` returns it.
    """
    progress = Progress(node=node_name)

    def send(events: Sequence[Event]) -> None:
        node.note.remote(run, pack(events), None if way is None else way())

    progress.watch(send)
    try:
        yield TaskReport(progress, reference)
    finally:
        progress.close()
