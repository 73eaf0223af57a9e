"""A place for a tree that appears complete or not at all.

Invariant: the destination is new or empty when work begins, and bears its name with content only
once all of it is there: the tree is built beside it and renamed onto it. A destination that cannot
be renamed onto (a mount point, a parent that this user cannot write) has ``.stowray-incomplete`` in
it while it is filled.
"""

from __future__ import annotations

import errno
import os
import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stowray.pipeline.errors import StorageError
from stowray.pipeline.files import translated
from stowray.pipeline.locks import try_lock
from stowray.pipeline.removal import remove_tree
from stowray.pipeline.tree_ops import OPEN_DIRECTORY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

INCOMPLETE = ".stowray-incomplete"


def check_destination(destination: Path) -> bool:
    """Return whether ``destination`` exists; StorageError unless it is new or empty."""
    with translated(destination, "make the tree"):
        return _check(destination)


@contextmanager
def building(destination: Path) -> Iterator[int]:
    """Give the descriptor of an empty directory that becomes ``destination`` at a clean end."""
    destination = destination.absolute()
    exists = check_destination(destination)
    inside = exists and (os.path.ismount(destination) or not os.access(destination.parent, os.W_OK))
    with _inside(destination) if inside else _beside(destination) as directory:
        yield directory


@contextmanager
def _beside(destination: Path) -> Iterator[int]:
    stem = f".{destination.name}.stowray-"
    _sweep(destination.parent, stem)
    path = destination.parent / f"{stem}{secrets.token_hex(8)}"
    with translated(path, "make the tree"):
        path.mkdir(0o700)
        directory = os.open(path, OPEN_DIRECTORY)
    try:
        # Locked, so that a later run can tell a leftover from one that is being built.
        try_lock(directory)
        with translated(path, "make the tree"):
            _forget_inheritance(directory)
        yield directory
        with translated(destination, "put the tree in place"):
            os.rename(path, destination)
    except BaseException:
        remove_tree(path)
        raise
    finally:
        os.close(directory)


@contextmanager
def _inside(destination: Path) -> Iterator[int]:
    marker = destination / INCOMPLETE
    with translated(destination, "make the tree"):
        marker.touch(0o600)
        directory = os.open(destination, OPEN_DIRECTORY)
    try:
        yield directory
        with translated(marker, "finish the tree"):
            # Removing the marker changes the root's own times.
            status = os.fstat(directory)
            marker.unlink()
            os.utime(directory, ns=(status.st_atime_ns, status.st_mtime_ns))
    except BaseException:
        for name in os.listdir(directory):
            if name != INCOMPLETE:
                remove_tree(destination / name)
        marker.unlink(missing_ok=True)
        raise
    finally:
        os.close(directory)


def _check(destination: Path) -> bool:
    if destination.is_symlink():
        raise StorageError(str(destination), "is a symbolic link: name the directory itself")
    try:
        names = os.listdir(destination)
    except FileNotFoundError:
        if not destination.parent.is_dir():
            raise StorageError(str(destination.parent), "no such directory") from None
        return False
    except NotADirectoryError:
        raise StorageError(str(destination), "exists and is no directory") from None
    if INCOMPLETE in names:
        raise StorageError(str(destination), "holds a tree that was not finished: empty it first")
    if names:
        raise StorageError(str(destination), "is not empty: name an empty or a new directory")
    return True


def _sweep(parent: Path, stem: str) -> None:
    """Remove what killed runs for the same destination left behind."""
    with translated(parent, "make the tree"):
        names = [name for name in os.listdir(parent) if name.startswith(stem)]
    for name in names:
        try:
            descriptor = os.open(parent / name, OPEN_DIRECTORY)
        except OSError:
            # Gone meanwhile, or somebody else's file of that name.
            continue
        try:
            if try_lock(descriptor):
                remove_tree(parent / name)
        finally:
            os.close(descriptor)


def _forget_inheritance(directory: int) -> None:
    # A set-group-ID parent or its default ACL must not leave traces in the tree.
    os.fchmod(directory, 0o700)
    try:
        os.removexattr(directory, "system.posix_acl_default")
    except OSError as error:
        if error.errno not in {errno.ENODATA, errno.ENOTSUP, errno.EPERM, errno.EACCES}:
            raise
