"""A pre-warm run as a handle: watch it, wait for it, stop it, place work where it is done.

Invariant: a job ends in exactly one of a report and an error; leaving it (``with``) ends all its
actors; a slow reader of its events gets fewer and newer ones, and never holds the run up.

Examples::

    import ray, stowray

    with stowray.prewarm(["debian:12", "nginx:1.27"], lock="images.lock") as job:
        for event in job:
            print(event.node, event.reference, event.status)
        report = job.result()
        task = work.options(label_selector=job.ready_nodes("debian:12")).remote()
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, Protocol, Self

from stowray.pipeline.errors import DeadlineError, NodeError
from stowray.pipeline.prewarm_report import PrewarmReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from stowray.pipeline.dry_run import DryRun
    from stowray.pipeline.prewarm_plan import PrewarmPlan
    from stowray.pipeline.progress import Event, Key, Progress
    from stowray.pipeline.settings import Settings

# The label that Ray gives each node; a task's or an actor's `label_selector` may name it.
NODE_ID_LABEL: Final = "ray.io/node-id"
_POLL_SECONDS: Final = 0.2


class Run(Protocol):
    """What carries a run out; :class:`stowray.actors.prewarm.PrewarmRun` is it."""

    on_change: Callable[[PrewarmReport], None]

    def plan(self, cancelled: Callable[[], bool]) -> DryRun:
        """Return what :meth:`run` would do."""

    def run(self, cancelled: Callable[[], bool]) -> PrewarmReport:
        """Do it; ``cancelled`` is polled."""

    def status(self, repair: bool, cancelled: Callable[[], bool]) -> PrewarmReport:
        """Look what is there; ``repair`` brings what is missing."""

    def close(self) -> None:
        """End all actors."""


def make_run(
    plan: PrewarmPlan,
    settings: Settings,
    *,
    progress: Progress,
    lock: Path | None = None,
    watch: bool = False,
    embedded_nodes: int = 1,
) -> Run:
    """Return the run of ``plan`` on the Ray that the settings lead to; nothing is started yet.

    Where there is no Ray, one is started on this machine, with ``embedded_nodes`` nodes.
    """
    from stowray.actors.prewarm import PrewarmRun

    return PrewarmRun(
        plan, settings, progress=progress, lock=lock, watch=watch, embedded_nodes=embedded_nodes
    )


class Job:
    """A run under way on a thread of its own."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self._run = run
        self._progress = progress
        self._changed = threading.Condition()
        self._report = PrewarmReport()
        self._error: BaseException | None = None
        self._done = False
        self._cancelled = threading.Event()
        run.on_change = self._take
        self._thread = threading.Thread(target=self._work, name="prewarm", daemon=True)
        self._thread.start()

    @property
    def report(self) -> PrewarmReport:
        """Return the state so far; after the end the same as :meth:`result`."""
        with self._changed:
            return self._report

    @property
    def is_done(self) -> bool:
        """Return whether the run has ended."""
        with self._changed:
            return self._done

    def result(self, timeout_seconds: float | None = None) -> PrewarmReport:
        """Wait for the end and return the report; its ``exit_code`` tells whether all went well.

        Raises what kept the run as a whole from being carried out (no cluster, no such image for
        any node, a lost head), and DeadlineError when ``timeout_seconds`` have passed: the run goes
        on then.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._done, timeout_seconds):
                raise DeadlineError("the pre-warm run", timeout_seconds or 0.0)
            if self._error is not None:
                raise self._error
            return self._report

    def cancel(self) -> None:
        """Ask the run to stop; :meth:`result` then returns soon what was reached."""
        self._cancelled.set()

    def ready_nodes(self, reference: str) -> dict[str, str]:
        """Return a Ray label selector that holds for the nodes that have ``reference`` by now.

        To be given as ``label_selector=`` of a task or an actor (Ray 2.49 and later). Raises
        NodeError while no node has it: an empty selector would mean any node.
        """
        return {NODE_ID_LABEL: f"in({', '.join(self.ready_node_ids(reference))})"}

    def ready_node_ids(self, reference: str) -> tuple[str, ...]:
        """Return the Ray IDs of these nodes, for a ``NodeAffinitySchedulingStrategy``."""
        found = tuple(node.node_id for node in self.report.ready_nodes(reference) if node.node_id)
        if not found:
            raise NodeError(reference, "is not ready on any node yet")
        return found

    def __iter__(self) -> Iterator[Event]:
        """Yield events until the run ends: first the present state, then what changes.

        What changes several times between two looks is told once, as it is last.
        """
        inbox = _Inbox()
        self._progress.watch(inbox.put)
        while True:
            # First ask, then take: what came before the end is not lost.
            over = self.is_done
            if over:
                self._progress.flush()
            yield from inbox.take(0.0 if over else _POLL_SECONDS)
            if over:
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the run if it goes on, wait for its end, and end its actors."""
        self.cancel()
        self._thread.join()

    def _take(self, report: PrewarmReport) -> None:
        with self._changed:
            if not self._done:
                self._report = report
                self._changed.notify_all()

    def _work(self) -> None:
        report: PrewarmReport | None = None
        error: BaseException | None = None
        try:
            try:
                report = self._run.run(self._cancelled.is_set)
            finally:
                self._run.close()
        except BaseException as caught:  # noqa: BLE001 - handed to the thread that waits
            error = caught
        self._progress.close()
        with self._changed:
            if report is not None and error is None:
                self._report = report
            self._error = error
            self._done = True
            self._changed.notify_all()


class _Inbox:
    """Changed events between two looks of one reader, the last state of each."""

    def __init__(self) -> None:
        self._arrived = threading.Condition()
        self._events: dict[Key, Event] = {}

    def put(self, events: Sequence[Event]) -> None:
        with self._arrived:
            for event in events:
                self._events[event.key] = event
            self._arrived.notify()

    def take(self, seconds: float) -> list[Event]:
        with self._arrived:
            self._arrived.wait_for(lambda: self._events, seconds)
            events, self._events = list(self._events.values()), {}
            return events
