"""The tree of one layer while it is staged: its directories, kept in memory and made on demand.

Invariant: every directory of the tree is a ``Directory`` here, so that what a name means is decided
from our own records and not from what the disk shows; a path is resolved part by part inside the
root, symlinks included, and ``..`` never leaves it. What the layer cannot know of the trees below
(unless they are given) is assumed and noted.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, NamedTuple

from stowray.pipeline import tree_ops
from stowray.pipeline.entry_list import OWNER, Record
from stowray.pipeline.errors import LayerError, StorageError, escape

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from stowray.pipeline.overlay import ChainView

_SYMLINKS = 40
_DESCRIPTORS = 96

# States of a directory. A phantom is not on disk: the layer only removes things in it, or it was
# only looked up below. An implied one has no entry of its own.
PHANTOM: Final = 0
IMPLIED: Final = 1
ENTERED: Final = 2


class Attributes(NamedTuple):
    """What is set on a directory when everything in it is done; directories share equal ones."""

    mode: int
    uid: int
    gid: int
    xattrs: dict[bytes, bytes] | None


# For implied parents that nothing below gives attributes to. The time is fixed, so that the same
# layers give the same tree wherever and whenever they are staged.
DEFAULT_ATTRIBUTES: Final = Attributes(0o755, *OWNER, None)
DEFAULT_MTIME: Final = 0
# Stands in until it is known what the directory below has, if there is one.
INHERITED: Final = Attributes(*DEFAULT_ATTRIBUTES)


class DependsOnBelowError(Exception):
    """The layer cannot be staged alone; whoever stages it raises nothing of this to callers."""


class Directory:
    """A directory of the layer. ``fresh``: nothing of the directory below shows through.

    A layer may have millions of them: this, its name and its place in its parent are all that one
    costs in memory.
    """

    __slots__ = (
        "attributes",
        "children",
        "descriptor",
        "fresh",
        "mtime_ns",
        "name",
        "parent",
        "state",
        "whiteouts",
    )

    def __init__(self, parent: Directory | None, name: bytes, state: int) -> None:
        self.parent = parent
        self.name = name
        self.state = state
        self.fresh = False
        self.descriptor = -1
        self.attributes = DEFAULT_ATTRIBUTES
        self.mtime_ns = DEFAULT_MTIME
        # Most directories hold only files: they share one empty mapping.
        self.children: dict[bytes, Directory] = _NO_CHILDREN
        self.whiteouts: set[bytes] | None = None

    @property
    def inherits(self) -> bool:
        """Whether its attributes are those of the directory below, if there is one."""
        return self.attributes is INHERITED

    def add(self, child: Directory) -> None:
        """Enter a directory below this one."""
        if self.children is _NO_CHILDREN:
            self.children = {}
        self.children[child.name] = child

    def path(self) -> bytes:
        """Return the path from the root, without slashes at its ends."""
        names: list[bytes] = []
        here = self
        while here.parent is not None:
            names.append(here.name)
            here = here.parent
        return b"/".join(reversed(names))

    def hides(self) -> bool:
        """Return whether nothing from below shows in this directory."""
        here: Directory | None = self
        while here is not None:
            if here.fresh:
                return True
            here = here.parent
        return False

    def child_path(self, name: bytes) -> bytes:
        """Return the path of a name in this directory."""
        path = self.path()
        return path + b"/" + name if path else name


_NO_CHILDREN: Final[dict[bytes, Directory]] = {}


class StagedTree:
    """Resolves and makes the directories of a layer; ``lower`` is what lies below, if it is known.

    ``records`` holds what the entry list is to say of names that are no directories. ``assumed``
    collects each directory that was taken for something that is no symlink below,
    ``walked`` the paths of those that no directory was made for.
    """

    def __init__(self, directory: Path, lower: ChainView | None) -> None:
        self.directory = directory
        self.lower = lower
        self.root = Directory(None, b"", IMPLIED)
        self.root.descriptor = os.open(directory, tree_ops.OPEN_DIRECTORY)
        self.records: dict[Directory, dict[bytes, Record]] = {}
        self.assumed: list[Directory] = []
        self.walked: set[bytes] = set()
        # Counts removals: a path that was resolved before one may lead elsewhere after it.
        self.removals = 0
        self._open: OrderedDict[int, Directory] = OrderedDict()

    def close(self) -> None:
        """Close all descriptors."""
        for directory in self._open.values():
            os.close(directory.descriptor)
            directory.descriptor = -1
        self._open.clear()
        if self.root.descriptor >= 0:
            os.close(self.root.descriptor)
            self.root.descriptor = -1

    def descriptor(self, directory: Directory) -> int:
        """Return an open descriptor of a directory on disk; good until a few others are used."""
        if directory.descriptor >= 0:
            if directory.parent is not None:
                self._open.move_to_end(id(directory))
            return directory.descriptor
        closed = [directory]
        above = directory.parent
        while above is not None and above.descriptor < 0:
            closed.append(above)
            above = above.parent
        if above is None:
            raise StorageError(str(self.directory), "is closed already")
        while closed:
            child = closed.pop()
            try:
                child.descriptor = os.open(
                    child.name, tree_ops.OPEN_DIRECTORY, dir_fd=above.descriptor
                )
            except OSError as error:
                if error.errno in {errno.ENOTDIR, errno.ELOOP, errno.ENOENT}:
                    raise self._disturbed(child.path()) from error
                raise
            self._open[id(child)] = child
            if len(self._open) > _DESCRIPTORS:
                self._close(next(iter(self._open.values())))
            above = child
        return directory.descriptor

    def forget(self, directory: Directory) -> None:
        """Close the descriptor of a directory that is being removed."""
        if id(directory) in self._open:
            self._close(directory)

    def is_on_disk(self, directory: Directory) -> bool:
        """Return whether a directory that may have been removed before is there."""
        chain: list[Directory] = []
        here = directory
        while here.parent is not None and here.descriptor < 0:
            chain.append(here)
            here = here.parent
        for child in reversed(chain):
            parent = child.parent or self.root
            if not tree_ops.exists(self.descriptor(parent), child.name):
                return False
        return True

    def _close(self, directory: Directory) -> None:
        del self._open[id(directory)]
        os.close(directory.descriptor)
        directory.descriptor = -1

    def _disturbed(self, path: bytes) -> StorageError:
        return StorageError(
            f"{self.directory}/{escape(path)}", "was changed by another process while it was staged"
        )

    def resolve(self, parts: Sequence[bytes]) -> tuple[Directory, list[bytes], bool]:
        """Return the deepest directory on a path, the parts beyond it, and whether that is certain.

        Parts beyond exist nowhere as directories; uncertain ones only as far as this layer knows.
        Nothing is made on disk.
        """
        here = self.root
        beyond: list[bytes] = []
        certain = True
        followed = 0
        pending = list(reversed(parts))
        while pending:
            name = pending.pop()
            if name in {b"", b"."}:
                continue
            if name == b"..":
                if not beyond:
                    here = here.parent or here
                    continue
                if not certain:
                    self.walked.add(here.child_path(b"/".join(beyond)))
                beyond.pop()
                continue
            if beyond:
                beyond.append(name)
                continue
            child = here.children.get(name)
            if child is not None:
                here = child
                continue
            target, child, certain = self._look(here, name)
            if target is not None:
                followed += 1
                if followed > _SYMLINKS:
                    if self.lower is None:
                        raise DependsOnBelowError
                    raise LayerError(escape(b"/".join(parts)), "leads through too many symlinks")
                if target.startswith(b"/"):
                    here = self.root
                pending += reversed(target.split(b"/"))
                certain = True
            elif child is not None:
                here = child
            else:
                beyond.append(name)
        return here, beyond, certain

    def _look(self, here: Directory, name: bytes) -> tuple[bytes | None, Directory | None, bool]:
        """Return a symlink's target, or the directory below, or neither; and if that is sure."""
        if here.state != PHANTOM:
            descriptor = self.descriptor(here)
            target = tree_ops.read_link(descriptor, name)
            if target is not None:
                return target, None, True
            if tree_ops.exists(descriptor, name):
                return None, None, True
        if (here.whiteouts is not None and name in here.whiteouts) or here.hides():
            return None, None, True
        if self.lower is None:
            return None, None, False
        node = self.lower.find(here.child_path(name))
        if node is not None and node.is_symlink:
            return self.lower.readlink(node), None, True
        if node is not None and node.is_directory:
            child = Directory(here, name, PHANTOM)
            here.add(child)
            xattrs = self.lower.xattrs(node)
            child.attributes = Attributes(node.mode, node.uid, node.gid, xattrs)
            child.mtime_ns = node.mtime_ns
            return None, child, True
        return None, None, True

    def make_parent(self, parts: Sequence[bytes]) -> Directory:
        """Return the directory on disk that an entry of these parent parts belongs in."""
        here, beyond, certain = self.resolve(parts)
        if here.state == PHANTOM:
            self.materialise(here)
        for name in beyond:
            here = self.make_directory(here, name, IMPLIED, certain)
        return here

    def find_parent(self, parts: Sequence[bytes]) -> Directory | None:
        """Return the directory that a whiteout acts in, maybe a phantom; None if there is none."""
        here, beyond, certain = self.resolve(parts)
        if beyond and certain:
            return None
        for name in beyond:
            child = Directory(here, name, PHANTOM)
            here.add(child)
            child.attributes = INHERITED
            self.assumed.append(child)
            here = child
        return here

    def find_below(self, parts: Sequence[bytes]) -> Directory | None:
        """Return the directory at a path of lower directories; None if the layer hides it."""
        here = self.root
        for name in parts:
            child = here.children.get(name)
            if child is None:
                _, child, _ = self._look(here, name)
                if child is None:
                    return None
            here = child
        return here

    def make_directory(
        self, here: Directory, name: bytes, state: int, certain: bool = True
    ) -> Directory:
        """Make a directory of a name that is none in the layer yet; it replaces whatever is."""
        child = Directory(here, name, state)
        if here.whiteouts is not None and name in here.whiteouts:
            here.whiteouts.discard(name)
            child.fresh = True
        descriptor = self.descriptor(here)
        try:
            # Private until its own mode is set, when everything in it is done.
            os.mkdir(name, 0o700, dir_fd=descriptor)
        except FileExistsError:
            self.unlink(here, name)
            # The name was something else in this layer: what is below it must not come back.
            child.fresh = True
            os.mkdir(name, 0o700, dir_fd=descriptor)
        if not certain:
            child.attributes = INHERITED
            self.assumed.append(child)
        here.add(child)
        return child

    def materialise(self, directory: Directory) -> None:
        """Put a phantom and the phantoms above it on disk."""
        missing: list[Directory] = []
        here: Directory | None = directory
        while here is not None and here.state == PHANTOM:
            missing.append(here)
            here = here.parent
        hidden = here is not None and here.hides()
        while missing:
            child = missing.pop()
            if hidden:
                # It was removed, with all else from below, after it had been noted.
                child.attributes = DEFAULT_ATTRIBUTES
                child.mtime_ns = DEFAULT_MTIME
            if child.parent is not None:
                os.mkdir(child.name, 0o700, dir_fd=self.descriptor(child.parent))
            child.state = IMPLIED

    def unlink(self, here: Directory, name: bytes) -> None:
        """Remove what is no directory; its record goes with it."""
        self.removals += 1
        os.unlink(name, dir_fd=self.descriptor(here))
        if here in self.records:
            self.records[here].pop(name, None)

    def remove_directory(self, directory: Directory) -> None:
        """Remove a directory and all in it, on disk as far as it is there."""
        self.removals += 1
        parent = directory.parent
        if parent is None:
            raise LayerError("", "would remove its own root")
        for here in self._bottom_up(directory):
            if here.state != PHANTOM:
                tree_ops.empty_directory(self.descriptor(here))
                self._close(here)
                if here.parent is not None:
                    os.rmdir(here.name, dir_fd=self.descriptor(here.parent))
        del parent.children[directory.name]

    @staticmethod
    def _bottom_up(top: Directory) -> Iterator[Directory]:
        """Yield the directories below and including ``top``, each after those in it."""
        pending: list[tuple[Directory, Iterator[Directory]]] = [
            (top, iter([*top.children.values()]))
        ]
        while pending:
            here, rest = pending[-1]
            child = next(rest, None)
            if child is None:
                pending.pop()
                yield here
            else:
                pending.append((child, iter([*child.children.values()])))

    def bottom_up(self) -> Iterator[Directory]:
        """Yield all directories of the layer, each after those in it, the root last."""
        return self._bottom_up(self.root)
