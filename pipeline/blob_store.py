"""The blobs of a store, the records of them, and its locks.

Invariant: a blob is visible under its digest only after size and digest were proven, and is used
only while it is trusted (``trust``) or after it was proven again; one that fails is put aside and
counts as absent. Nothing here waits for the disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import threading
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import DigestMismatchError, NotFoundError, StorageError
from stowray.pipeline.failpoint import failpoint
from stowray.pipeline.files import (
    TEMPORARY,
    open_regular,
    read_regular,
    storage_error,
    translated,
    write_all,
)
from stowray.pipeline.locks import is_current, locked
from stowray.pipeline.records import BlobRecord, Record, read_record, write_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from stowray.pipeline.trust import Stamp, Trust

_LOCK_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,180}")
_LOCK_SECONDS = 30.0
_READ_SIZE = 1 << 20


class BlobStore:
    """What a store is to those who read and write blobs; safe to share between threads."""

    def __init__(self, path: Path, trust: Trust, *, writable: bool) -> None:
        """Look after the blobs below ``path``, which is a store."""
        self.path = path
        self.trust = trust
        self.writable = writable
        self._proven: dict[Digest, tuple[int, int, int, int]] = {}
        self._guard = threading.Lock()

    # -- blobs ------------------------------------------------------------------------------------

    def blob_path(self, digest: Digest) -> Path:
        """Return where the blob lies once it is committed."""
        digest = Digest(digest)
        return self.path / "blobs" / digest.algorithm / digest.encoded

    def ingest_path(self, digest: Digest) -> Path:
        """Return the directory of the digest's ingest."""
        digest = Digest(digest)
        return self.path / "ingest" / f"{digest.algorithm}-{digest.encoded}"

    def source_path(self, digest: Digest) -> Path:
        """Return the path of the digest's record."""
        digest = Digest(digest)
        return self.path / "sources" / digest.algorithm / digest.encoded

    def has(self, digest: Digest, size: int | None = None) -> bool:
        """Say whether the blob is committed and trusted, proving it again if it is not trusted.

        One that fails the proof is put aside. With ``size`` a blob of another size is not it.
        """
        digest = Digest(digest)
        try:
            descriptor = self._open_trusted(digest)
        except NotFoundError:
            return False
        try:
            return size is None or os.fstat(descriptor).st_size == size
        finally:
            os.close(descriptor)

    def open_blob(self, digest: Digest) -> int:
        """Return a read-only descriptor of a committed and trusted blob, or ``NotFoundError``."""
        return self._open_trusted(Digest(digest))

    def read_blob(self, digest: Digest, limit: int) -> bytes:
        """Return a small document, hashed once more; at most ``limit`` bytes."""
        digest = Digest(digest)
        path = self.blob_path(digest)
        try:
            with translated(path, "read a blob"):
                data = read_regular(path, limit)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise NotFoundError(str(digest), str(self.path)) from error
            raise
        if not digest.matches(data):
            self.quarantine(digest)
            raise NotFoundError(str(digest), str(self.path))
        return data

    def put_blob(self, digest: Digest, data: bytes) -> None:
        """Commit a small document; success as well when it is there already."""
        digest = Digest(digest)
        if not digest.matches(data):
            actual = Digest.of(data, digest.algorithm)
            raise DigestMismatchError(str(digest), str(digest), str(actual))
        if self.has(digest, len(data)):
            return
        path = self.blob_path(digest)
        self.void_proof(digest)
        with translated(path, f"store the {len(data)} bytes of {digest}"):
            descriptor, temporary = self._new_temporary()
            try:
                write_all(descriptor, data)
                os.fchmod(descriptor, 0o444)
                failpoint("put-before-rename")
                temporary.rename(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            finally:
                os.close(descriptor)
        failpoint("put-after-rename")
        self.record_blob(digest, len(data))

    def prove(self, digest: Digest) -> bool:
        """Hash a committed blob now, trusted or not; one that is damaged is put aside.

        For whoever meets bytes in a trusted blob that cannot be right: False means fetch it again.
        """
        digest = Digest(digest)
        with self._guard:
            self._proven.pop(digest, None)
        try:
            descriptor = open_regular(self.blob_path(digest))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise storage_error(error, self.blob_path(digest), "open a blob") from error
        try:
            self._prove(digest, descriptor, self.blob_record(digest))
        except NotFoundError:
            return False
        finally:
            os.close(descriptor)
        return True

    def quarantine(self, digest: Digest) -> None:
        """Put a damaged blob aside, so that the next pull fetches it again."""
        digest = Digest(digest)
        path = self.blob_path(digest)
        with self._guard:
            self._proven.pop(digest, None)
        name = f"{digest.algorithm}-{digest.encoded}-{os.urandom(4).hex()}"
        with translated(path, "put a damaged blob aside"):
            try:
                path.rename(self.path / "quarantine" / name)
            except FileNotFoundError:
                return

    # -- records ----------------------------------------------------------------------------------

    def write_record(
        self, path: Path, payload: dict[str, Any], *, stamp: Stamp | None = None
    ) -> None:
        """Replace the record at ``path``, stamped now: what it speaks of is complete."""
        write_record(path, payload, stamp or self.trust.stamp())

    def read_record(self, path: Path) -> Record | None:
        """Return the record at ``path``, or None when it is missing or damaged."""
        return read_record(path, self.trust)

    def blob_record(self, digest: Digest) -> BlobRecord:
        """Return what is known of a digest; an empty record when nothing is."""
        record = self.read_record(self.source_path(digest))
        return BlobRecord() if record is None else BlobRecord.parse(record.payload)

    def confirm(self, digest: Digest, repository: str) -> None:
        """Record that ``repository`` (with its registry) served or confirmed the digest.

        A store that can only be read remembers nothing.
        """
        digest = Digest(digest)
        if self.writable and repository not in self.blob_record(digest).repositories:
            with self._record_lock(digest):
                record = self.blob_record(digest).with_repository(repository)
                self.write_record(self.source_path(digest), record.payload())

    def confirmed(self, digest: Digest, repository: str) -> bool:
        """Say whether ``repository`` served or confirmed the digest before."""
        return repository in self.blob_record(digest).repositories

    def void_proof(self, digest: Digest) -> None:
        """Forget that a blob was proven, before other bytes take its name.

        A record that survives a power cut must not speak for bytes that came after it and may not.
        """
        if self.blob_record(digest).verified is not None:
            with self._record_lock(digest):
                record = replace(self.blob_record(digest), verified=None)
                self.write_record(self.source_path(digest), record.payload())

    def record_blob(self, digest: Digest, size: int, repository: str = "") -> None:
        """Record that the committed blob has just been proven, and who (if named) served it."""
        with self._record_lock(digest):
            old = self.blob_record(digest)
            record = BlobRecord(size, old.repositories, self.trust.stamp())
            if repository:
                record = record.with_repository(repository)
            self.write_record(self.source_path(digest), record.payload())

    # -- locks ------------------------------------------------------------------------------------

    def lock(
        self,
        name: str,
        *,
        wait_seconds: float,
        cancelled: Callable[[], bool] | None = None,
        shared: bool = False,
    ) -> AbstractContextManager[None]:
        """Hold the lock ``name`` for a block; ``StorageError`` when it stays taken.

        In a store that can only be read there is nothing to exclude others from.
        """
        if not self.writable:
            return nullcontext()
        # Names that come and go with their content (they hold a digest) leave no file behind.
        keep = not re.search(r"[0-9a-f]{64}", name)
        if not _LOCK_NAME.fullmatch(name):
            name = hashlib.sha256(name.encode()).hexdigest()
            keep = False
        path = self.path / "locks" / f"{name}.lock"
        return locked(
            path,
            what=name,
            wait_seconds=wait_seconds,
            cancelled=cancelled,
            shared=shared,
            keep=keep or shared,
        )

    # -- internals --------------------------------------------------------------------------------

    def _record_lock(self, digest: Digest) -> AbstractContextManager[None]:
        """Keep others from changing a digest's record; threads that fetch seldom meet here."""
        return self.lock(f"sources-{digest.encoded[:2]}", wait_seconds=_LOCK_SECONDS)

    def _new_temporary(self) -> tuple[int, Path]:
        """Return a new file in ``ingest/``, locked: a collector removes only what nobody holds."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            path = self.path / "ingest" / f"{TEMPORARY}{os.urandom(8).hex()}"
            descriptor = os.open(path, flags, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if is_current(descriptor, path):
                return descriptor, path
            # A collector took it for a leftover in the instant before the lock.
            os.close(descriptor)

    def _open_trusted(self, digest: Digest) -> int:
        path = self.blob_path(digest)
        try:
            descriptor = open_regular(path)
        except FileNotFoundError:
            raise NotFoundError(str(digest), str(self.path)) from None
        except OSError as error:
            raise storage_error(error, path, "open a blob") from error
        try:
            status = os.fstat(descriptor)
            identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            with self._guard:
                known = self._proven.get(digest) == identity
            if not known:
                record = self.blob_record(digest)
                if record.size != status.st_size or not self.trust.trusts(record.verified):
                    self._prove(digest, descriptor, record)
                with self._guard:
                    self._proven[digest] = identity
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _prove(self, digest: Digest, descriptor: int, record: BlobRecord) -> None:
        """Hash a blob that is not trusted; renew its record, or put it aside."""
        path = self.blob_path(digest)
        hasher = digest.hasher()
        size = 0
        with translated(path, "prove a blob again"):
            if record.verified is not None and self.trust.is_suspect(record.verified):
                # The disk failed: what counts is what it gives back, not the page cache.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            while part := os.pread(descriptor, _READ_SIZE, size):
                hasher.update(part)
                size += len(part)
        if f"{digest.algorithm}:{hasher.hexdigest()}" == digest:
            if self.writable:
                self.record_blob(digest, size)
            return
        # Only the very file that failed is put aside: another process may have replaced it.
        if self.writable and is_current(descriptor, path):
            self.quarantine(digest)
        raise NotFoundError(str(digest), str(self.path))
