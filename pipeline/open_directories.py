"""Descriptors of the directories below one root, a bounded number of them open at a time.

Invariant: each directory is reached part by part through ``O_NOFOLLOW``, so that a symlink never
leads out, and neither depth nor number of directories exhausts the process's descriptors.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Self

from stowray.pipeline.tree_ops import OPEN_DIRECTORY

_MOST = 128


class OpenDirectories:
    """Opens directories by their path from ``root`` (a descriptor that stays the caller's)."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._open: OrderedDict[bytes, int] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, path: bytes) -> int:
        """Return a descriptor of the directory; the next call may close it."""
        if not path:
            return self._root
        descriptor = self._open.get(path)
        if descriptor is not None:
            self._open.move_to_end(path)
            return descriptor
        missing = [path]
        while missing[-1] and missing[-1] not in self._open:
            missing.append(missing[-1].rpartition(b"/")[0])
        nearest = missing.pop()
        descriptor = self._open[nearest] if nearest else self._root
        while missing:
            path = missing.pop()
            descriptor = os.open(path.rpartition(b"/")[2], OPEN_DIRECTORY, dir_fd=descriptor)
            self._open[path] = descriptor
            # The newest stays: it is the parent of the next step or the answer.
            if len(self._open) > _MOST:
                os.close(self._open.popitem(last=False)[1])
        return descriptor

    def close(self) -> None:
        """Close all but the root."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
