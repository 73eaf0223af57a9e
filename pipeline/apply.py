"""Applies the entries of one layer, in the order of the tar, to a tree in overlay format.

The definition: layers are applied one after the other onto one directory; within a layer whiteouts
and opaque markers act on what lies below only, and all other entries in order, the last one wins.

Invariant: nothing outside the tree is touched; an entry never writes into a file that exists, it
replaces it (so other names of that file, fifos and devices are safe); metadata of a hard link entry
is never applied; owners, then attributes, then modes, as each clears bits of the one before.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from stowray.pipeline import tree_ops
from stowray.pipeline.copy_up import CopyUp
from stowray.pipeline.entry_list import OWNER, Record
from stowray.pipeline.errors import LayerError, StorageError, escape
from stowray.pipeline.overlay import HOST_LABELS, IMPLIED_ROOT, OPAQUE, ORIGIN, PRIVATE_PREFIXES
from stowray.pipeline.overlay import namespace as overlay_namespace
from stowray.pipeline.staged_tree import (
    ENTERED,
    PHANTOM,
    Attributes,
    DependsOnBelowError,
    Directory,
    StagedTree,
)
from stowray.pipeline.tar import (
    BLOCK_DEVICE,
    CHAR_DEVICE,
    DIRECTORY,
    FIFO,
    FILE,
    HARDLINK,
    SYMLINK,
    Entry,
    TarReader,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stowray.pipeline.overlay import ChainView, Node

WHITEOUT = b".wh."
OPAQUE_MARKER = b".wh..wh..opq"
# Names that AUFS kept for itself. Hard links of its layers may lead to files in the first.
AUFS = b".wh..wh."
AUFS_LINKS = b".wh..wh.plnk"

_SPECIAL_BITS = 0o7000
_LARGE = 64 << 20
_WARNINGS = 50
_UNSUPPORTED = frozenset({errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENODATA})


class LayerApplier:
    """Applies entries to an empty ``directory``; ``finish`` sets what must come last."""

    def __init__(
        self, reader: TarReader, directory: Path, privileged: bool, lower: ChainView | None
    ) -> None:
        self.tree = StagedTree(directory, lower)
        self.privileged = privileged
        self.lower = lower
        self.warnings: list[str] = []
        self.entries = 0
        self.unpacked_size = 0
        self._reader = reader
        self._directory_records: list[tuple[bytes, Record]] = []
        self._namespace = overlay_namespace(privileged)
        self._claim_root()
        umask = tree_ops.process_umask()
        # Only these bits need a chmod after creation.
        self._chmod_bits = umask | _SPECIAL_BITS
        self._owner = (os.geteuid(), os.getegid())
        # The parent of the entry before, as it was spelt; most entries have the same one.
        self._spelt: bytes | None = None
        # Not above symlinks of others: a name made in this layer may hide one, unseen.
        self._keeps_parent = lower is None or not lower.lowers
        self._parent = self.tree.root
        self._removals = 0
        self._copies = CopyUp(self.tree, lower) if lower is not None else None

    def _claim_root(self) -> None:
        # What is made in a directory with the setgid bit or a default ACL inherits them.
        root = self.tree.root.descriptor
        os.fchmod(root, 0o700)
        if self.privileged:
            os.fchown(root, os.geteuid(), os.getegid())
        tree_ops.remove_xattr(root, "system.posix_acl_default")

    def apply(self, entry: Entry) -> None:
        """Apply one entry; its data is taken from the reader."""
        self.entries += 1
        self.unpacked_size += entry.size
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
            self._file(here, base, entry)
        elif kind == DIRECTORY:
            self._directory(here, base, entry)
        elif kind == SYMLINK:
            self._symlink(here, base, entry)
        elif kind == HARDLINK:
            self._hardlink(here, base, entry)
        else:
            self._special(here, base, entry)

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
        self.tree.root.attributes = _attributes(entry)

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
        child.inherits = False
        child.attributes = _attributes(entry)

    def _clear(self, here: Directory, base: bytes) -> None:
        """Make way for an entry that is no directory, as far as directories and whiteouts go."""
        child = here.children.get(base)
        if child is not None:
            self.tree.remove_directory(child)
        if here.whiteouts is not None:
            here.whiteouts.discard(base)

    def _file(self, here: Directory, base: bytes, entry: Entry, source: int | None = None) -> None:
        """Make a regular file of the entry's data, or of what the descriptor ``source`` holds."""
        if base in here.children or here.whiteouts is not None:
            self._clear(here, base)
        directory = self.tree.descriptor(here)
        mode = entry.mode
        xattrs = entry.xattrs
        # An owner who may not write the file may not set user.* attributes on it either.
        creation_mode = 0o600 if xattrs else mode & 0o777
        try:
            descriptor = os.open(base, tree_ops.CREATE_FILE, creation_mode, dir_fd=directory)
        except FileExistsError:
            self.tree.unlink(here, base)
            descriptor = os.open(base, tree_ops.CREATE_FILE, creation_mode, dir_fd=directory)
        try:
            if source is not None:
                tree_ops.copy_data(source, descriptor)
            elif entry.size:
                data = self._reader.take() if entry.sparse is None else None
                if data is not None:
                    tree_ops.write_all(descriptor, data)
                else:
                    self._write(descriptor, entry)
            if self.privileged:
                if (entry.uid, entry.gid) != self._owner:
                    os.fchown(descriptor, entry.uid, entry.gid)
            elif entry.uid or entry.gid or xattrs or mode & 0o400 == 0:
                self._record(here, base, entry, stat.S_IFREG)
                mode |= 0o400
            if xattrs:
                self._xattrs(descriptor, here, base, xattrs, stat.S_IFREG)
                os.fchmod(descriptor, mode)
            elif mode & self._chmod_bits or mode != entry.mode:
                os.fchmod(descriptor, mode)
            mtime_ns = tree_ops.clamp_time(entry.mtime_ns)
            os.utime(descriptor, ns=(mtime_ns, mtime_ns))
        finally:
            os.close(descriptor)

    def _write(self, descriptor: int, entry: Entry) -> None:
        """Write the data of a file that is large, sparse, or lies across chunks."""
        segments = entry.sparse
        needed = entry.size if segments is None else sum(length for _, length in segments)
        if needed > _LARGE:
            self._check_space(needed, entry)
        if segments is None:
            for data in self._reader.data():
                tree_ops.write_all(descriptor, data)
            return
        rest = iter(segments)
        offset, left = 0, 0
        for data in self._reader.data():
            while data:
                while not left:
                    offset, left = next(rest)
                piece = data[:left]
                written = os.pwrite(descriptor, piece, offset)
                offset += written
                left -= written
                data = data[written:]
        os.ftruncate(descriptor, entry.size)

    def _check_space(self, needed: int, entry: Entry) -> None:
        # A header may claim terabytes: say so before the disk is full and not after.
        system = os.statvfs(self.tree.root.descriptor)
        free = system.f_bavail * system.f_frsize
        if needed > free:
            raise StorageError(
                str(self.tree.directory),
                f"{escape(entry.name)} needs {needed} bytes, {free} are free: "
                "free space (`stowray gc`) or choose another --store",
            )

    def _symlink(self, here: Directory, base: bytes, entry: Entry) -> None:
        if base in here.children or here.whiteouts is not None:
            self._clear(here, base)
        if not entry.linkname:
            raise LayerError(escape(entry.name), "is a symlink to nothing")
        directory = self.tree.descriptor(here)
        try:
            os.symlink(entry.linkname, base, dir_fd=directory)
        except FileExistsError:
            self.tree.unlink(here, base)
            os.symlink(entry.linkname, base, dir_fd=directory)
        self._finish_name(here, base, entry, stat.S_IFLNK)

    def _special(self, here: Directory, base: bytes, entry: Entry) -> None:
        """Make a fifo or a device; a plain user gets an empty file in place of a device."""
        kind = entry.kind
        if kind not in (FIFO, CHAR_DEVICE, BLOCK_DEVICE):
            raise LayerError(escape(entry.name), f"is of unknown type {kind}")
        if kind == CHAR_DEVICE and not entry.devmajor and not entry.devminor:
            # It would be a whiteout.
            raise LayerError(escape(entry.name), "is the device 0/0, which overlay cannot store")
        self._clear(here, base)
        directory = self.tree.descriptor(here)
        if tree_ops.exists(directory, base):
            self.tree.unlink(here, base)
        file_type = {FIFO: stat.S_IFIFO, CHAR_DEVICE: stat.S_IFCHR, BLOCK_DEVICE: stat.S_IFBLK}[
            kind
        ]
        if kind == FIFO:
            os.mkfifo(base, 0o600, dir_fd=directory)
        elif self.privileged:
            device = os.makedev(entry.devmajor, entry.devminor)
            os.mknod(base, file_type | 0o600, device, dir_fd=directory)
        else:
            os.close(os.open(base, tree_ops.CREATE_FILE, 0o600, dir_fd=directory))
        self._finish_name(here, base, entry, file_type)

    def _finish_name(self, here: Directory, base: bytes, entry: Entry, file_type: int) -> None:
        """Set owner, attributes, mode and times of what no descriptor can be had of."""
        directory = self.tree.descriptor(here)
        mode = entry.mode
        if self.privileged:
            if (entry.uid, entry.gid) != self._owner:
                tree_ops.set_owner(directory, base, entry.uid, entry.gid)
        elif file_type == stat.S_IFLNK:
            if entry.uid or entry.gid or entry.xattrs:
                self._record(here, base, entry, file_type)
        else:
            self._record(here, base, entry, file_type)
            mode |= 0o400
        if entry.xattrs:
            path = tree_ops.name_path(directory, base)
            self._xattrs(path, here, base, entry.xattrs, file_type)
        if file_type != stat.S_IFLNK:
            tree_ops.set_mode(directory, base, mode)
        tree_ops.set_times(directory, base, entry.mtime_ns)

    def _record(self, here: Directory, base: bytes, entry: Entry, file_type: int) -> None:
        if here.records is None:
            here.records = {}
        device = (entry.devmajor, entry.devminor)
        # The mode of a symlink is always the same on Linux, whatever the tar says.
        mode = 0o777 if file_type == stat.S_IFLNK else entry.mode
        here.records[base] = Record(
            file_type, mode, entry.uid, entry.gid, entry.mtime_ns, device, {}
        )

    def _xattrs(
        self,
        target: int | bytes,
        here: Directory,
        base: bytes,
        xattrs: dict[bytes, bytes],
        file_type: int,
    ) -> None:
        """Set the attributes of an entry, and record those that a plain user may not set."""
        failed = self._set_xattrs(target, here.child_path(base), xattrs, file_type)
        if failed and not self.privileged and here.records is not None:
            here.records[base].xattrs.update(failed)

    def _set_xattrs(
        self, target: int | bytes, path: bytes, xattrs: dict[bytes, bytes], file_type: int
    ) -> dict[bytes, bytes]:
        """Set attributes that an image may bring; return those that this file system refuses."""
        wanted: dict[bytes, bytes] = {}
        for key, value in xattrs.items():
            if key.startswith(PRIVATE_PREFIXES) or key in HOST_LABELS:
                self._warn(path, key, "is not taken from images")
            elif key.startswith(b"user.") and file_type not in (stat.S_IFREG, stat.S_IFDIR):
                self._warn(path, key, "exists on files and directories only (xattr(7))")
            else:
                wanted[key] = value
        failed: dict[bytes, bytes] = {}
        for key, error in tree_ops.set_xattrs(target, wanted):
            full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.E2BIG, errno.ERANGE}
            if error.errno not in _UNSUPPORTED and not (full and key.startswith(b"user.")):
                raise error
            self._warn(path, key, f"cannot be set: {error.strerror}")
            failed[key] = wanted[key]
        return failed

    def _warn(self, path: bytes, key: bytes, reason: str) -> None:
        if len(self.warnings) < _WARNINGS:
            self.warnings.append(f"{escape(path)}: attribute {escape(key)} {reason}")

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
            self._link(parent, name, here, base)
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

    def _link(self, parent: Directory, name: bytes, here: Directory, base: bytes) -> None:
        """Give a file of this tree another name."""
        self._clear(here, base)
        if tree_ops.exists(self.tree.descriptor(here), base):
            self.tree.unlink(here, base)
        source, target = self.tree.descriptor(parent), self.tree.descriptor(here)
        # Without follow_symlinks=False linkat(2) would link what a symlink leads to, also outside.
        os.link(name, base, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
        record = parent.records.get(name) if parent.records is not None else None
        if record is not None:
            if here.records is None:
                here.records = {}
            here.records[base] = record

    def _link_below(self, node: Node, here: Directory, base: bytes, entry: Entry) -> None:
        """Link a file of a lower tree: a copy in this tree, which in the end has all its names."""
        copies = self._copies
        if copies is None:
            raise DependsOnBelowError
        if copies.find(node) == (here, base):
            return
        # What the link replaces may be, or hold, the only copy so far.
        self._clear(here, base)
        copy = copies.find(node)
        if copy is not None:
            self._link(*copy, here, base)
            return
        copied = copies.as_entry(node, entry.name)
        if node.is_file:
            source = copies.lower.open(node) if node.size else None
            try:
                self._file(here, base, copied, source)
            finally:
                if source is not None:
                    os.close(source)
        elif node.is_symlink:
            self._symlink(here, base, copied)
        else:
            self._special(here, base, copied)
        copies.remember(node, here, base)

    def finish(self) -> None:
        """Write the whiteouts and set the attributes of directories, the deepest first."""
        tree = self.tree
        links = tree.root.children.get(AUFS_LINKS)
        if links is not None:
            tree.remove_directory(links)
        if self._copies is not None:
            for parent, name, here, base in self._copies.lower_names():
                self._link(parent, name, here, base)
        for directory in tree.bottom_up():
            if directory.whiteouts and not directory.hides():
                if directory.state == PHANTOM:
                    tree.materialise(directory)
                self._write_whiteouts(directory)
            if directory.state != PHANTOM:
                self._finish_directory(directory)

    def _write_whiteouts(self, directory: Directory) -> None:
        descriptor = self.tree.descriptor(directory)
        for name in directory.whiteouts or ():
            # Any user may make this one device (mknod(2), since Linux 5.8).
            os.mknod(name, stat.S_IFCHR | 0o000, 0, dir_fd=descriptor)
        os.setxattr(descriptor, self._namespace + ORIGIN, b"")

    def _finish_directory(self, directory: Directory) -> None:
        descriptor = self.tree.descriptor(directory)
        if directory.fresh:
            os.setxattr(descriptor, self._namespace + OPAQUE, b"y")
        if directory.parent is None and directory.state != ENTERED:
            os.setxattr(descriptor, self._namespace + IMPLIED_ROOT, b"")
        mode, uid, gid, mtime_ns, xattrs = directory.attributes
        if self.privileged and (uid, gid) != self._owner:
            os.fchown(descriptor, uid, gid)
        failed: dict[bytes, bytes] = {}
        if xattrs:
            failed = self._set_xattrs(descriptor, directory.path(), xattrs, stat.S_IFDIR)
        if not self.privileged:
            if (uid, gid) != OWNER or failed or mode & 0o500 != 0o500:
                record = Record(stat.S_IFDIR, mode, uid, gid, mtime_ns, (0, 0), failed)
                self._directory_records.append((directory.path(), record))
            # Its owner must be able to read the tree that he made.
            mode |= 0o500
        os.fchmod(descriptor, mode)
        mtime_ns = tree_ops.clamp_time(mtime_ns)
        os.utime(descriptor, ns=(mtime_ns, mtime_ns))

    def records(self) -> Iterator[tuple[bytes, Record]]:
        """Yield the entry list of a tree made as a plain user, by path."""
        yield from self._directory_records
        for directory in self.tree.bottom_up():
            if directory.state != PHANTOM and directory.records:
                for name, record in directory.records.items():
                    yield directory.child_path(name), record


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


def _attributes(entry: Entry) -> Attributes:
    return Attributes(entry.mode, entry.uid, entry.gid, entry.mtime_ns, entry.xattrs)
