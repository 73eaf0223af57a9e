"""Run work that shows progress and can be interrupted, for one reference or several.

Invariant: Ctrl-C (or SIGTERM) once cancels and waits for the work to put things in order, twice
leaves at once; each reference ends in an answer on stdout or an error, never in silence.
"""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Self

from stowray.cli.app import fail
from stowray.pipeline.errors import CancelledError, StowrayError
from stowray.pipeline.files import raise_descriptor_limit
from stowray.pipeline.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType

    from stowray.cli.context import Context
    from stowray.pipeline.engine import LocalEngine
    from stowray.pipeline.progress import Event

PARALLEL = 4
POLL_SECONDS = 0.2


class Work:
    """An engine with a display, for the time of one command."""

    def __init__(self, context: Context, *, forks: bool = True) -> None:
        raise_descriptor_limit()
        self._context = context
        self._interrupted = threading.Event()
        self._handlers: dict[int, Any] = {}
        self.progress = Progress(node=context.settings.node_name)
        # Told of progress beside the display; like it, only from when the workers are forked.
        self.watchers: list[Callable[[Sequence[Event]], None]] = []
        self.engine: LocalEngine = context.engine(self.progress, fork_workers=forks)
        self._warnings: list[str] = []
        self._end_display: Callable[[], None] = _nothing
        self.engine.on_warning = self._warnings.append
        self.engine.is_last = True

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *details: object) -> None:
        self.engine.close()
        self.progress.close()
        self._end_display()
        log = self._context.log
        for text in self._warnings:
            log("warning", "warning", text if log.as_json else f"warning: {text}")
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def cancelled(self) -> bool:
        """Return whether the user has interrupted the command."""
        return self._interrupted.is_set()

    def _start_display(self) -> None:
        """Show progress on stderr as the options say."""
        from stowray.display import attach

        for watcher in self.watchers:
            self.progress.watch(watcher)
        log = self._context.log
        if log.as_json:
            from stowray.log import LogLines

            if log.says("warning"):
                self.progress.watch(LogLines(log))
            if self._context.value("progress") is None:
                return
        self._end_display = attach(
            self.progress,
            "none" if self._context.value("quiet") else self._context.value("progress", "auto"),
        )

    def each(
        self,
        references: Sequence[str],
        work: Callable[[str, Callable[[], bool]], Any],
        show: Callable[[Any], None],
    ) -> int:
        """Do ``work`` for each reference, ``show`` each answer in order, return the exit status.

        A single reference is worked on in this thread; several side by side.
        """
        self.engine.on_begin = self._start_display
        if len(references) == 1:
            only = references[0]
            return self._answer(only, lambda: work(only, self.cancelled), show, last=True)
        self.engine.begin()
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="pull") as pool:
            futures = [pool.submit(work, reference, self.cancelled) for reference in references]
            statuses = [
                self._answer(reference, _waiting(future), show)
                for reference, future in zip(references, futures, strict=True)
            ]
        if self.cancelled():
            return 130
        return 1 if any(statuses) else 0

    def _answer(
        self,
        reference: str,
        get: Callable[[], Any],
        show: Callable[[Any], None],
        *,
        last: bool = False,
    ) -> int:
        try:
            answer = get()
        except StowrayError as error:
            self._told(last=last)
            if self.cancelled() and not isinstance(error, CancelledError):
                error = CancelledError(reference)
            return fail(error, self._context, reference)
        self._told(last=last)
        show(answer)
        return 0

    def _told(self, *, last: bool) -> None:
        """Show progress up to now; the ``last`` answer stands below a picture that is done."""
        self.progress.flush()
        if last:
            self._end_display()

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        if self._interrupted.is_set():
            # Asked twice: leave now. Workers see our sockets close; the store is resumable.
            os._exit(130)
        self._interrupted.set()
        os.write(2, b"stowray: stopping; what was fetched is kept (again to leave at once)\n")


def _nothing() -> None:
    """Do nothing: the end of a display that was never begun."""


def _waiting(future: Future[Any]) -> Callable[[], Any]:
    """Wait in short steps: a signal is only handled between two waits of the main thread."""

    def get() -> Any:
        while not wait([future], timeout=POLL_SECONDS, return_when=FIRST_COMPLETED).done:
            continue
        return future.result()

    return get
