"""The names of an overlay tree: its special attributes and entries, and what is visible of it.

Overlay format: kernel, Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    import os

OPAQUE = "overlay.opaque"
# A zero-sized origin says "copied up, origin unknown" (ovl_path_check_origin_xattr): without it a
# directory that only one layer has lists its whiteouts, which cannot be opened.
ORIGIN = "overlay.origin"
# Ours, hidden by overlayfs like all of its prefix: the layer has no entry for the root.
IMPLIED_ROOT = "overlay.stowray.root"
# Attributes by which a layer could forge the above; never passed on, never shown.
PRIVATE_PREFIXES = (b"trusted.overlay.", b"user.overlay.")
# Labels of the host's own security modules: made by it, not by an image, and never carried along.
HOST_LABELS = frozenset({b"security.selinux", b"security.ima", b"security.evm"})


def namespace(privileged: bool) -> str:
    """Return the prefix of the overlay attributes in trees of this kind."""
    return "trusted." if privileged else "user."


def is_whiteout(status: os.stat_result) -> bool:
    """Return whether an entry of a layer tree hides the name below it."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


@dataclass(slots=True, eq=False)
class Node:
    """One visible name; ``file_type`` holds the ``S_IFMT`` bits, ``path`` has no slash at its ends.

    Two nodes are names of one inode when their ``inode`` is equal and they are no directories.
    """

    path: bytes
    file_type: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    device: tuple[int, int]
    inode: tuple[int, int]
    links: int

    @property
    def layer(self) -> int:
        """The number of the tree, from the top, that the name is read from."""
        return self.inode[0]

    @property
    def is_directory(self) -> bool:
        """Whether this is a directory."""
        return self.file_type == stat.S_IFDIR

    @property
    def is_file(self) -> bool:
        """Whether this is a regular file."""
        return self.file_type == stat.S_IFREG

    @property
    def is_symlink(self) -> bool:
        """Whether this is a symbolic link."""
        return self.file_type == stat.S_IFLNK
