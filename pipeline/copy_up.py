"""Hard links of a layer to files of the layers below: one inode under all its names.

Invariant: in the merged tree the new name, and every name of the lower file that the layer leaves
visible in the end, are one inode in this layer's tree. Which lower names stay visible does not
depend on the order of entries, so they are linked when all entries are applied.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from stowray.pipeline import tree_ops
from stowray.pipeline.removal import remove_tree
from stowray.pipeline.staged_tree import ENTERED, PHANTOM, Directory, StagedTree
from stowray.pipeline.tar_entry import BLOCK_DEVICE, CHAR_DEVICE, FIFO, FILE, SYMLINK, Entry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stowray.pipeline.overlay import ChainView
    from stowray.pipeline.overlay_node import Node

SUFFIX = ".copies"
_KINDS = {
    stat.S_IFREG: FILE,
    stat.S_IFLNK: SYMLINK,
    stat.S_IFIFO: FIFO,
    stat.S_IFCHR: CHAR_DEVICE,
    stat.S_IFBLK: BLOCK_DEVICE,
}


class CopyUp:
    """Knows which files of the staged tree are copies of lower ones.

    Each copy has one more name in a directory beside the tree, where no entry can reach it: so it
    is still there when its name in the tree is replaced and another link to the lower file comes.
    """

    def __init__(self, tree: StagedTree, lower: ChainView) -> None:
        self.lower = lower
        self._tree = tree
        self._path = tree.directory.with_name(tree.directory.name + SUFFIX)
        self._holder: Directory | None = None
        self._copies: dict[tuple[int, int], tuple[bytes, Node]] = {}

    def close(self) -> None:
        """Remove the second names."""
        if self._holder is not None:
            os.close(self._holder.descriptor)
            self._holder = None
            remove_tree(self._path)

    def find_lower(self, parent: Directory, name: bytes) -> Node | None:
        """Return what shows through from below as ``name``, which the layer itself has not."""
        if parent.hides() or (parent.whiteouts is not None and name in parent.whiteouts):
            return None
        return self.lower.find(parent.child_path(name))

    def as_entry(self, node: Node) -> Entry:
        """Return the entry that makes a copy of ``node``."""
        target = self.lower.readlink(node) if node.is_symlink else b""
        entry = Entry(
            node.path,
            _KINDS[node.file_type],
            node.mode,
            node.uid,
            node.gid,
            node.size,
            node.mtime_ns,
            target,
        )
        entry.devmajor, entry.devminor = node.device
        entry.xattrs = self.lower.xattrs(node) or None
        return entry

    def find(self, node: Node) -> tuple[Directory, bytes] | None:
        """Return the second name of the copy of ``node``; None if there is no copy yet."""
        copy = self._copies.get(node.inode)
        return None if copy is None or self._holder is None else (self._holder, copy[0])

    def second_name(self, node: Node) -> tuple[Directory, bytes]:
        """Return where the second name of a new copy of ``node`` belongs."""
        if self._holder is None:
            os.mkdir(self._path, 0o700)
            holder = Directory(None, b"", ENTERED)
            holder.descriptor = os.open(self._path, tree_ops.OPEN_DIRECTORY)
            self._holder = holder
        name = b"%d" % len(self._copies)
        self._copies[node.inode] = (name, node)
        return self._holder, name

    def lower_names(self) -> Iterator[tuple[Directory, bytes, Directory, bytes]]:
        """Yield ``(directory, name)`` of each copy and of each lower name that it must have too."""
        if self._holder is None:
            return
        for copy, node in self._copies.values():
            status = os.stat(copy, dir_fd=self._holder.descriptor, follow_symlinks=False)
            if status.st_nlink == 1:
                # All its names in the tree were replaced: the lower file shows as it is.
                continue
            for path in self.lower.links(node):
                place = self._visible(path)
                if place is not None:
                    yield self._holder, copy, *place

    def _visible(self, path: bytes) -> tuple[Directory, bytes] | None:
        """Return where a lower name belongs in this tree; None if the layer hides it."""
        parents = path.split(b"/")
        name = parents.pop()
        here = self._tree.find_below(parents)
        if (
            here is None
            or name in here.children
            or here.hides()
            or (here.whiteouts is not None and name in here.whiteouts)
        ):
            return None
        if here.state == PHANTOM:
            self._tree.materialise(here)
        elif tree_ops.exists(self._tree.descriptor(here), name):
            return None
        return here, name
