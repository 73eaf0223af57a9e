"""Reads a layer's tar stream entry by entry, from chunks as they arrive, without copying data.

Invariant: every entry of the stream is yielded once, with the meaning that Go's archive/tar gives
it (so containerd, podman and docker agree), or a ``LayerError`` is raised: no damage, odd header or
missing end ever shortens the list of entries in silence. The stream is read to its very end,
padding included, so that whoever wraps ``read`` with a hash sees every byte. Work is linear in the
stream, and memory is bounded by one chunk and the limits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import adler32

from stowray.pipeline import pax, sparse, ustar
from stowray.pipeline.errors import LayerError, escape
from stowray.pipeline.limits import DEFAULT_LIMITS
from stowray.pipeline.tar_entry import (
    BLOCK_DEVICE,
    CHAR_DEVICE,
    DIRECTORY,
    FIFO,
    FILE,
    Entry,
)
from stowray.pipeline.ustar import BLOCK, ZERO_BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stowray.pipeline.limits import LayerLimits

_OLD_FILE = 0
_CONTIGUOUS = ord("7")
_OLD_SPARSE = ord("S")
_PAX = ord("x")
_PAX_GLOBAL = ord("g")
_LONG_NAME = ord("L")
_LONG_LINK = ord("K")
_METADATA = frozenset((_PAX, _PAX_GLOBAL, _LONG_NAME, _LONG_LINK))

_PERMISSIONS = 0o7777
_SECOND = 1_000_000_000
# Field values seen before, kept because neighbours in a layer share them.
_CACHE_SIZE = 32_768


class _Pending:
    """What metadata headers said about the next entry; of each kind the last one counts."""

    __slots__ = ("count", "link", "name", "records")

    def __init__(self) -> None:
        self.count = 0
        self.name = b""
        self.link = b""
        self.records: dict[bytes, bytes] | None = None

    @property
    def waits(self) -> bool:
        """Whether an entry must follow that all this belongs to."""
        return bool(self.name or self.link or self.records is not None)


class TarReader:
    """Iterates over the entries of a tar stream; ``read`` answers ``b""`` at its end.

    Between two entries the data of the first may be taken with ``take`` or ``data``; what is not
    taken is skipped. Views that are handed out keep their chunk alive and stay valid.
    """

    def __init__(self, read: Callable[[], bytes], limits: LayerLimits = DEFAULT_LIMITS) -> None:
        self._read = read
        self._limits = limits
        self._chunk = b""
        self._view = memoryview(b"")
        self._position = 0
        self._end = 0
        self._chunk_offset = 0
        self._left = 0
        self._padding = 0
        self._sums: dict[bytes, int] = {}
        self._owners: dict[bytes, tuple[int, int, int]] = {}
        self._numbers: dict[bytes, int] = {}
        self._name = b""
        self.unpacked_size = 0

    @property
    def offset(self) -> int:
        """Bytes of the stream read so far."""
        return self._chunk_offset + self._position

    def __iter__(self) -> Iterator[Entry]:
        limits = self._limits
        sums, owners, numbers = self._sums, self._owners, self._numbers
        pending: _Pending | None = None
        entries = 0
        while True:
            position = self._position + self._left + self._padding
            if position <= self._end:
                self._left = self._padding = 0
            else:
                self._skip()
                position = self._position
            stop = position + BLOCK
            if stop <= self._end:
                header = self._chunk[position:stop]
                self._position = stop
            else:
                self._position = position
                block = self._block()
                if block is None:
                    break
                header = block
            # Adler-32's low half is 1 + the sum of the bytes modulo 65521, computed in C; the sum
            # of 512 ASCII bytes is smaller than that, hence exact.
            if sums.get(header[148:156]) != adler32(header) & 0xFFFF or not header.isascii():
                if header == ZERO_BLOCK:
                    self._check_end()
                    break
                self._verify(header)
            flag = header[156]
            if flag > FIFO and flag in _METADATA:
                pending = self._metadata(header, flag, pending or _Pending())
                continue
            stop = header.find(0, 0, 100)
            name = header[:stop] if stop >= 0 else header[:100]
            if header[345]:
                prefix = ustar.prefix(header)
                if prefix:
                    name = prefix + b"/" + name
            field = header[100:124]
            owner = owners.get(field)
            if owner is None:
                owner = self._owner(field, name)
            mode, uid, gid = owner
            field = header[124:136]
            size = numbers.get(field, -1)
            if size < 0:
                size = self._number(field, "size", name)
            field = header[136:148]
            seconds = numbers.get(field)
            if seconds is None:
                seconds = self._number(field, "time", name)
            if flag == FILE:
                entry = Entry(name, flag, mode, uid, gid, size, seconds * _SECOND, b"")
            else:
                linkname = ustar.text(header, 157, 257) if header[157] else b""
                entry = Entry(name, flag, mode, uid, gid, size, seconds * _SECOND, linkname)
            if flag != FILE or pending is not None:
                try:
                    size = self._complete(entry, header, pending)
                except LayerError as error:
                    raise _named(error, entry.name) from None
                pending = None
                name = entry.name
            if size < 0:
                raise LayerError(escape(name), "has a negative size")
            self._left = size
            self._padding = -size % BLOCK
            entries += 1
            if entries > limits.entries:
                raise LayerError("", f"has more than {limits.entries} entries")
            self._name = name
            if entry.size:
                self.count(entry.size)
            yield entry
        if pending is not None and pending.waits:
            raise LayerError("", "ends after a header that belongs to an entry")
        self.drain()

    def count(self, size: int) -> None:
        """Count ``size`` bytes that the current entry makes, whether from the stream or from below.

        Raises ``LayerError`` beyond the limit for all that a layer unpacks.
        """
        self.unpacked_size += size
        limit = self._limits.unpacked_size
        if self.unpacked_size > limit:
            raise LayerError(escape(self._name), f"brings the layer beyond {limit} bytes")

    def take(self) -> memoryview | None:
        """Return all data of the current entry if the chunk at hand holds it, else None."""
        if self._position == self._end and self._left:
            self._load()
        position = self._position
        stop = position + self._left
        if stop > self._end:
            return None
        self._position = stop
        self._left = 0
        return self._view[position:stop]

    def data(self) -> Iterator[memoryview]:
        """Yield what is left of the current entry's data; of a sparse file only what is stored."""
        while self._left:
            if self._position == self._end and not self._load():
                raise LayerError(escape(self._name), f"is cut off at byte {self.offset}")
            position = self._position
            size = min(self._end - position, self._left)
            self._position = position + size
            self._left -= size
            yield self._view[position : position + size]

    def drain(self) -> None:
        """Read the rest of the stream without looking at it."""
        self._position = self._end
        self._left = self._padding = 0
        while self._load():
            self._position = self._end

    def _load(self) -> bool:
        """Make the next chunk current; False at the end of the stream."""
        chunk = self._read()
        self._chunk_offset += self._end
        self._chunk = chunk
        self._view = memoryview(chunk)
        self._position = 0
        self._end = len(chunk)
        return bool(chunk)

    def _skip(self) -> None:
        """Skip the rest of the current entry, which reaches beyond the chunk.

        The padding behind the very last data may be missing: nothing is lost, and Go reads on.
        """
        for _ in self.data():
            pass
        while self._padding > self._end - self._position:
            self._padding -= self._end - self._position
            if not self._load():
                self._padding = 0
        self._position += self._padding
        self._padding = 0

    def _gather(self, size: int) -> bytes:
        """Return the next ``size`` bytes, fewer only at the end of the stream."""
        stop = self._position + size
        if stop <= self._end:
            found = self._chunk[self._position : stop]
            self._position = stop
            return found
        pieces: list[bytes] = []
        while size:
            if self._position == self._end and not self._load():
                break
            piece = self._chunk[self._position : self._position + size]
            self._position += len(piece)
            size -= len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    def _block(self) -> bytes | None:
        """Return the next block, or None at the end of the stream."""
        block = self._gather(BLOCK)
        if not block:
            return None
        if len(block) < BLOCK:
            raise LayerError("", f"is cut off in a header, at byte {self.offset}")
        return block

    def _map_block(self) -> bytes:
        """Return a block that belongs to a sparse map."""
        block = self._block()
        if block is None:
            raise LayerError("", "is cut off in its sparse map")
        return block

    def _check_end(self) -> None:
        """Raise if one NUL block is followed by anything but NULs or the end of the stream.

        Two NUL blocks end an archive; members behind a single one would be lost in silence.
        """
        following = self._gather(BLOCK)
        if following.count(0) != len(following):
            raise LayerError("", f"goes on after a single NUL block, at byte {self.offset}")

    def _verify(self, header: bytes) -> None:
        """Raise unless the header's checksum is right; remember the field if it is."""
        if not ustar.checksum_fits(header):
            raise LayerError("", f"has a header with a wrong checksum before byte {self.offset}")
        if header.isascii() and len(self._sums) < _CACHE_SIZE:
            self._sums[header[148:156]] = adler32(header) & 0xFFFF

    def _owner(self, field: bytes, name: bytes) -> tuple[int, int, int]:
        """Return mode, user and group ID of a header, and remember them."""
        try:
            owner = (
                ustar.number(field[:8], "mode") & _PERMISSIONS,
                ustar.owner(ustar.number(field[8:16], "user ID"), "user ID"),
                ustar.owner(ustar.number(field[16:], "group ID"), "group ID"),
            )
        except LayerError as error:
            raise _named(error, name) from None
        if len(self._owners) < _CACHE_SIZE:
            self._owners[field] = owner
        return owner

    def _number(self, field: bytes, what: str, name: bytes) -> int:
        """Return a number of twelve bytes, and remember it."""
        try:
            value = ustar.number(field, what)
        except LayerError as error:
            raise _named(error, name) from None
        if len(self._numbers) < _CACHE_SIZE:
            self._numbers[field] = value
        return value

    def _metadata(self, header: bytes, flag: int, pending: _Pending) -> _Pending:
        """Read a header that speaks of the next entry, or of none."""
        limits = self._limits
        pending.count += 1
        if pending.count > limits.metadata_headers:
            raise LayerError("", f"has more than {limits.metadata_headers} headers for one entry")
        size = self._number(header[124:136], "size", b"")
        if not 0 <= size <= limits.metadata_size:
            raise LayerError("", f"has a PAX or long-name header of {size} bytes")
        padded = size + -size % BLOCK
        payload = self._gather(padded)
        if len(payload) < padded:
            raise LayerError("", f"is cut off in a PAX or long-name header, at byte {self.offset}")
        payload = payload[:size]
        if flag == _PAX:
            pending.records = pax.parse(payload)
        elif flag == _PAX_GLOBAL:
            # containerd, podman and docker let global records change no entry: only checked.
            pax.parse(payload)
            if pending.waits:
                # Readers disagree here: Go forgets what came before, GNU tar does not.
                raise LayerError("", "has a global header between a header and its entry")
        else:
            text = payload.partition(b"\0")[0]
            if len(text) > limits.path_size:
                raise LayerError("", f"has a name of more than {limits.path_size} bytes")
            if flag == _LONG_NAME:
                pending.name = text
            else:
                pending.link = text
        return pending

    def _complete(self, entry: Entry, header: bytes, pending: _Pending | None) -> int:
        """Settle what is not plain about an entry; return the size of its data in the stream."""
        records = pending.records if pending is not None else None
        holes = records is not None and pax.merge(entry, records, self._limits)
        if pending is not None:
            entry.name = pending.name or entry.name
            entry.linkname = pending.link or entry.linkname
        stored = entry.size
        flag = entry.kind
        if flag == _OLD_FILE:
            # Before POSIX a directory was a file whose name ends in a slash.
            entry.kind = DIRECTORY if entry.name.endswith(b"/") else FILE
        elif flag in (_CONTIGUOUS, _OLD_SPARSE):
            entry.kind = FILE
        elif not FILE <= flag <= FIFO:
            raise LayerError("", f"has the unknown type {chr(flag)!r}")
        if flag == _OLD_SPARSE:
            segments, real = sparse.old_gnu(header, self._map_block, self._limits)
            self._set_sparse(entry, segments, real, stored)
        elif holes and records is not None:
            entry.name = records.get(b"GNU.sparse.name") or entry.name
            found = sparse.pax_map(records, stored, self._map_block, self._limits)
            if found is not None:
                segments, real, map_size = found
                stored -= map_size
                self._set_sparse(entry, segments, real, stored)
        if entry.kind != FILE:
            # Go gives no data to these kinds whatever their size says; were there any, the next
            # header's checksum would tell.
            entry.size = stored = 0
            if entry.kind in (CHAR_DEVICE, BLOCK_DEVICE):
                if not entry.devmajor and not entry.devminor:
                    entry.devmajor, entry.devminor = ustar.device(header)
                ustar.check_device(entry.devmajor, entry.devminor)
        return stored

    def _set_sparse(self, entry: Entry, segments: sparse.Segments, real: int, stored: int) -> None:
        """Make ``entry`` a sparse file of ``real`` bytes."""
        if entry.kind != FILE:
            raise LayerError("", "is sparse but no file")
        sparse.check(segments, real, stored)
        entry.size = real
        entry.sparse = segments


def _named(error: LayerError, name: bytes) -> LayerError:
    """Return ``error`` with the entry that it is about."""
    return error if error.entry else LayerError(escape(name), error.reason)
