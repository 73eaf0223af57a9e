"""The content store: an OCI image layout with our records beside it.

Invariant: a blob is visible under its digest only after size and digest were proven, and is used
only while it is trusted (``trust``) or after it was proven again; one that fails is put aside and
counts as absent. Nothing here waits for the disk, except ``sync``. Any number of threads, processes
and hosts may have one store open.

STORE/ oci-layout index.json blobs/       what other tools read; ``index.json`` is derived
       refs/ sources/ durable/            records: references, blobs, what survives a power cut
       ingest/ layers/ snapshots/         arriving blobs, layer trees, chain IDs
       leases/ locks/ quarantine/ trash/  what is held, and what is on its way out
       nonce version capabilities.json hosts.json
"""

from __future__ import annotations

import errno
import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from stowray.pipeline.blob_store import BlobStore
from stowray.pipeline.clock import Boot, boot_time_ns
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import StorageError
from stowray.pipeline.files import read_regular, replace_file, translated
from stowray.pipeline.foundation import FORMAT, create_store, open_root, read_version, require_owner
from stowray.pipeline.recordfile import encode_record, read_record_file
from stowray.pipeline.trust import Trust

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from stowray.pipeline.follower import Follower
    from stowray.pipeline.ingest import Ingest
    from stowray.pipeline.leases import Lease
    from stowray.pipeline.probe import Capabilities
    from stowray.pipeline.records import ReferenceRecord

RESERVE_BYTES = 64 << 20


