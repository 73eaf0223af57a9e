"""Advisory locks (``flock``) that the kernel frees when their holder dies.

Invariant: whoever holds a lock holds the file that the path names *now*. Holders may unlink a lock
file before they let go, so each locker compares inodes after locking and begins again when the file
was replaced. ``flock`` belongs to the open file, so that two threads of one process exclude each
other too, which ``fcntl.lockf`` does not give.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stowray.pipeline.errors import CancelledError, StorageError
from stowray.pipeline.files import translated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_FIRST_PAUSE = 0.001
_LONGEST_PAUSE = 0.02


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Lock an open file without waiting; False when another open file holds it."""
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def unlock(descriptor: int) -> None:
    """Let an open file's lock go.

    Closing alone is not enough: a process forked meanwhile has the same open file.
    """
    fcntl.flock(descriptor, fcntl.LOCK_UN)


def is_current(descriptor: int, path: Path) -> bool:
    """Say whether ``path`` still names the open file."""
    try:
        named = path.lstat()
    except FileNotFoundError:
        return False
    opened = os.fstat(descriptor)
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)


def open_lock(path: Path) -> int:
    """Open (or create) a lock file."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


@contextmanager
def locked(
    path: Path,
    *,
    what: str,
    wait_seconds: float,
    cancelled: Callable[[], bool] | None = None,
    shared: bool = False,
    keep: bool = True,
) -> Iterator[None]:
    """Hold the lock file ``path`` for the block; ``StorageError`` after ``wait_seconds``.

    Without ``keep`` the file is removed at the end, for names that come and go with their content.
    """
    descriptor = _take(path, what, wait_seconds, cancelled, shared=shared)
    try:
        yield
    finally:
        try:
            if not keep and not shared:
                with translated(path, "remove a lock"):
                    path.unlink(missing_ok=True)
        finally:
            unlock(descriptor)
            os.close(descriptor)


def _take(
    path: Path,
    what: str,
    wait_seconds: float,
    cancelled: Callable[[], bool] | None,
    *,
    shared: bool,
) -> int:
    """Return the descriptor of the locked file."""
    deadline = time.monotonic() + wait_seconds
    pause = _FIRST_PAUSE
    with translated(path, "take a lock"):
        descriptor = open_lock(path)
        try:
            while True:
                if try_lock(descriptor, shared=shared):
                    if is_current(descriptor, path):
                        return descriptor
                    # Its last holder removed it: whoever comes next makes a new one.
                    os.close(descriptor)
                    descriptor = -1
                    descriptor = open_lock(path)
                    continue
                if cancelled is not None and cancelled():
                    raise CancelledError(what)
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise StorageError(
                        str(path),
                        f"the lock of {what} was not free within {wait_seconds:g} s: see with "
                        "`fuser` or `lsof` who has it, and try again when that one is done",
                    )
                time.sleep(min(pause, remaining))
                pause = min(pause * 2, _LONGEST_PAUSE)
        except BaseException:
            if descriptor >= 0:
                os.close(descriptor)
            raise
