"""Every difference between two layer trees, as they lie on disk.

Invariant: trees without a difference are equal in names, types, modes, owners, sizes, modification
times, devices, link targets, hard-link groups, extended attributes (those of overlayfs included),
contents and entry lists. No link is followed.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from stowray.pipeline.entry_list import read_entry_list
from stowray.pipeline.errors import StorageError, escape
from stowray.pipeline.files import SCARCITY, storage_error, translated
from stowray.pipeline.open_directories import OpenDirectories
from stowray.pipeline.overlay_node import is_whiteout
from stowray.pipeline.tree_ops import OPEN_DIRECTORY, name_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_CHUNK = 1 << 20
_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_Difference = tuple[bytes, str]


def compare_trees(expected: Path, actual: Path) -> Iterator[_Difference]:
    """Yield path and what is wrong of each difference of ``actual``; the root's path is empty."""
    with translated(expected, "read a layer tree"):
        expected_root = os.open(expected, OPEN_DIRECTORY)
    try:
        try:
            actual_root = os.open(actual, OPEN_DIRECTORY)
        except OSError as error:
            yield b"", _unreadable(error, b"")
            return
        try:
            with OpenDirectories(expected_root) as first, OpenDirectories(actual_root) as second:
                yield from _Comparison(first, second).run()
        finally:
            os.close(actual_root)
    finally:
        os.close(expected_root)
    yield from _compare_entry_lists(expected, actual)


def _unreadable(error: OSError, path: bytes) -> str:
    """Return what is wrong with an entry that cannot be read; raise for what is not its fault."""
    if error.errno in SCARCITY:
        raise storage_error(error, escape(path), "read a layer tree") from error
    return f"cannot be read: {error.strerror}"


class _Comparison:
    """One walk over both trees at once."""

    def __init__(self, expected: OpenDirectories, actual: OpenDirectories) -> None:
        self._sides = (expected, actual)
        self._groups: tuple[dict[int, bytes], dict[int, bytes]] = ({}, {})

    def run(self) -> Iterator[_Difference]:
        pending = [b""]
        yield from self._attributes(b"", b"")
        while pending:
            path = pending.pop()
            try:
                wanted, found = (set(os.listdir(side.get(path))) for side in self._sides)
            except OSError as error:
                yield path, _unreadable(error, path)
                continue
            for text in sorted(wanted | found):
                name = os.fsencode(text)
                below = path + b"/" + name if path else name
                if text not in found:
                    yield below, "is missing"
                elif text not in wanted:
                    yield below, "should not be there"
                else:
                    yield from self._attributes(path, name)
                    try:
                        is_directory = self._is_directory(path, name)
                    except OSError as error:
                        yield below, _unreadable(error, below)
                        continue
                    if is_directory:
                        pending.append(below)

    def _is_directory(self, path: bytes, name: bytes) -> bool:
        return all(
            stat.S_ISDIR(os.stat(name, dir_fd=side.get(path), follow_symlinks=False).st_mode)
            for side in self._sides
        )

    def _attributes(self, path: bytes, name: bytes) -> Iterator[_Difference]:
        """Compare the entry ``name`` of the directory ``path``, or (no name) the root itself."""
        below = path + b"/" + name if path else name
        first, second = (side.get(path) for side in self._sides)
        try:
            wanted, found = (
                os.stat(name or b".", dir_fd=directory, follow_symlinks=False)
                for directory in (first, second)
            )
            if stat.S_IFMT(wanted.st_mode) != stat.S_IFMT(found.st_mode):
                yield below, f"is a {_kind(found)} and should be a {_kind(wanted)}"
                return
            if is_whiteout(wanted) and is_whiteout(found):
                # A mark and no entry of the image: when it was made means nothing.
                return
            differences = _differing_status(wanted, found)
            if not stat.S_ISDIR(wanted.st_mode) and self._group(0, wanted, below) != self._group(
                1, found, below
            ):
                differences.append("hard links")
            if _xattrs(first, name) != _xattrs(second, name):
                differences.append("extended attributes")
            if stat.S_ISLNK(wanted.st_mode):
                targets = {os.readlink(name, dir_fd=directory) for directory in (first, second)}
                if len(targets) > 1:
                    differences.append("link target")
            elif (
                stat.S_ISREG(wanted.st_mode)
                and wanted.st_size == found.st_size
                and not _same_content(first, second, name)
            ):
                differences.append("content")
        except OSError as error:
            yield below, _unreadable(error, below)
            return
        if differences:
            yield below, f"differs in {', '.join(differences)}"

    def _group(self, side: int, status: os.stat_result, path: bytes) -> bytes:
        """Return the first name of the inode: equal groups have equal first names."""
        if status.st_nlink < 2:
            return path
        return self._groups[side].setdefault(status.st_ino, path)


def _differing_status(wanted: os.stat_result, found: os.stat_result) -> list[str]:
    differences = []
    if wanted.st_mode != found.st_mode:
        differences.append(
            f"mode ({stat.S_IMODE(found.st_mode):04o} for {stat.S_IMODE(wanted.st_mode):04o})"
        )
    if (wanted.st_uid, wanted.st_gid) != (found.st_uid, found.st_gid):
        differences.append(
            f"owner ({found.st_uid}:{found.st_gid} for {wanted.st_uid}:{wanted.st_gid})"
        )
    if stat.S_ISREG(wanted.st_mode) and wanted.st_size != found.st_size:
        differences.append(f"size ({found.st_size} for {wanted.st_size})")
    if wanted.st_mtime_ns != found.st_mtime_ns:
        differences.append("modification time")
    if wanted.st_rdev != found.st_rdev:
        differences.append("device number")
    return differences


def _xattrs(directory: int, name: bytes) -> dict[str, bytes]:
    path = name_path(directory, name or b".")
    return {
        key: os.getxattr(path, key, follow_symlinks=False)
        for key in os.listxattr(path, follow_symlinks=False)
    }


def _same_content(first: int, second: int, name: bytes) -> bool:
    one = os.open(name, _OPEN_FILE, dir_fd=first)
    try:
        other = os.open(name, _OPEN_FILE, dir_fd=second)
        try:
            while True:
                data = os.read(one, _CHUNK)
                # Files of one size on local disks give reads of one length; loop for any that not.
                matched = b""
                while len(matched) < len(data):
                    part = os.read(other, len(data) - len(matched))
                    if not part:
                        return False
                    matched += part
                if data != matched:
                    return False
                if not data:
                    return not os.read(other, 1)
        finally:
            os.close(other)
    finally:
        os.close(one)


def _kind(status: os.stat_result) -> str:
    kinds = {
        stat.S_IFREG: "file",
        stat.S_IFDIR: "directory",
        stat.S_IFLNK: "symbolic link",
        stat.S_IFCHR: "character device",
        stat.S_IFBLK: "block device",
        stat.S_IFIFO: "fifo",
    }
    return kinds.get(stat.S_IFMT(status.st_mode), "socket")


def _compare_entry_lists(expected: Path, actual: Path) -> Iterator[_Difference]:
    wanted = read_entry_list(expected)
    try:
        found = read_entry_list(actual)
    except StorageError as error:
        yield b"", f"entry list: {error.reason}"
        return
    for path in sorted(wanted.keys() | found.keys()):
        if wanted.get(path) != found.get(path):
            yield path, "differs in its recorded attributes"
