from __future__ import annotations

import base64
import hashlib
import random
import struct
import sys
import tracemalloc
import zlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowray.pipeline.compress import CHUNK, decompress
from stowray.pipeline.errors import LayerError, UnavailableError
from stowray.pipeline.limits import LayerLimits
from tests.support.tars import gzipped, source
from tests.support.vectors import table

if TYPE_CHECKING:
    from collections.abc import Callable

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

RANDOM = random.Random(7)
NOISE = RANDOM.randbytes(300_000)
TEXT = b"".join(b"line %d of a text that compresses\n" % number for number in range(20_000))
FIXTURES = table("fixtures")
CHECKSUM = {zstd.CompressionParameter.checksum_flag: 1}


def read_all(read: Callable[[], bytes]) -> bytes:
    """Return all that ``read`` yields, and see that the end stays the end."""
    content = b"".join(iter(read, b""))
    assert read() == b""
    return content


def inflate(blob: bytes, chunk: int = 64 << 10, limits: LayerLimits | None = None) -> bytes:
    return read_all(decompress(source(blob, chunk), limits or LayerLimits()))


def framed(*parts: bytes, options: dict[int, int] | None = None) -> bytes:
    return b"".join(zstd.compress(part, options=options) for part in parts)


def skippable(payload: bytes = b"metadata", number: int = 0) -> bytes:
    return struct.pack("<II", 0x184D2A50 + number, len(payload)) + payload


def streamed(data: bytes, options: dict[int, int]) -> bytes:
    """Return a frame without content size, as a pipe through ``zstd`` has it."""
    compressor = zstd.ZstdCompressor(options=options)
    return compressor.compress(data) + compressor.flush()


def gzip_header(flags: int, extra: bytes) -> bytes:
    body = zlib.compressobj(6, zlib.DEFLATED, -15)
    deflated = body.compress(TEXT) + body.flush()
    trailer = struct.pack("<II", zlib.crc32(TEXT), len(TEXT))
    return b"\x1f\x8b\x08" + bytes([flags]) + bytes(6) + extra + deflated + trailer


GOOD = [
    pytest.param(b"", b"", id="no bytes"),
    pytest.param(b"t", b"t", id="plain, shorter than a magic number"),
    pytest.param(TEXT, TEXT, id="plain"),
    pytest.param(b"\x28\xb5\x2f\xfe" + NOISE, b"\x28\xb5\x2f\xfe" + NOISE, id="nearly zstd"),
    pytest.param(b"\x60\x2a\x4d\x18xx", b"\x60\x2a\x4d\x18xx", id="nearly skippable"),
    pytest.param(gzipped(TEXT), TEXT, id="gzip"),
    pytest.param(gzipped(NOISE), NOISE, id="gzip of noise"),
    pytest.param(gzipped(b""), b"", id="gzip of nothing"),
    pytest.param(gzipped(TEXT, members=97), TEXT, id="gzip members"),
    pytest.param(gzipped(b"") * 3 + gzipped(TEXT) + gzipped(b""), TEXT, id="empty gzip members"),
    pytest.param(gzipped(TEXT) + bytes(1000), TEXT, id="gzip and NUL padding"),
    pytest.param(gzip_header(0x08, b"name.tar\0"), TEXT, id="gzip with file name"),
    pytest.param(gzip_header(0x10, b"comment\0"), TEXT, id="gzip with comment"),
    pytest.param(gzip_header(0x04, b"\x04\0XXXX"), TEXT, id="gzip with extra field"),
    pytest.param(framed(TEXT), TEXT, id="zstd"),
    pytest.param(framed(NOISE), NOISE, id="zstd of noise"),
    pytest.param(framed(b""), b"", id="zstd of nothing"),
    pytest.param(framed(TEXT, NOISE, b"", TEXT), TEXT + NOISE + TEXT, id="zstd frames"),
    pytest.param(skippable() + framed(TEXT), TEXT, id="skippable frame first"),
    pytest.param(framed(TEXT) + skippable() + framed(b"x"), TEXT + b"x", id="skippable between"),
    pytest.param(framed(TEXT) + skippable(b"", 15), TEXT, id="skippable frame last"),
    pytest.param(skippable(NOISE, 7), b"", id="skippable frame alone"),
    pytest.param(framed(TEXT, options=CHECKSUM), TEXT, id="zstd with checksum"),
    pytest.param(streamed(TEXT, {}), TEXT, id="zstd without content size"),
    pytest.param(
        streamed(TEXT, {zstd.CompressionParameter.window_log: 27}), TEXT, id="zstd window 128 MiB"
    ),
]


