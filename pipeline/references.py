"""The records of the images that are here, one file per reference and platform.

Invariant: a reference's record is replaced in one step, and ``index.json`` follows it under one
lock. While a change is under way a marker lies in ``refs/``; whoever finds it derives the whole
index anew, so that a crash between the two leaves no stale index behind. What the index repeats of
a record that cannot be read any more stays there until the record is restored from it.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from stowray.pipeline.errors import StorageError
from stowray.pipeline.failpoint import failpoint
from stowray.pipeline.files import translated
from stowray.pipeline.leases import LOCK, LOCK_SECONDS
from stowray.pipeline.recordfile import require_record_file
from stowray.pipeline.records import ReferenceRecord, parse_record, read_record, write_record

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from stowray.pipeline.store import Store

_LOCK_SECONDS = 60.0
MARKER = ".changing"
_REMEDY = "pull its image again, or remove the file if you no longer want that image"


def reference_directory(store: Store, canonical: str) -> Path:
    """Return the directory of a reference's records; the text may be of any length."""
    return store.path / "refs" / hashlib.sha256(canonical.encode()).hexdigest()


def record_path(store: Store, canonical: str, platform: str) -> Path:
    """Return the path of one record."""
    name = hashlib.sha256(platform.encode()).hexdigest()[:32]
    return reference_directory(store, canonical) / f"{name}.json"


def find_reference(store: Store, canonical: str, platform: str) -> ReferenceRecord | None:
    """Return the record of a reference for one platform, or None."""
    record = read_record(record_path(store, canonical, platform), store.trust)
    return None if record is None else ReferenceRecord.parse(record.payload)


def references(store: Store, canonical: str | None = None) -> list[ReferenceRecord]:
    """Return every readable record (of one reference), by reference and platform."""
    found: list[ReferenceRecord] = []
    for path in _paths(store, canonical):
        record = read_record(path, store.trust)
        parsed = None if record is None else ReferenceRecord.parse(record.payload)
        if parsed is not None:
            found.append(parsed)
    return sorted(found, key=lambda record: (record.reference, record.platform))


def remembered(store: Store) -> dict[Path, ReferenceRecord]:
    """Return what the index repeats of records that are damaged or missing, by their paths.

    Under a change that was cut short the index may be behind the records: then nothing is missing,
    but what is damaged is still known by it.
    """
    from stowray.pipeline.layout import read_index, record_of

    found: dict[Path, ReferenceRecord] = {}
    behind = os.path.lexists(store.path / "refs" / MARKER)
    for entry in read_index(store.path) or ():
        record = record_of(entry)
        if record is None:
            continue
        path = record_path(store, record.reference, record.platform)
        if behind and not os.path.lexists(path):
            continue
        if _readable(store, path) is None:
            found[path] = record
    return found


def restore(store: Store) -> int:
    """Write the records anew that only the index still knows; return how many there were."""
    with store.lock("refs", wait_seconds=_LOCK_SECONDS):
        lost = remembered(store)
        for path, record in lost.items():
            write_record(path, record.payload(), store.trust.stamp())
    return len(lost)


def _readable(store: Store, path: Path) -> ReferenceRecord | None:
    record = read_record(path, store.trust)
    return None if record is None else ReferenceRecord.parse(record.payload)


def require_references(store: Store) -> list[ReferenceRecord]:
    """Return every record; a damaged one is a ``StorageError`` that names it and the remedy."""
    found: list[ReferenceRecord] = []
    for path in _paths(store, None):
        content = require_record_file(path, _REMEDY)
        if content is None:
            continue  # removed since it was listed
        record = parse_record(content, store.trust)
        parsed = None if record is None else ReferenceRecord.parse(record.payload)
        if parsed is None:
            raise StorageError(str(path), f"this record is of an unknown form: {_REMEDY}")
        found.append(parsed)
    return found


def record_reference(store: Store, record: ReferenceRecord) -> None:
    """Record an image that is here and derive the index; pins stay.

    When nothing but the time differs from what is recorded, only the use is noted.
    """
    path = record_path(store, record.reference, record.platform)
    old = find_reference(store, record.reference, record.platform)
    if old is None and os.path.lexists(path):
        old = remembered(store).get(path)  # damaged: its pin must not be lost with it
    if old is not None:
        record = replace(record, created=old.created, pinned=old.pinned or record.pinned)
        if (
            record == old
            and _readable(store, path) is not None
            and not os.path.lexists(store.path / "refs" / MARKER)
        ):
            if not store.writable:
                return
            with translated(path, "note the use of an image"), suppress(FileNotFoundError):
                os.utime(path)
                return
    with store.lock("refs", wait_seconds=_LOCK_SECONDS):
        now = find_reference(store, record.reference, record.platform)
        if now is not None:
            # Pinned since it was looked at.
            record = replace(record, pinned=record.pinned or now.pinned)
        _apply(store, [record], [])


