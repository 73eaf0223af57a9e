"""A stack of layer trees in overlay format, read as the one tree that they make.

Overlay format (kernel: Documentation/filesystems/overlayfs.rst): a whiteout is a character device
0/0, an opaque directory has the attribute ``overlay.opaque`` = ``y`` in the ``trusted`` namespace
(trees made as root) or the ``user`` namespace (trees made as a plain user).

Invariant: what is seen here is what an overlay mount of the same trees shows, except for the root:
an opaque root hides all trees below it, and the root's attributes are those of the topmost layer
that has an entry for it. No symlink is ever followed, and each name is reached through
descriptors of its parents.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from typing import TYPE_CHECKING, Self

from stowray.pipeline.entry_list import OWNER, Record, read_entry_list
from stowray.pipeline.errors import StorageError, escape
from stowray.pipeline.files import storage_error
from stowray.pipeline.merged_directory import OPEN_DIRECTORY, MergedDirectory
from stowray.pipeline.overlay_node import (
    HOST_LABELS,
    IMPLIED_ROOT,
    OPAQUE,
    PRIVATE_PREFIXES,
    Node,
    is_whiteout,
    namespace,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from stowray.pipeline.merged_directory import Part

_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_DESCRIPTORS = 192


class ChainView:
    """Trees in overlay format as one tree; ``lowers`` are topmost first and must not change.

    Not thread-safe. Holds descriptors until closed.
    """

    def __init__(self, lowers: Sequence[Path], privileged: bool) -> None:
        self.lowers = tuple(lowers)
        self.privileged = privileged
        self._namespace = namespace(privileged)
        self._cache: OrderedDict[bytes, MergedDirectory] = OrderedDict()
        self._open = 0
        self._root: MergedDirectory | None = None
        self._root_layer: int | None = None
        self._records: dict[int, dict[bytes, Record]] = {}
        self._links: dict[tuple[int, int], list[bytes]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all descriptors; the view may be used again."""
        for merged in self._cache.values():
            merged.drop()
        self._cache.clear()
        self._open = 0
        if self._root is not None:
            self._root.drop()
            self._root = None

    @property
    def effective_lowers(self) -> tuple[Path, ...]:
        """The trees that count: none below an opaque root, which a mount does not respect."""
        return tuple(self.lowers[layer] for layer, _ in self._parts(self._merged_root()))

    @property
    def shows_root(self) -> bool:
        """Whether the topmost tree's own root has the attributes that the merged root must have.

        If not, a mount needs a topmost directory that has them.
        """
        return self._root_node().layer <= 0

    def lookup(self, path: bytes) -> Node:
        """Return what is at ``path``; ``StorageError`` if nothing is, see :meth:`find`."""
        node = self.find(path)
        if node is None:
            raise StorageError(escape(path), "not in the image")
        return node

    def find(self, path: bytes) -> Node | None:
        """Return what is at ``path``; None when nothing is or a part of it is no directory."""
        if not path:
            return self._root_node()
        parent, _, name = path.rpartition(b"/")
        try:
            merged = self._directory(parent)
            found = None if merged is None else self._top(merged, name)
        except OSError as error:
            raise self._error(error, path) from error
        return None if found is None else self._node(path, found[0], found[1])

    def children(self, path: bytes) -> list[Node]:
        """Return the entries of a directory in the order of their names; none if it is not one."""
        try:
            merged = self._directory(path)
            return [] if merged is None else self._list(merged)
        except OSError as error:
            raise self._error(error, path) from error

    def walk(self) -> Iterator[Node]:
        """Yield all nodes, the root first, each directory before what is in it."""
        yield self._root_node()
        pending = self.children(b"")[::-1]
        while pending:
            node = pending.pop()
            yield node
            if node.file_type == stat.S_IFDIR:
                found = self.children(node.path)
                found.reverse()
                pending += found

    def readlink(self, node: Node) -> bytes:
        """Return the target of a symlink, byte for byte."""
        try:
            directory, name = self._place(node)
            return os.readlink(name, dir_fd=directory)
        except OSError as error:
            raise self._error(error, node.path) from error

    def open(self, node: Node) -> int:
        """Return a read-only descriptor of a regular file; the caller closes it."""
        try:
            directory, name = self._place(node)
            return os.open(name, _OPEN_FILE, dir_fd=directory)
        except OSError as error:
            raise self._error(error, node.path) from error

    def xattrs(self, node: Node) -> dict[bytes, bytes]:
        """Return the extended attributes that the layer gave, those of overlayfs left out."""
        try:
            attributes = self._read_xattrs(node)
        except OSError as error:
            raise self._error(error, node.path) from error
        attributes.update(self.unset_xattrs(node))
        return attributes

    def unset_xattrs(self, node: Node) -> dict[bytes, bytes]:
        """Return those attributes that only the entry list holds."""
        record = self._record(node.layer, node.path)
        return dict(record.xattrs) if record is not None else {}

    def links(self, node: Node) -> list[bytes]:
        """Return all visible names of the inode, at least its own."""
        if node.links < 2 or node.is_directory:
            return [node.path]
        if self._links is None:
            self._links = {}
            for other in self.walk():
                if other.links > 1 and not other.is_directory:
                    self._links.setdefault(other.inode, []).append(other.path)
        return self._links[node.inode]

    def _merged_root(self) -> MergedDirectory:
        if self._root is None:
            self._root = MergedDirectory(b"", None)
        return self._root

    def _parts(self, merged: MergedDirectory) -> Iterator[Part]:
        """Yield the layer and the descriptor of each part; those further down are opened late."""
        position = 0
        while position < len(merged.parts) or self._grow(merged):
            yield merged.parts[position]
            position += 1

    def _grow(self, merged: MergedDirectory) -> bool:
        """Open the next part of a directory; False when there is none."""
        if merged.is_complete:
            return False
        found = None
        if not merged.parts or not self._ends_at(*merged.parts[-1]):
            parent = merged.parent
            found = self._next_tree(merged) if parent is None else merged.open_next(self._grow)
        if found is None:
            self._open -= merged.complete()
            return False
        merged.parts.append(found)
        if merged.path:
            self._open += 1
        return True

    def _next_tree(self, root: MergedDirectory) -> Part | None:
        layer = root.position
        if layer == len(self.lowers):
            return None
        descriptor = self._open_tree(layer)
        root.position += 1
        return layer, descriptor

    def _open_tree(self, layer: int) -> int:
        path = self.lowers[layer]
        try:
            return os.open(path, OPEN_DIRECTORY)
        except OSError as error:
            raise storage_error(error, path, "read a layer tree") from error

    def _root_node(self) -> Node:
        try:
            if self._root_layer is None:
                self._root_layer = self._find_root_layer()
            layer = self._root_layer
            if layer < 0:
                return Node(b"", stat.S_IFDIR, 0o755, *OWNER, 0, 0, (0, 0), (-1, 0), 1)
            return self._node(b"", layer, os.stat(self.lowers[layer], follow_symlinks=False))
        except OSError as error:
            raise self._error(error, b"") from error

    def _find_root_layer(self) -> int:
        """Return the topmost layer with an entry for the root, -1 for none."""
        # An opaque root hides what is in the roots below it, not what they say of the root itself.
        for layer in range(len(self.lowers)):
            descriptor = self._open_tree(layer)
            try:
                implied = self._attribute(descriptor, IMPLIED_ROOT) is not None
            finally:
                os.close(descriptor)
            if not implied:
                return layer
        return -1

    def _directory(self, path: bytes) -> MergedDirectory | None:
        """Return the merged directory at ``path``, from the cache or its nearest cached parent."""
        if not path:
            return self._merged_root()
        merged = self._cache.get(path)
        if merged is not None:
            self._cache.move_to_end(path)
            return merged
        missing: list[bytes] = []
        above = path
        while above and merged is None:
            above, _, name = above.rpartition(b"/")
            missing.append(name)
            merged = self._cache.get(above)
        merged = merged or self._merged_root()
        while missing:
            child = self._descend(merged, missing.pop())
            if child is None:
                return None
            self._remember(child)
            merged = child
        return merged

    def _remember(self, merged: MergedDirectory) -> None:
        self._cache[merged.path] = merged
        while self._open > _DESCRIPTORS and len(self._cache) > 1:
            _, old = self._cache.popitem(last=False)
            self._open -= old.drop()

    def _descend(self, merged: MergedDirectory, name: bytes) -> MergedDirectory | None:
        child = MergedDirectory(merged.path + b"/" + name if merged.path else name, merged)
        try:
            is_there = self._grow(child)
        except OSError:
            child.drop()
            raise
        return child if is_there else None

    def _top(self, merged: MergedDirectory, name: bytes) -> tuple[int, os.stat_result] | None:
        for layer, directory in self._parts(merged):
            try:
                status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:
                    return None
                raise
            return None if is_whiteout(status) else (layer, status)
        return None

    def _list(self, merged: MergedDirectory) -> list[Node]:
        seen: set[str] = set()
        found: list[tuple[bytes, int, os.stat_result]] = []
        for layer, directory in self._parts(merged):
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.name in seen:
                        continue
                    seen.add(entry.name)
                    status = entry.stat(follow_symlinks=False)
                    if not is_whiteout(status):
                        found.append((os.fsencode(entry.name), layer, status))
        found.sort(key=lambda item: item[0])
        prefix = merged.path + b"/" if merged.path else b""
        return [self._node(prefix + name, layer, status) for name, layer, status in found]

    def _node(self, path: bytes, layer: int, status: os.stat_result) -> Node:
        mode = status.st_mode
        uid, gid, rdev = status.st_uid, status.st_gid, status.st_rdev
        node = Node(
            path,
            stat.S_IFMT(mode),
            stat.S_IMODE(mode),
            uid,
            gid,
            status.st_size,
            status.st_mtime_ns,
            (os.major(rdev), os.minor(rdev)) if rdev else (0, 0),
            (layer, status.st_ino),
            status.st_nlink,
        )
        if not self.privileged:
            self._correct(node)
        return node

    def _correct(self, node: Node) -> None:
        record = self._record(node.layer, node.path)
        if record is None:
            node.uid, node.gid = OWNER
            return
        node.file_type, node.mode = record.file_type, record.mode
        node.uid, node.gid, node.device = record.uid, record.gid, record.device

    def _record(self, layer: int, path: bytes) -> Record | None:
        if self.privileged or layer < 0:
            return None
        records = self._records.get(layer)
        if records is None:
            records = self._records[layer] = read_entry_list(self.lowers[layer])
        return records.get(path)

    def _place(self, node: Node) -> tuple[int, bytes]:
        """Return the descriptor of the directory that really holds the node, and its name there."""
        parent, _, name = node.path.rpartition(b"/")
        merged = self._directory(parent)
        if merged is not None:
            for layer, directory in self._parts(merged):
                if layer == node.layer:
                    return directory, name
        raise StorageError(escape(node.path), "changed while it was read")

    def _read_xattrs(self, node: Node) -> dict[bytes, bytes]:
        if node.layer < 0:
            return {}
        if node.path:
            directory, name = self._place(node)
            # No *at() form exists; the magic link names the parent, its last part is not followed.
            path = b"/proc/self/fd/%d/%s" % (directory, name)
        else:
            path = os.fsencode(self.lowers[node.layer])
        attributes: dict[bytes, bytes] = {}
        try:
            keys = os.listxattr(path, follow_symlinks=False)
        except OSError as error:
            if error.errno == errno.ENOTSUP:
                return attributes
            raise
        for key in keys:
            raw = os.fsencode(key)
            if not raw.startswith(PRIVATE_PREFIXES) and raw not in HOST_LABELS:
                attributes[raw] = os.getxattr(path, key, follow_symlinks=False)
        return attributes

    def _ends_at(self, layer: int, descriptor: int) -> bool:
        """Return whether nothing below this part shows."""
        return layer + 1 == len(self.lowers) or self._attribute(descriptor, OPAQUE) == b"y"

    def _attribute(self, descriptor: int, name: str) -> bytes | None:
        try:
            return os.getxattr(descriptor, self._namespace + name)
        except OSError as error:
            if error.errno in {errno.ENODATA, errno.ENOTSUP}:
                return None
            raise

    def _error(self, error: OSError, path: bytes) -> StorageError:
        top = self.lowers[0] if self.lowers else ""
        return storage_error(error, f"{top}/{escape(path)}", "read a layer tree")
