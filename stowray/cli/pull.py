"""``stowray pull``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from stowray.cli.context import command
from stowray.cli.observe import Observer, observe_options

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from stowray.cli.context import Context
    from stowray.pipeline.engine import LocalEngine, PullOptions
    from stowray.pipeline.result import PullResult

PARALLEL_PULLS = 4


@command("pull", short_help="Fetch, verify and unpack images.")
@click.argument("references", metavar="REF...", nargs=-1, required=True)
@click.option("--no-unpack", is_flag=True, help="Content only, no root filesystem.")
@click.option(
    "--policy",
    type=click.Choice(["newer", "missing", "always", "never"]),
    help="When to ask the registry (default: newer, a tag is resolved again).",
)
@click.option("--all-platforms", is_flag=True, help="Content of every platform, not unpacked.")
@click.option("--sync", is_flag=True, help="Return only when all is safe from a power cut.")
@click.option("--offline", is_flag=True, help="The same as --policy never.")
@observe_options
def pull_command(
    context: Context,
    references: tuple[str, ...],
    no_unpack: bool,
    policy: str | None,
    all_platforms: bool,
    sync: bool,
    offline: bool,
    record: Path | None,
    metrics: Path | None,
    no_metrics: bool,
) -> int:
    """Fetch images, verify them and unpack them into the store.

    REF is a Docker/OCI reference (debian:12, host:5000/app@sha256:…) or an image on disk:
    oci:DIR[:NAME], oci-archive:FILE[:NAME], docker-archive:FILE[:NAME].
    """
    from stowray.pipeline.engine import PullOptions

    settings = context.settings
    options = PullOptions(
        policy="never" if offline else (policy or settings.resolve.policy),  # type: ignore[arg-type]
        unpack=not (no_unpack or all_platforms),
        sync=sync,
    )
    observer = Observer(context, "pull", record=record, metrics=metrics, no_metrics=no_metrics)
    return pull_references(context, references, options, observer, all_platforms=all_platforms)


def pull_references(
    context: Context,
    references: Sequence[str],
    options: PullOptions,
    observer: Observer,
    *,
    all_platforms: bool = False,
) -> int:
    """Pull all references, print a line for each, and return the exit status."""
    from stowray.cli.work import Work

    with Work(context, forks=options.unpack) as work:
        observer.watch(work)
        status = work.each(
            references,
            observer.observed(
                lambda reference, cancelled: _pull(
                    work.engine, reference, options, cancelled, all_platforms=all_platforms
                )
            ),
            lambda results: _show(context, results),
        )
    observer.finish(work)
    return status


def _pull(
    engine: LocalEngine,
    reference: str,
    options: PullOptions,
    cancelled: Callable[[], bool],
    *,
    all_platforms: bool,
) -> list[PullResult]:
    from stowray.pipeline.source import parse_source

    source = parse_source(reference)
    if all_platforms:
        return engine.pull_all_platforms(source, options, cancelled)
    return [engine.pull(source, options, cancelled)]


def _show(context: Context, results: Sequence[PullResult]) -> None:
    for result in results:
        if context.json:
            print(json.dumps(result.to_dict()))  # noqa: T201
        else:
            # A reference again: one with a digest in it has no room for a second one.
            pinned = "" if "@" in result.reference else f"@{result.digest}"
            print(f"{result.reference}{pinned}")  # noqa: T201
