"""Mounted images: overlay mounts of a chain that hold it against the collector.

Invariant: a mount that stands has a lease, made before anything was looked up and ended only after
the file system is unmounted or its boot is over; only what this store mounted is ever unmounted.
What a mount needs beside the trees lies in ``mounts/<lease>`` and goes with it.
"""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from stowray.pipeline.errors import StorageError
from stowray.pipeline.files import make_directory, storage_error, translated
from stowray.pipeline.leases import (
    end_mount_lease,
    is_persistent,
    leases,
    unreadable_leases,
)
from stowray.pipeline.mountinfo import read_mounts, topmost
from stowray.pipeline.overlay_mount import SOURCE, attach, prepare
from stowray.pipeline.removal import remove_tree
from stowray.pipeline.snapshot import Snapshots

if TYPE_CHECKING:
    from stowray.pipeline.digest import Digest
    from stowray.pipeline.store import Store

_HOLDER = "mount "
_LOCK_SECONDS = 60.0


def mount(
    store: Store, chain_id: Digest | None, target: Path, rw_upper: Path | None = None
) -> Path:
    """Mount the chain at ``target``, an empty directory (made when missing); return its real path.

    Read-only unless ``rw_upper`` names the directory that takes the changes; the kernel's work
    directory is made beside it. ``chain_id`` None is the image of no layers. The mount and its
    lease last until :func:`umount` or a reboot.
    """
    if os.geteuid() != 0:
        raise StorageError(
            str(target),
            "only root can mount: use `stowray unshare REF DIR -- COMMAND`, which needs no rights",
        )
    with translated(target, "make the mount point"):
        target.mkdir(0o755, exist_ok=True)
    point = Path(os.path.realpath(target))
    with store.lock("mounts", wait_seconds=_LOCK_SECONDS):
        _check_free(point)
        sweep(store)
        identity = secrets.token_hex(8)
        lease = store.lease(
            _HOLDER + identity,
            chain_ids=[] if chain_id is None else [chain_id],
            persistent=True,
            mount_point=str(point),
        )
        directory: Path | None = None
        try:
            directory = mount_directory(store, identity)
            snapshots = Snapshots(store)
            lowers = snapshots.lowers(chain_id)
            options = prepare(directory, lowers, snapshots.privileged, rw_upper)
            attach(directory, options, point, writable=rw_upper is not None)
        except BaseException:
            lease.remove()
            if directory is not None:
                remove_tree(directory)
            raise
        lease.close()
    return point


def umount(store: Store, target: Path) -> None:
    """Unmount what :func:`mount` mounted at ``target`` and end its lease.

    A mount that somebody unmounted by other means only loses its lease.
    """
    point = os.path.realpath(target)
    with store.lock("mounts", wait_seconds=_LOCK_SECONDS):
        held = [lease for lease in leases(store) if lease.mount_point == point]
        if not held:
            raise StorageError(str(target), f"not mounted from the store {store.path}")
        if is_mounted(Path(point)):
            _detach(point)
        end_mount_lease(store, point)
        sweep(store)


def is_mounted(point: Path) -> bool:
    """Return whether an image is what is visible at the mount point."""
    top = topmost(os.fsencode(point), read_mounts())
    return top is not None and top.kind == b"overlay" and top.source == SOURCE


def mount_directory(store: Store, identity: str) -> Path:
    """Make the directory for what one mount needs; its lease is in force already."""
    base = store.path / "mounts"
    with translated(base, "prepare a mount"):
        make_directory(base)
        (base / identity).mkdir(0o700)
    return base / identity


def sweep(store: Store) -> int:
    """Remove the directories of mounts that are gone; return how many there were."""
    base = store.path / "mounts"
    with translated(base, "list the mounts"):
        if not base.is_dir():
            return 0
        # Listed before the leases: each of these had its lease when its directory was made.
        names = os.listdir(base)
    live = {lease.holder.rpartition(" ")[2] for lease in leases(store)}
    gone = [name for name in names if name not in live]
    for name in gone:
        remove_tree(base / name)
    return len(gone)


def mend_lease(store: Store, path: Path) -> str:
    """Put a lease that cannot be read in order; return why not, empty when it is done.

    Which mount it was of is lost with it, so each mount that stands without a lease is given one on
    everything, until it is unmounted: rather too much is held than too little.
    """
    if not is_persistent(path):
        return "belongs to a process that is at work: run again when it has ended"
    with store.lock("mounts", wait_seconds=_LOCK_SECONDS):
        readable = leases(store, without=unreadable_leases(store))
        points = _standing() - {lease.mount_point for lease in readable}
        live = {lease.holder.rpartition(" ")[2] for lease in readable}
        chains = [snapshot.chain_id for snapshot in Snapshots(store).all()]
        with translated(store.path, "mend a lease"):
            base = store.path / "mounts"
            names = sorted(set(os.listdir(base)) - live) if base.is_dir() else []
            for point in sorted(points):
                # Which directory is whose nobody knows: each stays until all are unmounted.
                for name in names or [""]:
                    lease = store.lease(
                        _HOLDER + name, chain_ids=chains, persistent=True, mount_point=point
                    )
                    lease.close()
            path.rename(store.path / "quarantine" / f"lease-{secrets.token_hex(8)}")
    return ""


def _standing() -> set[str]:
    """Return where images are mounted, in every mount namespace that can be seen from here."""
    points: set[str] = set()
    namespaces: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            namespace = os.readlink(process / "ns" / "mnt")
            if namespace in namespaces:
                continue
            mounts = read_mounts(process / "mountinfo")
        except (OSError, StorageError):
            continue  # it has ended, or is another user's
        namespaces.add(namespace)
        points |= {
            os.fsdecode(mount.point)
            for mount in mounts
            if mount.kind == b"overlay" and mount.source == SOURCE
        }
    return points


def _check_free(point: Path) -> None:
    if topmost(os.fsencode(point), read_mounts()) is not None:
        what = "an image" if is_mounted(point) else "something"
        raise StorageError(str(point), f"{what} is mounted here already: unmount it first")
    with translated(point, "look at the mount point"):
        if any(point.iterdir()):
            raise StorageError(str(point), "not empty: the mount would hide what is in it")


def _detach(point: str) -> None:
    from stowray.pipeline import kernel

    try:
        kernel.unmount(os.fsencode(point))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise StorageError(point, "in use: end what works in it (`fuser -vm DIR`)") from error
        if error.errno == errno.EPERM:
            raise StorageError(point, "only root can unmount") from error
        raise storage_error(error, point, "unmount") from error
