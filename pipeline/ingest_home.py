"""What ingests share with their store and their followers.

Invariant: an ingest's directory is removed with its lock held, the lock file last.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from stowray.pipeline.errors import StorageError
from stowray.pipeline.failpoint import failpoint
from stowray.pipeline.files import storage_error, translated

if TYPE_CHECKING:
    from pathlib import Path

    from stowray.pipeline.clock import Boot
    from stowray.pipeline.digest import Digest


_CREATE = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC


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


def has_room(home: IngestHome, directory: Path, size: int) -> bool:
    """Tell whether ``size`` bytes fit below ``directory`` without touching the reserve."""
    free = free_bytes(directory)
    return free is None or free >= size + home.reserve_bytes


def require_room(home: IngestHome, directory: Path, digest: Digest, needed: int) -> None:
    """Raise StorageError unless ``needed`` bytes of a blob fit without touching the reserve."""
    free = free_bytes(directory)
    if needed and free is not None and free < needed + home.reserve_bytes:
        raise StorageError(
            str(directory.parent.parent),
            f"{digest} needs {needed} more bytes, {free} are free and {home.reserve_bytes} stay in "
            "reserve: free space (`stowray gc`) or choose another --store",
        )


def create_data(path: Path) -> int:
    """Make the file that a generation grows in; those of earlier generations are removed."""
    old = [entry for entry in path.parent.iterdir() if entry.name.startswith("data.")]
    descriptor = os.open(path, _CREATE, 0o600)
    for entry in old:
        if entry != path:
            with suppress(FileNotFoundError):
                entry.unlink()
    return descriptor


def put_at(
    descriptor: int, path: Path, view: memoryview, offset: int, digest: Digest, size: int
) -> None:
    """Write all of ``view`` into the data of a blob of ``size`` bytes; StorageError if it fails."""
    while view:
        try:
            written = os.pwrite(descriptor, view, offset)
        except OSError as error:
            missing = size - offset
            raise storage_error(
                error, path, f"write the {missing} bytes that {digest} ({size} bytes) still needs"
            ) from error
        view = view[written:]
        offset += written


def discard_ingest(directory: Path) -> None:
    """Remove an ingest whose lock is held: the lock last, so that the next locker finds it gone."""
    with translated(directory, "remove an ingest"):
        for entry in list(directory.iterdir()):
            if entry.name != "lock":
                entry.unlink(missing_ok=True)
        failpoint("ingest-before-unlock")
        (directory / "lock").unlink(missing_ok=True)
    # A new writer may have made its own lock file in between: then the directory is its.
    with suppress(OSError):
        directory.rmdir()
