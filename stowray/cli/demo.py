"""``stowray demo``: the main job with a small image, no registry needed."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stowray.cli.context import command
from stowray.text import seconds_text, size_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stowray.cli.context import Context
    from stowray.pipeline.prewarm_report import PrewarmReport
    from stowray.pipeline.result import PullResult
    from stowray.pipeline.store import Store

NODES = 2


@command("demo", short_help="Show the main job with a small image, no registry needed.")
def demo_command(context: Context) -> int:
    """Make a small image, serve it on loopback, and pre-warm two nodes of an embedded Ray with it.

    One node reads each byte from the registry, the other gets it from there; then the same again,
    with nothing left to do. All happens in a temporary folder that is removed. --engine local pulls
    the image in this process instead, without Ray.
    """
    with tempfile.TemporaryDirectory(prefix="stowray-demo-") as folder:
        if context.value("engine") == "local":
            return _pull(context, Path(folder))
        return _prewarm(context, Path(folder))


def _prewarm(context: Context, folder: Path) -> int:
    from stowray.cli.running import Running
    from stowray.demo_image import serve_demo_image
    from stowray.job import make_run
    from stowray.pipeline.prewarm_plan_file import load_plan
    from stowray.pipeline.store import Store

    # A Ray of our own, whatever other one there is.
    settings = replace(
        context.settings, store=str(folder / "{node}"), engine="ray", address="local"
    )
    with serve_demo_image() as (reference, requests), Running(context) as running:
        run = running.take(
            make_run(
                load_plan(None, references=[reference]),
                settings,
                progress=running.progress,
                embedded_nodes=NODES,
            )
        )
        first = run.run(running.cancelled)
        asked = len(requests)
        reports = [first]
        if first.exit_code == 0:
            reports.append(run.run(running.cancelled))
        asked_again = len(requests) - asked
        tree: dict[str, str] = {}
        last = first.cells[-1] if first.cells else None
        if last is not None and last.present and last.result is not None:
            store = Store.open(folder / last.node, create=False)
            tree = _tree(store, last.result["chain_id"], folder / "tree")
    if context.json:
        _print_lines([line for report in reports for line in report.results()])
    else:
        print(_prewarm_story(reports, asked, asked_again, tree))  # noqa: T201
    return reports[-1].exit_code


def _prewarm_story(
    reports: Sequence[PrewarmReport], asked: int, asked_again: int, tree: dict[str, str]
) -> str:
    from stowray.prewarm_text import failures, who_has_what

    first = reports[0]
    image = first.images[0] if first.images else None
    lines = [
        f"image    {image.reference if image else '-'}",
        f"digest   {image.resolved if image else '-'}",
        "",
        *who_has_what(first),
        "",
        (
            f"once     {size_text(first.origin_bytes)} from the registry in {asked} requests, "
            f"{size_text(first.peer_bytes)} from node to node, {seconds_text(first.seconds)}"
        ),
    ]
    for cell in first.cells:
        sources = {layer["source"] for layer in (cell.result or {}).get("layers", ())}
        lines.append(f"         {cell.node}: layers from {', '.join(sorted(sources)) or '-'}")
    lines += [
        (
            f"again    {size_text(report.origin_bytes + report.peer_bytes)} in {asked_again} "
            f"requests, {seconds_text(report.seconds)}: everything was there"
        )
        for report in reports[1:]
    ]
    return "\n".join([*lines, *_tree_lines(tree), *failures(reports[-1])])


def _pull(context: Context, folder: Path) -> int:
    from stowray.api import make_engine
    from stowray.demo_image import serve_demo_image
    from stowray.display import attach
    from stowray.pipeline.engine import PullOptions
    from stowray.pipeline.progress import Progress
    from stowray.pipeline.source import parse_source

    settings = replace(context.settings, store=str(folder / "store"), engine="local")
    progress = Progress(node=settings.node_name)
    mode = "none" if context.value("quiet") else context.value("progress", "plain")
    end_display = attach(progress, mode)
    engine = make_engine(settings, progress=progress)
    try:
        with serve_demo_image() as (reference, requests):
            source = parse_source(reference)
            first = engine.pull(source, PullOptions())
            asked = len(requests)
            again = engine.pull(source, PullOptions())
            asked_again = len(requests) - asked
        tree = _tree(engine.store, first.chain_id, folder / "tree")
    finally:
        engine.close()
        progress.close()
        end_display()
    if context.json:
        _print_lines([first.to_dict(), again.to_dict()])
    else:
        print(_pull_story(first, again, asked, asked_again, tree))  # noqa: T201
    return 0


def _pull_story(
    first: PullResult, again: PullResult, asked: int, asked_again: int, tree: dict[str, str]
) -> str:
    return "\n".join(
        [
            f"pulled   {first.reference} with the {first.engine} engine",
            (
                f"         {len(first.layers)} layers, {size_text(first.fetched_bytes)} fetched in "
                f"{asked} requests, {seconds_text(first.seconds['total'])}"
            ),
            f"manifest {first.digest}",
            f"chain ID {first.chain_id}",
            (
                f"again    {size_text(again.fetched_bytes)} fetched in {asked_again} requests, "
                f"{seconds_text(again.seconds['total'])}"
            ),
            *_tree_lines(tree),
        ]
    )


def _tree(store: Store, chain_id: str, destination: Path) -> dict[str, str]:
    """Return the files of an image, those of text with their words."""
    from stowray.pipeline.digest import Digest
    from stowray.pipeline.rootfs import write_rootfs

    write_rootfs(store, Digest(chain_id), destination)
    paths = sorted(path for path in destination.rglob("*") if not path.is_dir())
    return {
        f"/{path.relative_to(destination)}": path.read_text(encoding="utf-8").strip()
        for path in paths
    }


def _tree_lines(tree: dict[str, str]) -> list[str]:
    if not tree:
        return []
    return [
        f"tree     {', '.join(tree)}",
        f"/srv/README says: {tree.get('/srv/README', '')}",
    ]


def _print_lines(lines: Sequence[dict[str, Any]]) -> None:
    for line in lines:
        print(json.dumps(line))  # noqa: T201
