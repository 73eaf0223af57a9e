"""What a command leaves behind besides its answer: a run record, metrics, spans.

Invariant: what is observed never changes how the work ends; a file that cannot be written is an
error of its own, told after the work's answers.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stowray.pipeline.errors import StowrayError, UsageError, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stowray.cli.context import Context
    from stowray.cli.work import Work
    from stowray.metrics import Metrics
    from stowray.pipeline.prewarm_report import PrewarmReport
    from stowray.pipeline.result import PullResult
    from stowray.pipeline.run_record import Recorder, Run, RunRecord


class OutputFile(click.Path):
    """A file to write when the work is done: that there is no place for it is known before."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path; a usage error where its directory does not exist."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        if not path.absolute().parent.is_dir():
            self.fail(f"{path}: its directory does not exist", param, ctx)
        return path


OUTPUT_FILE = OutputFile()


def observe_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that an :class:`Observer` carries out."""
    function = metrics_option(function)
    # For `bench`, whose pulls are not to add to what the settings say.
    function = click.option("--no-metrics", is_flag=True, hidden=True)(function)
    return click.option(
        "--record", metavar="FILE", type=OUTPUT_FILE, help="Keep a run record for `stowray trace`."
    )(function)


class Observer:
    """Watches one command's pulls; does nothing at all unless something was asked for."""

    def __init__(
        self,
        context: Context,
        kind: str,
        *,
        record: Path | None,
        metrics: Path | None,
        no_metrics: bool = False,
    ) -> None:
        self._context = context
        self._kind = kind
        self._record = record
        self._metrics_path = None if no_metrics else metrics_path(context, metrics)
        self._metrics: Metrics | None = None
        self._lock = threading.Lock()
        self._runs: list[Run] = []
        self._recorder: Recorder | None = None

    @property
    def is_needed(self) -> bool:
        """Return whether anything was asked for."""
        return self._record is not None or self._metrics_path is not None or spans_wanted()

    def watch(self, work: Work) -> None:
        """Follow the progress of ``work`` from its beginning."""
        if self.is_needed:
            from stowray.pipeline.run_record import Recorder

            self._recorder = Recorder()
            work.watchers.append(self._recorder)
        if self._metrics_path is not None:
            from stowray.metrics import Metrics

            self._metrics = Metrics()
            work.watchers.append(self._metrics.watch)

    def observed(
        self, pull: Callable[[str, Callable[[], bool]], Sequence[PullResult]]
    ) -> Callable[[str, Callable[[], bool]], Sequence[PullResult]]:
        """Return ``pull`` so that its results and errors are noted too."""
        if self._recorder is None:
            return pull
        recorder = self._recorder

        def observed(reference: str, cancelled: Callable[[], bool]) -> Sequence[PullResult]:
            from stowray.pipeline.run_record import Run

            started = recorder.now()
            results: Sequence[PullResult] = ()
            error: dict[str, Any] | None = None
            try:
                results = pull(reference, cancelled)
            except StowrayError as failure:
                error = {**describe(failure), "exit_code": failure.exit_code}
                raise
            finally:
                seconds = recorder.now() - started
                told: list[dict[str, Any] | None] = [result.to_dict() for result in results]
                if error is not None:
                    told.append(None)
                with self._lock:
                    self._runs += [
                        Run(reference, "pull", number, started, seconds, result, error)
                        for number, result in enumerate(told, 1)
                    ]
            return results

        return observed

    def finish(self, work: Work) -> None:
        """Write what was asked for, after the work and its display have ended."""
        recorder = self._recorder
        if recorder is None:
            return
        # Also what ended before anybody watched: a pull that finds everything starts no display.
        recorder(work.progress.events())
        if self._record is not None:
            self._write_record(recorder, self._record)
        if self._metrics is not None and self._metrics_path is not None:
            self._write_metrics(self._metrics, self._metrics_path, work)
        if spans_wanted():
            from stowray.spans import export

            _sent(self._context, lambda: export(self._finished(recorder), recorder.started))

    def _write_metrics(self, metrics: Metrics, path: Path, work: Work) -> None:
        metrics.watch(work.progress.events())
        for run in self._runs:
            if run.result is not None:
                metrics.pulled(run.result)
            if run.error is not None:
                metrics.failed(str(run.error["type"]))
        metrics.measure(work.engine.store)
        metrics.write(path)

    def _finished(self, recorder: Recorder) -> list[Run]:
        """Return the runs with what was seen of each."""
        from dataclasses import replace

        runs = []
        seen: set[str] = set()
        for run in self._runs:
            name = _canonical(run.reference)
            # The platforms of one index are worked on as one.
            spans = () if name in seen else recorder.spans(name)
            seen.add(name)
            runs.append(replace(run, reference=name, spans=spans))
        return runs

    def _write_record(self, recorder: Recorder, path: Path) -> None:
        from stowray import __version__
        from stowray.pipeline.run_record import RunRecord, machine

        runs = self._finished(recorder)
        options = {"engine": self._context.settings.engine}
        record = RunRecord(
            self._kind, __version__, recorder.started, machine(), options, tuple(runs)
        )
        record.write(path)


def metrics_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the option of a file with figures."""
    return click.option(
        "--metrics",
        metavar="FILE",
        type=OUTPUT_FILE,
        help="Add up figures in FILE, for Prometheus.",
    )(function)


def metrics_path(context: Context, given: Path | None) -> Path | None:
    """Return where figures go: what was ``given``, else what the settings say."""
    named = context.settings.metrics
    return given or (Path(named) if named else None)


def observe_run(context: Context, report: PrewarmReport, metrics: Path | None) -> None:
    """Write the figures and send the spans of a pre-warm run that has ended."""
    path = metrics_path(context, metrics)
    if path is not None:
        from stowray.metrics import Metrics
        from stowray.metrics_run import count_run

        figures = Metrics()
        count_run(figures, report)
        figures.write(path)
    if spans_wanted():
        from stowray.spans_run import export_run

        _sent(context, lambda: export_run(report))


def observe_bench(context: Context, record: RunRecord, metrics: Path | None) -> None:
    """Write the figures and send the spans of a benchmark."""
    path = metrics_path(context, metrics)
    if path is not None:
        from stowray.metrics import Metrics
        from stowray.metrics_run import count_bench

        figures = Metrics()
        count_bench(figures, record)
        figures.write(path)
    if spans_wanted():
        from stowray.spans import export_bench

        _sent(context, lambda: export_bench(record))


def _sent(context: Context, export: Callable[[], None]) -> None:
    """Export spans; the variables may be a whole cluster's: they must not fail its work."""
    try:
        export()
    except UsageError as error:
        context.log("warning", "spans", f"no spans were sent: {error}")


def spans_wanted() -> bool:
    """Return whether the environment asks for spans; costs nothing where it does not."""
    if not any(name.startswith("OTEL_") for name in os.environ):
        return False
    from stowray.spans import wanted

    return wanted(os.environ)


def _canonical(text: str) -> str:
    from stowray.pipeline.source import parse_source

    try:
        return parse_source(text).canonical
    except StowrayError:
        return text
