"""``index.json``: the store as an OCI image layout for other tools.

Invariant: the index is derived from the reference records and says nothing that they do not say.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from stowray.pipeline.files import read_regular, replace_file, translated

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from stowray.pipeline.records import ReferenceRecord

REF_NAME = "org.opencontainers.image.ref.name"
REFERENCE = "org.stowray.reference"
INDEX_MEDIA_TYPE = "application/vnd.oci.image.index.v1+json"
_LIMIT = 256 << 20


def spell(reference: str, platform: str = "") -> str:
    """Return the name under which other tools find ``reference`` in the index."""
    return reference if not platform else f"{reference}-{platform.replace('/', '-')}"


def entries(records: Sequence[ReferenceRecord]) -> list[dict[str, Any]]:
    """Return the index entries of the records of any references."""
    found: list[dict[str, Any]] = []
    for record in records:
        found.append(
            {
                "mediaType": record.manifest_media_type,
                "digest": str(record.manifest),
                "size": record.manifest_size,
                "annotations": {
                    REF_NAME: spell(record.reference),
                    REFERENCE: record.reference,
                },
            }
        )
    return found


def rewrite_index(path: Path, records: Sequence[ReferenceRecord], *, only: str | None) -> None:
    """Write the index: all of it from ``records``, or only the entries of one reference."""
    index = path / "index.json"
    kept: list[dict[str, Any]] = []
    with translated(index, "write the image index"):
        if only is not None:
            kept = [
                entry
                for entry in _manifests(index)
                if entry.get("annotations", {}).get(REFERENCE) != only
            ]
        manifests = sorted(
            kept + entries(records), key=lambda entry: str(entry["annotations"][REF_NAME])
        )
        document = {
            "schemaVersion": 2,
            "mediaType": INDEX_MEDIA_TYPE,
            "manifests": manifests,
        }
        replace_file(index, json.dumps(document, separators=(",", ":")).encode(), mode=0o644)


def _manifests(index: Path) -> list[dict[str, Any]]:
    manifests: list[dict[str, Any]] = json.loads(read_regular(index, _LIMIT))["manifests"]
    return manifests
