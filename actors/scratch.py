"""The private folder of a Ray of our own: short, mode 0700, and removed also after a kill.

Invariant: a folder is in use as long as somebody holds the flock on its ``lock`` file; only folders
of this user whose lock is free, or never was made, are swept away, whoever left them.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import stat
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stowray.pipeline.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

PREFIX = "stowray-ray-"
# unix(7): 108 bytes for a socket's path; Ray puts up to 66 of its own behind the folder's.
_LONGEST = 40
_TRIES = 8
_REMOVALS = 20
_UNLOCKED_SECONDS = 60.0
_REMOVAL_SECONDS = 0.05


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """Yield a fresh private folder and remove it at the end."""
    parent = _parent()
    sweep(parent)
    directory, lock = _make(parent)
    try:
        yield directory
    finally:
        _remove(directory)
        os.close(lock)


def write_token(directory: Path) -> Path:
    """Write a new random token into ``directory`` and return its path, mode 0600."""
    path = directory / "token"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
    except OSError as error:
        raise StorageError(str(path), error.strerror or str(error)) from error
    return path


def sweep(parent: Path) -> list[Path]:
    """Remove folders that a killed process left in ``parent``; return them."""
    removed = []
    try:
        candidates = sorted(parent.glob(f"{PREFIX}*"))
    except OSError:
        return []
    for directory in candidates:
        try:
            status = directory.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                continue
            lock = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            # Its maker has not locked it yet, which takes a moment only; or Ray, on its way out,
            # made the folder again after it had been removed.
            if time.time() - status.st_mtime > _UNLOCKED_SECONDS and _remove(directory):
                removed.append(directory)
            continue
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            if _remove(directory):
                removed.append(directory)
        finally:
            os.close(lock)
    return removed


def _remove(directory: Path) -> bool:
    """Remove the folder, its lock file last: what cannot be removed now is swept another time."""
    lock = directory / "lock"
    for _ in range(_REMOVALS):
        # Ray's last thread may still write a log file while the others are being removed.
        try:
            for entry in [entry for entry in directory.iterdir() if entry != lock]:
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)
            if list(directory.iterdir()) in ([lock], []):
                lock.unlink(missing_ok=True)
                directory.rmdir()
                return True
        except OSError:
            if not directory.exists():
                return True
        time.sleep(_REMOVAL_SECONDS)
    return False


def _make(parent: Path) -> tuple[Path, int]:
    for _ in range(_TRIES):
        try:
            directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            # A sweeper cannot have seen the lock file yet; the parent itself may be gone.
            raise StorageError(str(parent), "the folder for temporary files is missing") from None
        except OSError as error:
            raise StorageError(str(parent), error.strerror or str(error)) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            # A sweeper came between the two calls: leave this folder to it.
            os.close(lock)
            continue
        return directory, lock
    raise StorageError(str(parent), "cannot make a private folder for Ray")


def _parent() -> Path:
    parent = Path(tempfile.gettempdir())
    if len(os.fsencode(parent)) + 1 + len(PREFIX) + 8 > _LONGEST:
        parent = Path("/tmp")
    return parent
