"""Reads the four ways in which GNU tar writes the holes of a file (its manual, "Sparse Formats").

Invariant: the segments that come out lie in order, do not overlap, lie inside the file and hold
together exactly the bytes that the archive stores; nothing is allocated for holes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stowray.pipeline import pax
from stowray.pipeline.errors import LayerError
from stowray.pipeline.ustar import BLOCK, GNU_MAGIC, number

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.limits import LayerLimits

Segments = list[tuple[int, int]]

_FIELD = 12
# Of a number in a 1.0 map: 19 digits and the newline.
_NUMBER_SIZE = 20


def old_gnu(
    header: bytes, read_block: Callable[[], bytes], limits: LayerLimits
) -> tuple[Segments, int]:
    """Return the segments and the real size of an old GNU sparse entry (type ``S``).

    The map goes on in extension blocks behind the header, which its size does not count.
    """
    if header[257:265] != GNU_MAGIC:
        raise LayerError("", "is a sparse file without a GNU header")
    real = number(header[483:495], "real size")
    segments: Segments = []
    _slots(header, 386, 4, segments)
    more = header[482]
    while more:
        block = read_block()
        _slots(block, 0, 21, segments)
        if len(segments) > limits.sparse_segments:
            raise LayerError("", f"has more than {limits.sparse_segments} sparse segments")
        more = block[504]
    return segments, real


def _slots(block: bytes, start: int, count: int, segments: Segments) -> None:
    """Append the used slots of one map; an empty offset or length ends it."""
    for position in range(start, start + count * 2 * _FIELD, 2 * _FIELD):
        middle = position + _FIELD
        if not block[position] or not block[middle]:
            return
        offset = number(block[position:middle], "sparse offset")
        length = number(block[middle : middle + _FIELD], "sparse length")
        segments.append((offset, length))


def pax_map(
    records: dict[bytes, bytes], stored: int, read_block: Callable[[], bytes], limits: LayerLimits
) -> tuple[Segments, int, int] | None:
    """Return the segments, the real size and the bytes that the map took of the data, or None.

    Format 1.0 has its map in front of the data, formats 0.0 and 0.1 have it in the header.
    """
    version = records.get(b"GNU.sparse.major", b""), records.get(b"GNU.sparse.minor", b"")
    if version not in ((b"", b""), (b"0", b"0"), (b"0", b"1"), (b"1", b"0")):
        raise LayerError("", "is a sparse file of an unknown format")
    map_size = 0
    if version == (b"1", b"0"):
        segments, map_size = _map_1_0(stored, read_block, limits)
    elif pax.SPARSE_MAP in records:
        segments = _map_0_1(records[pax.SPARSE_MAP], limits)
        count = records.get(b"GNU.sparse.numblocks")
        if count and pax.integer(count, "number of sparse segments") != len(segments):
            raise LayerError("", "has another number of sparse segments than it says")
    elif version == (b"", b""):
        return None
    else:
        raise LayerError("", "is a sparse file without a map")
    size = records.get(b"GNU.sparse.realsize") or records.get(b"GNU.sparse.size")
    return segments, pax.integer(size, "real size") if size else stored, map_size


def _map_0_1(text: bytes, limits: LayerLimits) -> Segments:
    """Return the segments of a comma-separated map."""
    if text.count(b",") >= 2 * limits.sparse_segments:
        raise LayerError("", f"has more than {limits.sparse_segments} sparse segments")
    return _pairs(text.split(b",")) if text else []


def _map_1_0(
    stored: int, read_block: Callable[[], bytes], limits: LayerLimits
) -> tuple[Segments, int]:
    """Return the segments of a map in front of the data, and the size of its blocks."""
    blocks: list[bytes] = []
    newlines = 0
    wanted = 1
    count = -1
    while newlines < wanted:
        if (len(blocks) + 1) * BLOCK > stored:
            raise LayerError("", "has a sparse map that is cut off")
        block = read_block()
        blocks.append(block)
        newlines += block.count(b"\n")
        if count < 0:
            if not newlines:
                raise LayerError("", "has a sparse map without a count")
            count = pax.integer(block[: block.index(b"\n")], "number of sparse segments")
            if count > limits.sparse_segments:
                raise LayerError("", f"has more than {limits.sparse_segments} sparse segments")
            wanted = 2 * count + 1
        if len(blocks) * BLOCK > (wanted + 1) * _NUMBER_SIZE + BLOCK:
            raise LayerError("", "has a sparse map of numbers that are too long")
    return _pairs(b"".join(blocks).split(b"\n", wanted)[1:wanted]), len(blocks) * BLOCK


def _pairs(numbers: list[bytes]) -> Segments:
    """Return offsets and lengths from the decimal numbers of a map."""
    if len(numbers) % 2:
        raise LayerError("", "has a sparse map with an offset but no length")
    values = [pax.integer(value, "sparse number") for value in numbers]
    return list(zip(values[::2], values[1::2], strict=True))


def check(segments: Segments, real: int, stored: int) -> None:
    """Raise unless the segments are in order, inside the file, and hold ``stored`` bytes."""
    if real < 0:
        raise LayerError("", "has a negative size")
    end = 0
    total = 0
    for offset, length in segments:
        if offset < end or length < 0:
            raise LayerError("", "has sparse segments that overlap or are out of order")
        end = offset + length
        total += length
    if end > real:
        raise LayerError("", "has a sparse segment beyond its end")
    if total != stored:
        raise LayerError("", "stores another number of bytes than its sparse map names")
