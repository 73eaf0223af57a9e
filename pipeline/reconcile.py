"""Settles a tree that was staged alone against the chain that it is committed onto.

Invariant: after ``settle`` has returned True the tree, read above that chain, equals what applying
the layer's entries to the chain's merged tree would have given. What cannot be mended in place is
reported, never half mended: all checks come before the first change.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from stowray.pipeline import tree_ops
from stowray.pipeline.entry_list import OWNER, Record, read_entry_list, write_entry_list
from stowray.pipeline.files import translated
from stowray.pipeline.notes import BELOW, IMPLIED_DIRECTORY, PLAIN, WHITEOUTS, Name, read_names
from stowray.pipeline.staged_tree import IMPLIED, Directory, StagedTree

if TYPE_CHECKING:
    from pathlib import Path

    from stowray.pipeline.layer import Staged
    from stowray.pipeline.overlay import ChainView
    from stowray.pipeline.overlay_node import Node


def settle(tree: Path, staged: Staged, below: ChainView) -> bool:
    """Make ``tree`` right above ``below``; False if it must be staged again with ``lower=below``.

    Idempotent: a settle that was killed may be done again with the same arguments.
    """
    if staged.notes.get(BELOW):
        return False
    names = list(read_names(staged.notes))
    if not names:
        return True
    nodes = _find(names, below)
    if nodes is None:
        return False
    with translated(tree, "settle a layer"):
        staged_tree = StagedTree(tree, None)
        try:
            _mend(staged_tree, names, nodes, below)
        finally:
            staged_tree.close()
    adopted = [node for node in nodes if node is not None]
    if adopted and not below.privileged:
        _record(tree, names, nodes, below)
    return True


def fits(tree: Path, staged: Staged, below: ChainView) -> bool:
    """Return whether :func:`settle` would find nothing to change in ``tree``."""
    if staged.notes.get(BELOW):
        return False
    names = list(read_names(staged.notes))
    with translated(tree, "look below a layer"):
        nodes = _find(names, below)
    if nodes is None:
        return False
    return all(
        kind not in (IMPLIED_DIRECTORY, WHITEOUTS) or (node is None and kind != WHITEOUTS)
        for (_, _, kind), node in zip(names, nodes, strict=True)
    )


def _find(names: list[Name], below: ChainView) -> list[Node | None] | None:
    """Return the directory below of each name, if there is one; None if a symlink is in the way."""
    nodes: list[Node | None] = []
    for parent, name, kind in names:
        if parent < 0:
            node = below.find(name)
        else:
            above = nodes[parent]
            node = None if above is None else below.find(above.path + b"/" + name)
        if node is not None and not node.is_directory:
            if node.is_symlink and kind != PLAIN:
                return None
            node = None
        nodes.append(node)
    return nodes


def _mend(tree: StagedTree, names: list[Name], nodes: list[Node | None], below: ChainView) -> None:
    directories: list[Directory] = []
    for parent, name, _ in names:
        above = tree.root if parent < 0 else directories[parent]
        directories.append(Directory(above, name, IMPLIED))
    # Parents come first, so this goes from the deepest up: what only holds whiteouts, and has no
    # twin below, holds only directories like itself.
    for directory, (_, _, kind), node in zip(
        reversed(directories), reversed(names), reversed(nodes), strict=True
    ):
        if kind not in (IMPLIED_DIRECTORY, WHITEOUTS):
            continue
        if node is not None:
            _adopt(tree.descriptor(directory), node, below)
        elif kind == WHITEOUTS:
            _remove(tree, directory)


def _remove(tree: StagedTree, directory: Directory) -> None:
    """Remove a directory that only holds whiteouts, without a trace in its parent's times."""
    if directory.parent is None or not tree.is_on_disk(directory):
        return
    tree_ops.empty_directory(tree.descriptor(directory))
    above = tree.descriptor(directory.parent)
    status = os.fstat(above)
    # A plain user may have closed the directory to himself, as the layer says.
    os.fchmod(above, 0o700)
    tree.forget(directory)
    os.rmdir(directory.name, dir_fd=above)
    os.fchmod(above, stat.S_IMODE(status.st_mode))
    os.utime(above, ns=(status.st_atime_ns, status.st_mtime_ns))


def _adopt(descriptor: int, node: Node, below: ChainView) -> None:
    """Give a directory of the tree the attributes of the one below."""
    mode = node.mode
    if below.privileged:
        os.fchown(descriptor, node.uid, node.gid)
    else:
        mode |= 0o500
    unset = below.unset_xattrs(node)
    wanted = {key: value for key, value in below.xattrs(node).items() if key not in unset}
    for _, error in tree_ops.set_xattrs(descriptor, wanted):
        raise error
    os.fchmod(descriptor, mode)
    os.utime(descriptor, ns=(node.mtime_ns, node.mtime_ns))


def _record(tree: Path, names: list[Name], nodes: list[Node | None], below: ChainView) -> None:
    records = read_entry_list(tree)
    for (_, _, kind), node in zip(names, nodes, strict=True):
        if node is None or kind not in (IMPLIED_DIRECTORY, WHITEOUTS):
            continue
        xattrs = below.unset_xattrs(node)
        if (node.uid, node.gid) != OWNER or node.mode & 0o500 != 0o500 or xattrs:
            records[node.path] = Record(
                stat.S_IFDIR, node.mode, node.uid, node.gid, node.mtime_ns, node.device, xattrs
            )
    write_entry_list(tree, records.items())
