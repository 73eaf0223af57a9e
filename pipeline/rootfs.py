"""A flattened copy of an image's root filesystem.

Invariant: the destination has the complete tree or does not bear the name: the tree is built beside
it and renamed into place (a destination that cannot be renamed onto has ``.stowray-incomplete`` in
it while it is filled). Nothing written to the result reaches the store, except with
``link="hardlink"``: its files *are* those of the store, so that such a result is read-only.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections import OrderedDict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from stowray.pipeline.errors import StorageError, escape
from stowray.pipeline.files import storage_error, translated
from stowray.pipeline.kernel import FICLONE
from stowray.pipeline.locks import try_lock
from stowray.pipeline.removal import remove_tree
from stowray.pipeline.tree_ops import (
    CREATE_FILE,
    OPEN_DIRECTORY,
    name_path,
    process_umask,
    set_mode,
    set_owner,
    set_times,
    set_xattrs,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.overlay import ChainView, Node
    from stowray.pipeline.store import Store

Link = Literal["auto", "reflink", "copy", "hardlink"]

INCOMPLETE = ".stowray-incomplete"
_DESCRIPTORS = 128
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


def check_destination(destination: Path) -> None:
    """Raise StorageError unless a tree can be made at ``destination``: new or empty."""
    with translated(destination, "make the tree"):
        _check_free(destination)


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
    with _building(destination) as directory:
        copier = _Copier(view, directory, link, cancelled)
        try:
            return copier.run()
        except OSError as error:
            place = destination / os.fsdecode(copier.current)
            raise storage_error(error, escape(os.fsencode(place)), "write the tree") from error
        finally:
            copier.close()


@contextmanager
def _building(destination: Path) -> Iterator[int]:
    """Give the descriptor of an empty directory that becomes ``destination`` at a clean end."""
    destination = destination.absolute()
    with translated(destination, "make the tree"):
        exists = _check_free(destination)
    if exists and (os.path.ismount(destination) or not os.access(destination.parent, os.W_OK)):
        with _building_inside(destination) as directory:
            yield directory
        return
    stem = f".{destination.name}.stowray-"
    _sweep(destination.parent, stem)
    path = destination.parent / f"{stem}{secrets.token_hex(8)}"
    with translated(path, "make the tree"):
        path.mkdir(0o700)
        directory = os.open(path, OPEN_DIRECTORY)
    try:
        # Locked, so that a later run can tell a leftover from one that is being built.
        try_lock(directory)
        with translated(path, "make the tree"):
            _forget_inheritance(directory)
        yield directory
        with translated(destination, "put the tree in place"):
            os.rename(path, destination)
    except BaseException:
        remove_tree(path)
        raise
    finally:
        os.close(directory)


@contextmanager
def _building_inside(destination: Path) -> Iterator[int]:
    marker = destination / INCOMPLETE
    with translated(destination, "make the tree"):
        marker.touch(0o600)
        directory = os.open(destination, OPEN_DIRECTORY)
    try:
        yield directory
        with translated(marker, "finish the tree"):
            # Removing the marker changes the root's own times.
            status = os.fstat(directory)
            marker.unlink()
            os.utime(directory, ns=(status.st_atime_ns, status.st_mtime_ns))
    except BaseException:
        for name in os.listdir(directory):
            if name != INCOMPLETE:
                remove_tree(destination / name)
        marker.unlink(missing_ok=True)
        raise
    finally:
        os.close(directory)


def _check_free(destination: Path) -> bool:
    """Return whether ``destination`` exists; it must be an empty directory then."""
    try:
        names = os.listdir(destination)
    except FileNotFoundError:
        if destination.is_symlink():
            raise StorageError(str(destination), "is a dangling symbolic link") from None
        if not destination.parent.is_dir():
            raise StorageError(str(destination.parent), "no such directory") from None
        return False
    except NotADirectoryError:
        raise StorageError(str(destination), "exists and is no directory") from None
    if INCOMPLETE in names:
        raise StorageError(str(destination), "holds a tree that was not finished: empty it first")
    if names:
        raise StorageError(str(destination), "is not empty: name an empty or a new directory")
    if destination.is_symlink():
        raise StorageError(str(destination), "is a symbolic link: name the directory itself")
    return True


def _sweep(parent: Path, stem: str) -> None:
    """Remove what killed runs for the same destination left behind."""
    with translated(parent, "make the tree"):
        names = [name for name in os.listdir(parent) if name.startswith(stem)]
    for name in names:
        try:
            descriptor = os.open(parent / name, OPEN_DIRECTORY)
        except OSError:
            # Gone meanwhile, or somebody else's file of that name.
            continue
        try:
            if try_lock(descriptor):
                remove_tree(parent / name)
        finally:
            os.close(descriptor)


def _forget_inheritance(directory: int) -> None:
    # A set-group-ID parent or its default ACL must not leave traces in the tree.
    os.fchmod(directory, 0o700)
    try:
        os.removexattr(directory, "system.posix_acl_default")
    except OSError as error:
        if error.errno not in {errno.ENODATA, *_NO_XATTR}:
            raise


class _Copier:
    """One walk over the merged tree; ``current`` is the path at work, for messages."""

    def __init__(
        self, view: ChainView, root: int, link: Link, cancelled: Callable[[], bool] | None
    ) -> None:
        self._view = view
        self._root = root
        self._link = link
        self._cancelled = cancelled
        self._clones = link in ("auto", "reflink")
        self._identity = (os.geteuid(), os.getegid())
        self._may_chown = self._identity[0] == 0
        self._umask = process_umask() | 0o7000
        self._open: OrderedDict[bytes, int] = OrderedDict()
        self._names: dict[tuple[int, int], bytes] = {}
        self.result = Flattened()
        self.current = b""

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

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
            parent = self._directory(above)
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

    def _directory(self, path: bytes) -> int:
        """Return the descriptor of a destination directory, from the cache or by walking down."""
        if not path:
            return self._root
        descriptor = self._open.get(path)
        if descriptor is not None:
            self._open.move_to_end(path)
            return descriptor
        missing = [path]
        while missing[-1] and missing[-1] not in self._open:
            missing.append(missing[-1].rpartition(b"/")[0])
        base = missing.pop()
        descriptor = self._open[base] if base else self._root
        while missing:
            path = missing.pop()
            descriptor = os.open(path.rpartition(b"/")[2], OPEN_DIRECTORY, dir_fd=descriptor)
            self._open[path] = descriptor
            # The newest stays: it is the parent of the next step or the answer.
            if len(self._open) > _DESCRIPTORS:
                os.close(self._open.popitem(last=False)[1])
        return descriptor

    def _linked(self, node: Node, name: bytes) -> bool:
        """Make ``name`` a hard link when another name of the inode was made already."""
        first = self._names.setdefault(node.inode, node.path)
        if first == node.path:
            return False
        directory, _, base = first.rpartition(b"/")
        source = os.dup(self._directory(directory))
        try:
            # Never follow: linkat() on a symlink would make a name for a file outside (H06).
            target = self._directory(node.path.rpartition(b"/")[0])
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
                os.fchown(target, node.uid, node.gid)
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
            set_owner(parent, name, node.uid, node.gid)
        self._xattrs(node, name_path(parent, name))
        if not node.is_symlink:
            set_mode(parent, name, node.mode)
        set_times(parent, name, node.mtime_ns)

    def _xattrs(self, node: Node, target: int | bytes) -> None:
        for key, error in set_xattrs(target, self._view.xattrs(node)):
            if error.errno not in _NO_XATTR:
                raise error
            self.result.skipped.append(f"{escape(node.path)}: {escape(key)}")

    def _finish_directory(self, node: Node) -> None:
        descriptor = self._directory(node.path)
        if self._may_chown:
            os.fchown(descriptor, node.uid, node.gid)
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
