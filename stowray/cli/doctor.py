"""``stowray doctor``: what would keep a pull from working here, and what to do about it."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

import click

from stowray.cli.context import command
from stowray.cli.observe import metrics_option, metrics_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stowray.cli.context import Context
    from stowray.doctor import Finding

_MARKS = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "problem": ("problem", "red")}


@command("doctor", short_help="Check machine, store, registries and cluster; say what to do.")
@click.argument("references", metavar="[REF|REGISTRY...]", nargs=-1)
@metrics_option
def doctor_command(context: Context, references: tuple[str, ...], metrics: Path | None) -> int:
    """Try what a pull needs, here and now, and say for each thing what to do if it is amiss.

    With REF or REGISTRY (ghcr.io, 10.0.0.5:5000) these are asked too, with --address every node of
    the Ray cluster. Logins are named by file and registry and never shown. Exits with 1 when there
    is a problem; warnings exit with 0.
    """
    worst = 0
    findings = []
    for finding in _findings(context, references):
        findings.append(finding)
        if finding.state == "problem":
            worst = 1
        if context.json:
            print(json.dumps(finding.to_dict()), flush=True)  # noqa: T201
        elif not context.value("quiet") or finding.state != "ok":
            click.echo(_line(finding), color=_colours())
    path = metrics_path(context, metrics)
    if path is not None:
        from stowray.metrics import Metrics
        from stowray.metrics_run import count_findings

        figures = Metrics()
        count_findings(figures, findings)
        figures.write(path)
    return worst


def _findings(context: Context, references: tuple[str, ...]) -> Iterator[Finding]:
    from stowray import doctor, doctor_remote

    settings = context.settings
    yield doctor.examine_program()
    yield from doctor.examine_machine(settings.store_path())
    yield from doctor_remote.examine_credentials(settings)
    yield from doctor_remote.examine_references(settings, references)
    yield from doctor_remote.examine_ray(settings)


def _line(finding: Finding) -> str:
    word, colour = _MARKS[finding.state]
    lines = f"{click.style(f'{word:<8}', fg=colour)}{finding.check}: {finding.found}"
    if finding.advice:
        lines += f"\n{'':8}→ {finding.advice}"
    return lines


def _colours() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
