"""The local crew: fetch threads and staging processes of this machine.

Invariant: steps start in the order in which they were submitted; there are at least as many fetch
slots as staging slots, so that a stage never holds a worker for a fetch that has not begun.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from stowray.pipeline.run import Outcome
from stowray.pipeline.workers import WorkerPool

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.fetch import Fetcher
    from stowray.pipeline.image import Image
    from stowray.pipeline.plan import Step
    from stowray.pipeline.progress import Report
    from stowray.pipeline.settings import Settings
    from stowray.pipeline.store import Store


class Crew(Protocol):
    """Those who carry out the steps of plans; an engine has one."""

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


class LocalCrew:
    """Carries out the steps of any number of pulls on this machine."""

    def __init__(self, settings: Settings, store: Store, *, fork_workers: bool = False) -> None:
        self._settings = settings
        self._store = store
        self._workers = WorkerPool(settings.worker_count(), fork=fork_workers)
        self._fetchers: ThreadPoolExecutor | None = None

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
        if step.kind == "fetch":
            if self._fetchers is None:
                slots = max(self._settings.registry.connections, self._workers.size)
                self._fetchers = ThreadPoolExecutor(slots, thread_name_prefix="fetch")
            return self._fetchers.submit(_fetch, fetcher, step, image, report, cancelled)
        return self._unpack(step, report, cancelled)

    def close(self) -> None:
        """End all threads and processes of the crew."""
        if self._fetchers is not None:
            self._fetchers.shutdown(wait=True, cancel_futures=True)
        self._workers.close()

    def _unpack(self, step: Step, report: Report, cancelled: Callable[[], bool]) -> Future[Outcome]:
        descriptor = step.descriptor
        layer = str(descriptor.digest)
        if step.kind == "stage":
            kind, id, final = "layer", layer, "applied"
            report(kind, id, "waiting", 0, descriptor.size)
        else:
            kind, id, final = "commit", str(step.chain_id), "committed"

        def on_progress(current: int, total: int) -> None:
            if step.kind == "stage":
                report(kind, id, "applying", current, total)

        inner = self._workers.submit(
            step.kind,
            unpack_arguments(self._settings, self._store, step),
            on_progress=on_progress,
            cancelled=cancelled,
        )
        outer: Future[Outcome] = Future()
        outer.set_running_or_notify_cancel()

        def finish(done: Future[dict[str, Any]]) -> None:
            error = done.exception()
            if error is not None:
                outer.set_exception(error)
                return
            size = descriptor.size if step.kind == "stage" else 0
            report(kind, id, final, size, size)
            outer.set_result(Outcome(**done.result()))

        inner.add_done_callback(finish)
        return outer


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
