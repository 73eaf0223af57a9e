"""File operations below a directory descriptor that never follow a symlink.

Invariant: each call acts on the one name that it is given, in the one directory that the
descriptor holds, whatever another process puts in its place meanwhile: no path of more than one
part is ever handed to the kernel, and no symlink is followed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# O_EXCL: an existing fifo or device is never opened, an existing file never written into.
CREATE_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
OPEN_HANDLE: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC

# Seconds that time_t and every file system can take; beyond them the kernel clamps further.
MAX_NS: Final = ((1 << 63) - 1) * 1_000_000_000
MIN_NS: Final = -(1 << 63) * 1_000_000_000


def process_umask() -> int:
    """Return the umask without changing it, as other threads would see the change."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"Umask:"):
                return int(line[6:], 8)
    # Unknown: as if all bits were masked, each mode is then set after creation.
    return 0o777


def set_times(directory: int, name: bytes, mtime_ns: int) -> None:
    """Set both times of ``name``."""
    mtime_ns = clamp_time(mtime_ns)
    os.utime(name, ns=(mtime_ns, mtime_ns), dir_fd=directory, follow_symlinks=False)


def clamp_time(mtime_ns: int) -> int:
    """Return the nearest time that the kernel takes; it clamps to what the file system stores."""
    return min(max(mtime_ns, MIN_NS), MAX_NS)


def set_owner(directory: int, name: bytes, uid: int, gid: int) -> None:
    """Set the owner of ``name``."""
    os.chown(name, uid, gid, dir_fd=directory, follow_symlinks=False)


def set_mode(directory: int, name: bytes, mode: int) -> None:
    """Set the mode of ``name``, which must be no symlink.

    fchmodat(2) knows no AT_SYMLINK_NOFOLLOW; the magic link of an O_PATH descriptor names exactly
    the inode that was opened, whatever bears its name now.
    """
    handle = os.open(name, OPEN_HANDLE, dir_fd=directory)
    try:
        if stat.S_ISLNK(os.fstat(handle).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), name)
        os.chmod(b"/proc/self/fd/%d" % handle, mode)
    finally:
        os.close(handle)


def set_xattrs(target: int | bytes, xattrs: Mapping[bytes, bytes]) -> list[tuple[bytes, OSError]]:
    """Set the extended attributes one by one; return those that could not be set, and why."""
    failures: list[tuple[bytes, OSError]] = []
    for key, value in xattrs.items():
        try:
            if isinstance(target, int):
                os.setxattr(target, key, value)
            else:
                os.setxattr(target, key, value, follow_symlinks=False)
        except OSError as error:
            failures.append((key, error))
    return failures


def name_path(directory: int, name: bytes) -> bytes:
    """Return a path of ``name`` for calls without ``dir_fd``; do not follow its last part."""
    return b"/proc/self/fd/%d/%s" % (directory, name)


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all of ``data``; the kernel may take less at a time."""
    written = os.write(descriptor, data)
    while written < len(data):
        data = data[written:]
        written = os.write(descriptor, data)


def exists(directory: int, name: bytes) -> bool:
    """Return whether there is anything of this name."""
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def read_link(directory: int, name: bytes) -> bytes | None:
    """Return the target of a symlink; None for whatever else has the name or if nothing has."""
    try:
        return os.readlink(name, dir_fd=directory)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise


def empty_directory(descriptor: int) -> None:
    """Unlink everything in a directory that holds no directories."""
    with os.scandir(descriptor) as entries:
        names = [entry.name for entry in entries]
    for name in names:
        os.unlink(name, dir_fd=descriptor)


def remove_xattr(descriptor: int, key: str) -> None:
    """Remove an extended attribute; one that is not there is success."""
    try:
        os.removexattr(descriptor, key)
    except OSError as error:
        if error.errno not in {errno.ENODATA, errno.ENOTSUP}:
            raise
