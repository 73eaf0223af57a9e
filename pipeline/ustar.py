"""Reads the fields of one 512-byte tar header: v7, ustar, star and GNU.

Invariant: a field either has the one value that Go's archive/tar (and so containerd, podman,
docker) reads from it, or raises; Python's leniency (``int(b" +1_0 ")``) never decides what a
header says.
"""

from __future__ import annotations

import re
from zlib import adler32

from stowray.pipeline.errors import LayerError

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)

POSIX_MAGIC = b"ustar\0"
GNU_MAGIC = b"ustar  \0"
STAR_TRAILER = b"tar\0"

CHECKSUM = slice(148, 156)

INT64 = 1 << 63
_ENDS = b" \0"
# chown(-1) changes nothing (chown(2)), so 2^32-1 is no owner; above it values would be cut short.
OWNER_MAX = 2**32 - 2
# The kernel's dev_t has 12 bits for the major and 20 for the minor number.
MAJOR_MAX = 2**12 - 1
MINOR_MAX = 2**20 - 1

# Leading spaces and NULs, octal digits, spaces; what stands behind a NUL is not looked at.
_OCTAL = re.compile(rb"[ \0]*([0-7]*) *(?:\0.*)?", re.DOTALL)


def number(field: bytes, what: str) -> int:
    """Return the value of a numeric field: octal text, or GNU's signed base-256."""
    if field[0] & 0x80:
        # Two's complement in all bits but the first, which only marks the form.
        width = 8 * len(field) - 1
        value = int.from_bytes(field, "big") & ((1 << width) - 1)
        if value >> (width - 1):
            value -= 1 << width
        if not -INT64 <= value < INT64:
            raise LayerError("", f"has a {what} beyond 64 bits")
        return value
    return octal(field, what)


def octal(field: bytes, what: str) -> int:
    """Return the value of a field of octal text; an empty one is 0."""
    digits = field[:-1]
    if digits.isdigit() and field[-1] in _ENDS:
        try:
            return int(digits, 8)
        except ValueError:
            raise LayerError("", f"has a {what} that is no number") from None
    match = _OCTAL.fullmatch(field)
    if match is None:
        raise LayerError("", f"has a {what} that is no number")
    return int(match[1] or b"0", 8)


def checksum_fits(header: bytes) -> bool:
    """Tell whether the header's checksum is right, summed as unsigned or, as once, signed bytes."""
    field = header[CHECKSUM]
    stored = octal(field, "checksum")
    # The low half of Adler-32 is 1 + the sum modulo 65521, which 512 ASCII bytes do not reach.
    total = (adler32(header) & 0xFFFF) - 1 if header.isascii() else sum(header)
    # The field itself counts as eight spaces.
    unsigned = total - sum(field) + 8 * 0x20
    if stored == unsigned:
        return True
    high = sum(1 for byte in header if byte & 0x80) - sum(1 for byte in field if byte & 0x80)
    return stored == unsigned - 256 * high


def text(header: bytes, start: int, stop: int) -> bytes:
    """Return a text field, which ends at its first NUL or at its full width."""
    end = header.find(b"\0", start, stop)
    return header[start:end] if end >= 0 else header[start:stop]


def prefix(header: bytes) -> bytes:
    """Return what stands before the name field, which only ustar and star headers have."""
    magic = header[257:265]
    if magic.startswith(POSIX_MAGIC):
        star = header[508:512] == STAR_TRAILER
        return text(header, 345, 476 if star else 500)
    if magic == GNU_MAGIC:
        # GNU has access and change time here. Go before 1.8 wrote GNU headers with a ustar prefix;
        # images that hold such layers exist, and containerd reads them this way.
        try:
            number(header[345:357], "access time")
            number(header[357:369], "change time")
        except LayerError:
            found = text(header, 345, 500)
            return found if found.isascii() else b""
    return b""


def owner(value: int, what: str) -> int:
    """Return a user or group ID that chown(2) can set, or raise."""
    if not 0 <= value <= OWNER_MAX:
        raise LayerError("", f"has the {what} {value}, which no file can have")
    return value


def device(header: bytes) -> tuple[int, int]:
    """Return the major and minor number of a device entry."""
    if not header.startswith(b"ustar", 257):
        return 0, 0
    return (number(header[329:337], "major number"), number(header[337:345], "minor number"))


def check_device(major: int, minor: int) -> None:
    """Raise unless Linux can make a device of these numbers; mknod would cut them short."""
    if not 0 <= major <= MAJOR_MAX or not 0 <= minor <= MINOR_MAX:
        raise LayerError("", f"has the device number {major}:{minor}, which Linux does not have")
