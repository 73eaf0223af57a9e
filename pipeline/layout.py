"""``index.json``: the store as an OCI image layout that other tools read.

Invariant: the index is derived from the reference records and says nothing that they do not say. No
two entries have one name: skopeo takes the first of several and umoci refuses them all. Each entry
repeats its record, checksum included, as an annotation: a record that was damaged since is restored
from it, name, pin and all (``references.restore``).

An entry's name is the canonical reference where the image-spec's grammar of
``org.opencontainers.image.ref.name`` allows it, because skopeo and umoci refuse to look up any
other name. What the grammar forbids (``a__b``, ``:_x``, ``[::1]:5000/x``) is written as ``+`` and
two upper-case hexadecimal digits per byte, after a ``0`` where the name would begin with it:
``a+5F+5Fb``, ``+`` being a character that no reference has. With several platforms of one reference
the one that this host prefers has the plain name, the others ``NAME+linux.arm64``.
"""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

from stowray.pipeline.errors import InvalidPlatformError, StorageError
from stowray.pipeline.files import read_regular, replace_file, translated
from stowray.pipeline.media_types import OCI_MANIFEST
from stowray.pipeline.platform import Platform
from stowray.pipeline.recordfile import decode_record, encode_record
from stowray.pipeline.records import ReferenceRecord

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

REF_NAME = "org.opencontainers.image.ref.name"
REFERENCE = "org.stowray.reference"
RECORD = "org.stowray.record"
INDEX_MEDIA_TYPE = "application/vnd.oci.image.index.v1+json"
LAYOUT_FILE = b'{"imageLayoutVersion":"1.0.0"}'
_LIMIT = 256 << 20
# image-spec annotations.md: components of [A-Za-z0-9]+ joined by one of [-._:@+], "--" or "/".
_SEPARATORS = re.compile(r"[-._:@/]|--")
_PARTS = re.compile(r"([A-Za-z0-9]+)")


def spell(reference: str, platform: str = "") -> str:
    """Return the name in the index of ``reference``, for ``platform`` unless it has the plain name.

    Distinct references have distinct names.
    """
    name = _escape(reference)
    return f"{name}+{_escape(platform.replace('/', '.'))}" if platform else name


def entries(records: Sequence[ReferenceRecord], host: Platform) -> list[dict[str, Any]]:
    """Return the index entries of any records, each name once."""
    best: dict[str, ReferenceRecord] = {}
    for record in sorted(records, key=lambda record: _preference(record, host)):
        best.setdefault(record.reference, record)
    return [_entry(record, plain=best[record.reference] is record) for record in records]


def write_index(
    path: Path, records: Sequence[ReferenceRecord], others: list[dict[str, Any]]
) -> None:
    """Write the index of the store at ``path``: entries for ``records`` beside ``others``."""
    index = path / "index.json"
    manifests = sorted(others + entries(records, Platform.host()), key=_name)
    document = {"schemaVersion": 2, "mediaType": INDEX_MEDIA_TYPE, "manifests": manifests}
    with translated(index, "write the image index"):
        replace_file(index, json.dumps(document, separators=(",", ":")).encode(), mode=0o644)
        if not os.path.lexists(path / "oci-layout"):
            replace_file(path / "oci-layout", LAYOUT_FILE, mode=0o644)


def read_index(path: Path) -> list[dict[str, Any]] | None:
    """Return the entries of the index, all of them ours; None when it must be derived anew."""
    try:
        document = json.loads(read_regular(path / "index.json", _LIMIT))
        if set(document) != {"schemaVersion", "mediaType", "manifests"}:
            return None
        if (document["schemaVersion"], document["mediaType"]) != (2, INDEX_MEDIA_TYPE):
            return None
        manifests: list[dict[str, Any]] = document["manifests"]
        for entry in manifests:
            annotations = entry["annotations"]
            if not all(type(annotations[name]) is str for name in (REF_NAME, REFERENCE)):
                return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError, StorageError):
        # Missing, cut short by a crash, or written by another tool.
        return None
    return manifests


def other_entries(path: Path, reference: str) -> list[dict[str, Any]] | None:
    """Return the entries of all other references; None when the index must be derived anew."""
    found = read_index(path)
    if found is None:
        return None
    return [entry for entry in found if entry["annotations"][REFERENCE] != reference]


def record_of(entry: dict[str, Any]) -> ReferenceRecord | None:
    """Return the record that an entry repeats, None when that is damaged or missing."""
    text = entry["annotations"].get(RECORD)
    if not isinstance(text, str) or not text.isascii():
        return None
    payload = decode_record(text.encode("ascii"))
    return None if payload is None else ReferenceRecord.parse(payload)


def is_entry_of(entry: dict[str, Any], record: ReferenceRecord) -> bool:
    """Say whether an entry says what is to be said of ``record``, under either of its names.

    Which of several platforms has the plain name depends on the host that wrote the index.
    """
    for plain in (True, False):
        expected = _entry(record, plain=plain)
        if RECORD not in entry["annotations"]:
            del expected["annotations"][RECORD]  # as it was written before records were repeated
        if entry == expected:
            return True
    return False


def _escape(text: str) -> str:
    parts = _PARTS.split(text)
    last = len(parts) - 1
    escaped: list[str] = []
    for position, part in enumerate(parts):
        between = 0 < position < last
        if position % 2 or (between and _SEPARATORS.fullmatch(part)):
            escaped.append(part)
        elif part:
            lead = "0" if position == 0 else ""
            escaped.append(lead + "".join(f"+{byte:02X}" for byte in part.encode()))
    return "".join(escaped)


def _preference(
    record: ReferenceRecord, host: Platform
) -> tuple[bool, tuple[int, int], float, str]:
    """Return a key that sorts the record that this host would run first, then the oldest."""
    try:
        rank = host.rank(Platform.parse(record.platform))
    except InvalidPlatformError:
        rank = None
    return (rank is None, rank or (0, 0), record.created, record.platform)


def _entry(record: ReferenceRecord, *, plain: bool) -> dict[str, Any]:
    # Tools that read layouts know OCI types alone: they get the twin of a Docker manifest.
    has_twin = record.twin is not None
    entry: dict[str, Any] = {
        "mediaType": OCI_MANIFEST if has_twin else record.manifest_media_type,
        "digest": str(record.twin if has_twin else record.manifest),
        "size": record.twin_size if has_twin else record.manifest_size,
        "annotations": {
            REF_NAME: spell(record.reference, "" if plain else record.platform or "unknown"),
            REFERENCE: record.reference,
            RECORD: encode_record(record.payload()).decode("ascii"),
        },
    }
    platform = _oci_platform(record.platform)
    if platform:
        entry["platform"] = platform
    return entry


def _oci_platform(text: str) -> dict[str, Any]:
    """Return the entry's optional ``platform`` (image-spec image-index.md), empty for none."""
    try:
        platform = Platform.parse(text)
    except InvalidPlatformError:
        return {}  # an image whose config names none
    fields = {
        "architecture": platform.architecture,
        "os": platform.os,
        "variant": platform.variant,
        "os.version": platform.os_version,
        "os.features": list(platform.os_features),
    }
    return {name: value for name, value in fields.items() if value}


def _name(entry: dict[str, Any]) -> str:
    return str(entry["annotations"][REF_NAME])