def pin_reference(
    store: Store, canonical: str, platform: str | None = None, *, pinned: bool = True
) -> int:
    """Protect an image from the collector's limits, or no more; return how many records it has.

    Beside a collector it waits until that has chosen what goes: one that is chosen already is not
    here any more, and is not recorded again without its content.
    """
    with (
        store.lock(LOCK, wait_seconds=LOCK_SECONDS, shared=True),
        store.lock("refs", wait_seconds=_LOCK_SECONDS),
    ):
        found = [
            record
            for record in references(store, canonical)
            if platform is None or record.platform == platform
        ]
        changed = [replace(record, pinned=pinned) for record in found if record.pinned != pinned]
        _apply(store, changed, [])
    return len(found)


def remove_reference(store: Store, canonical: str, platform: str | None = None) -> int:
    """Forget a reference, for one platform or for all; return how many records went.

    Damaged records of the reference go as well.
    """
    if platform is not None:
        return _change(store, [], [(canonical, record_path(store, canonical, platform))])
    return _change(store, [], [(canonical, path) for path in _paths(store, canonical)])


def remove_records(store: Store, records: Iterable[ReferenceRecord]) -> int:
    """Forget several images at once; return how many records went."""
    return _change(
        store,
        [],
        [
            (record.reference, record_path(store, record.reference, record.platform))
            for record in records
        ],
    )


def last_used(store: Store, record: ReferenceRecord) -> tuple[float, str]:
    """Return a key that sorts images by when they were last pulled."""
    path = record_path(store, record.reference, record.platform)
    with translated(path, "ask when an image was used"):
        try:
            used = path.lstat().st_mtime
        except FileNotFoundError:
            used = record.created
    return used, record.reference


def _change(store: Store, written: list[ReferenceRecord], removed: list[tuple[str, Path]]) -> int:
    """Write and remove records and derive the index, as one change under one lock."""
    if not written and not removed:
        return 0
    with store.lock("refs", wait_seconds=_LOCK_SECONDS):
        return _apply(store, written, removed)


def _apply(store: Store, written: list[ReferenceRecord], removed: list[tuple[str, Path]]) -> int:
    """Do as :func:`_change` does, under the lock that the caller holds."""
    if not written and not removed:
        return 0
    count = 0
    whole = _begin(store)
    for record in written:
        path = record_path(store, record.reference, record.platform)
        write_record(path, record.payload(), store.trust.stamp())
    for _, path in removed:
        with translated(path, "forget an image"):
            try:
                path.unlink()
            except FileNotFoundError:
                continue
            count += 1
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
    failpoint("references-changed")
    changed = {record.reference for record in written} | {name for name, _ in removed}
    _derive(store, min(changed), whole=whole or len(changed) > 1)
    failpoint("index-derived")
    _end(store)
    return count


def derive_index(store: Store) -> None:
    """Derive ``index.json`` anew from all records."""
    with store.lock("refs", wait_seconds=_LOCK_SECONDS):
        _begin(store)
        _derive(store, "", whole=True)
        _end(store)


def _paths(store: Store, canonical: str | None) -> list[Path]:
    root = store.path / "refs"
    with translated(root, "list the references"):
        if canonical is None:
            directories = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
        else:
            directories = [reference_directory(store, canonical)]
        found: list[Path] = []
        for directory in directories:
            try:
                entries = list(directory.iterdir())
            except FileNotFoundError:
                continue
            found += [entry for entry in entries if not entry.name.startswith(".")]
    return sorted(found)


def _begin(store: Store) -> bool:
    """Set the marker; True when it was there, so that the whole index is to be derived."""
    marker = store.path / "refs" / MARKER
    with translated(marker, "mark a change of the references"):
        try:
            marker.touch(mode=0o600, exist_ok=False)
        except FileExistsError:
            return True
    return False


def _end(store: Store) -> None:
    marker = store.path / "refs" / MARKER
    with translated(marker, "mark a change of the references"):
        marker.unlink()


def _derive(store: Store, canonical: str, *, whole: bool) -> None:
    from stowray.pipeline.layout import REFERENCE, read_index, record_of, write_index

    found = None if whole else read_index(store.path)
    if found is None:
        found, others, records = read_index(store.path) or [], [], references(store)
    else:
        others = [entry for entry in found if entry["annotations"][REFERENCE] != canonical]
        found = [entry for entry in found if entry["annotations"][REFERENCE] == canonical]
        records = references(store, canonical)
    # What only the index still knows of a damaged record stays in it until that is restored.
    for record in filter(None, map(record_of, found)):
        path = record_path(store, record.reference, record.platform)
        if os.path.lexists(path) and _readable(store, path) is None:
            records.append(record)
    write_index(store.path, records, others)
