"""``stowray prewarm``, ``status`` and ``plan -f``: all images on all selected nodes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from stowray.cli.context import command
from stowray.cli.observe import metrics_option, observe_run
from stowray.cli.running import Running
from stowray.pipeline.errors import StowrayError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stowray.cli.context import Context
    from stowray.pipeline.prewarm_plan import PrewarmPlan
    from stowray.pipeline.prewarm_report import PrewarmReport

REPORT_KINDS: Final = (".html", ".json")
# So long is no number that a plan has.
_DIGITS = 19
_FILE = click.option(
    "-f", "--file", type=click.Path(path_type=Path), metavar="FILE", help="A plan (TOML)."
)
_LOCK = click.option(
    "--lock",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Lock file: what a tag named, written and honoured.",
)
_REPORT = click.option(
    "--report",
    "reports",
    type=click.Path(path_type=Path),
    metavar="FILE.html|.json",
    multiple=True,
    help="Write a report; repeatable.",
)
_SELECTION: Final = (
    click.option(
        "--nodes",
        metavar="PATTERN",
        multiple=True,
        help="Only nodes of this name, ID or address; * ? [...] as in a shell. Repeatable.",
    ),
    click.option(
        "--label",
        "labels",
        metavar="KEY=VALUE",
        multiple=True,
        help="Only nodes with this Ray label; the same key again: either value.",
    ),
    click.option(
        "--resource",
        "resources",
        metavar="NAME[=AMOUNT]",
        multiple=True,
        help="Only nodes with this Ray resource.",
    ),
    click.option("--exclude-head", is_flag=True, help="Not the node of the Ray head."),
)
_LIMITS: Final = (
    click.option("--nodes-at-once", type=click.IntRange(0), metavar="N", help="0: all."),
    click.option(
        "--origin-connections",
        type=click.IntRange(1),
        metavar="N",
        help="To the registry, from all nodes together.",
    ),
    click.option(
        "--fan-out", type=click.IntRange(1), metavar="N", help="Nodes that one node sends to."
    ),
    click.option(
        "--bandwidth", metavar="RATE", help="What one node receives: 200MB/s, or bytes per second."
    ),
    click.option("--waves", metavar="N,N%,...", help="How many nodes first: 1,10%,100%."),
    click.option("--min-ready", metavar="PERCENT", help="Ready nodes that are enough (100%)."),
    click.option("--tries", type=click.IntRange(1), metavar="N", help="Per image and node (3)."),
    click.option("--node-timeout", type=float, metavar="SECONDS", help="Per image and node."),
    click.option("--deadline", type=float, metavar="SECONDS", help="For the whole run."),
    click.option(
        "--deliver",
        type=click.Choice(["containerd", "podman", "docker"]),
        multiple=True,
        help="Hand each image to this runtime on each node. Repeatable.",
    ),
)


def _several(options: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


# What a run and its dry run are told alike.
RUN_OPTIONS: Final = _several((_LOCK, *_SELECTION, *_LIMITS))


@command("prewarm", short_help="Bring images to every node of a Ray cluster.")
@click.argument("references", metavar="[REF...]", nargs=-1)
@_FILE
@click.option("--watch", is_flag=True, help="Go on, and warm nodes that join, until interrupted.")
@_LOCK
@_REPORT
@click.option(
    "--receipts",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write what each node got to DIR/<node>.json.",
)
@click.option(
    "--ui",
    metavar="HOST:PORT",
    help="Show the run live in a browser; HOST left out: this machine only, PORT 0: a free one.",
)
@metrics_option
@_several(_SELECTION)
@_several(_LIMITS)
def prewarm_command(
    context: Context,
    references: tuple[str, ...],
    file: Path | None,
    watch: bool,
    lock: Path | None,
    reports: tuple[Path, ...],
    receipts: Path | None,
    ui: str | None,
    metrics: Path | None,
    **options: Any,
) -> int:
    """Fetch, verify and unpack images on every selected node, downloading each byte once.

    One node reads a byte from the registry, the others get it from nodes. REF is an image
    reference; FILE is a plan with images, nodes, limits, waves and deliveries. Without --address
    the Ray of this program, of RAY_ADDRESS, of a session, or one on this machine is used.
    """
    plan = _plan(context, references, file, options)
    outputs = Outputs(reports, receipts)
    with Running(context, ui=ui) as running:
        run = running.make(plan, file, lock, watch=watch)
        try:
            report = run.run(running.cancelled)
        except StowrayError:
            # The cluster's head is dead, say: how far it got is worth knowing all the more.
            if running.reached is not None:
                outputs.write(running.reached)
            raise
    code = tell(context, report, outputs)
    observe_run(context, report, metrics)
    return code


@command("status", short_help="Show which node has which images, checked on disk.")
@click.argument("references", metavar="[REF...]", nargs=-1)
@_FILE
@click.option("--repair", is_flag=True, help="Bring what is missing, from other nodes if possible.")
@_LOCK
@_REPORT
@_several(_SELECTION)
def status_command(
    context: Context,
    references: tuple[str, ...],
    file: Path | None,
    repair: bool,
    lock: Path | None,
    reports: tuple[Path, ...],
    **options: Any,
) -> int:
    """Look on every selected node whether images are there, blobs and snapshots, on disk."""
    plan = _plan(context, references, file, options)
    outputs = Outputs(reports, None)
    with Running(context) as running:
        report = running.make(plan, file, lock, watch=False).status(repair, running.cancelled)
    return tell(context, report, outputs)


def plan_file(
    context: Context,
    file: Path,
    references: Sequence[str],
    lock: Path | None,
    options: dict[str, Any],
) -> int:
    """Print what a pre-warm run of the plan in ``file`` would do, and return the exit status.

    ``options`` are those of :func:`RUN_OPTIONS`; they win over the file.
    """
    plan = _plan(context, references, file, options)
    with Running(context) as running:
        dry = running.make(plan, file, lock, watch=False).plan(running.cancelled)
    from stowray.prewarm_text import failures, plan_text

    if context.json:
        total = {"reference": None, "node": None, "plan": dry.to_dict()}
        for result in (*dry.results(), total):
            print(json.dumps(result))  # noqa: T201
    else:
        print("\n".join(plan_text(dry)))  # noqa: T201
    # With a log of JSON lines they have been told as they came.
    for line in () if context.log.as_json else failures(dry.report):
        print(f"stowray: {line}", file=sys.stderr)  # noqa: T201
    return dry.exit_code


class Outputs:
    """The files that a command is to write; checked before the work begins."""

    def __init__(self, reports: Sequence[Path], receipts: Path | None) -> None:
        from stowray.pipeline.errors import UsageError

        for path in reports:
            if path.suffix.lower() not in REPORT_KINDS:
                raise UsageError(str(path), f"a report ends in {' or '.join(REPORT_KINDS)}")
            if not path.absolute().parent.is_dir():
                raise UsageError(str(path), "its directory does not exist")
        self._reports = reports
        self._receipts = receipts

    def write(self, report: PrewarmReport) -> None:
        """Write all of them."""
        from stowray.pipeline.files import replace_file, translated

        for path in self._reports:
            if path.suffix.lower() == ".json":
                text = json.dumps(report.to_dict(), indent=2)
            else:
                from stowray.html_report import html_report

                text = html_report(report)
            with translated(path, "write the report"):
                replace_file(path, f"{text}\n".encode(errors="backslashreplace"), mode=0o644)
        if self._receipts is not None:
            with translated(self._receipts, "write the receipts"):
                self._receipts.mkdir(parents=True, exist_ok=True)
            for node in report.nodes:
                path = self._receipts / f"{_file_name(node.name)}.json"
                body = json.dumps(report.receipt(node.name), indent=2)
                with translated(path, "write a receipt"):
                    replace_file(path, f"{body}\n".encode(), mode=0o644)


def tell(context: Context, report: PrewarmReport, outputs: Outputs) -> int:
    """Print the answer and what people want to know, write the files, return the exit status."""
    from stowray.prewarm_text import failures, summary, who_has_what

    outputs.write(report)
    width = max(60, shutil.get_terminal_size().columns)
    table = who_has_what(report, width)
    if context.json:
        for result in report.results():
            print(json.dumps(result))  # noqa: T201
    elif report.command == "status":
        print("\n".join(table))  # noqa: T201
    else:
        for image in report.images:
            if image.resolved:
                print(f"{image.reference.partition('@')[0]}@{image.resolved}")  # noqa: T201
    if context.log.as_json:
        from stowray.prewarm_log import log_end

        log_end(context.log, report)
        return report.exit_code
    said = [] if context.value("quiet") else summary(report)
    if not context.value("quiet") and (context.json or report.command != "status"):
        said = [*table, *said]
    for line in said:
        print(line, file=sys.stderr)  # noqa: T201
    for line in failures(report):
        print(f"stowray: {line}", file=sys.stderr)  # noqa: T201
    return report.exit_code


def _plan(
    context: Context, references: Sequence[str], file: Path | None, options: dict[str, Any]
) -> PrewarmPlan:
    from stowray.pipeline.prewarm_plan_file import load_plan, wishes

    if not references and file is None:
        raise click.UsageError("name at least one REF, or a plan with -f FILE")
    platform = context.value("platform")
    entries = wishes(references, [platform] if platform else [])
    return load_plan(file, references=entries, overrides=_overrides(options))


def _overrides(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options as keys of a plan file."""
    labels: dict[str, list[str]] = {}
    for text in options.get("labels", ()):
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--label")
        labels.setdefault(key, []).append(value)
    resources: dict[str, float] = {}
    for text in options.get("resources", ()):
        name, equals, amount = text.partition("=")
        try:
            # Without an amount any will do; Ray counts in ten-thousandths.
            resources[name] = float(amount) if equals else 0.0001
        except ValueError:
            raise click.BadParameter(
                f"{text!r} is not NAME or NAME=AMOUNT", param_hint="--resource"
            ) from None
    waves: list[int | str] = []
    for text in (options.get("waves") or "").split(","):
        if text.strip():
            # What is longer is no number of nodes, which the plan's own check says.
            is_count = text.strip().isdecimal() and len(text.strip()) < _DIGITS
            waves.append(int(text) if is_count else text.strip())
    least = options.get("min_ready")
    return {
        "nodes.names": list(options.get("nodes", ())),
        "nodes.labels": labels,
        "nodes.resources": resources,
        "nodes.exclude_head": options.get("exclude_head") or None,
        "limits.nodes_at_once": options.get("nodes_at_once"),
        "limits.origin_connections": options.get("origin_connections"),
        "limits.fan_out": options.get("fan_out"),
        "limits.bandwidth": _number_or_text(options.get("bandwidth")),
        "failure.tries": options.get("tries"),
        "failure.node_timeout_seconds": options.get("node_timeout"),
        "failure.deadline_seconds": options.get("deadline"),
        "failure.minimum_ready": _number_or_text(least),
        "waves": waves,
        "deliver": list(options.get("deliver", ())),
    }


def _number_or_text(text: str | None) -> float | int | str | None:
    if text is None:
        return None
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        return text


def _file_name(node: str) -> str:
    """Return a file name for a node's name, which somebody else chose."""
    from urllib.parse import quote

    return quote(node, safe="").replace(".", "%2E", 1) if node.startswith(".") else quote(node, "")
