"""``stowray deliver``: an image for another tool."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from stowray.cli.context import command

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.cli.context import Context


@command("deliver", short_help="Hand an image to containerd, podman, docker or an archive.")
@click.argument("reference", metavar="REF")
@click.option(
    "--to",
    "destination",
    metavar="TARGET",
    required=True,
    help="containerd, podman, docker or oci-archive:FILE.",
)
@click.option("--name", metavar="REF", help="The name there; default: the reference itself.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=1.0),
    metavar="SECONDS",
    default=3600.0,
    show_default=True,
    help="How long the other tool may take.",
)
@click.option("--offline", is_flag=True, help="Do not pull what is missing.")
@click.option(
    "--policy",
    type=click.Choice(["newer", "missing", "always", "never"]),
    default="missing",
    show_default=True,
    help="When to ask the registry.",
)
def deliver_command(
    context: Context,
    reference: str,
    destination: str,
    name: str | None,
    timeout: float,
    offline: bool,
    policy: str,
) -> int:
    """Hand REF to another tool under its own name, pulling it first if it is not here.

    containerd: CONTAINERD_ADDRESS and CONTAINERD_NAMESPACE say where. podman: this user's storage.
    docker: its daemon. oci-archive: a file that skopeo, podman, docker and stowray read.
    """
    from stowray.cli.work import Work
    from stowray.pipeline.deliver import deliver, parse_target
    from stowray.pipeline.engine import PullOptions
    from stowray.pipeline.reference import Reference
    from stowray.pipeline.source import parse_source

    target = parse_target(destination)
    if name is not None:
        Reference.parse(name)
    # Only content is handed over: nothing needs to be unpacked here.
    options = PullOptions(policy="never" if offline else policy, unpack=False)  # type: ignore[arg-type]

    def run(text: str, cancelled: Callable[[], bool]) -> dict[str, Any]:
        source = parse_source(text)
        image, lease = work.engine.hold_image(source, options, cancelled)
        with lease:
            result = work.engine.pull_image(source, image, options, cancelled)
            delivered = deliver(
                work.engine.store, image, target, name=name, cancelled=cancelled, seconds=timeout
            )
        return {
            "reference": result.reference,
            "target": delivered.target,
            "name": delivered.name,
            "digest": delivered.digest,
            "platform": result.platform,
            "present": delivered.present,
        }

    def show(answer: dict[str, Any]) -> None:
        named = f"{answer['name']}@{answer['digest']}" if answer["name"] else answer["digest"]
        if "@" in answer["name"]:
            named = answer["name"]
        print(json.dumps(answer) if context.json else named)  # noqa: T201

    with Work(context) as work:
        return work.each([reference], run, show)
