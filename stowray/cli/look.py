"""Commands that only look: from ``resolve`` to ``plan``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stowray.cli.context import command
from stowray.cli.prewarm import RUN_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.cli.context import Context
    from stowray.pipeline.engine import LocalEngine, PullOptions
    from stowray.pipeline.image import Image
    from stowray.pipeline.plan import Plan

_OFFLINE = click.option("--offline", is_flag=True, help="Answer from the store alone.")
_POLICY = click.option(
    "--policy",
    type=click.Choice(["newer", "missing", "always", "never"]),
    help="When to ask the registry.",
)


def _options(context: Context, *, offline: bool, policy: str | None) -> PullOptions:
    from stowray.pipeline.engine import PullOptions

    chosen = "never" if offline else (policy or context.settings.resolve.policy)
    return PullOptions(policy=chosen)  # type: ignore[arg-type]


def _with_image(
    context: Context,
    references: tuple[str, ...],
    options: PullOptions,
    show: Callable[[Any], None],
    make: Callable[[LocalEngine, Image], Any] = lambda _engine, image: image,
) -> int:
    """Resolve each reference to its image and show what ``make`` makes of it."""
    from stowray.cli.work import Work
    from stowray.pipeline.source import parse_source

    with Work(context, forks=False) as work:
        return work.each(
            references,
            lambda reference, cancelled: make(
                work.engine, work.engine.image(parse_source(reference), options, cancelled)
            ),
            show,
        )


@command("resolve", short_help="Print the digest that a reference points to.")
@click.argument("reference", metavar="REF")
@_OFFLINE
@_POLICY
def resolve_command(context: Context, reference: str, offline: bool, policy: str | None) -> int:
    """Print the digest that REF points to: of an index, or of a manifest."""
    from stowray.cli.work import Work
    from stowray.pipeline.source import parse_source

    options = _options(context, offline=offline, policy=policy)

    def show(answer: dict[str, Any]) -> None:
        print(json.dumps(answer) if context.json else answer["digest"])  # noqa: T201

    def resolve(text: str, cancelled: Callable[[], bool]) -> dict[str, Any]:
        source = parse_source(text)
        descriptor = work.engine.resolve(source, options, cancelled)
        return {
            "reference": source.canonical,
            "digest": str(descriptor.digest),
            "media_type": descriptor.media_type,
            "size": descriptor.size,
        }

    with Work(context, forks=False) as work:
        return work.each([reference], resolve, show)


@command("config", short_help="Print an image's config, raw bytes as stored.")
@click.argument("reference", metavar="REF")
@_OFFLINE
@_POLICY
def config_command(context: Context, reference: str, offline: bool, policy: str | None) -> int:
    """Print the config of REF for the platform, byte for byte as stored."""

    def show(image: Image) -> None:
        sys.stdout.flush()
        sys.stdout.buffer.write(image.config.raw)
        sys.stdout.buffer.flush()

    options = _options(context, offline=offline, policy=policy)
    return _with_image(context, (reference,), options, show)


@command("key", short_help="Print the two cache keys of an image.")
@click.argument("reference", metavar="REF")
@_OFFLINE
@_POLICY
def key_command(context: Context, reference: str, offline: bool, policy: str | None) -> int:
    """Print the manifest key and the chain ID of REF, as one JSON line."""
    options = _options(context, offline=offline, policy=policy)

    def make(engine: LocalEngine, image: Image) -> dict[str, str]:
        from stowray.pipeline.image import manifest_key

        return {
            "manifest_key": manifest_key(image.resolved.digest, engine.platform(options)),
            "chain_id": str(image.chain_id),
        }

    return _with_image(
        context,
        (reference,),
        options,
        lambda answer: print(json.dumps(answer)),  # noqa: T201
        make,
    )


@command("reference", short_help="Show how references are understood.")
@click.argument("texts", metavar="TEXT...", nargs=-1, required=True)
def reference_command(context: Context, texts: tuple[str, ...]) -> int:
    """Print one JSON line per TEXT: its parts, or why it is not a reference."""
    from stowray.pipeline.reference import describe

    answers = [describe(text) for text in texts]
    for answer in answers:
        print(json.dumps(answer))  # noqa: T201
    return _status(answers)


@command("platform", short_help="Show how platforms are understood.")
@click.argument("texts", metavar="TEXT...", nargs=-1, required=True)
def platform_command(context: Context, texts: tuple[str, ...]) -> int:
    """Print one JSON line per TEXT: the platform, normalised, or why it is none."""
    from stowray.pipeline.platform import describe

    answers = [describe(text) for text in texts]
    for answer in answers:
        print(json.dumps(answer))  # noqa: T201
    return _status(answers)


def _status(answers: list[dict[str, Any]]) -> int:
    failed = sum("error" in answer for answer in answers)
    if not failed:
        return 0
    return 2 if len(answers) == 1 else 1


@command("plan", short_help="Show what a pull, or a pre-warm run, would do.")
@click.argument("references", metavar="REF...", nargs=-1)
@click.option(
    "-f",
    "--file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A plan (TOML): what `prewarm -f FILE` would do on the cluster.",
)
@click.option("--no-unpack", is_flag=True, help="Plan content only.")
@_OFFLINE
@_POLICY
@RUN_OPTIONS
def plan_command(
    context: Context,
    references: tuple[str, ...],
    file: Path | None,
    no_unpack: bool,
    offline: bool,
    policy: str | None,
    lock: Path | None,
    **run_options: Any,
) -> int:
    """Print, per image and blob, what is here and what would be fetched and applied.

    Fetches documents only (index, manifest, config), no layer. With -f FILE for all nodes: per node
    and blob have or need, bytes from the origin and from nodes, disk, requests, time; the options
    about nodes, limits and the lock file are those of `stowray prewarm`, and go with it only.
    """
    from dataclasses import replace

    if file is not None:
        from stowray.cli.prewarm import plan_file

        if no_unpack or offline or policy:
            raise click.UsageError("--no-unpack, --offline and --policy do not go with -f FILE")
        return plan_file(context, file, references, lock, run_options)
    if lock is not None or any(value not in (None, False, ()) for value in run_options.values()):
        raise click.UsageError("options about nodes, limits and the lock file need -f FILE")
    if not references:
        raise click.UsageError("Missing argument 'REF...' (or -f FILE).")

    from stowray.cli.work import Work
    from stowray.pipeline.source import parse_source

    options = replace(_options(context, offline=offline, policy=policy), unpack=not no_unpack)

    def make(text: str, cancelled: Callable[[], bool]) -> dict[str, Any]:
        image, plan = work.engine.plan(parse_source(text), options, cancelled)
        answer = describe_plan(image, plan)
        quota = work.engine.quota(image.reference)
        if quota is not None:
            answer["quota"] = quota.to_dict()
        return answer

    def show(answer: dict[str, Any]) -> None:
        if context.json:
            print(json.dumps(answer))  # noqa: T201
        else:
            print(_plan_text(answer))  # noqa: T201

    with Work(context, forks=False) as work:
        return work.each(references, make, show)


def describe_plan(image: Image, plan: Plan) -> dict[str, Any]:
    """Return a plan as plain data; sizes in bytes."""
    fetched = {step.descriptor.digest for step in plan.steps if step.kind == "fetch"}
    source = getattr(image.reference, "registry", "")
    return {
        "reference": image.reference.canonical,
        "digest": str(image.manifest_descriptor.digest),
        "resolved": str(image.resolved.digest),
        "platform": str(image.platform),
        "chain_id": str(image.chain_id),
        "fetch_bytes": plan.fetch_bytes,
        # Unpacked sizes are not known before the layers are: archives of programs and libraries
        # shrink to about two fifths under gzip.
        "disk_bytes": plan.fetch_bytes
        + sum(int(layer.descriptor.size * 2.5) for layer in plan.layers if not layer.committed),
        "requests": len(fetched),
        "layers": [
            {
                "digest": str(layer.descriptor.digest),
                "diff_id": str(layer.diff_id),
                "chain_id": str(layer.chain_id),
                "size": layer.descriptor.size,
                "blob": "have" if layer.blob_present else "need",
                "snapshot": "have" if layer.committed else "need",
                "source": "store" if layer.blob_present else source,
            }
            for layer in plan.layers
        ],
        "steps": [
            {
                "id": step.id,
                "kind": step.kind,
                "needs": list(step.needs),
                "follows": step.follows,
            }
            for step in plan.steps
        ],
    }


def _plan_text(answer: dict[str, Any]) -> str:
    from stowray.text import size_text

    lines = [
        f"{answer['reference']} ({answer['platform']})",
        f"  manifest {answer['digest']}",
        (
            f"  fetch {size_text(answer['fetch_bytes'])} in {answer['requests']} requests, "
            f"about {size_text(answer['disk_bytes'])} of disk"
        ),
    ]
    quota = answer.get("quota")
    if quota is not None:
        of = "" if quota["limit"] is None else f" of {quota['limit']}"
        lines.append(f"  quota {quota['remaining']}{of} requests are left")
    lines += [
        f"  {layer['digest'][:19]}  {size_text(layer['size']):>10}  "
        f"blob: {layer['blob']}  snapshot: {layer['snapshot']}  from {layer['source']}"
        for layer in answer["layers"]
    ]
    return "\n".join(lines)
