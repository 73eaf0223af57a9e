"""What running pulls, open handles and mounts hold against the collector.

Invariant: a lease is in force before its creator looks for what it names, and ends with its holder:
the kernel frees a dead process's ``flock``, and a mount ends with its boot. Leases are made and
grown under the shared half of the collector's lock, so that a collector sees each or none of it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import StorageError
from stowray.pipeline.failpoint import failpoint
from stowray.pipeline.files import SCARCITY, TEMPORARY, translated, write_all
from stowray.pipeline.locks import is_current, try_lock, unlock
from stowray.pipeline.recordfile import encode_record, require_record_file
from stowray.pipeline.trust import Stamp
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

    from stowray.pipeline.store import Store

LOCK = "collect"
LOCK_SECONDS = 120.0
_HELD, _PERSISTENT = ".json", ".mount.json"
_REMEDY = "`stowray verify --repair` makes it anew from what is mounted"


@dataclass(frozen=True, slots=True)
class Held:
    """What one lease in force names; ``begun`` is of when its holder began."""

    path: Path
    holder: str
    digests: frozenset[str]
    chain_ids: frozenset[str]
    persistent: bool
    mount_point: str
    begun: Stamp


class Lease:
    """A lease that this process made; a context manager. A persistent one outlives it."""

    def __init__(self, store: Store, path: Path, holder: str, *, persistent: bool) -> None:
        """Prepare a lease; use ``Store.lease``."""
        self._store = store
        self.path = path
        self.holder = holder
        self.persistent = persistent
        self._mount_point = ""
        self._digests: set[str] = set()
        self._chain_ids: set[str] = set()
        self._begun = store.trust.stamp()
        self._descriptor = -1

    @classmethod
    def create(
        cls,
        store: Store,
        holder: str,
        digests: Iterable[str],
        chain_ids: Iterable[str],
        *,
        persistent: bool = False,
        mount_point: str = "",
    ) -> Lease:
        """Make a lease that is in force when the call returns."""
        suffix = _PERSISTENT if persistent else _HELD
        path = store.path / "leases" / f"{os.urandom(12).hex()}{suffix}"
        lease = cls(store, path, holder, persistent=persistent)
        lease._mount_point = mount_point
        lease.add(digests, chain_ids)
        return lease

    def add(self, digests: Iterable[str] = (), chain_ids: Iterable[str] = ()) -> None:
        """Hold more; in force when the call returns."""
        new_digests = {str(Digest(digest)) for digest in digests} - self._digests
        new_chains = {str(Digest(chain)) for chain in chain_ids} - self._chain_ids
        if self._descriptor >= 0 and not new_digests and not new_chains:
            return
        if not self._store.writable:
            return
        with self._store.lock(LOCK, wait_seconds=LOCK_SECONDS, shared=True):
            self._digests |= new_digests
            self._chain_ids |= new_chains
            self._write()

    def close(self) -> None:
        """End the lease; a persistent one stays until it is removed. Idempotent."""
        if self._descriptor < 0:
            return
        try:
            if not self.persistent:
                with translated(self.path, "end a lease"):
                    self.path.unlink(missing_ok=True)
        finally:
            unlock(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def remove(self) -> None:
        """End the lease, also a persistent one."""
        self.persistent = False
        if self._descriptor < 0:
            with translated(self.path, "end a lease"):
                self.path.unlink(missing_ok=True)
        self.close()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def _write(self) -> None:
        """Put a new locked file in the place of the old one: no moment without a held lease."""
        data = encode_record(
            {
                "holder": self.holder,
                "pid": os.getpid(),
                "digests": sorted(self._digests),
                "chain_ids": sorted(self._chain_ids),
                "persistent": self.persistent,
                "mount_point": self._mount_point,
                "begun": self._begun.payload(),
            }
        )
        temporary = self.path.with_name(f"{TEMPORARY}{os.urandom(8).hex()}")
        with translated(self.path, "make a lease"):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o600)
            try:
                if not try_lock(descriptor):
                    raise StorageError(str(temporary), "another program locked a new lease")
                write_all(descriptor, data)
                failpoint("lease-before-rename")
                temporary.rename(self.path)
            except BaseException:
                os.close(descriptor)
                temporary.unlink(missing_ok=True)
                raise
        if self._descriptor >= 0:
            unlock(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = descriptor


def leases(store: Store, *, sweep: bool = False, without: Collection[Path] = ()) -> list[Held]:
    """Return the leases in force; with ``sweep`` (under the collector's lock) remove dead ones.

    A lease that cannot be read although it is in force is a ``StorageError``: the collector must
    not guess what it holds. ``without`` leaves those files out.
    """
    directory = store.path / "leases"
    with translated(directory, "list the leases"):
        paths = sorted(directory.iterdir())
    found: list[Held] = []
    for path in paths:
        if path in without:
            continue
        persistent = is_persistent(path)
        if not persistent and not _is_held(path):
            if sweep:
                with translated(path, "remove a dead lease"):
                    path.unlink(missing_ok=True)
            continue
        if path.name.startswith(TEMPORARY):
            continue
        held = _read(path)
        if held is None:
            continue
        if persistent and _is_over(store, held):
            if sweep:
                with translated(path, "remove a dead lease"):
                    path.unlink(missing_ok=True)
            continue
        found.append(held)
    return found


def unreadable_leases(store: Store) -> list[Path]:
    """Return the leases that are in force and cannot be read, for which the collector stops."""
    directory = store.path / "leases"
    with translated(directory, "list the leases"):
        paths = [path for path in sorted(directory.iterdir()) if path.suffix == ".json"]
    found: list[Path] = []
    for path in paths:
        if not is_persistent(path) and not _is_held(path):
            continue
        try:
            _read(path)
        except StorageError as error:
            if getattr(error.__cause__, "errno", None) in SCARCITY:
                raise
            found.append(path)
    return found


def is_persistent(path: Path) -> bool:
    """Say whether a lease's file is that of a mount, which outlives the process that made it."""
    return path.name.endswith(_PERSISTENT)


def end_mount_lease(store: Store, mount_point: str) -> int:
    """Remove the persistent leases of a mount point; return how many there were."""
    ended = 0
    for held in leases(store):
        if held.persistent and held.mount_point == mount_point:
            with translated(held.path, "end a lease"):
                held.path.unlink(missing_ok=True)
            ended += 1
    return ended


def _is_held(path: Path) -> bool:
    """Say whether a live process holds the lease's lock."""
    with translated(path, "look whether a lease is held"):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            if not try_lock(descriptor):
                return True
            held = not is_current(descriptor, path)  # replaced by its holder while we looked
            unlock(descriptor)
            return held
        finally:
            os.close(descriptor)


def _is_over(store: Store, held: Held) -> bool:
    """Say whether a mount's boot has ended; on another host nobody here can tell."""
    return held.begun.host == store.boot.host and held.begun.boot_id != store.boot.boot_id


def _read(path: Path) -> Held | None:
    payload = require_record_file(path, _REMEDY)
    if payload is None:
        return None
    begun = Stamp.parse(payload.get("begun"))
    digests, chain_ids = payload.get("digests"), payload.get("chain_ids")
    if begun is None or not isinstance(digests, list) or not isinstance(chain_ids, list):
        raise StorageError(str(path), f"this lease is of an unknown form: {_REMEDY}")
    return Held(
        path=path,
        holder=_text(payload, "holder"),
        digests=frozenset(map(str, digests)),
        chain_ids=frozenset(map(str, chain_ids)),
        persistent=payload.get("persistent") is True,
        mount_point=_text(payload, "mount_point"),
        begun=begun,
    )


def _text(payload: dict[str, Any], name: str) -> str:
    value = payload.get(name)
    return value if isinstance(value, str) else ""
