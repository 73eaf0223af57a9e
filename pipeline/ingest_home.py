"""What ingests share with their store and their followers.

Invariant: an ingest's directory is removed with its lock held, the lock file last.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from stowray.pipeline.failpoint import failpoint
from stowray.pipeline.files import translated

if TYPE_CHECKING:
    from pathlib import Path

    from stowray.pipeline.clock import Boot
    from stowray.pipeline.digest import Digest


class GenerationChanged(Exception):  # noqa: N818 - a signal to begin again, not an error
    """The bytes read so far are void: drop what was made of them and call ``rewind()``."""


class IngestHome(Protocol):
    """What an ingest needs of its store."""

    boot: Boot
    reserve_bytes: int

    def ingest_path(self, digest: Digest) -> Path:
        """Return the directory of a digest's ingest."""

    def blob_path(self, digest: Digest) -> Path:
        """Return the path of a committed blob."""

    def has(self, digest: Digest, size: int | None = None) -> bool:
        """Say whether the blob is committed and trusted."""

    def void_proof(self, digest: Digest) -> None:
        """Forget that a blob was proven, before other bytes take its name."""

    def record_blob(self, digest: Digest, size: int, repository: str = "") -> None:
        """Record that the committed blob has just been proven, and who (if named) served it."""


def free_bytes(directory: Path) -> int | None:
    """Return how many bytes the file system of ``directory`` has free, None if it cannot tell."""
    with translated(directory, "ask for free space"):
        system = os.statvfs(directory)
    return system.f_bavail * system.f_frsize if system.f_blocks else None


def discard_ingest(directory: Path) -> None:
    """Remove an ingest whose lock is held: the lock last, so that the next locker finds it gone."""
    for entry in list(directory.iterdir()):
        if entry.name != "lock":
            entry.unlink(missing_ok=True)
    failpoint("ingest-before-unlock")
    (directory / "lock").unlink(missing_ok=True)
    # A new writer may have made its own lock file in between: then the directory is its.
    with suppress(OSError):
        directory.rmdir()
