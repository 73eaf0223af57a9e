"""Reads PAX extended headers (POSIX pax, "pax Extended Header").

Invariant: work and memory are linear in the size of the header; a record is taken exactly as
written or refused, and numbers and times are exact integers.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from stowray.pipeline import ustar
from stowray.pipeline.errors import LayerError

if TYPE_CHECKING:
    from stowray.pipeline.limits import LayerLimits
    from stowray.pipeline.tar_entry import Entry

SCHILY_XATTR = b"SCHILY.xattr."
LIBARCHIVE_XATTR = b"LIBARCHIVE.xattr."
SPARSE = b"GNU.sparse."
# Format 0.0 repeats the two keys of a pair for each segment; kept joined, as format 0.1 has them.
SPARSE_MAP = b"GNU.sparse.map"
_SPARSE_PAIR = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")

CHARSETS = (b"BINARY", b"ISO-IR 10646 2000 UTF-8")

# A record's length has no more digits than the largest header: longer ones are refused unread.
_LENGTH_DIGITS = 10
# Writers fill numbers up with zeros; nobody needs so many.
_INTEGER = re.compile(rb"[0-9]{1,64}")
_MOST_DIGITS = 64
_INT64 = 1 << 63
_SECOND = 1_000_000_000


def parse(payload: bytes) -> dict[bytes, bytes]:
    """Return the records of one extended header; of equal keys the last one counts."""
    records: dict[bytes, bytes] = {}
    pairs: list[bytes] = []
    position = 0
    while position < len(payload):
        space = payload.find(b" ", position, position + _LENGTH_DIGITS + 1)
        digits = payload[position:space]
        if space < 0 or not digits.isdigit():
            raise LayerError("", "has a PAX record without a length")
        end = position + int(digits)
        if not space < end <= len(payload) or payload[end - 1] != 0x0A:
            raise LayerError("", "has a PAX record that does not end where its length says")
        equals = payload.find(b"=", space + 1, end - 1)
        if equals <= space + 1:
            raise LayerError("", "has a PAX record without a key")
        key = payload[space + 1 : equals]
        value = payload[equals + 1 : end - 1]
        if key in _SPARSE_PAIR:
            if key != _SPARSE_PAIR[len(pairs) % 2] or not _INTEGER.fullmatch(value):
                raise LayerError("", "has a sparse map out of order")
            pairs.append(value)
        elif b"\0" in key:
            raise LayerError("", "has a NUL in the key of a PAX record")
        else:
            records[key] = value
        position = end
    if pairs:
        records[SPARSE_MAP] = b",".join(pairs)
    charset = records.get(b"hdrcharset")
    if charset and charset not in CHARSETS:
        raise LayerError("", "has a PAX header in an unknown character set")
    return records


def merge(entry: Entry, records: dict[bytes, bytes], limits: LayerLimits) -> bool:
    """Apply PAX records to an entry and tell whether some of them make it a sparse file.

    An empty value leaves what the header says (as in Go).
    """
    extended = holes = False
    for key, value in records.items():
        if not value:
            continue
        if key == b"path":
            entry.name = path(value, "name", limits)
        elif key == b"mtime":
            entry.mtime_ns = time_ns(value)
        elif key == b"linkpath":
            entry.linkname = path(value, "link target", limits)
        elif key == b"size":
            entry.size = integer(value, "size")
        elif key == b"uid":
            entry.uid = ustar.owner(integer(value, "user ID"), "user ID")
        elif key == b"gid":
            entry.gid = ustar.owner(integer(value, "group ID"), "group ID")
        elif key == b"SCHILY.devmajor":
            entry.devmajor = integer(value, "major number")
        elif key == b"SCHILY.devminor":
            entry.devminor = integer(value, "minor number")
        elif key.startswith((SCHILY_XATTR, LIBARCHIVE_XATTR)):
            extended = True
        elif key.startswith(SPARSE):
            holes = True
            if key == b"GNU.sparse.name":
                path(value, "name", limits)
    if extended:
        entry.xattrs = xattrs(records, limits)
    return holes


def path(value: bytes, what: str, limits: LayerLimits) -> bytes:
    """Return a name or link target, which no NUL may cut (oracle of differing readers)."""
    if b"\0" in value:
        raise LayerError("", f"has a NUL in its {what}")
    if len(value) > limits.path_size:
        raise LayerError("", f"has a {what} of more than {limits.path_size} bytes")
    return value


def integer(value: bytes, what: str) -> int:
    """Return a decimal number that is not negative and fits 64 bits."""
    if not _INTEGER.fullmatch(value):
        raise LayerError("", f"has a {what} that is no number in its PAX header")
    result = int(value)
    if result >= _INT64:
        raise LayerError("", f"has a {what} beyond 64 bits")
    return result


def time_ns(value: bytes) -> int:
    """Return a PAX time in nanoseconds since the epoch; finer digits are cut off, as Go does."""
    whole, _, fraction = value.partition(b".")
    negative = whole[:1] == b"-"
    digits = whole[1:] if negative else whole
    if (
        not digits.isdigit()
        or len(digits) > _MOST_DIGITS
        or (fraction and not fraction.isdigit())
        or (seconds := int(digits)) >= _INT64
    ):
        raise LayerError("", "has a time that is no number in its PAX header")
    nanoseconds = seconds * _SECOND + (int(fraction[:9].ljust(9, b"0")) if fraction else 0)
    return -nanoseconds if negative else nanoseconds


def xattrs(records: dict[bytes, bytes], limits: LayerLimits) -> dict[bytes, bytes] | None:
    """Return the extended attributes of an entry, or None; star's raw form wins."""
    found: dict[bytes, bytes] = {}
    for key, value in records.items():
        if key.startswith(LIBARCHIVE_XATTR):
            name = unquote_to_bytes(key[len(LIBARCHIVE_XATTR) :])
            found.setdefault(name, _base64(value))
    for key, value in records.items():
        if key.startswith(SCHILY_XATTR):
            found[key[len(SCHILY_XATTR) :]] = value
    for name, value in found.items():
        if not name or b"\0" in name or len(name) > limits.xattr_name_size:
            raise LayerError("", "has an extended attribute with an impossible name")
        if len(value) > limits.xattr_value_size:
            raise LayerError(
                "", f"has an extended attribute of more than {limits.xattr_value_size} bytes"
            )
    return found or None


def _base64(value: bytes) -> bytes:
    """Decode base64, which libarchive writes without padding."""
    try:
        bare = value.rstrip(b"=")
        return base64.b64decode(bare + b"=" * (-len(bare) % 4), validate=True)
    except binascii.Error:
        raise LayerError("", "has an extended attribute that is not base64") from None
