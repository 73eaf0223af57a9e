"""Turns the stored bytes of a layer into its tar stream, whatever it is compressed with.

Invariant: the stream that comes out is complete and checked (checksums, lengths, ends of all gzip
members and zstd frames), or a ``LayerError`` is raised before its end is reported; after any
failure the stream stays failed. What is kept in memory depends on neither ratio nor number of
members.

The format is told by its first bytes and not by the media type, as containerd and podman do.
"""

from __future__ import annotations

import gzip
import io
import sys
from typing import TYPE_CHECKING, Protocol

from stowray.pipeline.errors import LayerError
from stowray.pipeline.limits import DEFAULT_LIMITS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _typeshed import ReadableBuffer, WriteableBuffer

    from stowray.pipeline.limits import LayerLimits

GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
# Sixteen magic numbers 0x184D2A50 … 0x184D2A5F, little-endian (RFC 8878 §3.1.2).
SKIPPABLE_MAGIC = b"\x2a\x4d\x18"
MAGIC_SIZE = 4

CHUNK = 512 << 10
# Output of tiny frames is gathered up to this size before it is handed on.
SMALL_CHUNK = 64 << 10
# Windows of input grow from the small to the large one within a frame: what lies behind the end of
# a frame is copied by the decoder, so a window must not exceed by much what its frame consumes.
SMALLEST_WINDOW = 512
LARGEST_WINDOW = 128 << 10


def decompress(
    read: Callable[[], bytes], limits: LayerLimits = DEFAULT_LIMITS
) -> Callable[[], bytes]:
    """Return a callable that yields the uncompressed stream of ``read`` in chunks, then ``b""``.

    ``read`` answers ``b""`` at its end; what it raises passes through.
    """
    return _Stream(read, limits)


def is_gzip(head: bytes) -> bool:
    """Tell whether ``head`` begins as a gzip member does."""
    return head.startswith(GZIP_MAGIC)


def is_zstd(head: bytes) -> bool:
    """Tell whether ``head`` begins as a zstd frame or a skippable frame does."""
    return head.startswith(ZSTD_MAGIC) or (
        head[1:MAGIC_SIZE] == SKIPPABLE_MAGIC and 0x50 <= head[0] <= 0x5F
    )


class _Stream:
    """Counts what a decoder yields and keeps a failed stream failed."""

    def __init__(self, read: Callable[[], bytes], limits: LayerLimits) -> None:
        self._chunks = _decode(read, limits)
        self._limit = limits.layer_size
        self._left = limits.layer_size
        self._ended = False

    def __call__(self) -> bytes:
        for chunk in self._chunks:
            self._left -= len(chunk)
            if self._left < 0:
                self._chunks = iter(())
                raise LayerError("", f"is larger than {self._limit} bytes uncompressed")
            if not chunk:
                self._ended = True
            return chunk
        # A generator that has raised looks exhausted: only its own b"" is an end.
        if not self._ended:
            raise LayerError("", "was read on after a failure")
        return b""


def _decode(read: Callable[[], bytes], limits: LayerLimits) -> Iterator[bytes]:
    """Yield the non-empty chunks of the uncompressed stream and then ``b""``."""
    head = b""
    while len(head) < MAGIC_SIZE:
        chunk = read()
        if not chunk:
            break
        head = head + chunk if head else chunk
    if is_gzip(head):
        yield from _gunzip(_Source(head, read))
    elif is_zstd(head):
        yield from _unzstd(head, read, limits)
    else:
        while head:
            yield head
            head = read()
    yield b""


class _Source(io.RawIOBase):
    """Presents ``read`` as the raw file that the gzip reader wants."""

    def __init__(self, head: bytes, read: Callable[[], bytes]) -> None:
        super().__init__()
        self._rest = memoryview(head)
        self._read = read

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill the start of ``buffer`` with what is at hand; 0 at the end."""
        target = memoryview(buffer)
        if not self._rest:
            self._rest = memoryview(self._read())
        size = min(len(target), len(self._rest))
        target[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _gunzip(source: _Source) -> Iterator[bytes]:
    """Yield the content of all gzip members.

    ISA-L's own reader walks the members, checks CRC and ISIZE, accepts NUL padding after the last
    member and nothing else (RFC 1952 §2.2 knows no padding; tape blocks do), bounds its output by
    the chunk, and releases the GIL, which ``isal_zlib.decompressobj`` does not.
    """
    from isal import igzip, isal_zlib

    reader = igzip.IGzipFile(fileobj=source, mode="rb")  # type: ignore[no-untyped-call]
    while True:
        try:
            chunk = reader.read(CHUNK)
        except EOFError:
            raise LayerError("", "gzip stream is cut off or followed by other bytes") from None
        except (gzip.BadGzipFile, isal_zlib.IsalError) as error:  # type: ignore[misc]
            raise LayerError("", f"gzip stream is damaged: {error}") from None
        if not chunk:
            return
        yield chunk


class _Decompressor(Protocol):
    """What is used of a ``ZstdDecompressor``; one instance decodes one frame."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: ReadableBuffer, max_length: int = -1) -> bytes: ...


def _unzstd(head: bytes, read: Callable[[], bytes], limits: LayerLimits) -> Iterator[bytes]:
    """Yield the content of all zstd frames; skippable frames have none (RFC 8878 §3.1)."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd

    options: dict[int, int] = {
        zstd.DecompressionParameter.window_log_max: limits.window_size.bit_length() - 1
    }
    view, position = memoryview(head), 0
    decompressor: _Decompressor | None = None
    window = SMALLEST_WINDOW
    gathered: list[bytes] = []
    gathered_size = 0
    while True:
        data = view[:0]
        if decompressor is None or decompressor.needs_input:
            if position == len(view):
                view, position = memoryview(read()), 0
                if not view:
                    break
            if decompressor is None:
                decompressor = zstd.ZstdDecompressor(options=options)
                window = SMALLEST_WINDOW
            data = view[position : position + window]
            position += len(data)
            window = min(window * 2, LARGEST_WINDOW)
        try:
            chunk = decompressor.decompress(data, CHUNK)
        except zstd.ZstdError as error:
            raise LayerError("", f"zstd stream is damaged or unsupported: {error}") from None
        if decompressor.eof:
            position -= len(decompressor.unused_data)
            decompressor = None
        if chunk:
            gathered.append(chunk)
            gathered_size += len(chunk)
            if gathered_size >= SMALL_CHUNK:
                yield chunk if len(gathered) == 1 else b"".join(gathered)
                gathered = []
                gathered_size = 0
    if decompressor is not None:
        raise LayerError("", "zstd stream is cut off")
    if gathered:
        yield b"".join(gathered)
