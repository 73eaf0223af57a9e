"""Settles a tree that was staged alone against the chain that it is committed onto.

Invariant: after ``settle`` has returned True the tree, read above that chain, equals what applying
the layer's entries to the chain's merged tree would have given. What cannot be mended in place is
reported, never half mended: all checks come before the first change.
"""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stowray.pipeline import tree_ops
from stowray.pipeline.entry_list import OWNER, Record, read_entry_list, write_entry_list
from stowray.pipeline.files import translated
from stowray.pipeline.layer import BELOW_NOTE, IMPLIED_NOTE, WALKED_NOTE, WHITEOUTS_NOTE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stowray.pipeline.layer import Staged
    from stowray.pipeline.overlay import ChainView, Node


def settle(tree: Path, staged: Staged, below: ChainView) -> bool:
    """Make ``tree`` right above ``below``; False if it must be staged again with ``lower=below``.

    Idempotent: a settle that was killed may be done again with the same arguments.
    """
    notes = staged.notes
    if notes.get(BELOW_NOTE):
        return False
    implied = [os.fsencode(path) for path in notes.get(IMPLIED_NOTE, ())]
    whiteouts = [os.fsencode(path) for path in notes.get(WHITEOUTS_NOTE, ())]
    walked = [os.fsencode(path) for path in notes.get(WALKED_NOTE, ())]
    found = {path: below.find(path) for path in (*implied, *whiteouts, *walked)}
    if any(node is not None and node.is_symlink for node in found.values()):
        return False
    directories = [
        (path, node)
        for path in (*implied, *whiteouts)
        if (node := found[path]) is not None and node.is_directory
    ]
    kept = {path for path, _ in directories}
    with translated(tree, "settle a layer"):
        # The deepest first: a directory without a twin below holds only such directories.
        for path in sorted(whiteouts, key=lambda path: path.count(b"/"), reverse=True):
            if path not in kept:
                _remove(tree, path)
        for path, node in directories:
            _adopt(tree, path, node, below)
    if directories and not below.privileged:
        _record(tree, directories, below)
    return True


@contextmanager
def _open(tree: Path, path: bytes) -> Iterator[int | None]:
    """Give a descriptor of a directory of the tree; None if it is not there (any more)."""
    here = os.open(tree, tree_ops.OPEN_DIRECTORY)
    try:
        for name in path.split(b"/") if path else ():
            try:
                child = os.open(name, tree_ops.OPEN_DIRECTORY, dir_fd=here)
            except FileNotFoundError:
                os.close(here)
                here = -1
                break
            os.close(here)
            here = child
        yield None if here < 0 else here
    finally:
        if here >= 0:
            os.close(here)


def _remove(tree: Path, path: bytes) -> None:
    """Remove a directory that only holds whiteouts, without a trace in its parent's times."""
    parent, _, name = path.rpartition(b"/")
    with _open(tree, path) as directory:
        if directory is None:
            return
        tree_ops.empty_directory(directory)
    with _open(tree, parent) as above:
        if above is None:
            return
        status = os.fstat(above)
        # A plain user may have closed the directory to himself, as the layer says.
        os.fchmod(above, 0o700)
        os.rmdir(name, dir_fd=above)
        os.fchmod(above, stat.S_IMODE(status.st_mode))
        os.utime(above, ns=(status.st_atime_ns, status.st_mtime_ns))


def _adopt(tree: Path, path: bytes, node: Node, below: ChainView) -> None:
    """Give a directory of the tree the attributes of the one below."""
    with _open(tree, path) as directory:
        if directory is None:
            return
        mode = node.mode
        if below.privileged:
            os.fchown(directory, node.uid, node.gid)
        else:
            mode |= 0o500
        unset = below.unset_xattrs(node)
        wanted = {key: value for key, value in below.xattrs(node).items() if key not in unset}
        for _, error in tree_ops.set_xattrs(directory, wanted):
            raise error
        os.fchmod(directory, mode)
        os.utime(directory, ns=(node.mtime_ns, node.mtime_ns))


def _record(tree: Path, directories: list[tuple[bytes, Node]], below: ChainView) -> None:
    records = read_entry_list(tree)
    for path, node in directories:
        xattrs = below.unset_xattrs(node)
        if (node.uid, node.gid) != OWNER or node.mode & 0o500 != 0o500 or xattrs:
            records[path] = Record(
                stat.S_IFDIR, node.mode, node.uid, node.gid, node.mtime_ns, node.device, xattrs
            )
    write_entry_list(tree, records.items())
