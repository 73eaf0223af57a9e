"""A pre-warm run with what shows it, for the time of one command."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

    from stowray.cli.context import Context
    from stowray.job import Run
    from stowray.pipeline.prewarm_plan import PrewarmPlan
    from stowray.pipeline.prewarm_report import PrewarmReport
    from stowray.pipeline.progress import Progress
    from stowray.prewarm_log import PrewarmLog
    from stowray.ui import LiveUi


class Running:
    """A run with a display, for the time of one command.

    With ``ui`` the run is shown live in browsers that open the address which is told on stderr.
    Ctrl-C (or SIGTERM) once cancels it and waits for its report, twice leaves at once.
    ``reached`` is the report so far; None while nothing is known.
    """

    def __init__(self, context: Context, *, ui: str | None = None) -> None:
        from stowray.pipeline.progress import Progress
        from stowray.prewarm_view import Display

        # Before anything begins: an address that cannot be had is the user's to change.
        self._ui = _live_ui(context, ui)

        self._context = context
        self._interrupted = threading.Event()
        self._handlers: dict[int, Any] = {}
        self.progress: Progress = Progress()
        # With a log of JSON lines a display is shown when it was asked for only.
        usual = "none" if context.log.as_json else "auto"
        mode = "none" if context.value("quiet") else context.value("progress", usual)
        self._display = Display(self.progress, mode, sys.stderr)
        self._log = _log(context)
        if self._log is not None:
            self.progress.watch(self._log.events)
        self._run: Run | None = None
        self.reached: PrewarmReport | None = None
        if self._ui is not None:
            self.progress.watch(self._ui.see)

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *details: object) -> None:
        try:
            if self._run is not None:
                self._run.close()
        finally:
            self.progress.close()
            self._display.close()
            if self._ui is not None:
                self._ui.close(_reason(details[1] if details else None))
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def make(self, plan: PrewarmPlan, file: Path | None, lock: Path | None, *, watch: bool) -> Run:
        """Return the run of ``plan``; it is closed when this is left."""
        from stowray.actors.connect import passed_over
        from stowray.job import make_run

        other = passed_over(self._context.settings)
        if other:
            self._context.log(
                "warning",
                "address",
                f"a Ray runs here at {other} and is not used: --address auto takes its nodes",
                address=other,
            )
        return self.take(
            make_run(
                plan,
                self._context.settings,
                progress=self.progress,
                lock=lock or plan.lock_path(file),
                watch=watch,
            )
        )

    def take(self, run: Run) -> Run:
        """Show ``run``, which reports to :attr:`progress`, and close it when this is left."""
        self._run = run
        run.on_change = self._report
        return run

    def _report(self, report: PrewarmReport) -> None:
        self.reached = report
        self._display.report(report)
        if self._log is not None:
            self._log.report(report)
        if self._ui is not None:
            self._ui.take(report)

    def cancelled(self) -> bool:
        """Return whether the user has interrupted the command."""
        return self._interrupted.is_set()

    def _interrupt(self, _signal: int, _frame: FrameType | None) -> None:
        if self._interrupted.is_set():
            # Asked twice: leave now. The actors end with their driver; stores are resumable.
            os._exit(130)
        self._interrupted.set()
        os.write(2, b"stowray: stopping; what was fetched is kept (again to leave at once)\n")


def _live_ui(context: Context, listen: str | None) -> LiveUi | None:
    """Begin the live page at ``listen`` and tell its address; also with ``-q``, nobody else can."""
    if listen is None:
        return None
    from stowray.log import Log
    from stowray.ui import LiveUi

    ui = LiveUi(listen)
    ui.start()
    log = Log(as_json=bool(context.value("log_json")))
    log("info", "ui", f"live page at {ui.url}", url=ui.url)
    if not ui.is_loopback:
        log(
            "warning",
            "open",
            "the live page goes over the network unencrypted: whoever sees its address can watch",
        )
    return ui


def _log(context: Context) -> PrewarmLog | None:
    if not context.log.as_json:
        return None
    from stowray.prewarm_log import PrewarmLog

    return PrewarmLog(context.log)


def _reason(error: object) -> str:
    """Return what is to stand on the page of a run that ended without a report."""
    return "" if error is None else (str(error) or type(error).__name__)
