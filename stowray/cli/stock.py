"""Commands about what is in the store: from ``images`` to ``verify``."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from stowray.cli.context import command
from stowray.pipeline.errors import NotFoundError, StowrayError, UsageError
from stowray.text import age_text, size_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.cli.context import Context
    from stowray.pipeline.records import ReferenceRecord
    from stowray.pipeline.snapshot import Snapshots
    from stowray.pipeline.store import Store


def _say(text: str) -> None:
    print(text)  # noqa: T201


@command("images", short_help="List the images in the store.")
def images_command(context: Context) -> int:
    """List the images in the store: reference, platform, digest, size, age, state."""
    try:
        store = context.open_store()
    except NotFoundError:
        # No store holds no images: an empty answer, not a failure.
        return 0
    rows = [_image_row(store, record) for record in store.references()]
    if context.json:
        for row in rows:
            _say(json.dumps(row))
        return 0
    if rows:
        width = max(len(row["reference"]) for row in rows)
        for row in rows:
            state = "unpacked" if row["unpacked"] else "content"
            pinned = ", pinned" if row["pinned"] else ""
            _say(
                f"{row['reference']:<{width}}  {row['platform']:<14}  {row['digest'][7:19]}  "
                f"{size_text(row['size']):>10}  {age_text(time.time() - row['created']):<11}  "
                f"{state}{pinned}"
            )
    return 0


def _image_row(store: Store, record: ReferenceRecord) -> dict[str, Any]:
    sizes = {digest: _blob_size(store, digest) for digest in record.digests}
    return {
        "reference": record.reference,
        "platform": record.platform,
        "digest": str(record.manifest),
        "resolved": str(record.resolved.digest),
        "chain_id": record.chain_id,
        "size": sum(size for size in sizes.values() if size is not None),
        "created": record.created,
        "unpacked": record.unpacked,
        "pinned": record.pinned,
    }


def _blob_size(store: Store, digest: Any) -> int | None:
    try:
        return store.blob_path(digest).stat().st_size
    except FileNotFoundError:
        return None


def _find(context: Context, store: Store, text: str) -> ReferenceRecord:
    """Return the record of a reference for the wanted platform, or of its only platform."""
    from stowray.pipeline.platform import Platform
    from stowray.pipeline.source import parse_source

    canonical = parse_source(text).canonical
    records = [record for record in store.references() if record.reference == canonical]
    if not records:
        raise NotFoundError(canonical, str(store.path))
    name = context.settings.resolve.platform
    wanted = (Platform.parse(name) if name else Platform.host()).normalized()
    for record in records:
        if record.platform == str(wanted):
            return record
    if name:
        raise NotFoundError(f"{canonical} for {wanted}", str(store.path))
    return records[0]


@command("inspect", short_help="Show an image's layers, chain IDs and blob mapping.")
@click.argument("reference", metavar="REF")
def inspect_command(context: Context, reference: str) -> int:
    """Show what the store knows of REF: layers, chain IDs, the blob of each, sizes, durability."""
    from stowray.cli.app import fail

    try:
        answer = _inspected(context, reference)
    except StowrayError as error:
        return fail(error, context, reference)
    if context.json:
        _say(json.dumps(answer))
        return 0
    _say(f"{answer['reference']} ({answer['platform']})")
    for name in ("digest", "resolved", "config", "chain_id"):
        _say(f"  {name:<9} {answer[name]}")
    for row in answer["layers"]:
        state = "unpacked" if row["snapshot"] else ("blob" if row["present"] else "missing")
        _say(f"  layer     {row['digest']}  {size_text(row['size'] or 0):>10}  {state}")
        _say(f"            diff  {row['diff_id']}")
        _say(f"            chain {row['chain_id']}")
    return 0


def _inspected(context: Context, reference: str) -> dict[str, Any]:
    """Return what the store knows of an image as plain data."""
    from stowray.pipeline.image import CONFIG_LIMIT, chain_ids, parse_config
    from stowray.pipeline.snapshot import Snapshots

    store = context.open_store()
    record = _find(context, store, reference)
    config = parse_config(store.read_blob(record.config, CONFIG_LIMIT), record.config)
    snapshots = Snapshots(store)
    chain = chain_ids(config.diff_ids)
    layers = [
        _layer_row(store, snapshots, digest, diff_id, chain_id)
        for digest, diff_id, chain_id in zip(record.layers, config.diff_ids, chain, strict=True)
    ]
    return {
        **_image_row(store, record),
        "config": str(record.config),
        "media_type": record.manifest_media_type,
        "layers": layers,
        "blob_mapping": {
            row["chain_id"]: row["snapshot"]["blob"] for row in layers if row["snapshot"]
        },
    }


def _layer_row(
    store: Store, snapshots: Snapshots, digest: Any, diff_id: Any, chain_id: Any
) -> dict[str, Any]:
    snapshot = None
    if snapshots.has(chain_id):
        found = snapshots.get(chain_id)
        snapshot = {
            "blob": str(found.blob),
            "parent": str(found.parent) if found.parent else None,
            "layer": found.layer,
            "unpacked_size": found.unpacked_size,
            "created": found.created,
        }
    return {
        "digest": str(digest),
        "diff_id": str(diff_id),
        "chain_id": str(chain_id),
        "size": _blob_size(store, digest),
        "present": store.has(digest),
        "durable": store.trust.is_durable(store.blob_record(digest).verified),
        "snapshot": snapshot,
    }


@command("rm", short_help="Remove references from the store.")
@click.argument("references", metavar="REF...", nargs=-1, required=True)
def rm_command(context: Context, references: tuple[str, ...]) -> int:
    """Remove references; `gc` then frees what nothing else needs. Running pulls are not harmed."""
    from stowray.pipeline.collect import remove
    from stowray.pipeline.source import parse_source

    store = context.open_store()
    platform = context.settings.resolve.platform or None

    def take_out(text: str) -> dict[str, Any]:
        canonical = parse_source(text).canonical
        if not remove(store, canonical, platform):
            raise NotFoundError(canonical, str(store.path))
        return {"reference": canonical, "removed": True}

    return _each(context, references, take_out)


@command("gc", short_help="Remove what no reference needs.")
@click.option("--dry-run", is_flag=True, help="Only tell what would be removed.")
@click.option("--max-size", metavar="SIZE", help="Also remove oldest unpinned images above SIZE.")
@click.option("--min-free", metavar="SIZE", help="Also remove oldest unpinned images for SIZE.")
def gc_command(context: Context, dry_run: bool, max_size: str | None, min_free: str | None) -> int:
    """Remove blobs, layer trees and leftovers that no reference, pin, lease or pull needs."""
    from dataclasses import asdict

    from stowray.pipeline.collect import collect

    most, least = _size(max_size), _size(min_free)
    report = collect(context.open_store(), dry_run=dry_run, max_size=most, min_free=least)
    if context.json:
        _say(json.dumps(asdict(report)))
    else:
        verb = "would free" if dry_run else "freed"
        count = len(report.blobs) + len(report.snapshots) + len(report.layers)
        _say(f"{verb} {size_text(report.freed)} in {count} items")
    return 0


def _size(text: str | None) -> int | None:
    """Return ``10G``, ``500MiB``, ``1024`` as bytes; the letters count in powers of 1024."""
    if text is None:
        return None
    number, unit = text.strip(), ""
    while number and not number[-1].isdigit():
        number, unit = number[:-1], number[-1] + unit
    powers = {"": 0, "b": 0, "k": 1, "m": 2, "g": 3, "t": 4}
    key = unit.strip().lower().removesuffix("ib").removesuffix("b")
    try:
        size = int(float(number) * 1024 ** powers[key])
    except (ValueError, KeyError, OverflowError) as error:
        raise UsageError(text, "not a size; write 10G, 500MiB or a number of bytes") from error
    if size < 0:
        raise UsageError(text, "a size must not be negative")
    return size


def _pin(context: Context, references: tuple[str, ...], *, pinned: bool) -> int:
    from stowray.pipeline.references import pin_reference

    store = context.open_store()
    platform = context.settings.resolve.platform or None

    def pin(text: str) -> dict[str, Any]:
        record = _find(context, store, text)
        pin_reference(store, record.reference, platform, pinned=pinned)
        return {"reference": record.reference, "pinned": pinned}

    return _each(context, references, pin)


def _each(
    context: Context, references: tuple[str, ...], act: Callable[[str], dict[str, Any]]
) -> int:
    """Do ``act`` for each reference, answer for each in order, and return the exit status."""
    from stowray.cli.app import fail

    statuses = []
    for text in references:
        try:
            answer = act(text)
        except StowrayError as error:
            statuses.append(fail(error, context, text))
        else:
            statuses.append(0)
            _say(json.dumps(answer) if context.json else answer["reference"])
    if len(references) == 1:
        return statuses[0]
    return 1 if any(statuses) else 0


@command("pin", short_help="Keep an image from being collected.")
@click.argument("references", metavar="REF...", nargs=-1, required=True)
def pin_command(context: Context, references: tuple[str, ...]) -> int:
    """Keep REF from being removed by `gc --max-size` and `gc --min-free`."""
    return _pin(context, references, pinned=True)


@command("unpin", short_help="Let a pinned image be collected again.")
@click.argument("references", metavar="REF...", nargs=-1, required=True)
def unpin_command(context: Context, references: tuple[str, ...]) -> int:
    """Let REF be collected again."""
    return _pin(context, references, pinned=False)


@command("verify", short_help="Re-hash blobs; compare trees with their layers (--deep).")
@click.argument("references", metavar="[REF...]", nargs=-1)
@click.option("--deep", is_flag=True, help="Compare every unpacked tree with its layers.")
@click.option("--repair", is_flag=True, help="Fetch and unpack again what is damaged.")
def verify_command(context: Context, references: tuple[str, ...], deep: bool, repair: bool) -> int:
    """Re-hash what the store holds (of REF, or everything) and name what is damaged.

    Exits with 5 when damage was found and not mended.
    """
    from stowray.cli.mend import verify_store

    return verify_store(context, references, deep=deep, repair=repair)
