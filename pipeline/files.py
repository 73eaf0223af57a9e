"""Small file operations of the store, each with its errors in the user's words.

Invariant: a file that is replaced is either its old or its new self, never a mixture, and no
``OSError`` leaves this module's context manager untranslated.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from stowray.pipeline.errors import StorageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Temporary names start so; they are locked while they are written (gc removes the unlocked ones).
TEMPORARY = ".tmp-"
PROBE = ".probe-"
# What a process of ours asks for; far above what any tree needs, below what slows a close-all loop.
DESCRIPTORS = 65_536

# Errors that say nothing of the file: this process or machine has run out of something.
SCARCITY = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

_ADVICE = {
    errno.ENOSPC: "the disk is full: free space (`stowray gc`) or choose another --store",
    errno.EDQUOT: "the disk quota is used up: free space (`stowray gc`) or ask for more",
    errno.EFBIG: "the file would be larger than this file system or `ulimit -f` allows",
    errno.EROFS: "the file system is mounted read-only: choose another --store",
    errno.EACCES: "permission denied: run as the store's owner or choose another --store",
    errno.EPERM: "operation not permitted: run as the store's owner or choose another --store",
    errno.EIO: "the disk reports an input/output error: check it, then run `stowray verify`",
    errno.EMFILE: "too many open files in this process: raise `ulimit -n`",
    errno.ENFILE: "too many open files on this machine",
    errno.ENOMEM: "this machine is out of memory: try again when less runs on it",
    errno.ENOTDIR: "a part of the path is not a directory",
    errno.ELOOP: "a symbolic link stands where the store keeps a file or directory of its own",
}


def storage_error(error: OSError, path: Path | str, doing: str) -> StorageError:
    """Return the ``StorageError`` that says what ``error`` means for the user."""
    code = error.errno or 0
    reason = _ADVICE.get(code) or (os.strerror(code) if code else str(error))
    return StorageError(str(path), f"cannot {doing}: {reason}")


@contextmanager
def translated(path: Path | str, doing: str) -> Iterator[None]:
    """Translate each ``OSError`` of the block to a ``StorageError`` about ``path``."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path, doing) from error


def make_directory(path: Path, mode: int = 0o700) -> bool:
    """Create one directory with exactly ``mode`` whatever the umask; False when it was there."""
    try:
        path.mkdir(mode)
    except FileExistsError:
        return False
    path.chmod(mode)
    return True


def open_regular(path: Path) -> int:
    """Return a read-only descriptor of a regular file, refusing whatever else bears its name.

    ``O_NOFOLLOW`` and ``O_NONBLOCK``: a planted link must not lead out of the store, nor a planted
    fifo hang the reader.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StorageError(str(path), "not a regular file: remove it and pull again")
    return descriptor


def read_regular(path: Path, limit: int) -> bytes:
    """Return the bytes of a small regular file; more than ``limit`` is a ``StorageError``."""
    descriptor = open_regular(path)
    try:
        parts: list[bytes] = []
        total = 0
        while part := os.read(descriptor, min(1 << 20, limit + 1 - total)):
            parts.append(part)
            total += len(part)
            if total > limit:
                raise StorageError(str(path), f"larger than {limit} bytes: not written by stowray")
        return b"".join(parts)
    finally:
        os.close(descriptor)


def read_given(path: Path, limit: int) -> bytes:
    """Return the bytes of a file that a user named: a link or a pipe will do.

    Raises OSError, and UsageError for more than ``limit`` bytes.
    """
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UsageError(str(path), f"larger than {limit} bytes")
    return data


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of ``data``; the kernel may take less at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def replace_file(path: Path, data: bytes, *, mode: int = 0o600, durable: bool = False) -> None:
    """Put ``data`` at ``path`` in one step; readers see the old file or the new one.

    With ``durable`` the file and its name are on disk when the call returns.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.urandom(8).hex()}")
    descriptor = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )
    try:
        try:
            # Whoever looks for leftovers removes only what nobody holds.
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            write_all(descriptor, data)
            os.fchmod(descriptor, mode)
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    if durable:
        sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Bring a directory's names to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def raise_descriptor_limit() -> None:
    """Let this process open as many files as it may: walking a deep chain holds many directories.

    The soft limit is 1024 by custom, for programs that use select(2); this one does not.
    """
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
