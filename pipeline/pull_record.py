"""What a pull holds, reports and leaves behind of an image: leases' names, events, its record.

Invariant: an image is recorded when all of it is there, and its OCI twin is there with it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from stowray.pipeline.digest import Digest
from stowray.pipeline.documents import MANIFEST_LIMIT
from stowray.pipeline.records import ReferenceRecord
from stowray.pipeline.resolve import document_digests

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stowray.pipeline.image import Image
    from stowray.pipeline.plan import Plan
    from stowray.pipeline.progress import Report
    from stowray.pipeline.run import Outcome
    from stowray.pipeline.source import Source
    from stowray.pipeline.store import Store


def all_digests(image: Image) -> tuple[str, ...]:
    """Return what a lease on the image holds: documents, layers, and staged trees by diff ID."""
    return (
        *map(str, document_digests(image)),
        *(str(layer.digest) for layer in image.layers),
        *map(str, image.diff_ids),
    )


def report_present(report: Report, plan: Plan) -> None:
    """Report what the plan found in the store."""
    for layer in plan.layers:
        size = layer.descriptor.size
        if layer.blob_present:
            report("blob", str(layer.descriptor.digest), "exists", size, size)
        if layer.committed:
            report("commit", str(layer.chain_id), "exists")


def record_image(
    store: Store, source: Source, image: Image, *, unpacked: bool, beside: bool = False
) -> None:
    """Record the image, with the OCI twin of a Docker manifest beside it.

    Of several images of one platform in one index one is on record, and the others with it: the
    last one recorded, or with ``beside`` the one that is on record already.
    """
    twin = _twin(image, store)
    if twin is not None:
        store.put_blob(Digest.of(twin), twin)
    record = _make_record(source, image, store, twin, unpacked=unpacked)
    known = store.find_reference(record.reference, record.platform)
    if known is not None and known.resolved.digest == record.resolved.digest:
        if known.manifest == record.manifest:
            record = replace(record, others=_union(record.others, known.others))
        elif beside:
            others = _union(known.others, record.digests)
            record = replace(known, others=others, created=record.created)
        else:
            record = replace(record, others=_union(record.others, known.digests))
    store.record_reference(record)
    if twin is not None and not store.has(Digest.of(twin)):
        # Collected just before the record could protect it.
        store.put_blob(Digest.of(twin), twin)


def _twin(image: Image, store: Store) -> bytes | None:
    """Return the OCI twin of the image's manifest if other tools need one."""
    manifest = image.manifest_descriptor
    types = {
        manifest.media_type,
        *(part.media_type for part in (image.manifest.config, *image.layers)),
    }
    if not any("docker" in media_type.lower() for media_type in types):
        return None
    from stowray.pipeline.oci_manifest import oci_twin

    return oci_twin(store.read_blob(manifest.digest, MANIFEST_LIMIT), manifest.media_type)


def _make_record(
    source: Source, image: Image, store: Store, twin: bytes | None, *, unpacked: bool
) -> ReferenceRecord:
    known = store.find_reference(source.canonical, str(image.platform))
    # A tag that moved leads to another image: that the one before was unpacked says nothing of it.
    kept = known is not None and known.unpacked and known.chain_id == str(image.chain_id)
    return ReferenceRecord(
        reference=source.canonical,
        platform=str(image.platform),
        resolved=image.resolved,
        manifest=image.manifest_descriptor.digest,
        manifest_media_type=image.manifest_descriptor.media_type,
        manifest_size=image.manifest_descriptor.size,
        config=image.manifest.config.digest,
        layers=tuple(layer.digest for layer in image.layers),
        chain_id=str(image.chain_id),
        unpacked=unpacked or kept,
        pinned=known is not None and known.pinned,
        created=time.time(),
        twin=None if twin is None else Digest.of(twin),
        twin_size=0 if twin is None else len(twin),
        others=tuple(index.digest for index in image.indexes),
    )


def _union(first: Sequence[Digest], second: Sequence[Digest]) -> tuple[Digest, ...]:
    return tuple(dict.fromkeys((*first, *second)))


def stage_seconds(
    plan: Plan, outcomes: dict[str, Outcome], resolve: float, rest: float
) -> dict[str, float]:
    """Return how long each stage took; steps run side by side, so the longest one is named."""
    longest = {"fetch": 0.0, "stage": 0.0, "commit": 0.0}
    for step in plan.steps:
        longest[step.kind] = max(longest[step.kind], outcomes[step.id].seconds)
    return {
        "resolve": resolve,
        "fetch": longest["fetch"],
        "apply": max(longest["stage"], longest["commit"]),
        "total": resolve + rest,
    }
