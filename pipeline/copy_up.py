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
from stowray.pipeline.staged_tree import PHANTOM, Directory, StagedTree
from stowray.pipeline.tar import BLOCK_DEVICE, CHAR_DEVICE, FIFO, FILE, SYMLINK, Entry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stowray.pipeline.overlay import ChainView, Node

_KINDS = {
    stat.S_IFREG: FILE,
    stat.S_IFLNK: SYMLINK,
    stat.S_IFIFO: FIFO,
    stat.S_IFCHR: CHAR_DEVICE,
    stat.S_IFBLK: BLOCK_DEVICE,
}


class CopyUp:
    """Knows which files of the staged tree are copies of lower ones."""

    def __init__(self, tree: StagedTree, lower: ChainView) -> None:
        self.lower = lower
        self._tree = tree
        # Lower inode → our inode, where it was last seen, and the lower node.
        self._copies: dict[tuple[int, int], tuple[int, Directory, bytes, Node]] = {}

    def find_lower(self, parent: Directory, name: bytes) -> Node | None:
        """Return what shows through from below as ``name``, which the layer itself has not."""
        if parent.hides() or (parent.whiteouts is not None and name in parent.whiteouts):
            return None
        return self.lower.find(parent.child_path(name))

    def as_entry(self, node: Node, name: bytes) -> Entry:
        """Return the entry that makes a copy of ``node``."""
        target = self.lower.readlink(node) if node.is_symlink else b""
        entry = Entry(
            name,
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

    def remember(self, node: Node, here: Directory, base: bytes) -> None:
        """Note that ``base`` is the copy of ``node``."""
        inode = self._inode(here, base)
        if inode is not None:
            self._copies[node.inode] = (inode, here, base, node)

    def find(self, node: Node) -> tuple[Directory, bytes] | None:
        """Return a name of this tree that is a copy of ``node``; None if none is left."""
        copy = self._copies.get(node.inode)
        if copy is None:
            return None
        inode, here, base, _ = copy
        attached = here.parent is None or self._tree.has(here.path(), here)
        if attached and self._inode(here, base) == inode:
            return here, base
        # Its first name was replaced; another may have been linked to it.
        for directory in self._tree.bottom_up():
            if directory.state == PHANTOM:
                continue
            with os.scandir(self._tree.descriptor(directory)) as entries:
                names = [os.fsencode(entry.name) for entry in entries if entry.inode() == inode]
            if names:
                self._copies[node.inode] = (inode, directory, names[0], node)
                return directory, names[0]
        del self._copies[node.inode]
        return None

    def lower_names(self) -> Iterator[tuple[Directory, bytes, Directory, bytes]]:
        """Yield ``(directory, name)`` of each copy and of each lower name that it must have too."""
        for _, _, _, node in list(self._copies.values()):
            copy = self.find(node)
            if copy is None:
                continue
            for path in self.lower.links(node):
                place = self._visible(path)
                if place is not None:
                    yield *copy, *place

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

    def _inode(self, here: Directory, base: bytes) -> int | None:
        if base in here.children:
            return None
        try:
            status = os.stat(base, dir_fd=self._tree.descriptor(here), follow_symlinks=False)
        except FileNotFoundError:
            return None
        return status.st_ino
