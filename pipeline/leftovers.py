"""What killed processes leave behind: temporary files, probes and lock files.

Invariant: only what nobody holds any more is removed. A temporary file is locked by its writer from
the instant after its birth; that instant is covered by an age.
"""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING

from stowray.pipeline.files import PROBE, TEMPORARY, translated
from stowray.pipeline.locks import is_current, try_lock
from stowray.pipeline.removal import remove_tree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stowray.pipeline.store import Store

AGE_SECONDS = 3600.0
_NAMED_BY_CONTENT = re.compile(r"[0-9a-f]{64}")


def is_abandoned(path: Path) -> bool:
    """Say whether nobody holds the lock on a temporary file or directory."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return try_lock(descriptor)
    finally:
        os.close(descriptor)


def sweep_leftovers(store: Store, age_seconds: float = AGE_SECONDS) -> int:
    """Remove temporary files, probes and unused lock files; return how many there were."""
    removed = 0
    for path in list(_candidates(store.path)):
        with translated(path, "remove a leftover"):
            try:
                # A clock that was set back makes ages negative: then it stays.
                old = time.time() - path.lstat().st_mtime > age_seconds
            except FileNotFoundError:
                continue
            if old and is_abandoned(path):
                remove_tree(path)
                removed += 1
    return removed + _sweep_locks(store.path / "locks")


def _candidates(root: Path) -> Iterator[Path]:
    folders = [root, root / "snapshots", root / "durable"]
    for name in ("refs", "sources", "ingest"):
        with translated(root / name, "look for leftovers"):
            folders += [entry for entry in (root / name).iterdir() if entry.is_dir()]
    for folder in folders:
        with translated(folder, "look for leftovers"):
            try:
                entries = list(folder.iterdir())
            except FileNotFoundError:
                continue
        yield from (entry for entry in entries if entry.name.startswith((TEMPORARY, PROBE)))


def _sweep_locks(root: Path) -> int:
    """Remove lock files named by content; lockers begin anew when theirs is gone."""
    removed = 0
    with translated(root, "look for leftovers"):
        for path in list(root.iterdir()):
            if not _NAMED_BY_CONTENT.search(path.name):
                continue
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                if try_lock(descriptor) and is_current(descriptor, path):
                    path.unlink()
                    removed += 1
            finally:
                os.close(descriptor)
    return removed
