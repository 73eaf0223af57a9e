"""The local crew: fetch threads and staging processes of this machine.

Invariant: steps start in the order in which they were submitted; there are at least as many fetch
slots as staging slots, so that a stage never holds a worker for a fetch that has not begun. The
commits of one pull are carried out in the order in which they came, each after the one before it
has ended well.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from stowray.pipeline.run import Outcome
from stowray.pipeline.turns import Turns
from stowray.pipeline.workers import WorkerPool

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.fetch import Fetcher
    from stowray.pipeline.image import Image
    from stowray.pipeline.plan import Step
    from stowray.pipeline.progress import Report
    from stowray.pipeline.settings import Settings
    from stowray.pipeline.store import Store


class Crew(Protocol):
    """Those who carry out the steps of plans; an engine has one.

    ``commits_in_order`` is what :func:`stowray.pipeline.run.run_plan` wants to know of ``submit``.
    """

    @property
    def commits_in_order(self) -> bool:
        """Return whether commits of one pull may be submitted before those below are done."""
        return False

    def start_early(self) -> None:
        """Start what is slow to start, before it is needed."""

    def submit(
        self,
        step: Step,
        image: Image,
        fetcher: Fetcher,
        report: Report,
        cancelled: Callable[[], bool],
    ) -> Future[Outcome]:
        """Start one step and return at once; see :class:`stowray.pipeline.run.Submit`."""

    def close(self) -> None:
        """End all that the crew started."""


class Workers(Protocol):
    """Those who carry out operations of :class:`stowray.pipeline.layer_tasks.LayerTasks`."""

    def submit(
        self,
        operation: str,
        arguments: dict[str, Any],
        *,
        on_progress: Callable[[int, int], None],
        cancelled: Callable[[], bool],
    ) -> Future[dict[str, Any]]:
        """Queue one operation; the future yields its plain result."""


class LocalCrew:
    """Carries out the steps of any number of pulls on this machine."""

    commits_in_order = True

    def __init__(self, settings: Settings, store: Store, *, fork_workers: bool = False) -> None:
        self._settings = settings
        self._store = store
        self._workers = WorkerPool(settings.worker_count(), fork=fork_workers)
        self._lock = threading.Lock()
        self._fetchers: ThreadPoolExecutor | None = None
        self._commits = Commits(settings, store, self._workers)
        self._turns = Turns()

    def start_early(self) -> None:
        """Start the worker processes before they are needed, while that is cheap."""
        self._workers.start_early()

    def submit(
        self,
        step: Step,
        image: Image,
        fetcher: Fetcher,
        report: Report,
        cancelled: Callable[[], bool],
    ) -> Future[Outcome]:
        """Start one step; see :class:`Crew`."""
        if step.kind == "commit":
            return self._commits.submit(step, report, cancelled)
        digest = str(step.descriptor.digest)
        if step.kind == "fetch":
            return self._turns.submit(
                ("fetch", digest),
                lambda tell: self._fetch(step, image, fetcher, tell, cancelled),
                report,
                cancelled,
            )
        report("layer", digest, "waiting", 0, step.descriptor.size)
        return self._turns.submit(
            ("stage", str(step.diff_id), digest),
            lambda tell: self._stage(step, tell, cancelled),
            report,
            cancelled,
        )

    def close(self) -> None:
        """End all threads and processes of the crew."""
        if self._fetchers is not None:
            self._fetchers.shutdown(wait=True, cancel_futures=True)
        self._workers.close()

    def _fetch(
        self,
        step: Step,
        image: Image,
        fetcher: Fetcher,
        report: Report,
        cancelled: Callable[[], bool],
    ) -> Future[Outcome]:
        with self._lock:
            if self._fetchers is None:
                slots = max(self._settings.registry.connections, self._workers.size)
                self._fetchers = ThreadPoolExecutor(slots, thread_name_prefix="fetch")
        return self._fetchers.submit(_fetch, fetcher, step, image, report, cancelled)

    def _stage(self, step: Step, report: Report, cancelled: Callable[[], bool]) -> Future[Outcome]:
        layer, size = str(step.descriptor.digest), step.descriptor.size
        inner = self._workers.submit(
            "stage",
            unpack_arguments(self._settings, self._store, step),
            on_progress=lambda current, total: report("layer", layer, "applying", current, total),
            cancelled=cancelled,
        )
        outer: Future[Outcome] = Future()
        outer.set_running_or_notify_cancel()

        def finish(done: Future[dict[str, Any]]) -> None:
            error = done.exception()
            if error is not None:
                outer.set_exception(error)
                return
            report("layer", layer, "applied", size, size)
            outer.set_result(Outcome(**done.result()))

        inner.add_done_callback(finish)
        return outer


class _Commit:
    """A commit on its way, and whom to tell."""

    def __init__(self, step: Step, report: Report) -> None:
        self.step = step
        self.report = report
        self.future: Future[Outcome] = Future()
        self.future.set_running_or_notify_cancel()


class _Lane:
    """The commits of one pull: who waits, and (by chain ID) what failed and was not tried again."""

    def __init__(self) -> None:
        self.waiting: list[_Commit] = []
        self.is_busy = False
        self.failed: dict[Digest | None, BaseException] = {}


class Commits:
    """Carries commits out in the order in which they come, as many in one task as are waiting.

    The commit of a small layer takes less time than handing it to a worker and hearing of its end.
    Pulls are told apart by their ``cancelled``.
    """

    def __init__(self, settings: Settings, store: Store, workers: Workers) -> None:
        self._settings = settings
        self._store = store
        self._workers = workers
        self._lock = threading.Lock()
        self._lanes: WeakKeyDictionary[Callable[[], bool], _Lane] = WeakKeyDictionary()

    def submit(self, step: Step, report: Report, cancelled: Callable[[], bool]) -> Future[Outcome]:
        """Queue a commit behind the others of its pull."""
        commit = _Commit(step, report)
        with self._lock:
            lane = self._lanes.setdefault(cancelled, _Lane())
            lane.failed.pop(step.chain_id, None)
            broken = lane.failed.get(step.parent)
            if broken is not None:
                # Sent before it was known that there will be nothing for it to stand on.
                lane.failed[step.chain_id] = broken
                commit.future.set_exception(broken)
                return commit.future
            lane.waiting.append(commit)
        self._go_on(lane, cancelled)
        return commit.future

    def _go_on(self, lane: _Lane, cancelled: Callable[[], bool]) -> None:
        with self._lock:
            if lane.is_busy or not lane.waiting:
                return
            batch, lane.waiting = lane.waiting, []
            lane.is_busy = True
        steps = [unpack_arguments(self._settings, self._store, commit.step) for commit in batch]
        task = self._workers.submit(
            "commits", {"steps": steps}, on_progress=lambda *_: None, cancelled=cancelled
        )
        task.add_done_callback(lambda done: self._finish(lane, batch, cancelled, done))

    def _finish(
        self,
        lane: _Lane,
        batch: list[_Commit],
        cancelled: Callable[[], bool],
        done: Future[dict[str, Any]],
    ) -> None:
        error = done.exception()
        if error is None:
            for commit, result in zip(batch, done.result()["results"], strict=True):
                commit.report("commit", str(commit.step.chain_id), "committed", 0, 0)
                commit.future.set_result(Outcome(**result))
            with self._lock:
                lane.is_busy = False
        else:
            with self._lock:
                batch += lane.waiting
                lane.waiting = []
                lane.failed.update((commit.step.chain_id, error) for commit in batch)
                lane.is_busy = False
            for commit in batch:
                commit.future.set_exception(error)
        self._go_on(lane, cancelled)


def unpack_arguments(settings: Settings, store: Store, step: Step) -> dict[str, Any]:
    """Return a stage or commit step as the plain arguments of a worker's task."""
    return {
        "store": str(store.path),
        "boot": [store.boot.boot_id, store.boot.host],
        "digest": str(step.descriptor.digest),
        "size": step.descriptor.size,
        "diff_id": str(step.diff_id),
        "chain_id": str(step.chain_id) if step.chain_id else None,
        "parent": str(step.parent) if step.parent else None,
        "limits": {
            "entries": settings.unpack.max_entries,
            "unpacked_size": settings.unpack.max_unpacked_bytes,
            "layer_size": settings.unpack.max_layer_bytes,
        },
    }


def _fetch(
    fetcher: Fetcher,
    step: Step,
    image: Image,
    report: Report,
    cancelled: Callable[[], bool],
) -> Outcome:
    fetched = fetcher.fetch(image.reference, step.descriptor, report=report, cancelled=cancelled)
    return Outcome(
        source=fetched.source, fetched_bytes=fetched.fetched_bytes, seconds=fetched.seconds
    )
