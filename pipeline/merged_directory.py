"""A directory of several layer trees seen as one, opened no further down than somebody looks.

Invariant: a directory stays open until it is dropped and no child needs it to find parts of its
own; every descriptor is closed once. Most look-ups are answered by the topmost trees, and a chain
may have more than a hundred.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

OPEN_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

# The number of a layer, counted from the top, and a descriptor of the directory in it.
Part = tuple[int, int]


class MergedDirectory:
    """The layers that take part in one directory, topmost first, with a descriptor in each.

    ``parts`` grows as far down as somebody looks; ``position`` is the next candidate among the
    parent's parts (of the root: among the layers).
    """

    __slots__ = ("is_complete", "is_dropped", "parent", "parts", "path", "position", "users")

    def __init__(self, path: bytes, parent: MergedDirectory | None) -> None:
        self.path = path
        self.parent = parent
        self.parts: list[Part] = []
        self.position = 0
        self.is_complete = False
        self.is_dropped = False
        self.users = 0
        if parent is not None:
            parent.users += 1

    @property
    def name(self) -> bytes:
        """The last part of the path."""
        return self.path.rpartition(b"/")[2]

    def open_next(self, grow: Callable[[MergedDirectory], bool]) -> Part | None:
        """Open this directory in the next layer that has it; None when no further one shows.

        ``grow`` opens one more part of the parent and tells whether there was one.
        """
        parent = self.parent
        if parent is None:
            return None
        while self.position < len(parent.parts) or grow(parent):
            layer, directory = parent.parts[self.position]
            try:
                descriptor = os.open(self.name, OPEN_DIRECTORY, dir_fd=directory)
            except FileNotFoundError:
                self.position += 1
                continue
            except OSError as error:
                # What is no directory hides those below it.
                if error.errno in {errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}:
                    return None
                raise
            self.position += 1
            return layer, descriptor
        return None

    def complete(self) -> int:
        """Say that there are no more parts; return how many descriptors that closes."""
        if self.is_complete:
            return 0
        self.is_complete = True
        parent, self.parent = self.parent, None
        if parent is None:
            return 0
        parent.users -= 1
        return parent.drop() if parent.is_dropped else 0

    def drop(self) -> int:
        """Close it as soon as nobody needs it; return how many descriptors are closed by now."""
        self.is_dropped = True
        if self.users:
            return 0
        closed = len(self.parts)
        for _, descriptor in self.parts:
            os.close(descriptor)
        self.parts.clear()
        return closed + self.complete()
