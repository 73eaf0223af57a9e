"""One entry of a tar archive, whatever headers described it."""

from __future__ import annotations

# Kinds of entries are the bytes of their type flags; contiguous, sparse and old files are FILE.
FILE = ord("0")
HARDLINK = ord("1")
SYMLINK = ord("2")
CHAR_DEVICE = ord("3")
BLOCK_DEVICE = ord("4")
DIRECTORY = ord("5")
FIFO = ord("6")


class Entry:
    """One entry of a layer. Names are the raw bytes of the archive, checked only for NUL.

    ``kind`` is one of the constants of this module; ``size`` is the size of the file (for a sparse
    one with its holes) and 0 for all other kinds. ``sparse`` lists the ``(offset, length)`` of the
    data that a sparse file stores, or is None.
    """

    __slots__ = (
        "devmajor",
        "devminor",
        "gid",
        "kind",
        "linkname",
        "mode",
        "mtime_ns",
        "name",
        "size",
        "sparse",
        "uid",
        "xattrs",
    )

    def __init__(
        self,
        name: bytes,
        kind: int,
        mode: int,
        uid: int,
        gid: int,
        size: int,
        mtime_ns: int,
        linkname: bytes,
    ) -> None:
        self.name = name
        self.kind = kind
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.size = size
        self.mtime_ns = mtime_ns
        self.linkname = linkname
        self.devmajor = 0
        self.devminor = 0
        self.xattrs: dict[bytes, bytes] | None = None
        self.sparse: list[tuple[int, int]] | None = None

    def __repr__(self) -> str:
        return f"<Entry {self.name!r} {chr(self.kind)} {self.size}>"
