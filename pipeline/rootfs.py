"""A flattened copy of an image's root filesystem.

Invariant: modes, owners (as root), times, extended attributes, hard links, devices and holes are
those of the image, and nothing written to the result reaches the store; except with
``link="hardlink"``: its files *are* those of the store, so that such a result is read-only. What a
plain user may not give away says in an attribute whose it is, where it can hold one.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import field
from typing import TYPE_CHECKING, Literal, Self

from stowray.pipeline import file_content
from stowray.pipeline.entry_list import OWNER
from stowray.pipeline.errors import CancelledError, StorageError, escape
from stowray.pipeline.files import storage_error
from stowray.pipeline.open_directories import OpenDirectories
from stowray.pipeline.overlay import ChainView
from stowray.pipeline.owner_attribute import NAME, owner_attribute
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
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future, ThreadPoolExecutor
    from pathlib import Path

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.overlay_node import Node
    from stowray.pipeline.store import Store

__all__ = ["Flattened", "Link", "check_destination", "flatten", "write_rootfs"]

Link = Literal["auto", "reflink", "copy", "hardlink"]

# Threads pay off only where the kernel copies for a while: small files cost mostly calls, for which
# threads of one interpreter stand in each other's way (measured: twice the time).
_LARGE = 1 << 20
_THREADS = 4
# Each thread's view holds a descriptor per layer tree, and more for merged directories.
_TREES = 256
_NO_XATTR = {errno.ENOTSUP, errno.EPERM, errno.EACCES}


@dataclass(slots=True)
class Flattened:
    """What was made; ``skipped`` names what this user may not make (devices, attributes)."""

    entries: int = 0
    size: int = 0
    cloned: int = 0
    linked: int = 0
    skipped: list[str] = field(default_factory=list)

    def add(self, other: Flattened) -> None:
        """Count what another thread made."""
        self.entries += other.entries
        self.size += other.size
        self.cloned += other.cloned
        self.linked += other.linked
        self.skipped += other.skipped


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

    ``link`` says how file contents come over: ``reflink`` shares blocks and fails where the file
    system cannot, ``copy`` copies, ``auto`` is the better of both for each file, and ``hardlink``
    makes the store's own files appear, for a result that nobody writes to.
    """
    with building(destination) as root, _Crew(view, root, destination, link) as crew:
        return _Walk(view, crew, cancelled).run()


class _Walk:
    """Makes every entry in the order of the walk, but hands large files to the crew."""

    def __init__(self, view: ChainView, crew: _Crew, cancelled: Callable[[], bool] | None) -> None:
        self._view = view
        self._crew = crew
        self._own = crew.copier(view)
        self._cancelled = cancelled
        self._names: dict[tuple[int, int], bytes] = {}

    def run(self) -> Flattened:
        directories: list[Node] = []
        links: list[tuple[bytes, Node]] = []
        for node in self._view.walk():
            if node.is_directory:
                self._check_cancelled()
                directories.append(node)
                if node.path:
                    self._own.do(self._own.directory, node)
            elif node.links > 1 and self._names.setdefault(node.inode, node.path) != node.path:
                links.append((self._names[node.inode], node))
            elif not node.is_file:
                self._own.do(self._own.special, node)
            elif node.size < _LARGE:
                self._own.do(self._own.file, node)
            else:
                self._crew.submit(node)
        result = self._crew.finish()
        for first, node in links:
            self._own.do(self._own.link, node, first)
        # From the leaves up: a closed directory must not bar the way to those below it, and
        # creating a name changes its directory's times.
        for node in reversed(directories):
            self._own.do(self._own.finish_directory, node)
        result.add(self._own.result)
        return result

    def _check_cancelled(self) -> None:
        if self._cancelled is not None and self._cancelled():
            raise CancelledError("rootfs")


