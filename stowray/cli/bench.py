"""``stowray bench``: how long pulls take here, stage by stage."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stowray.cli.context import command
from stowray.cli.observe import OUTPUT_FILE, metrics_option, observe_bench

if TYPE_CHECKING:
    from stowray.bench_runs import Mode
    from stowray.cli.context import Context
    from stowray.log import Log
    from stowray.pipeline.run_record import Run, RunRecord

_IN = click.Path(dir_okay=False, exists=True, path_type=Path)


@command("bench", short_help="Measure pulls, stage by stage; compare registries or records.")
@click.argument("references", metavar="[REF...]", nargs=-1)
@click.option(
    "--runs",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="How often each REF is pulled, per mode.",
)
@click.option("--cold", is_flag=True, help="Only into empty stores.")
@click.option("--warm", is_flag=True, help="Only where everything is here already.")
@click.option("--disk", metavar="DIR", help="Where the stores are made; default: beside --store.")
@click.option("--record", metavar="FILE", type=OUTPUT_FILE, help="Keep all figures in FILE.")
@click.option("--html", metavar="FILE", type=OUTPUT_FILE, help="Also draw the figures into FILE.")
@metrics_option
@click.option(
    "--compare",
    nargs=2,
    metavar="A B",
    type=_IN,
    help="Measure nothing: compare two records, B to A; --html draws it.",
)
def bench_command(
    context: Context,
    references: tuple[str, ...],
    runs: int,
    cold: bool,
    warm: bool,
    disk: str | None,
    record: Path | None,
    html: Path | None,
    metrics: Path | None,
    compare: tuple[Path, Path] | None,
) -> int:
    """Pull each REF several times and show how long each stage took: median, lowest, highest.

    Cold pulls go into empty stores beside yours, on the same disk, and are removed; warm ones
    follow in the same store. Every pull is a process of its own, so that "process" is what you
    wait for. Several REFs take turns: give one image at two registries to compare these.
    """
    from stowray.pipeline.errors import UsageError
    from stowray.pipeline.source import parse_source

    if compare is not None:
        if references:
            raise UsageError("bench", "give REFs to measure, or --compare A B, not both")
        if cold or warm or disk or record or metrics:
            raise UsageError("bench", "with --compare A B nothing is measured: only --html goes")
        return _compare(context, *compare, html)
    if not references:
        raise UsageError("bench", "give at least one REF, or --compare A B")
    references = tuple(dict.fromkeys(parse_source(text).canonical for text in references))
    modes: list[Mode] = [mode for mode, only in (("cold", cold), ("warm", warm)) if only]  # type: ignore[misc]
    measured = _measure(context, references, runs, modes or ["cold", "warm"], disk)
    if record is not None:
        measured.write(record)
    if html is not None:
        from stowray.bench_html import bench_page

        _write_page(bench_page(measured), html)
    observe_bench(context, measured, metrics)
    return _answer(context, measured, len(references))


def _measure(
    context: Context,
    references: tuple[str, ...],
    runs: int,
    modes: list[Mode],
    disk: str | None,
) -> RunRecord:
    from stowray.bench_runs import BenchRuns

    store = context.store_path()
    with BenchRuns(
        store,
        context.pass_on(),
        disk=Path(disk).absolute() if disk else None,
        tell=partial(_say_run, context.log),
    ) as bench:
        bench.measure(references, runs, modes)
        return bench.record(
            {
                "references": list(references),
                "runs": runs,
                "modes": list(modes),
                "engine": context.settings.engine,
            }
        )


def _answer(context: Context, record: RunRecord, references: int) -> int:
    from stowray import bench_text
    from stowray.pipeline.bench_summary import compared, summarise

    summaries = summarise(record)
    for summary in summaries:
        if context.json:
            print(json.dumps(summary.to_dict()))  # noqa: T201
        else:
            print(bench_text.summary_text(summary))  # noqa: T201
    if not context.json:
        for mode in dict.fromkeys(summary.mode for summary in summaries):
            good = [s for s in summaries if s.mode == mode and s.runs]
            for other in good[1:]:
                print(bench_text.comparison_text(compared(good[0], other)))  # noqa: T201
    errors = {s.reference: s.error for s in summaries if s.error is not None}
    for reference, error in errors.items():
        told = {"type": error.get("type"), "exit_code": error.get("exit_code")}
        context.log(
            "error", "failed", f"{reference}: {error['message']}", reference=reference, **told
        )
    if errors and references == 1:
        return int(next(iter(errors.values())).get("exit_code", 1))
    return 1 if errors else 0


def _compare(context: Context, first: Path, second: Path, html: Path | None) -> int:
    from stowray import bench_text
    from stowray.pipeline.bench_summary import compare
    from stowray.pipeline.errors import UsageError
    from stowray.pipeline.run_record import RunRecord

    records = RunRecord.read(first), RunRecord.read(second)
    comparisons = compare(*records)
    if not comparisons:
        raise UsageError(f"{first} and {second}", "no successful runs of one mode in both")
    if not context.json:
        print(bench_text.machines_text(*(record.machine for record in records)))  # noqa: T201
    for comparison in comparisons:
        if context.json:
            print(json.dumps(comparison.to_dict()))  # noqa: T201
        else:
            print(bench_text.comparison_text(comparison))  # noqa: T201
    if html is not None:
        from stowray.bench_html import comparison_page

        _write_page(comparison_page(*records), html)
    return 0


def _write_page(page: str, path: Path) -> None:
    from stowray.pipeline.files import replace_file, translated
    from stowray.pipeline.run_record import file_mode

    with translated(path, "write the page"):
        replace_file(path, page.encode(), mode=file_mode())


def _say_run(log: Log, run: Run) -> None:
    from stowray.text import seconds_text

    end = "failed" if run.error else seconds_text(run.seconds)
    log(
        "warning" if run.error else "info",
        "bench.failed" if run.error else "bench.done",
        f"{run.reference}: {run.mode} {run.number}: {end}",
        reference=run.reference,
        mode=run.mode,
        number=run.number,
        seconds=round(run.seconds, 6),
    )
