"""The compressions that layers come in, written as the field's tools write them."""

from __future__ import annotations

import hashlib
import zlib
from typing import BinaryIO, Literal, Protocol

Compression = Literal["gzip", "gzip-fast", "gzip-members", "zstd", "none"]
MEMBER_SIZE = 1 << 22


class Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


class _Plain:
    def compress(self, data: bytes) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


class _Members:
    """Gzip in many members, as parallel compressors write it."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def compress(self, data: bytes) -> bytes:
        self._pending += data
        out = b""
        while len(self._pending) >= MEMBER_SIZE:
            out += self._member(bytes(self._pending[:MEMBER_SIZE]))
            del self._pending[:MEMBER_SIZE]
        return out

    def flush(self) -> bytes:
        return self._member(bytes(self._pending))

    @staticmethod
    def _member(data: bytes) -> bytes:
        compressor = zlib.compressobj(1, zlib.DEFLATED, 31)
        return compressor.compress(data) + compressor.flush()


def compressor(compression: Compression) -> Compressor:
    if compression == "gzip":
        return zlib.compressobj(6, zlib.DEFLATED, 31)  # what docker and buildah write
    if compression == "gzip-fast":
        return zlib.compressobj(1, zlib.DEFLATED, 31)
    if compression == "gzip-members":
        return _Members()
    if compression == "zstd":
        return _zstd()
    return _Plain()


def _zstd() -> Compressor:
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        from backports import zstd
    result: Compressor = zstd.ZstdCompressor(level=3)
    return result


class HashingSink:
    """Hash and count what goes through, on its way into a compressor and a file."""

    def __init__(self, out: BinaryIO, compression: Compression) -> None:
        self._out = out
        self._compressor = compressor(compression)
        self._plain = hashlib.sha256()
        self._packed = hashlib.sha256()
        self.tar_size = 0
        self.size = 0

    def write(self, data: bytes, /) -> int:
        self._plain.update(data)
        self.tar_size += len(data)
        self._put(self._compressor.compress(data))
        return len(data)

    def finish(self) -> None:
        self._put(self._compressor.flush())

    def _put(self, data: bytes) -> None:
        self._packed.update(data)
        self.size += len(data)
        self._out.write(data)

    @property
    def digest(self) -> str:
        return f"sha256:{self._packed.hexdigest()}"

    @property
    def diff_id(self) -> str:
        return f"sha256:{self._plain.hexdigest()}"
