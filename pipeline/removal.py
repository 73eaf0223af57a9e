"""Removal of directory trees that may be hostile: unreadable, very deep, full of links.

Invariant: nothing outside the tree is touched (every step below the parent that the caller names
goes through a directory descriptor and ``O_NOFOLLOW``), no depth of nesting exhausts descriptors or
the stack, and modes such as 0000 or 0555 stop neither root nor a plain user.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING

from stowray.pipeline.errors import StorageError, escape

if TYPE_CHECKING:
    from pathlib import Path

_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# The way to the tree is the caller's: a store or a destination may well be behind a link.
_OPEN_PARENT = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OPEN_HANDLE = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: Path) -> None:
    """Remove ``path`` and all below it; a path that is not there is success."""
    try:
        parent = os.open(path.parent, _OPEN_PARENT)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(str(path), f"cannot be removed: {error.strerror}") from error
    try:
        _remove(parent, os.fsencode(path.name))
    except OSError as error:
        detail = f" ({escape(os.fsencode(error.filename))})" if error.filename else ""
        raise StorageError(str(path), f"cannot be removed: {error.strerror}{detail}") from error
    finally:
        os.close(parent)


def _remove(parent: int, name: bytes) -> None:
    try:
        status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(status.st_mode):
        os.unlink(name, dir_fd=parent)
        return
    top = _open_writable(parent, name)
    try:
        # Deeper directories are moved up beside the first ones, so that two descriptors are enough
        # for any depth. The names are random: an entry of the tree cannot stand in the way.
        prefix = f".remove-{os.urandom(8).hex()}-".encode()
        waiting: list[bytes] = _empty(top, top, prefix, 0)
        moved = len(waiting)
        while waiting:
            child = waiting.pop()
            directory = _open_writable(top, child)
            try:
                found = _empty(directory, top, prefix, moved)
            finally:
                os.close(directory)
            moved += len(found)
            waiting += found
            os.rmdir(child, dir_fd=top)
    finally:
        os.close(top)
    os.rmdir(name, dir_fd=parent)


def _open_writable(parent: int, name: bytes) -> int:
    """Open a directory that its owner may have closed to himself, and give him all rights on it."""
    handle = os.open(name, _OPEN_HANDLE, dir_fd=parent)
    try:
        if os.fstat(handle).st_mode & 0o700 != 0o700:
            # fchmod refuses O_PATH descriptors; the magic link names exactly this inode (proc(5)).
            os.chmod(f"/proc/self/fd/{handle}", 0o700)
        return os.open(b".", _OPEN_DIRECTORY, dir_fd=handle)
    finally:
        os.close(handle)


def _empty(directory: int, top: int, prefix: bytes, moved: int) -> list[bytes]:
    """Unlink what is no directory and move each directory to ``top``; return their new names."""
    directories: list[str] = []
    with os.scandir(directory) as entries:
        names = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_directory in names:
        if is_directory:
            directories.append(name)
            continue
        # Another remover of the same tree (a collector beside a failing stage) is no error.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)
    found: list[bytes] = []
    for name in directories:
        target = prefix + str(moved + len(found)).encode()
        _move(directory, os.fsencode(name), top, target)
        found.append(target)
    return found


def _move(source: int, name: bytes, destination: int, target: bytes) -> None:
    try:
        os.rename(name, target, src_dir_fd=source, dst_dir_fd=destination)
    except PermissionError:
        # Moving a directory to another parent rewrites its "..": its own write bit is needed.
        os.close(_open_writable(source, name))
        os.rename(name, target, src_dir_fd=source, dst_dir_fd=destination)