class _Crew:
    """Threads that copy large files, each with descriptors of its own; started when needed."""

    def __init__(self, view: ChainView, root: int, destination: Path, link: Link) -> None:
        self._view = view
        self._root = root
        self._destination = destination
        self._link = link
        self._pool: ThreadPoolExecutor | None = None
        self._free: list[_Copier] = []
        self._made: list[_Copier] = []
        self._tasks: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for copier in self._made:
            copier.close()

    def copier(self, view: ChainView | None = None) -> _Copier:
        """Return a new copier; with a ``view`` of its own unless one is given."""
        own = view or ChainView(self._view.lowers, self._view.privileged)
        copier = _Copier(own, self._root, self._destination, self._link, owns=view is None)
        self._made.append(copier)
        return copier

    def submit(self, node: Node) -> None:
        """Have a file copied some time before :meth:`finish` returns."""
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor

            count = min(_THREADS, len(os.sched_getaffinity(0)))
            count = max(1, min(count, _TREES // max(1, len(self._view.lowers))))
            self._pool = ThreadPoolExecutor(count, thread_name_prefix="rootfs")
            self._free = [self.copier() for _ in range(count)]
        self._tasks.append(self._pool.submit(self._work, node))

    def finish(self) -> Flattened:
        """Wait for all copies, raise the first failure, and return what was made."""
        for task in self._tasks:
            task.result()
        result = Flattened()
        for copier in self._free:
            result.add(copier.result)
        return result

    def _work(self, node: Node) -> None:
        # There are as many copiers as threads: one is always free.
        copier = self._free.pop()
        try:
            copier.do(copier.file, node)
        finally:
            self._free.append(copier)


class _Copier:
    """Makes single entries; not shared between threads."""

    def __init__(
        self, view: ChainView, root: int, destination: Path, link: Link, *, owns: bool
    ) -> None:
        self._view = view
        self._owns = owns
        self._destination = destination
        self._directories = OpenDirectories(root)
        self._link = link
        self._clones = link in ("auto", "reflink")
        self._identity = (os.geteuid(), os.getegid())
        self._may_chown = self._identity[0] == 0
        self._umask = process_umask() | 0o7000
        self.result = Flattened()

    def close(self) -> None:
        self._directories.close()
        if self._owns:
            self._view.close()

    def do(self, action: Callable[..., None], node: Node, *arguments: bytes) -> None:
        """Carry out one method for a node and translate its failure."""
        try:
            action(node, *arguments)
        except OSError as error:
            place = escape(os.fsencode(self._destination) + b"/" + node.path)
            raise storage_error(error, place, "write the tree") from error

    def directory(self, node: Node) -> None:
        self.result.entries += 1
        above, _, name = node.path.rpartition(b"/")
        os.mkdir(name, 0o700, dir_fd=self._directories.get(above))

    def finish_directory(self, node: Node) -> None:
        descriptor = self._directories.get(node.path)
        mode = self._chown(node, descriptor) if self._may_chown else node.mode
        self._set(node, descriptor, self._attributes(node))
        os.fchmod(descriptor, mode)
        os.utime(descriptor, ns=(node.mtime_ns, node.mtime_ns))

    def link(self, node: Node, first: bytes) -> None:
        """Make another name of ``first``, which was made before."""
        self.result.entries += 1
        source_directory, _, source = first.rpartition(b"/")
        above, _, name = node.path.rpartition(b"/")
        held = os.dup(self._directories.get(source_directory))
        try:
            os.link(
                source,
                name,
                src_dir_fd=held,
                dst_dir_fd=self._directories.get(above),
                # linkat() on a symlink would otherwise make a name for what it points to.
                follow_symlinks=False,
            )
        except FileNotFoundError:
            # The first name is one of those that this user cannot make.
            self.result.skipped.append(escape(node.path))
        finally:
            os.close(held)

    def file(self, node: Node) -> None:
        self.result.entries += 1
        above, _, name = node.path.rpartition(b"/")
        parent = self._directories.get(above)
        source = self._view.open(node)
        try:
            if self._link != "hardlink" or not self._share(node, source, parent, name):
                self._copy(node, source, parent, name)
        finally:
            os.close(source)

    def special(self, node: Node) -> None:
        self.result.entries += 1
        above, _, name = node.path.rpartition(b"/")
        parent = self._directories.get(above)
        if node.is_symlink:
            os.symlink(self._view.readlink(node), name, dir_fd=parent)
        else:
            try:
                os.mknod(name, node.file_type | 0o600, os.makedev(*node.device), dir_fd=parent)
            except PermissionError:
                self.result.skipped.append(escape(node.path))
                return
        mode = node.mode
        if self._may_chown and (node.uid, node.gid) != self._identity:
            mode = self._chown(node, parent, name)
        self._set(node, name_path(parent, name), self._attributes(node))
        if not node.is_symlink:
            set_mode(parent, name, mode)
        set_times(parent, name, node.mtime_ns)

    def _share(self, node: Node, source: int, parent: int, name: bytes) -> bool:
        status = os.fstat(source)
        if stat.S_IMODE(status.st_mode) != node.mode or not stat.S_ISREG(status.st_mode):
            # A plain user's store keeps some modes apart: a link would show the wrong one, and
            # setting it would change the store.
            return False
        if self._owner_is_named(node):
            return False
        try:
            os.link(f"/proc/self/fd/{source}", name, dst_dir_fd=parent, follow_symlinks=True)
        except OSError as error:
            if error.errno == errno.EXDEV:
                raise StorageError(
                    escape(os.fsencode(self._destination)),
                    "hard links need a destination on the store's file system (use --link copy)",
                ) from error
            if error.errno == errno.EMLINK:
                return False
            raise
        self.result.linked += 1
        return True

    def _copy(self, node: Node, source: int, parent: int, name: bytes) -> None:
        attributes: dict[bytes, bytes] = {}
        if not self._view.privileged or os.listxattr(source):
            attributes = self._attributes(node)
        mode = node.mode
        # An owner who may not write the file may not set user.* attributes on it either.
        exact = not attributes and not mode & self._umask
        target = os.open(name, CREATE_FILE, mode if exact else 0o600, dir_fd=parent)
        try:
            if node.size:
                self.result.size += node.size
                self._contents(node, source, target)
            if self._may_chown and (node.uid, node.gid) != self._identity:
                mode = self._chown(node, target)
            self._set(node, target, attributes)
            if not exact:
                os.fchmod(target, mode)
            os.utime(target, ns=(node.mtime_ns, node.mtime_ns))
        finally:
            os.close(target)

    def _contents(self, node: Node, source: int, target: int) -> None:
        if self._clones:
            if file_content.clone(source, target):
                self.result.cloned += 1
                return
            if self._link == "reflink":
                raise StorageError(
                    escape(os.fsencode(self._destination)),
                    "this file system cannot share blocks with the store (use --link copy)",
                )
            self._clones = False
        file_content.copy(source, target, node.size)

    def _chown(self, node: Node, descriptor: int, name: bytes | None = None) -> int:
        """Set the owner and return the mode that goes with it."""
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
            # What was to run as somebody harmless must not run as root instead.
            return node.mode & ~(stat.S_ISUID | stat.S_ISGID)
        return node.mode

    def _owner_is_named(self, node: Node) -> bool:
        """Return whether the entry needs the attribute that names its owner, and can hold it."""
        if self._may_chown or (node.uid, node.gid) == OWNER:
            return False
        return node.is_file or node.is_directory

    def _attributes(self, node: Node) -> dict[bytes, bytes]:
        attributes = self._view.xattrs(node)
        if self._owner_is_named(node):
            attributes[NAME] = owner_attribute(node.uid, node.gid)
        return attributes

    def _set(self, node: Node, target: int | bytes, attributes: dict[bytes, bytes]) -> None:
        for key, error in set_xattrs(target, attributes):
            if error.errno not in _NO_XATTR:
                raise error
            self.result.skipped.append(f"{escape(node.path)}: {escape(key)}")
