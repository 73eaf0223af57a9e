"""Which bytes of a blob a request asks for (RFC 9110, sections 13.1.5 and 14).

Invariant: what is not understood is answered with the whole blob, which is always right; only a
range that lies outside of the blob is refused.
"""

from __future__ import annotations

import re

from stowray.pipeline.values import dataclass

# More digits than any size has; int() of a huge text takes quadratic time.
_RANGE = re.compile(r"bytes=[ \t]*([0-9]{0,19})-([0-9]{0,19})[ \t]*", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a blob: from ``start``, ``length`` bytes."""

    start: int
    length: int

    def content_range(self, size: int) -> str:
        """Return the value of ``Content-Range`` for this part of ``size`` bytes."""
        return f"bytes {self.start}-{self.start + self.length - 1}/{size}"


class UnsatisfiableRangeError(Exception):
    """The range has no byte of the blob: 416."""


def requested_part(
    range_header: str | None, if_range: str | None, etag: str, size: int
) -> Part | None:
    """Return the part that is asked for, or None for the whole blob.

    Several ranges in one request are answered with the whole blob as well: no client of registries
    reads ``multipart/byteranges``.
    """
    if range_header is None or (if_range is not None and if_range.strip() != etag):
        # If-Range with a date never fits: blobs have no date, and a weak tag is no match there.
        return None
    match = _RANGE.fullmatch(range_header.strip())
    if match is None:
        return None
    first, last = match.groups()
    if first:
        start = int(first)
        end = int(last) if last else size - 1
        if last and end < start:
            return None
        if start >= size:
            raise UnsatisfiableRangeError
        return Part(start, min(end, size - 1) - start + 1)
    if not last:
        return None
    wanted = min(int(last), size)
    if wanted == 0:
        raise UnsatisfiableRangeError
    return Part(size - wanted, wanted)
