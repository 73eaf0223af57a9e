"""Compare two file trees in everything an image can say about them.

Invariant: equal means equal in type, mode, owner, size, mtime (nanoseconds), link target, hard-link
groups, extended attributes, device numbers and content. A difference is a line a person can read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}
SHOWN = 40


@dataclass(frozen=True)
class Node:
    """One name of a tree; `links` are all names in this tree of the same inode."""

    kind: str
    mode: str
    uid: int
    gid: int
    size: int
    mtime_ns: int
    target: bytes
    links: tuple[bytes, ...]
    xattrs: tuple[tuple[str, bytes], ...]
    device: tuple[int, int]
    content: str


def read_tree(
    root: Path, *, kept_xattrs: tuple[str, ...] = ("user.", "security."), ghosts: bool = False
) -> dict[bytes, Node]:
    """Read every name below `root`, the root itself as ``b"."``.

    With `ghosts` names may be listed and not be there: overlayfs lists the whiteouts of a directory
    that only one layer has, unless it is told to look closer, which not every tool does.
    """
    groups: dict[tuple[int, int], list[bytes]] = {}
    found: list[tuple[bytes, bytes, os.stat_result]] = []
    for name, path in _walk(os.fsencode(root)):
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            if ghosts:
                continue
            raise
        found.append((name, path, status))
        if not stat.S_ISDIR(status.st_mode):
            groups.setdefault((status.st_dev, status.st_ino), []).append(name)
    contents: dict[tuple[int, int], str] = {}
    tree: dict[bytes, Node] = {}
    for name, path, status in found:
        inode = (status.st_dev, status.st_ino)
        regular = stat.S_ISREG(status.st_mode)
        if regular and inode not in contents:
            with open(path, "rb", buffering=0) as content:
                contents[inode] = hashlib.file_digest(content, "sha256").hexdigest()
        is_device = stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)
        names = groups.get(inode, [])
        tree[name] = Node(
            kind=KINDS[stat.S_IFMT(status.st_mode)],
            mode=f"{stat.S_IMODE(status.st_mode):04o}",
            uid=status.st_uid,
            gid=status.st_gid,
            size=status.st_size if regular else 0,
            mtime_ns=status.st_mtime_ns,
            target=os.readlink(path) if stat.S_ISLNK(status.st_mode) else b"",
            links=tuple(sorted(names)) if len(names) > 1 else (),
            xattrs=_xattrs(path, kept_xattrs),
            device=(os.major(status.st_rdev), os.minor(status.st_rdev)) if is_device else (0, 0),
            content=contents.get(inode, "") if regular else "",
        )
    return tree


def _walk(root: bytes) -> Iterator[tuple[bytes, bytes]]:
    yield b".", root
    pending = [b""]
    while pending:
        prefix = pending.pop()
        with os.scandir(os.path.join(root, prefix)) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                name = prefix + entry.name
                yield name, entry.path
                if entry.is_dir(follow_symlinks=False):
                    pending.append(name + b"/")


def _xattrs(path: bytes, kept: tuple[str, ...]) -> tuple[tuple[str, bytes], ...]:
    with contextlib.suppress(OSError):
        return tuple(
            (key, os.getxattr(path, key, follow_symlinks=False))
            for key in sorted(os.listxattr(path, follow_symlinks=False))
            if key.startswith(kept) and not key.startswith("user.overlay.")
        )
    return ()


def differences(
    actual: dict[bytes, Node], expected: dict[bytes, Node], *, ignored: Collection[str] = ()
) -> list[str]:
    """Say what differs, name by name; empty when the trees are equal."""
    lines = [f"{_text(name)}: is not there" for name in sorted(expected.keys() - actual.keys())]
    lines += [
        f"{_text(name)}: should not be there" for name in sorted(actual.keys() - expected.keys())
    ]
    compared = [part.name for part in fields(Node) if part.name not in ignored]
    for name in sorted(actual.keys() & expected.keys()):
        for part in compared:
            is_now, should_be = getattr(actual[name], part), getattr(expected[name], part)
            if is_now != should_be:
                lines.append(f"{_text(name)}: {part} is {is_now!r}, should be {should_be!r}")
    return lines


def assert_same_tree(actual: Path, expected: Path, *, ignored: Collection[str] = ()) -> None:
    """Fail with the first differences when the trees are not equal."""
    lines = differences(read_tree(actual), read_tree(expected), ignored=ignored)
    if lines:
        more = f"\n… and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        shown = "\n".join(lines[:SHOWN])
        raise AssertionError(f"{actual} is not {expected}: {len(lines)} differences\n{shown}{more}")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
