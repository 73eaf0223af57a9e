"""Makes what the entries of a layer describe, each in its directory of the staged tree.

Invariant: a file is never written into when it exists, it is replaced (so other names of it, fifos
and devices are safe); owners are set first, then attributes, then modes, then times, as each clears
or changes something of the next; what a plain user cannot set is in the entry list.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from stowray.pipeline import file_content, tree_ops
from stowray.pipeline.entry_list import OWNER, Record
from stowray.pipeline.errors import LayerError, StorageError, escape
from stowray.pipeline.overlay_node import (
    HOST_LABELS,
    IMPLIED_ROOT,
    OPAQUE,
    ORIGIN,
    PRIVATE_PREFIXES,
)
from stowray.pipeline.overlay_node import namespace as overlay_namespace
from stowray.pipeline.staged_tree import ENTERED, PHANTOM, Directory, StagedTree
from stowray.pipeline.tar_entry import BLOCK_DEVICE, CHAR_DEVICE, FIFO, Entry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stowray.pipeline.tar import TarReader

_SPECIAL_BITS = 0o7000
_LARGE = 64 << 20
# Copies of files below, in bytes of one layer, up to which nobody asks how much room there is.
_MANY_COPIES = 8 << 20
_WARNINGS = 50
_UNSUPPORTED = frozenset({errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENODATA})
# Attributes of one file, in bytes, that any file system with attributes has a place for.
_FITS_EVERYWHERE = 512


class EntryMaker:
    """Makes files, links, devices; ``warnings`` says what an image asked for and does not get."""

    def __init__(
        self, reader: TarReader, tree: StagedTree, privileged: bool, reserve: int = 0
    ) -> None:
        self.tree = tree
        self.privileged = privileged
        self.warnings: list[str] = []
        self._reader = reader
        self._reserve = reserve
        self._copied = 0
        self._namespace = overlay_namespace(privileged)
        self._directory_records: list[tuple[bytes, Record]] = []
        self._owner = (os.geteuid(), os.getegid())
        # Only these bits need a chmod after creation.
        self._chmod_bits = tree_ops.process_umask() | _SPECIAL_BITS
        self._claim_root()

    def _claim_root(self) -> None:
        # What is made in a directory with the setgid bit or a default ACL inherits them.
        root = self.tree.root.descriptor
        os.fchmod(root, 0o700)
        if self.privileged:
            os.fchown(root, os.geteuid(), os.getegid())
        tree_ops.remove_xattr(root, "system.posix_acl_default")

    def clear(self, here: Directory, base: bytes) -> None:
        """Make way for an entry that is no directory, as far as directories and whiteouts go."""
        child = here.children.get(base)
        if child is not None:
            self.tree.remove_directory(child)
        if here.whiteouts is not None:
            here.whiteouts.discard(base)

    def file(self, here: Directory, base: bytes, entry: Entry, source: int | None = None) -> None:
        """Make a regular file of the entry's data, or of what the descriptor ``source`` holds."""
        if base in here.children or here.whiteouts is not None:
            self.clear(here, base)
        directory = here.descriptor
        if directory < 0:
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
                self._copy(source, descriptor, entry)
            elif entry.size:
                data = self._reader.take() if entry.sparse is None else None
                if data is not None:
                    written = os.write(descriptor, data)
                    if written < entry.size:
                        tree_ops.write_all(descriptor, data[written:])
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
            mtime_ns = entry.mtime_ns
            if not tree_ops.MIN_NS <= mtime_ns <= tree_ops.MAX_NS:
                mtime_ns = tree_ops.clamp_time(mtime_ns)
            os.utime(descriptor, ns=(mtime_ns, mtime_ns))
        finally:
            os.close(descriptor)

    def _copy(self, source: int, descriptor: int, entry: Entry) -> None:
        """Copy a file of a lower tree, with its holes, or share its blocks."""
        self._reader.count(entry.size)
        if file_content.clone(source, descriptor):
            return
        needed = os.fstat(source).st_blocks * 512
        # The stream says nothing of these bytes: a short one may ask for many copies.
        self._copied += needed
        if self._copied > _MANY_COPIES:
            self._check_space(needed, entry)
        file_content.copy(source, descriptor, entry.size)

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
        # Some file systems tell no figures at all.
        if system.f_blocks and needed + self._reserve > free:
            stay = f" and {self._reserve} stay in reserve" if self._reserve else ""
            raise StorageError(
                str(self.tree.directory),
                f"{escape(entry.name)} needs {needed} bytes, {free} are free{stay}: "
                "free space (`stowray gc`) or choose another --store",
            )

    def symlink(self, here: Directory, base: bytes, entry: Entry) -> None:
        """Make a symlink, its target byte for byte as it is given."""
        if base in here.children or here.whiteouts is not None:
            self.clear(here, base)
        if not entry.linkname:
            raise LayerError(escape(entry.name), "is a symlink to nothing")
        directory = self.tree.descriptor(here)
        try:
            os.symlink(entry.linkname, base, dir_fd=directory)
        except FileExistsError:
            self.tree.unlink(here, base)
            os.symlink(entry.linkname, base, dir_fd=directory)
        self._finish_name(here, base, entry, stat.S_IFLNK)

    def special(self, here: Directory, base: bytes, entry: Entry) -> None:
        """Make a fifo or a device; a plain user gets an empty file in place of a device."""
        kind = entry.kind
        if kind not in (FIFO, CHAR_DEVICE, BLOCK_DEVICE):
            raise LayerError(escape(entry.name), f"is of unknown type {kind}")
        if kind == CHAR_DEVICE and not entry.devmajor and not entry.devminor:
            # It would be a whiteout.
            raise LayerError(escape(entry.name), "is the device 0/0, which overlay cannot store")
        self.clear(here, base)
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
            try:
                os.mknod(base, file_type | 0o600, device, dir_fd=directory)
            except PermissionError as error:
                raise StorageError(
                    str(self.tree.directory),
                    f"{escape(entry.name)} is a device, which needs CAP_MKNOD: "
                    "pull as root of the host or as a plain user",
                ) from error
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
        device = (entry.devmajor, entry.devminor)
        # The mode of a symlink is always the same on Linux, whatever the tar says.
        mode = 0o777 if file_type == stat.S_IFLNK else entry.mode
        self.tree.records.setdefault(here, {})[base] = Record(
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
        if failed and not self.privileged:
            self.tree.records[here][base].xattrs.update(failed)

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
            large = key.startswith(b"user.") and self._is_too_large(error, wanted)
            if error.errno not in _UNSUPPORTED and not large:
                raise error
            self._warn(path, key, f"cannot be set: {error.strerror}")
            failed[key] = wanted[key]
        return failed

    def _is_too_large(self, error: OSError, wanted: dict[bytes, bytes]) -> bool:
        """Say whether this file system has no place for so much; a full disk is something else.

        ext4 gives ENOSPC for both: it keeps the attributes of a file in one block of 1 to 64 KiB.
        """
        if error.errno in {errno.E2BIG, errno.ERANGE}:
            return True
        size = sum(len(key) + len(value) for key, value in wanted.items())
        if error.errno != errno.ENOSPC or size < _FITS_EVERYWHERE:
            return False
        system = os.fstatvfs(self.tree.root.descriptor)
        return system.f_bavail > 0

    def _warn(self, path: bytes, key: bytes, reason: str) -> None:
        if len(self.warnings) < _WARNINGS:
            self.warnings.append(f"{escape(path)}: attribute {escape(key)} {reason}")

    def link(self, parent: Directory, name: bytes, here: Directory, base: bytes) -> None:
        """Give a file of this tree another name."""
        self.clear(here, base)
        if tree_ops.exists(self.tree.descriptor(here), base):
            self.tree.unlink(here, base)
        source, target = self.tree.descriptor(parent), self.tree.descriptor(here)
        # Without follow_symlinks=False linkat(2) would link what a symlink leads to, also outside.
        os.link(name, base, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
        record = self.tree.records.get(parent, {}).get(name)
        if record is not None:
            self.tree.records.setdefault(here, {})[base] = record

    def write_whiteouts(self, directory: Directory) -> None:
        """Put the whiteouts of a directory on disk."""
        descriptor = self.tree.descriptor(directory)
        for name in directory.whiteouts or ():
            # Any user may make this one device (mknod(2), since Linux 5.8).
            os.mknod(name, stat.S_IFCHR | 0o000, 0, dir_fd=descriptor)
        self._mark(descriptor, ORIGIN, b"")

    def _mark(self, descriptor: int, name: str, value: bytes) -> None:
        try:
            os.setxattr(descriptor, self._namespace + name, value)
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            raise StorageError(
                str(self.tree.directory),
                f"the file system holds no {self._namespace}* attributes, "
                "which layers need: choose another --store",
            ) from error

    def finish_directory(self, directory: Directory) -> None:
        """Set what a directory is to be in the end; everything in it is done."""
        descriptor = self.tree.descriptor(directory)
        if directory.fresh:
            self._mark(descriptor, OPAQUE, b"y")
        if directory.parent is None and directory.state != ENTERED:
            self._mark(descriptor, IMPLIED_ROOT, b"")
        mode, uid, gid, xattrs = directory.attributes
        mtime_ns = directory.mtime_ns
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
            if directory.state != PHANTOM and directory in self.tree.records:
                for name, record in self.tree.records[directory].items():
                    yield directory.child_path(name), record
