"""How a blob is divided into stripes that travel separately.

Invariant: the stripes of a blob are a partition of its bytes. Stripe ``i`` of ``n`` holds every
``n``-th unit, so that the contiguous prefix, which the unpacking follows, grows at the rate of all
stripes together and not of one. A *position* counts the bytes of a stripe from its start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterator

# Checkpoints of an ingest lie at multiples of 8 MiB: a unit is a whole number of them.
SMALL_UNIT: Final = 8 << 20
LARGE_UNIT: Final = 16 << 20
_SMALL_BLOB: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class Stripe:
    """One of ``count`` stripes of a blob of ``size`` bytes, dealt out ``unit`` bytes at a time."""

    size: int
    index: int = 0
    count: int = 1
    unit: int = LARGE_UNIT

    @property
    def length(self) -> int:
        """How many bytes the stripe has."""
        if self.count == 1:
            return self.size
        rounds, rest = divmod(self.size, self.unit * self.count)
        return rounds * self.unit + min(self.unit, max(0, rest - self.index * self.unit))

    def offset(self, position: int) -> int:
        """Return where in the blob the byte at ``position`` of this stripe is."""
        if self.count == 1:
            return position
        number, within = divmod(position, self.unit)
        return (number * self.count + self.index) * self.unit + within

    def position(self, offset: int) -> int:
        """Return how many bytes of this stripe lie before ``offset`` of the blob."""
        if self.count == 1:
            return min(offset, self.size)
        rounds, rest = divmod(min(offset, self.size), self.unit * self.count)
        return rounds * self.unit + min(self.unit, max(0, rest - self.index * self.unit))

    def ranges(self, position: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield ``(start, end)`` in the blob for the positions from ``position`` to ``end``."""
        stop = self.length if end is None else min(end, self.length)
        while position < stop:
            step = stop - position
            if self.count > 1:
                step = min(step, self.unit - position % self.unit)
            start = self.offset(position)
            yield start, start + step
            position += step

    def to_list(self) -> list[int]:
        """Return the fields in their order."""
        return [self.size, self.index, self.count, self.unit]


def divide(size: int, share: int, limit: int) -> tuple[Stripe, ...]:
    """Return the stripes of a blob so that none is much larger than ``share``; at most ``limit``.

    A blob that is not larger than its share stays whole.
    """
    unit = SMALL_UNIT if size < _SMALL_BLOB else LARGE_UNIT
    count = 1 if share <= 0 else -(-size // share)
    # A stripe of less than two units is not worth a stream of its own.
    count = max(1, min(count, limit, size // (2 * unit)))
    return tuple(Stripe(size, index, count, unit) for index in range(count))
