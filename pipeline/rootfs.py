"""A flattened copy of an image's root filesystem.

Invariant: modes, owners (as root), times, extended attributes, hard links, devices and holes are
those of the image, and nothing written to the result reaches the store; except with
``link="hardlink"``: its files *are* those of the store, so that such a result is read-only.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from stowray.pipeline.errors import StorageError, escape
from stowray.pipeline.files import storage_error
from stowray.pipeline.kernel import FICLONE
from stowray.pipeline.open_directories import OpenDirectories
from stowray.pipeline.tree_destination import building, check_destination
from stowray.pipeline.tree_ops import (
    CREATE_FILE,
    name_path,
    process_umask,
    set_mode,
    set_owner,
    set_times,
    set_xattrs,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.overlay import ChainView, Node
    from stowray.pipeline.store import Store

__all__ = ["Flattened", "Link", "check_destination", "flatten", "write_rootfs"]

Link = Literal["auto", "reflink", "copy", "hardlink"]

# Up to here two calls through a buffer cost less than setting up a copy in the kernel.
_SMALL = 128 << 10
_CHUNK = 1 << 30
_NO_CLONE = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM}
_NO_XATTR = {errno.ENOTSUP, errno.EPERM, errno.EACCES}


@dataclass(slots=True)
class Flattened:
    """What was made; ``skipped`` names what this user may not make (devices, attributes)."""

    entries: int = 0
    size: int = 0
    cloned: int = 0
    linked: int = 0
    skipped: list[str] = field(default_factory=list)


def write_rootfs(
    store: Store,
    chain_id: Digest | None,
    destination: Path,
    *,
    link: Link = "auto",
    cancelled: Callable[[], bool] | None = None,
) -> Flattened:
    """Write the tree of a committed chain to ``destination``; None is the image of no layers."""
    from stowray.pipeline.snapshot import Snapshots

    with Snapshots(store).held(chain_id, "rootfs") as view:
        return flatten(view, destination, link, cancelled=cancelled)


def flatten(
    view: ChainView,
    destination: Path,
    link: Link = "auto",
    *,
    cancelled: Callable[[], bool] | None = None,
) -> Flattened:
    """Copy the merged tree of ``view`` to ``destination``, which is empty or does not exist.

    Modes, owners (as root), times, extended attributes, hard links, devices and holes are those of
    the image. ``link`` says how file contents come over: ``reflink`` shares blocks and fails where
    the file system cannot, ``copy`` copies, ``auto`` is the better of both for each file, and
    ``hardlink`` makes the store's own files appear, for a result that nobody writes to.
    """
    with building(destination) as root, OpenDirectories(root) as directories:
        copier = _Copier(view, directories, link, cancelled)
        try:
            return copier.run()
        except OSError as error:
            place = destination / os.fsdecode(copier.current)
            raise storage_error(error, escape(os.fsencode(place)), "write the tree") from error


class _Copier:
    """One walk over the merged tree; ``current`` is the path at work, for messages."""

    def __init__(
        self,
        view: ChainView,
        directories: OpenDirectories,
        link: Link,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        self._view = view
        self._directories = directories
        self._link = link
        self._cancelled = cancelled
        self._clones = link in ("auto", "reflink")
        self._identity = (os.geteuid(), os.getegid())
        self._may_chown = self._identity[0] == 0
        self._umask = process_umask() | 0o7000
        self._names: dict[tuple[int, int], bytes] = {}
        self.result = Flattened()
        self.current = b""

    def run(self) -> Flattened:
        directories: list[Node] = []
        for node in self._view.walk():
            self.current = node.path
            if node.is_directory:
                directories.append(node)
            if not node.path:
                continue
            above, _, name = node.path.rpartition(b"/")
            # Looked up for each name: linking to another directory may have closed this one.
            parent = self._directories.get(above)
            self.result.entries += 1
            if node.is_file:
                self._file(node, parent, name)
            elif node.is_directory:
                self._check_cancelled()
                os.mkdir(name, 0o700, dir_fd=parent)
            else:
                self._special(node, parent, name)
        # From the leaves up: a closed directory must not bar the way to those below it, and
        # creating a name changes its directory's times.
        for node in reversed(directories):
            self.current = node.path
            self._finish_directory(node)
        return self.result

    def _check_cancelled(self) -> None:
        if self._cancelled is not None and self._cancelled():
            from stowray.pipeline.errors import CancelledError

            raise CancelledError("rootfs")

    def _linked(self, node: Node, name: bytes) -> bool:
        """Make ``name`` a hard link when another name of the inode was made already."""
        first = self._names.setdefault(node.inode, node.path)
        if first == node.path:
            return False
        directory, _, base = first.rpartition(b"/")
        source = os.dup(self._directories.get(directory))
        try:
            # Never follow: linkat() on a symlink would make a name for a file outside (H06).
            target = self._directories.get(node.path.rpartition(b"/")[0])
            os.link(base, name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
        finally:
            os.close(source)
        return True

    def _file(self, node: Node, parent: int, name: bytes) -> None:
        if node.links > 1 and self._linked(node, name):
            return
        source = self._view.open(node)
        try:
            if self._link == "hardlink" and self._share(node, source, parent, name):
                return
            self._copy(node, source, parent, name)
        finally:
            os.close(source)

    def _share(self, node: Node, source: int, parent: int, name: bytes) -> bool:
        status = os.fstat(source)
        if stat.S_IMODE(status.st_mode) != node.mode or not stat.S_ISREG(status.st_mode):
            # A plain user's store keeps some modes apart: a link would show the wrong one, and
            # setting it would change the store.
            return False
        try:
            os.link(f"/proc/self/fd/{source}", name, dst_dir_fd=parent, follow_symlinks=True)
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise StorageError(
                    escape(name), "hard links need the destination on the store's file system"
                ) from error
            if error.errno == errno.EMLINK:
                return False
            raise
        self.result.linked += 1
        return True

    def _copy(self, node: Node, source: int, parent: int, name: bytes) -> None:
        mode = node.mode
        exact = not mode & self._umask
        target = os.open(name, CREATE_FILE, mode if exact else 0o600, dir_fd=parent)
        try:
            size = node.size
            if size:
                self.result.size += size
                self._contents(source, target, size)
            if self._may_chown and (node.uid, node.gid) != self._identity:
                self._chown(node, target)
            if not self._view.privileged or os.listxattr(source):
                self._xattrs(node, target)
            if not exact:
                os.fchmod(target, mode)
            os.utime(target, ns=(node.mtime_ns, node.mtime_ns))
        finally:
            os.close(target)

    def _contents(self, source: int, target: int, size: int) -> None:
        if self._clones:
            try:
                fcntl.ioctl(target, FICLONE, source)
            except OSError as error:
                if error.errno not in _NO_CLONE:
                    raise
                if self._link == "reflink":
                    raise StorageError(
                        escape(self.current),
                        "this file system cannot share blocks with the store (use --link copy)",
                    ) from error
                self._clones = False
            else:
                self.result.cloned += 1
                return
        if size <= _SMALL:
            data = os.read(source, size)
            if len(data) == size:
                os.write(target, data)
                return
            os.lseek(source, 0, os.SEEK_SET)
        _copy_segments(source, target, size)

    def _special(self, node: Node, parent: int, name: bytes) -> None:
        if node.links > 1 and self._linked(node, name):
            return
        if node.is_symlink:
            os.symlink(self._view.readlink(node), name, dir_fd=parent)
        else:
            try:
                os.mknod(name, node.file_type | 0o600, os.makedev(*node.device), dir_fd=parent)
            except PermissionError:
                self.result.skipped.append(escape(node.path))
                self._names.pop(node.inode, None)
                return
        if self._may_chown and (node.uid, node.gid) != self._identity:
            self._chown(node, parent, name)
        self._xattrs(node, name_path(parent, name))
        if not node.is_symlink:
            set_mode(parent, name, node.mode)
        set_times(parent, name, node.mtime_ns)

    def _chown(self, node: Node, descriptor: int, name: bytes | None = None) -> None:
        try:
            if name is None:
                os.fchown(descriptor, node.uid, node.gid)
            else:
                set_owner(descriptor, name, node.uid, node.gid)
        except OSError as error:
            # Root of a user namespace can give files only to the IDs that are mapped there.
            if self._view.privileged or error.errno not in {errno.EPERM, errno.EINVAL}:
                raise
            self.result.skipped.append(f"{escape(node.path)}: owner {node.uid}:{node.gid}")

    def _xattrs(self, node: Node, target: int | bytes) -> None:
        for key, error in set_xattrs(target, self._view.xattrs(node)):
            if error.errno not in _NO_XATTR:
                raise error
            self.result.skipped.append(f"{escape(node.path)}: {escape(key)}")

    def _finish_directory(self, node: Node) -> None:
        descriptor = self._directories.get(node.path)
        if self._may_chown:
            self._chown(node, descriptor)
        self._xattrs(node, descriptor)
        os.fchmod(descriptor, node.mode)
        os.utime(descriptor, ns=(node.mtime_ns, node.mtime_ns))


def _copy_segments(source: int, target: int, size: int) -> None:
    """Copy the data segments of a file and leave its holes (lseek(2), SEEK_DATA)."""
    os.ftruncate(target, size)
    position = 0
    while position < size:
        try:
            start = os.lseek(source, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(source, start, os.SEEK_HOLE)
        _copy_range(source, target, start, min(end, size))
        position = end


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    offset = start
    with suppress(OSError):
        while offset < end:
            count = os.copy_file_range(source, target, min(_CHUNK, end - offset), offset, offset)
            if count == 0:
                break
            offset += count
    # Another file system, or a kernel that refuses: the portable way for what is left, and it
    # reports for good what is wrong.
    os.lseek(source, offset, os.SEEK_SET)
    os.lseek(target, offset, os.SEEK_SET)
    while offset < end:
        data = os.read(source, min(1 << 20, end - offset))
        if not data:
            raise OSError(errno.EIO, "the file became shorter while it was copied")
        view = memoryview(data)
        while view:
            view = view[os.write(target, view) :]
        offset += len(data)
