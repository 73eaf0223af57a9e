"""How far each stripe of an arriving blob is, and where it comes from, for other processes.

Invariant: the bytes of a stripe before its position are in the data file of the generation that is
named, and are never rewritten there. The writer voids the positions before it names another
generation or divides the blob in another way. A position counts only together with its complement,
and a name only with its check sum, so that a value caught in the middle of its change is not used.

The file stands beside an ingest's ``state``, and only while a blob comes in stripes: see there for
why it is mapped by readers and written by the writer. A single stripe of the unit ``WHOLE`` tells
that the blob came in stripes and proved wrong, and now comes in one piece.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from typing import TYPE_CHECKING, Final

from stowray.pipeline.stripes import Stripe

if TYPE_CHECKING:
    from pathlib import Path

NAME: Final = "stripes"
_MAGIC: Final = int.from_bytes(b"STOWSTR2", "little")
# Magic, generation, count, unit; then the pace.
_HEADER: Final = struct.Struct("=4Q")
_GENERATION_AT: Final = 8
_PACE: Final = struct.Struct("=d")
_RECORDS_AT: Final = _HEADER.size + _PACE.size
_VOID: Final = (1 << 64) - 1
_MASK: Final = (1 << 64) - 1
# Position and complement; check sum and length of the name, the name.
_POSITION: Final = struct.Struct("=2Q")
_NAME: Final = struct.Struct("=II")
_RECORD: Final = 320
_NAME_LIMIT: Final = _RECORD - _POSITION.size - _NAME.size
# The length that stands for "looks for a source".
_LOOKING: Final = 0xFFFFFFFF
_TORN_LIMIT: Final = 100
STRIPE_LIMIT: Final = 4096
WHOLE: Final = 0


class StripeState:
    """The positions of one ingest; a reader and the writer have one each."""

    def __init__(self, descriptor: int, length: int) -> None:
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, length, access=mmap.ACCESS_READ)
        _, _, count, unit = _HEADER.unpack_from(self._map)
        self.count, self.unit = int(count), int(unit)
        self._told_pace = 0.0

    @classmethod
    def create(cls, directory: Path, generation: int, count: int, unit: int) -> StripeState:
        """Make the file anew for its writer; readers of an older one are told that it is void."""
        path = directory / NAME
        _void(path)
        temporary = directory / f"{NAME}.new"
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o600)
        try:
            nothing = _POSITION.pack(0, _MASK) + _NAME.pack(0, _LOOKING) + bytes(_NAME_LIMIT)
            os.pwrite(descriptor, _HEADER.pack(_MAGIC, generation, count, unit), 0)
            os.pwrite(descriptor, _PACE.pack(0.0), _HEADER.size)
            os.pwrite(descriptor, nothing * count, _RECORDS_AT)
            temporary.rename(path)
            return cls(descriptor, _RECORDS_AT + count * _RECORD)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def follow(cls, directory: Path) -> StripeState | None:
        """Open the file for a reader; None when there is none, or none that can be used."""
        try:
            descriptor = os.open(
                directory / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            )
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            head = os.pread(descriptor, _HEADER.size, 0)
            if len(head) == _HEADER.size:
                magic, _, count, _ = _HEADER.unpack(head)
                length = _RECORDS_AT + min(count, STRIPE_LIMIT + 1) * _RECORD
                if magic == _MAGIC and os.fstat(descriptor).st_size == length:
                    return cls(descriptor, length)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def close(self) -> None:
        """Unmap and close; idempotent."""
        if self._descriptor >= 0:
            self._map.close()
            os.close(self._descriptor)
            self._descriptor = -1

    # -- for readers ------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """Of which generation the positions are; of none that exists when the file is void."""
        return int(_HEADER.unpack_from(self._map)[1])

    def divides(self, stripe: Stripe) -> bool:
        """Tell whether the positions are of stripes like this one."""
        # The unit of a blob in one piece means nothing.
        return self.count == stripe.count and (self.count == 1 or self.unit == stripe.unit)

    @property
    def is_whole(self) -> bool:
        """Whether the blob came in stripes before, and comes in one piece now."""
        return self.count == 1 and self.unit == WHOLE

    def position(self, index: int) -> int:
        """Return how many bytes of a stripe can be read."""
        at = self._record(index)
        for _ in range(_TORN_LIMIT):
            position, complement = _POSITION.unpack_from(self._map, at)
            if complement == position ^ _MASK:
                return int(position)
        return 0  # the writer died in the middle of a change

    def upstream(self, index: int) -> str | None:
        """Return whom a stripe is read from: a node, empty for the origin, None while it looks."""
        at = self._record(index) + _POSITION.size
        for _ in range(_TORN_LIMIT):
            check, length = _NAME.unpack_from(self._map, at)
            if length > _NAME_LIMIT:
                return None
            start = at + _NAME.size
            name = self._map[start : start + length]
            if zlib.crc32(name) == check:
                return name.decode("utf-8", "replace")
        return None

    @property
    def pace(self) -> float:
        """What the node expects of one source, in bytes per second; 0: it does not know yet."""
        return float(_PACE.unpack_from(self._map, _HEADER.size)[0])

    # -- for the writer ---------------------------------------------------------------------------

    def begin(self, generation: int) -> None:
        """Void all positions, then name the new generation."""
        for index in range(self.count):
            self.advance(index, 0)
        os.pwrite(self._descriptor, struct.pack("=Q", generation), _GENERATION_AT)

    def advance(self, index: int, position: int) -> None:
        """Let readers have the stripe's bytes before ``position``."""
        os.pwrite(self._descriptor, _POSITION.pack(position, position ^ _MASK), self._record(index))

    def tell(self, index: int, upstream: str | None) -> None:
        """Tell whom the stripe is read from; see :meth:`upstream`."""
        name = b"" if upstream is None else upstream.encode()
        length = _LOOKING if upstream is None or len(name) > _NAME_LIMIT else len(name)
        data = _NAME.pack(zlib.crc32(name), length) + name[:_NAME_LIMIT]
        os.pwrite(self._descriptor, data, self._record(index) + _POSITION.size)

    def tell_pace(self, pace: float) -> None:
        """Tell what the node expects of one source; see :meth:`pace`."""
        if pace != self._told_pace:
            self._told_pace = pace
            # Eight aligned bytes: no reader sees half of them.
            os.pwrite(self._descriptor, _PACE.pack(pace), _HEADER.size)

    def _record(self, index: int) -> int:
        return _RECORDS_AT + index * _RECORD


def end_showing(directory: Path, generation: int, size: int) -> list[tuple[int, int]]:
    """Remove what an earlier writer left and return the ranges of the blob that it showed."""
    left = StripeState.follow(directory)
    if left is None:
        return []
    try:
        shown: list[tuple[int, int]] = []
        if left.generation == generation and left.unit > 0:
            for index in range(left.count):
                stripe = Stripe(size, index, left.count, left.unit)
                shown += stripe.ranges(0, left.position(index))
    finally:
        left.close()
    _void(directory / NAME)
    (directory / NAME).unlink(missing_ok=True)
    return shown


def are_within(ranges: list[tuple[int, int]], kept: list[tuple[int, int]]) -> bool:
    """Tell whether each byte of ``ranges`` is in one of ``kept``, which are in order."""
    for start, end in ranges:
        at = start
        for left, right in kept:
            if left <= at < right:
                at = right
        if at < end:
            return False
    return True


def _void(path: Path) -> None:
    """Tell those who have the file open that its positions count no more."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.pwrite(descriptor, struct.pack("=Q", _VOID), _GENERATION_AT)
    finally:
        os.close(descriptor)
