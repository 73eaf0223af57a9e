"""``stowray demo``: the main job with a small image, no registry needed."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from stowray.cli.context import command
from stowray.text import seconds_text, size_text

if TYPE_CHECKING:
    from stowray.cli.context import Context
    from stowray.pipeline.result import PullResult


@command("demo", short_help="Show the main job with a small image, no registry needed.")
def demo_command(context: Context) -> int:
    """Make a small image, serve it on loopback, pull it with actors on an embedded Ray, show it.

    Everything happens in a temporary folder that is removed; --engine local leaves Ray out.
    """
    from stowray.api import make_engine
    from stowray.demo_image import serve_demo_image
    from stowray.display import attach
    from stowray.pipeline.digest import Digest
    from stowray.pipeline.engine import PullOptions
    from stowray.pipeline.progress import Progress
    from stowray.pipeline.rootfs import write_rootfs
    from stowray.pipeline.source import parse_source

    name = context.value("engine") or "ray"
    with tempfile.TemporaryDirectory(prefix="stowray-demo-") as folder:
        settings = replace(context.settings, store=str(Path(folder) / "store"), engine=name)
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
            tree = Path(folder) / "tree"
            write_rootfs(engine.store, Digest(first.chain_id), tree)
            files = sorted(
                f"/{path.relative_to(tree)}" for path in tree.rglob("*") if not path.is_dir()
            )
            greeting = (tree / "srv" / "README").read_text(encoding="utf-8").strip()
        finally:
            engine.close()
            progress.close()
            end_display()
    if context.json:
        print(json.dumps(first.to_dict()))  # noqa: T201
        print(json.dumps(again.to_dict()))  # noqa: T201
        return 0
    print(_story(first, again, asked, asked_again, files, greeting))  # noqa: T201
    return 0


def _story(
    first: PullResult,
    again: PullResult,
    asked: int,
    asked_again: int,
    files: list[str],
    greeting: str,
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
            f"tree     {', '.join(files)}",
            f"/srv/README says: {greeting}",
        ]
    )
