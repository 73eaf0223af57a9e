"""What the file system under a store can do, found out by doing it.

Invariant: a capability is claimed only when the operation worked inside this very store, and a
store that cannot hold a snapshot is refused before anything is written to it.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from stowray.pipeline.errors import StorageError
from stowray.pipeline.files import PROBE, storage_error
from stowray.pipeline.locks import try_lock
from stowray.pipeline.removal import remove_tree
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# statfs(2) f_type of file systems that other hosts may write to as well.
_NETWORK = {
    0x6969: "NFS",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB2",
    0x517B: "SMB",
    0x01021997: "9p",
    0x00C36400: "Ceph",
    0x0BD00BD0: "Lustre",
    0x5346414F: "AFS",
    0x47504653: "GPFS",
    0x01161970: "GFS2",
    0x7461636F: "OCFS2",
    0x65735546: "FUSE",
    0x19830326: "BeeGFS",
}
_UNSUPPORTED = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What worked in the store's directory, for the user who asked."""

    privileged: bool
    flock: bool
    rename: bool
    symlinks: bool
    hard_links: bool
    case_sensitive: bool
    user_xattrs: bool
    trusted_xattrs: bool
    devices: bool
    whiteouts: bool
    same_device: bool
    network: str

    def payload(self) -> dict[str, Any]:
        """Return the capabilities as JSON values."""
        return asdict(self)

    @classmethod
    def parse(cls, payload: object) -> Capabilities | None:
        """Return the capabilities that ``payload`` made, or None for another form."""
        if not isinstance(payload, dict) or set(payload) != {field.name for field in fields(cls)}:
            return None
        for name, value in payload.items():
            if type(value) is not (str if name == "network" else bool):
                return None
        return cls(**payload)

    def missing(self) -> list[str]:
        """Return what a store needs to hold blobs and snapshots and does not have here."""
        wanted = [
            (self.flock, "file locks (flock)"),
            (self.rename, "atomic rename"),
            (self.same_device, "one file system for ingest/, blobs/, layers/ and snapshots/"),
            (self.symlinks, "symbolic links"),
            (self.case_sensitive, "names that differ only in case"),
            (self.whiteouts, "whiteout devices (mknod c 0 0)"),
        ]
        if not self.privileged:
            wanted += [(self.user_xattrs, "user.* extended attributes")]
        return [text for present, text in wanted if not present]

    def require(self, path: Path) -> None:
        """Raise the one ``StorageError`` that names everything that is missing."""
        missing = self.missing()
        if missing:
            kind = f" ({self.network})" if self.network else ""
            raise StorageError(
                str(path),
                f"this file system{kind} cannot hold a store, it lacks {', '.join(missing)}: "
                "choose another --store",
            )


def probe(store: Path) -> Capabilities:
    """Try everything in a scratch directory inside ``store``."""
    scratch = store / f"{PROBE}{os.urandom(8).hex()}"
    try:
        scratch.mkdir(0o700)
    except OSError as error:
        raise storage_error(error, store, "write to the store") from error
    try:
        return _probe(store, scratch)
    except OSError as error:
        raise storage_error(error, store, "try out what the file system can do") from error
    finally:
        remove_tree(scratch)


def _probe(store: Path, scratch: Path) -> Capabilities:
    file = scratch / "File"
    file.write_bytes(b"1")
    device = scratch.lstat().st_dev
    trusted_xattrs = _works(lambda: os.setxattr(file, "trusted.stowray", b"1"))
    devices = _device(scratch / "null", 1, 3)
    return Capabilities(
        # Root of an ordinary container or of a user namespace has the number and not the rights:
        # it keeps trees as a plain user does.
        privileged=os.geteuid() == 0 and trusted_xattrs and devices,
        flock=_flock(file),
        rename=_rename(scratch),
        symlinks=_works(lambda: os.symlink("nowhere", scratch / "link")),
        hard_links=_works(lambda: os.link(file, scratch / "hard", follow_symlinks=False)),
        case_sensitive=not os.path.lexists(scratch / "fILE"),
        user_xattrs=_works(lambda: os.setxattr(file, "user.stowray", b"1")),
        trusted_xattrs=trusted_xattrs,
        devices=devices,
        # Since Linux 5.8 anybody may make the 0/0 character device (overlayfs whiteout).
        whiteouts=_device(scratch / "whiteout", 0, 0),
        same_device=all(
            (store / name).lstat().st_dev == device
            for name in ("ingest", "blobs", "layers", "snapshots")
            if os.path.lexists(store / name)
        ),
        network=network_kind(scratch),
    )


def _works(action: Callable[[], None]) -> bool:
    try:
        action()
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def _flock(file: Path) -> bool:
    """Say whether two open files of one process exclude each other."""
    first = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    second = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    try:
        return try_lock(first) and not try_lock(second)
    except OSError as error:
        if error.errno in (*_UNSUPPORTED, errno.ENOLCK):
            return False
        raise
    finally:
        os.close(first)
        os.close(second)


def _rename(scratch: Path) -> bool:
    old, new = scratch / "old", scratch / "new"
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    if not _works(lambda: os.rename(new, old)):
        return False
    return old.read_bytes() == b"new" and not os.path.lexists(new)


def _device(path: Path, major: int, minor: int) -> bool:
    number = os.makedev(major, minor)
    if not _works(lambda: os.mknod(path, stat.S_IFCHR | 0o600, number)):
        return False
    status = path.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == number


def network_kind(path: Path) -> str:
    """Return the name of a network (or FUSE) file system, ``""`` for a local one."""
    import ctypes

    buffer = (ctypes.c_ulong * 32)()  # larger than struct statfs on every Linux
    library = ctypes.CDLL(None, use_errno=True)
    if library.statfs(os.fsencode(path), ctypes.byref(buffer)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return _NETWORK.get(buffer[0] & 0xFFFFFFFF, "")
