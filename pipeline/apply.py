"""Applies the entries of one layer, in the order of the tar, to a tree in overlay format.

The definition: layers are applied one after the other onto one directory; within a layer whiteouts
and opaque markers act on what lies below only, and all other entries in order, the last one wins.

Invariant: nothing outside the tree is touched; no name with ``..`` is ever resolved; metadata of a
hard link entry is never applied.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from stowray.pipeline import tree_ops
from stowray.pipeline.copy_up import CopyUp
from stowray.pipeline.entry_maker import EntryMaker
from stowray.pipeline.errors import LayerError, escape
from stowray.pipeline.staged_tree import (
    ENTERED,
    PHANTOM,
    Attributes,
    DependsOnBelowError,
    Directory,
    StagedTree,
)
from stowray.pipeline.tar_entry import DIRECTORY, FILE, HARDLINK, SYMLINK, Entry

if TYPE_CHECKING:
    from pathlib import Path

    from stowray.pipeline.overlay import ChainView
    from stowray.pipeline.overlay_node import Node
    from stowray.pipeline.tar import TarReader

WHITEOUT = b".wh."
OPAQUE_MARKER = b".wh..wh..opq"
# Names that AUFS kept for itself. Hard links of its layers may lead to files in the first.
AUFS = b".wh..wh."
AUFS_LINKS = b".wh..wh.plnk"


class LayerApplier:
    """Applies entries to an empty ``directory``; ``finish`` sets what must come last."""

    def __init__(
        self,
        reader: TarReader,
        directory: Path,
        privileged: bool,
        lower: ChainView | None,
        reserve: int = 0,
    ) -> None:
        self.tree = StagedTree(directory, lower)
        try:
            self.maker = EntryMaker(reader, self.tree, privileged, reserve)
        except OSError:
            self.tree.close()
            raise
        self.lower = lower
        self.entries = 0
        # The parent of the entry before, as it was spelt; most entries have the same one.
        self._spelt: bytes | None = None
        # Not above symlinks of others: a name made in this layer may hide one, unseen.
        self._keeps_parent = lower is None or not lower.lowers
        self._parent = self.tree.root
        self._removals = 0
        self._attributes: dict[Attributes, Attributes] = {}
        self._copies = CopyUp(self.tree, lower) if lower is not None else None

    def apply(self, entry: Entry) -> None:
        """Apply one entry; its data is taken from the reader."""
        self.entries += 1
        name = entry.name
        kind = entry.kind
        if kind == DIRECTORY:
            name = name.rstrip(b"/")
        spelt, _, base = name.rpartition(b"/")
        tree = self.tree
        if (
            spelt == self._spelt
            and self._removals == tree.removals
            and base
            and not base.startswith(b".")
        ):
            here = self._parent
        else:
            found = self._place(entry)
            if found is None:
                return
            here, last = found
            if last == base and self._keeps_parent:
                self._spelt, self._parent, self._removals = spelt, here, tree.removals
            base = last
        if kind == FILE:
            self.maker.file(here, base, entry)
        elif kind == DIRECTORY:
            self._directory(here, base, entry)
        elif kind == SYMLINK:
            self.maker.symlink(here, base, entry)
        elif kind == HARDLINK:
            self._hardlink(here, base, entry)
        else:
            self.maker.special(here, base, entry)

    def _place(self, entry: Entry) -> tuple[Directory, bytes] | None:
        """Return the directory and name of an entry; None for markers and the root, done here."""
        parts = _split(entry.name)
        if not parts:
            self._root(entry)
            return None
        base = parts.pop()
        if base.startswith(AUFS) and base != OPAQUE_MARKER:
            return None
        if any(part.startswith(AUFS) for part in parts):
            return self._aufs(parts, base, entry)
        if base == OPAQUE_MARKER:
            self.tree.make_parent(parts).fresh = True
            self.tree.removals += 1
        elif base.startswith(WHITEOUT):
            self._whiteout(parts, base[len(WHITEOUT) :], entry)
        else:
            return self.tree.make_parent(parts), base
        return None

    def _root(self, entry: Entry) -> None:
        if entry.kind != DIRECTORY or not entry.name:
            # CVE-2021-29136: a symlink entry for the root led all others out of it.
            raise LayerError(escape(entry.name), "is an entry for the root that is no directory")
        self.tree.root.state = ENTERED
        self._describe(self.tree.root, entry)

    def _aufs(
        self, parents: list[bytes], base: bytes, entry: Entry
    ) -> tuple[Directory, bytes] | None:
        # Nothing of these names is in the result; the links are removed in the end.
        if parents != [AUFS_LINKS] or entry.kind not in (FILE, HARDLINK):
            return None
        links = self.tree.root.children.get(AUFS_LINKS)
        if links is None:
            links = self.tree.make_directory(self.tree.root, AUFS_LINKS, ENTERED)
        return links, base

    def _whiteout(self, parents: list[bytes], name: bytes, entry: Entry) -> None:
        if name in (b"", b".", b".."):
            # Some peers remove the parent of the directory here.
            raise LayerError(escape(entry.name), "is a whiteout of no name")
        here = self.tree.find_parent(parents)
        if here is None:
            return
        child = here.children.get(name)
        if child is not None and child.state != PHANTOM:
            # The layer's own content stays, what is below it does not show.
            child.fresh = True
            self.tree.removals += 1
            return
        if child is not None:
            del here.children[name]
        elif here.state != PHANTOM and tree_ops.exists(self.tree.descriptor(here), name):
            # Whiteouts act on lower content: what this layer made stays, whatever came first.
            return
        if here.hides():
            return
        if self.lower is not None and self.lower.find(here.child_path(name)) is None:
            return
        if here.whiteouts is None:
            here.whiteouts = set()
        here.whiteouts.add(name)
        self.tree.removals += 1

    def _directory(self, here: Directory, base: bytes, entry: Entry) -> None:
        child = here.children.get(base)
        if child is None:
            child = self.tree.make_directory(here, base, ENTERED)
        elif child.state == PHANTOM:
            self.tree.materialise(child)
        child.state = ENTERED
        self._describe(child, entry)

    def _describe(self, directory: Directory, entry: Entry) -> None:
        attributes = Attributes(entry.mode, entry.uid, entry.gid, entry.xattrs)
        if entry.xattrs is None:
            attributes = self._attributes.setdefault(attributes, attributes)
        directory.attributes = attributes
        directory.mtime_ns = entry.mtime_ns

    def _hardlink(self, here: Directory, base: bytes, entry: Entry) -> None:
        source = _split(entry.linkname)
        if not source:
            raise LayerError(escape(entry.name), "is a hard link to a directory")
        name = source.pop()
        parent, beyond, _ = self.tree.resolve(source)
        if not beyond and parent is here and name == base:
            raise LayerError(escape(entry.name), "is a hard link to itself")
        if _lies_in(parent, here, base):
            if self.lower is None:
                raise DependsOnBelowError
            raise LayerError(escape(entry.name), "is a hard link to what it replaces")
        if (
            not beyond
            and parent.state != PHANTOM
            and name not in parent.children
            and tree_ops.exists(self.tree.descriptor(parent), name)
        ):
            self.maker.link(parent, name, here, base)
            return
        if self._copies is None:
            raise DependsOnBelowError
        if not beyond and name in parent.children:
            raise LayerError(escape(entry.name), "is a hard link to a directory")
        node = None if beyond else self._copies.find_lower(parent, name)
        if node is None:
            raise LayerError(
                escape(entry.name),
                f"is a hard link to {escape(entry.linkname)}, which is not there",
            )
        if node.is_directory:
            raise LayerError(escape(entry.name), "is a hard link to a directory")
        self._link_below(node, here, base, entry)

    def _link_below(self, node: Node, here: Directory, base: bytes, entry: Entry) -> None:
        """Link a file of a lower tree: a copy in this tree, which in the end has all its names."""
        copies = self._copies
        if copies is None:
            raise DependsOnBelowError
        copy = copies.find(node)
        if copy is not None:
            self.maker.link(*copy, here, base)
            return
        copied = copies.as_entry(node)
        if node.is_file:
            source = copies.lower.open(node) if node.size else None
            try:
                self.maker.file(here, base, copied, source)
            finally:
                if source is not None:
                    os.close(source)
        elif node.is_symlink:
            self.maker.symlink(here, base, copied)
        else:
            self.maker.special(here, base, copied)
        self.maker.link(here, base, *copies.second_name(node))

    def close(self) -> None:
        """Close all descriptors."""
        if self._copies is not None:
            self._copies.close()
        self.tree.close()

    def finish(self) -> None:
        """Write the whiteouts and set the attributes of directories, the deepest first."""
        tree = self.tree
        links = tree.root.children.get(AUFS_LINKS)
        if links is not None:
            tree.remove_directory(links)
        if self._copies is not None:
            for parent, name, here, base in self._copies.lower_names():
                self.maker.link(parent, name, here, base)
        for directory in tree.bottom_up():
            if directory.whiteouts and not directory.hides():
                if directory.state == PHANTOM:
                    tree.materialise(directory)
                self.maker.write_whiteouts(directory)
            if directory.state != PHANTOM:
                self.maker.finish_directory(directory)


def _split(name: bytes) -> list[bytes]:
    """Return the parts of a name of the archive; one that climbs is an error and never resolved."""
    parts = [part for part in name.split(b"/") if part and part != b"."]
    if b".." in parts:
        raise LayerError(escape(name), "has a .. in its name")
    return parts


def _lies_in(directory: Directory, here: Directory, base: bytes) -> bool:
    """Return whether ``directory`` is ``base`` in ``here`` or below it."""
    while directory.parent is not None:
        if directory.parent is here and directory.name == base:
            return True
        directory = directory.parent
    return False
