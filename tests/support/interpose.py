"""Stands between the program and the disk: counts the calls on a store and lets one of them fail.

Invariant: only calls whose path or descriptor lies in the store are counted, in the order in which
they are made; all others pass. It replaces functions of the module ``os`` in this process, so it is
for a process of its own (``tests.support.faults`` forks one per round).
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# What changes the disk, by the place of the path or descriptor that says where.
CHANGES = {
    "mkdir": 0,
    "mknod": 0,
    "mkfifo": 0,
    "symlink": 1,
    "link": 1,
    "rename": 0,
    "replace": 0,
    "unlink": 0,
    "remove": 0,
    "rmdir": 0,
    "chmod": 0,
    "chown": 0,
    "lchown": 0,
    "utime": 0,
    "truncate": 0,
    "setxattr": 0,
    "removexattr": 0,
    "write": 0,
    "pwrite": 0,
    "fchmod": 0,
    "fchown": 0,
    "ftruncate": 0,
    "fsync": 0,
    "sendfile": 0,
    "copy_file_range": 1,
}
# What only looks, for the errors that may come of that as well.
LOOKS = {
    "read": 0,
    "pread": 0,
    "preadv": 0,
    "stat": 0,
    "lstat": 0,
    "scandir": 0,
    "listdir": 0,
    "statvfs": 0,
    "readlink": 0,
    "getxattr": 0,
    "listxattr": 0,
}
_WRITING = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_RDWR
_ROOM = {"mkdir", "mknod", "mkfifo", "symlink", "link", "write", "pwrite", "setxattr", "ftruncate"}
_ROOM |= {"rename", "replace", "create", "fsync", "copy_file_range", "sendfile"}
_CHANGING = {*CHANGES, "create"}
# Which calls an error may come from (the manual pages name them there).
ERRORS = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM | {"chown", "lchown", "fchown"},
    errno.EROFS: _CHANGING - {"write", "pwrite", "fsync"},
    errno.EMFILE: {"create", "open", "scandir", "listdir"},
    errno.ENFILE: {"create", "open", "scandir", "listdir"},
    errno.ENOMEM: {"create", "open", "mkdir", "stat", "lstat", "rename", "read"},
    errno.EIO: {*CHANGES, *LOOKS, "create", "open"},
}


class Interposer:
    """Replaces ``os`` functions; ``at`` is told number and kind of each call before it is made."""

    def __init__(self, store: Path, kinds: set[str], at: Callable[[int, str], None]) -> None:
        self._store = os.fsencode(os.path.realpath(store))
        self._kinds = kinds
        self._at = at
        self._count = itertools.count(1)
        self._last = 0
        self._busy = threading.local()
        self._readlink = os.readlink

    @property
    def count(self) -> int:
        """How many calls there were."""
        return self._last

    def install(self) -> None:
        """Begin; there is no way back in this process."""
        for name, place in {**CHANGES, **LOOKS}.items():
            if name in self._kinds:
                setattr(os, name, self._wrapped(name, getattr(os, name), place))
        if self._kinds & {"open", "create"}:
            os.open = self._opener(os.open)  # type: ignore[assignment]

    def _wrapped(self, name: str, real: Callable[..., Any], place: int) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            where = arguments[place] if len(arguments) > place else None
            folder = options.get("dir_fd", options.get("dst_dir_fd", options.get("src_dir_fd")))
            if self._is_ours(where, folder):
                self._note(name)
            return real(*arguments, **options)

        return call

    def _opener(self, real: Callable[..., int]) -> Callable[..., int]:
        def call(path: Any, flags: int, mode: int = 0o777, dir_fd: int | None = None) -> int:
            name = "create" if flags & _WRITING else "open"
            if name in self._kinds and self._is_ours(path, dir_fd):
                self._note(name)
            return real(path, flags, mode, dir_fd=dir_fd)

        return call

    def _note(self, name: str) -> None:
        self._last = number = next(self._count)
        self._at(number, name)

    def _is_ours(self, where: Any, folder: int | None) -> bool:
        if getattr(self._busy, "on", False):
            return False
        self._busy.on = True
        try:
            if isinstance(where, int):
                path = self._of(where)
            elif where is None:
                return False
            else:
                path = os.fsencode(where)
                if path.startswith(b"/proc/self/fd/"):
                    number, slash, rest = path.removeprefix(b"/proc/self/fd/").partition(b"/")
                    path = self._of(int(number)) + slash + rest
                elif not path.startswith(b"/") and folder is not None:
                    path = self._of(folder) + b"/" + path
            return path == self._store or path.startswith(self._store + b"/")
        finally:
            self._busy.on = False

    def _of(self, descriptor: int) -> bytes:
        try:
            return os.fsencode(self._readlink(f"/proc/self/fd/{descriptor}"))
        except OSError:
            return b""


def killer(number: int) -> Callable[[int, str], None]:
    """Return what ends the process with SIGKILL before its ``number``-th call."""

    def at(current: int, _name: str) -> None:
        if current == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return at


def failer(number: int, code: int, *, lasting: bool) -> Callable[[int, str], None]:
    """Return what fails the ``number``-th call with ``code``; with ``lasting`` all from then on."""

    def at(current: int, _name: str) -> None:
        if current == number or (lasting and current > number):
            raise OSError(code, os.strerror(code))

    return at


def locked_elsewhere(path: Path) -> bool:
    """Say whether another process holds the lock on a file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