class Store(BlobStore):
    """One store directory, open; safe to share between threads."""

    format: ClassVar[int] = FORMAT

    def __init__(
        self,
        path: Path | str,
        *,
        boot: Boot | None = None,
        create: bool = True,
        now_ns: Callable[[], int] = boot_time_ns,
    ) -> None:
        """Open the store at ``path``; with ``create`` make it if need be and demand write access.

        Without ``create`` a store on a read-only file system can be read. The descriptor that
        ``sync`` needs is opened here, before the first write.
        """
        path = Path(os.path.abspath(path))
        descriptor = open_root(path, create=create)
        try:
            require_owner(path, descriptor)
            version, found = read_version(path), None
            if version is None:
                if not create:
                    raise StorageError(str(path), "no store here: pull an image into it first")
                found = create_store(path, descriptor)
                version = FORMAT
            if version > FORMAT:
                raise StorageError(
                    str(path),
                    f"written by a newer stowray (store format {version}, this one knows "
                    f"{FORMAT}): upgrade stowray or choose another --store",
                )
            writable = os.access(path, os.W_OK | os.X_OK, effective_ids=True)
            if create and not writable:
                raise StorageError(
                    str(path), "this store cannot be written to: choose another --store"
                )
            with translated(path, "open the store"):
                nonce = read_regular(path / "nonce", 256).decode("ascii", "replace").strip()
        except BaseException:
            os.close(descriptor)
            raise
        boot = boot or Boot.read()
        super().__init__(path, Trust(path / "durable", boot, now_ns), writable=writable)
        self.boot = boot
        self.nonce = nonce
        self.reserve_bytes = RESERVE_BYTES
        self._descriptor = descriptor
        self._closer = weakref.finalize(self, os.close, descriptor)
        self._capabilities: Capabilities | None = None
        if found is not None:
            self._remember(found)
        if writable:
            self.capabilities.require(path)

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        boot: Boot | None = None,
        create: bool = True,
        now_ns: Callable[[], int] = boot_time_ns,
    ) -> Store:
        """Return ``Store(path, …)``: the same in a word."""
        return cls(path, boot=boot, create=create, now_ns=now_ns)

    def close(self) -> None:
        """Close the store's own descriptor; idempotent, and also done when it is collected."""
        self._closer()

    @property
    def is_current(self) -> bool:
        """Whether the path still leads to the store that was opened.

        It may have been removed and made anew: then what is remembered of it is void.
        """
        try:
            named = self.path.stat()
        except OSError:
            return False
        return os.path.samestat(named, os.fstat(self._descriptor))

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    @property
    def capabilities(self) -> Capabilities:
        """What the file system under the store can do; probed once per boot, device and user."""
        from stowray.pipeline.probe import Capabilities, probe

        if self._capabilities is None:
            cached = self._read_capabilities()
            known = Capabilities.parse(cached.get("capabilities"))
            if known is None or (self.writable and cached.get("key") != self._probe_key()):
                try:
                    known = probe(self.path)
                    self._remember(known)
                except StorageError as error:
                    # A full disk must not keep the collector out: what was found last will do.
                    if known is None or not _is_full(error):
                        raise
            self._capabilities = known
        return self._capabilities

    def _read_capabilities(self) -> dict[str, Any]:
        """Return what an earlier probe has left, if this user may read it."""
        try:
            return read_record_file(self.path / "capabilities.json") or {}
        except StorageError as error:
            # Left by root in somebody else's store, say: what it found does not hold for us.
            if isinstance(error.__cause__, PermissionError):
                return {}
            raise

    def _probe_key(self) -> dict[str, Any]:
        """Return what a probe's result holds for."""
        return {
            "boot_id": self.boot.boot_id,
            "host": self.boot.host,
            "device": os.fstat(self._descriptor).st_dev,
            "uid": os.geteuid(),
        }

    def _remember(self, found: Capabilities) -> None:
        path = self.path / "capabilities.json"
        content = {"key": self._probe_key(), "capabilities": found.payload()}
        with translated(path, "record what the file system can do"):
            replace_file(path, encode_record(content))
        self._capabilities = found

    # -- arriving ----------------------------------------------------------------------------------

    def acquire(self, digest: Digest, size: int, *, bare: bool = False) -> Ingest | None:
        """Become the blob's writer without waiting; None when another live writer is at it.

        The blob may have been committed meanwhile: then ``offset`` is the size and ``commit`` has
        nothing left to do. With ``bare`` nobody sees its bytes before it is whole, if it comes at
        once.
        """
        from stowray.pipeline.acquire import acquire

        return acquire(self, Digest(digest), size, bare=bare)

    def follow(
        self,
        digest: Digest,
        size: int,
        *,
        cancelled: Callable[[], bool] | None = None,
        grace_seconds: float = 30.0,
    ) -> Follower:
        """Return a reader of the blob, whether it is here, arriving or not yet begun."""
        from stowray.pipeline.follower import Follower

        return Follower(
            self, Digest(digest), size, cancelled=cancelled, grace_seconds=grace_seconds
        )

    # -- references --------------------------------------------------------------------------------

    def record_reference(self, record: ReferenceRecord) -> None:
        """Record an image that is here and derive ``index.json`` anew."""
        from stowray.pipeline.references import record_reference

        record_reference(self, record)

    def find_reference(self, canonical: str, platform: str) -> ReferenceRecord | None:
        """Return the record of a reference for one platform, or None."""
        from stowray.pipeline.references import find_reference

        return find_reference(self, canonical, platform)

    def references(self) -> list[ReferenceRecord]:
        """Return every readable reference record, by reference and platform."""
        from stowray.pipeline.references import references

        return references(self)

    def remove_reference(self, canonical: str, platform: str | None = None) -> int:
        """Forget a reference (for one platform or all); return how many records went."""
        from stowray.pipeline.references import remove_reference

        return remove_reference(self, canonical, platform)

    # -- holding ----------------------------------------------------------------------------------

    def lease(
        self,
        holder: str,
        digests: Iterable[Digest] = (),
        chain_ids: Iterable[str] = (),
        persistent: bool = False,
        mount_point: str = "",
    ) -> Lease:
        """Hold blobs and snapshots against the collector until the lease is closed.

        In a store that can only be read nothing can be held.
        """
        from stowray.pipeline.leases import Lease

        return Lease.create(
            self, holder, digests, chain_ids, persistent=persistent, mount_point=mount_point
        )

    def sync(self) -> None:
        """Bring everything written so far to the disk and mark it as durable."""
        with self.lock("durable", wait_seconds=600.0):
            self.trust.sync(self._descriptor)


def _is_full(error: StorageError) -> bool:
    return getattr(error.__cause__, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