@pytest.mark.parametrize("chunk", [1 << 20, 4099])
@pytest.mark.parametrize(("blob", "content"), GOOD)
def test_content_is_whole(blob: bytes, content: bytes, chunk: int) -> None:
    assert inflate(blob, chunk) == content


@pytest.mark.parametrize(
    ("blob", "content"),
    [
        pytest.param(gzipped(b"hello", members=3) + bytes(3), b"hello", id="gzip"),
        pytest.param(skippable() + framed(b"he", b"llo"), b"hello", id="zstd"),
        pytest.param(b"hello", b"hello", id="plain"),
    ],
)
def test_bytes_may_arrive_one_by_one(blob: bytes, content: bytes) -> None:
    assert inflate(blob, chunk=1) == content


def flipped(blob: bytes, position: int) -> bytes:
    changed = bytearray(blob)
    changed[position] ^= 0x55
    return bytes(changed)


GZIP = gzipped(TEXT)
ZSTD = framed(TEXT, options=CHECKSUM)
BAD = [
    pytest.param(GZIP[:3], id="gzip cut in the header"),
    pytest.param(GZIP[:-2000], id="gzip cut in the body"),
    pytest.param(GZIP[:-8], id="gzip without trailer"),
    pytest.param(GZIP[:-1], id="gzip cut in the trailer"),
    pytest.param(flipped(GZIP, -6), id="gzip CRC"),
    pytest.param(flipped(GZIP, -2), id="gzip ISIZE"),
    pytest.param(flipped(GZIP, len(GZIP) // 2), id="gzip body"),
    pytest.param(flipped(GZIP, 2), id="gzip method"),
    pytest.param(GZIP + b"garbage", id="gzip and other bytes"),
    pytest.param(GZIP + bytes(600) + b"garbage", id="gzip, NULs and other bytes"),
    pytest.param(GZIP + b"\x1f", id="gzip and half a magic number"),
    pytest.param(GZIP + GZIP[:-1], id="second gzip member cut"),
    pytest.param(GZIP + ZSTD, id="zstd behind gzip"),
    pytest.param(ZSTD[:5], id="zstd cut in the header"),
    pytest.param(ZSTD[:-300], id="zstd cut in the body"),
    pytest.param(ZSTD[:-1], id="zstd cut in the checksum"),
    pytest.param(flipped(ZSTD, -1), id="zstd checksum"),
    pytest.param(ZSTD + b"garbage", id="zstd and other bytes"),
    pytest.param(ZSTD + bytes(512), id="zstd and NUL padding"),
    pytest.param(ZSTD + ZSTD[:-1], id="second zstd frame cut"),
    pytest.param(ZSTD + b"\x28", id="zstd and part of a magic number"),
    pytest.param(skippable()[:-1], id="skippable frame cut"),
    pytest.param(ZSTD + skippable()[:6], id="skippable frame cut in its length"),
    pytest.param(
        streamed(NOISE, {zstd.CompressionParameter.window_log: 28}), id="zstd window 256 MiB"
    ),
    pytest.param(
        streamed(NOISE, {zstd.CompressionParameter.window_log: 31}), id="zstd window 2 GiB"
    ),
]


@pytest.mark.parametrize("chunk", [1 << 20, 4099])
@pytest.mark.parametrize("blob", BAD)
def test_flaws_never_look_like_an_end(blob: bytes, chunk: int) -> None:
    read = decompress(source(blob, chunk))
    with pytest.raises(LayerError):
        read_all(read)
    with pytest.raises(LayerError, match="after a failure"):
        read()


def test_frame_that_needs_a_dictionary_is_refused() -> None:
    samples = [b"sample %d of a dictionary with some text" % number for number in range(2000)]
    dictionary = zstd.train_dict(samples, 4096)
    with pytest.raises(LayerError, match="zstd"):
        inflate(zstd.compress(samples[0] * 9, zstd_dict=dictionary))


@pytest.mark.parametrize("cut", range(1, len(gzipped(b"abc")), 1))
def test_every_cut_of_a_gzip_stream_is_noticed(cut: int) -> None:
    blob = gzipped(b"abc")[:cut]
    if cut < 2:
        assert inflate(blob) == blob  # One byte tells no format: the tar reader refuses it.
        return
    with pytest.raises(LayerError):
        inflate(blob)


@pytest.mark.parametrize("name", [row["name"] for row in FIXTURES["streams"]])
def test_streams_of_the_field(name: str) -> None:
    (row,) = [row for row in FIXTURES["streams"] if row["name"] == name]
    assert inflate(base64.b64decode(row["blob"])) == b"docker"


@pytest.mark.parametrize("row", FIXTURES["layers"], ids=lambda row: row["name"])
def test_whole_stream_gives_the_diff_id(row: dict[str, str]) -> None:
    content = inflate(base64.b64decode(row["blob"]))
    assert f"sha256:{hashlib.sha256(content).hexdigest()}" == row["diff_id"]


@pytest.mark.parametrize(
    "pack",
    [
        pytest.param(gzipped, id="gzip"),
        pytest.param(framed, id="zstd"),
        pytest.param(bytes, id="plain"),
    ],
)
def test_uncompressed_size_is_limited(pack: Callable[[bytes], bytes]) -> None:
    limits = LayerLimits(layer_size=len(TEXT))
    assert inflate(pack(TEXT), limits=limits) == TEXT
    read = decompress(source(pack(TEXT + b"x")), limits)
    with pytest.raises(LayerError, match="larger than"):
        read_all(read)
    with pytest.raises(LayerError, match="after a failure"):
        read()


@pytest.mark.parametrize(
    "pack", [pytest.param(gzipped, id="gzip"), pytest.param(framed, id="zstd")]
)
def test_bombs_take_constant_memory(pack: Callable[[bytes], bytes]) -> None:
    size = 64 << 20
    blob = pack(bytes(size))
    read = decompress(source(blob, 1 << 20))
    total = 0
    tracemalloc.start()
    try:
        while chunk := read():
            assert len(chunk) <= CHUNK
            total += len(chunk)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert total == size
    assert peak < 4 << 20


@pytest.mark.parametrize(
    "member", [pytest.param(gzipped(b"x"), id="gzip"), pytest.param(framed(b"x"), id="zstd")]
)
def test_tiny_members_are_gathered(member: bytes) -> None:
    count = 100_000
    calls = 0
    total = 0
    read = decompress(source(member * count, 1 << 20))
    while chunk := read():
        calls += 1
        total += len(chunk)
    assert total == count
    assert calls < 10


@pytest.mark.parametrize(
    "blob",
    [
        pytest.param(GZIP, id="gzip"),
        pytest.param(ZSTD, id="zstd"),
        pytest.param(TEXT, id="plain"),
    ],
)
def test_errors_of_the_source_pass_through(blob: bytes) -> None:
    pieces = iter([blob[:1000], blob[1000:1500]])

    def read() -> bytes:
        piece = next(pieces, None)
        if piece is None:
            raise UnavailableError("http://registry", 0, "", "cut off")
        return piece

    stream = decompress(read)
    with pytest.raises(UnavailableError):
        read_all(stream)
    with pytest.raises(LayerError, match="after a failure"):
        stream()


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.binary(max_size=2000), min_size=1, max_size=6),
    chunk=st.integers(min_value=1, max_value=700),
    compression=st.sampled_from(["gzip", "zstd"]),
)
def test_any_chunking_gives_the_same_bytes(
    parts: list[bytes], chunk: int, compression: str
) -> None:
    blob = b"".join(gzipped(part) if compression == "gzip" else framed(part) for part in parts)
    assert inflate(blob, chunk) == b"".join(parts)


@settings(max_examples=150, deadline=None)
@given(
    position=st.integers(min_value=0),
    flip=st.integers(min_value=1, max_value=255),
    compression=st.sampled_from(["gzip", "zstd"]),
)
def test_a_changed_byte_is_an_error_or_changes_nothing(
    position: int, flip: int, compression: str
) -> None:
    content = TEXT[:3000]
    blob = bytearray(
        gzipped(content, members=2) if compression == "gzip" else framed(content, options=CHECKSUM)
    )
    # A changed magic number makes another format of the stream: the tar reader's case.
    position = 4 + position % (len(blob) - 4)
    blob[position] ^= flip
    try:
        result = inflate(bytes(blob), chunk=100)
    except LayerError:
        return
    assert result == content
