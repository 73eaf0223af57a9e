"""Files by name, in a directory or in an uncompressed tar archive, read at any offset.

Invariant: a name finds one regular file of the tree or nothing: in an archive it never leads out,
links are followed only within, and two different files of one name are an error.
"""

from __future__ import annotations

import os
import stat
import weakref
from typing import TYPE_CHECKING, Final, Protocol, Self

from stowray.pipeline import pax, ustar
from stowray.pipeline.errors import LayerError, ManifestError, NotFoundError, StorageError, escape

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK: Final = ustar.BLOCK
MEMBERS_LIMIT: Final = 200_000
METADATA_LIMIT: Final = 1 << 20
LINKS_LIMIT: Final = 8

# Three bytes, spelt so that the digit is not read as part of the escape: v7 writes NUL.
_REGULAR: Final = b"0\x007"
_HARD_LINK, _SYMLINK, _DIRECTORY = b"1"[0], b"2"[0], b"5"[0]
_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK = b"x"[0], b"g"[0], b"L"[0], b"K"[0]
_LINKS: Final = (_HARD_LINK, _SYMLINK)
_OVERRIDES: Final[tuple[bytes, ...]] = (b"path", b"linkpath", b"size")
_METADATA: Final = (_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK)


class Extent:
    """An open part of a file: one blob. Owns its descriptor until closed."""

    def __init__(
        self, descriptor: int, start: int, size: int, source: str, offset: int = 0
    ) -> None:
        self._descriptor = descriptor
        self._start = start
        self.size = size
        self.source = source
        self.offset = min(offset, size)
        self._position = self.offset

    def read(self, size: int = 1 << 20) -> bytes:
        """Return at most ``size`` bytes of what is left; ``b""`` at the end."""
        wanted = min(size, self.size - self._position)
        if wanted <= 0:
            return b""
        chunk = _pread(self._descriptor, wanted, self._start + self._position, self.source)
        self._position += len(chunk)
        return chunk

    def close(self) -> None:
        """Free the descriptor; calling it twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


class FileTree(Protocol):
    """What an image on disk is read from; usable from several threads."""

    @property
    def path(self) -> str:
        """The directory or archive, for messages."""

    def open(self, name: str, offset: int = 0) -> Extent | None:
        """Return the regular file ``name``, or None when there is none."""

    def close(self) -> None:
        """Free what the tree itself holds; open extents stay valid."""


class DirectoryTree:
    """The files below a directory.

    Links are followed: build tools make layouts of links, and what a link leads to is used only if
    it has the digest that was asked for.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        if not stat.S_ISDIR(_stat(path).st_mode):
            raise StorageError(path, "not a directory")

    def open(self, name: str, offset: int = 0) -> Extent | None:
        """Return the regular file ``name``, or None when there is none."""
        path = f"{self.path}/{name}"
        try:
            # Without O_NONBLOCK a planted fifo would hang the reader.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise unreadable(path, error) from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise StorageError(path, "not a regular file")
            return Extent(os.dup(descriptor), 0, status.st_size, self.path, offset)
        except OSError as error:
            raise unreadable(path, error) from None
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Do nothing: files are opened one by one."""


class ArchiveTree:
    """The files of a tar archive, found by an index of its headers; takes over ``descriptor``.

    Closed with its last user, because other threads may still open files when a newer archive has
    taken its place.
    """

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._finalizer = weakref.finalize(self, os.close, descriptor)
        try:
            self._size = os.fstat(descriptor).st_size
            self._files: dict[str, list[tuple[int, int]]] = {}
            self._links: dict[str, str] = {}
            self._read_index()
        except LayerError as error:
            self.close()
            what = f"member {error.entry} " if error.entry else "has a member that "
            raise self._broken(what + error.reason) from None
        except ManifestError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise unreadable(path, error) from None

    def open(self, name: str, offset: int = 0) -> Extent | None:
        """Return the regular file ``name``, or None when there is none."""
        found = self._normalize(name)
        for _ in range(LINKS_LIMIT):
            if found not in self._links:
                break
            found = self._links[found]
        else:
            raise self._broken(f"member {escape(name)} is a chain of links without an end")
        extents = self._files.get(found)
        if extents is None:
            return None
        if len(extents) > 1:
            raise self._broken(f"has more than one member named {escape(found)}")
        start, size = extents[0]
        try:
            return Extent(os.dup(self._descriptor), start, size, self.path, offset)
        except OSError as error:
            raise unreadable(self.path, error) from None

    def close(self) -> None:
        """Free the archive's descriptor; open extents stay valid."""
        self._finalizer()

    def _read_index(self) -> None:
        for number, (name, kind, link, start, size) in enumerate(self._members()):
            if number >= MEMBERS_LIMIT:
                raise self._broken(f"has more than {MEMBERS_LIMIT} members")
            if kind == _DIRECTORY or name.endswith("/"):
                continue
            key = self._normalize(name)
            if kind in _LINKS:
                if key in self._files or self._links.get(key, link) != link:
                    raise self._broken(f"has more than one member named {escape(key)}")
                self._links[key] = link
            elif kind in _REGULAR:
                if key in self._links:
                    raise self._broken(f"has more than one member named {escape(key)}")
                self._files.setdefault(key, []).append((start, size))
            # Devices and other kinds are no part of an image; whoever asks for one finds nothing.

    def _members(self) -> Iterator[tuple[str, int, str, int, int]]:
        """Yield name, kind, link target (from the root), start and size of each member."""
        position = 0
        overrides: dict[bytes, bytes] = {}
        while (header := self._block(position)) is not None:
            if not ustar.checksum_fits(header):
                raise self._broken(f"has no tar header at byte {position}")
            position += BLOCK
            kind = header[156]
            size = ustar.number(header[124:136], "size")
            if kind not in _METADATA and b"size" in overrides:
                size = pax.integer(overrides[b"size"], "size")
            if kind in (*_LINKS, _DIRECTORY):
                # Some writers put the target's size into a link's header; no data follows.
                size = 0
            if not 0 <= size <= self._size - position:
                raise self._broken(f"is cut off: the member at byte {position} is not all there")
            if kind in _METADATA:
                self._add_metadata(kind, position, size, overrides)
            else:
                name = overrides.get(b"path")
                link = overrides.get(b"linkpath", ustar.text(header, 157, 257))
                if name is None:
                    name = ustar.text(header, 0, 100)
                    if before := ustar.prefix(header):
                        name = before + b"/" + name
                text = name.decode("utf-8", "surrogateescape")
                yield text, kind, self._target(text, kind, link), position, size
                overrides = {}
            position += size + -size % BLOCK
        if overrides:
            raise self._broken("ends after a header that belongs to a member")

    def _block(self, position: int) -> bytes | None:
        """Return the header at ``position``; None at the end: two zero blocks, or no bytes."""
        header = _pread(self._descriptor, BLOCK, position, self.path)
        if not header or header == ustar.ZERO_BLOCK:
            return None
        if len(header) < BLOCK:
            raise self._broken(f"is cut off at byte {self._size}")
        return header

    def _add_metadata(
        self, kind: int, position: int, size: int, overrides: dict[bytes, bytes]
    ) -> None:
        """Take the fields that a metadata member gives to the member after it."""
        if size > METADATA_LIMIT:
            raise self._broken(f"has a header of more than {METADATA_LIMIT} bytes")
        payload = _pread(self._descriptor, size, position, self.path)
        if kind == _LONG_NAME:
            overrides.setdefault(b"path", payload.split(b"\0", 1)[0])
        elif kind == _LONG_LINK:
            overrides.setdefault(b"linkpath", payload.split(b"\0", 1)[0])
        else:
            records = pax.parse(payload)
            relevant = {key: records[key] for key in _OVERRIDES if key in records}
            if any(key.startswith(pax.SPARSE) for key in records):
                raise self._broken("has a sparse member, which no image archive has")
            if kind == _PAX:
                overrides.update(relevant)
            elif relevant:
                raise self._broken("has a global header that renames or resizes its members")

    def _target(self, name: str, kind: int, link: bytes) -> str:
        """Return where a link member leads, from the archive's root; empty for other kinds."""
        if kind not in _LINKS:
            return ""
        target = link.decode("utf-8", "surrogateescape")
        # A hard link names a member; a symbolic link is relative to its own directory.
        folder = name.rpartition("/")[0] if kind == _SYMLINK else ""
        return self._normalize(f"{folder}/{target}" if folder else target)

    def _normalize(self, name: str) -> str:
        """Return a member's name as a path from the root, or raise when it leads out of it."""
        if name.startswith("/") or "\0" in name:
            raise self._broken(f"names a file outside of it: {escape(name[:200])}")
        parts: list[str] = []
        for part in name.split("/"):
            if part == "..":
                if not parts:
                    raise self._broken(f"names a file outside of it: {escape(name[:200])}")
                parts.pop()
            elif part not in ("", "."):
                parts.append(part)
        return "/".join(parts)

    def _broken(self, reason: str) -> ManifestError:
        return ManifestError(self.path, f"the archive {reason}")


def read_small(tree: FileTree, name: str, limit: int) -> bytes | None:
    """Return the whole file ``name`` of at most ``limit`` bytes, or None when there is none."""
    extent = tree.open(name)
    if extent is None:
        return None
    with extent:
        if extent.size > limit:
            raise ManifestError(f"{tree.path}/{name}", f"longer than {limit} bytes")
        return b"".join(iter(extent.read, b""))


def unreadable(path: str, error: OSError) -> NotFoundError | StorageError:
    """Return what an ``OSError`` while reading ``path`` means to the user."""
    if isinstance(error, FileNotFoundError):
        return NotFoundError(path, "this machine's file system")
    return StorageError(path, f"cannot be read: {error.strerror or error}")


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from None


def _pread(descriptor: int, size: int, position: int, source: str) -> bytes:
    try:
        return os.pread(descriptor, size, position)
    except OSError as error:
        raise unreadable(source, error) from None
