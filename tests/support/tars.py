"""A small tar writer that says exactly what it is told, odd headers included.

``archive(directory("d"), file("d/f", b"data"))`` is the plain use; ``header`` takes raw field
values (numbers are octal unless given as bytes), ``pax``/``gnu_long`` write the metadata headers
that stand in front of an entry, and ``old_sparse``/``pax_sparse`` the four sparse formats.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

BLOCK = 512
END = bytes(2 * BLOCK)
POSIX = b"ustar\x0000"
GNU = b"ustar  \0"
V7 = bytes(8)

Text = str | bytes
Number = int | bytes


def raw(text: Text) -> bytes:
    """Return names as the bytes that the archive holds."""
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")


def octal(value: Number, width: int) -> bytes:
    """Return a number as zero-filled octal and a NUL; bytes stand as they are, NUL-filled."""
    if isinstance(value, bytes):
        if len(value) > width:
            raise ValueError(f"{value!r} is wider than {width}")
        return value.ljust(width, b"\0")
    digits = b"%0*o" % (width - 1, value)
    if value < 0 or len(digits) >= width:
        raise ValueError(f"{value} does not fit {width} bytes of octal: use base256")
    return digits + b"\0"


def base256(value: int, width: int) -> bytes:
    """Return a number in GNU's signed base-256 form."""
    encoded = bytearray(value.to_bytes(width, "big", signed=True))
    encoded[0] |= 0x80
    return bytes(encoded)


def wide(value: int, width: int) -> bytes:
    """Return a number as octal, or in base-256 where octal cannot hold it, as GNU tar does."""
    return octal(value, width) if 0 <= value < 8 ** (width - 1) else base256(value, width)


def _field(value: Text, width: int) -> bytes:
    encoded = raw(value)
    if len(encoded) > width:
        raise ValueError(f"{encoded!r} is wider than {width}: write it with pax or gnu_long")
    return encoded.ljust(width, b"\0")


def header(
    name: Text = b"",
    *,
    kind: Text = b"0",
    mode: Number = 0o644,
    uid: Number = 0,
    gid: Number = 0,
    size: Number = 0,
    mtime: Number = 0,
    linkname: Text = b"",
    magic: bytes = POSIX,
    uname: Text = b"",
    gname: Text = b"",
    devmajor: Number = b"",
    devminor: Number = b"",
    prefix: Text = b"",
    checksum: Number | None = None,
    patches: Mapping[int, bytes] | None = None,
) -> bytes:
    """Return one header; ``patches`` overwrite bytes at offsets before the checksum is taken.

    ``checksum`` overrides the right one: a number, or the eight raw bytes.
    """
    block = bytearray(
        _field(name, 100)
        + octal(mode, 8)
        + octal(uid, 8)
        + octal(gid, 8)
        + octal(size, 12)
        + octal(mtime, 12)
        + b" " * 8
        + raw(kind)
        + _field(linkname, 100)
        + magic
        + _field(uname, 32)
        + _field(gname, 32)
        + octal(devmajor, 8)
        + octal(devminor, 8)
        + _field(prefix, 155)
    ).ljust(BLOCK, b"\0")
    for offset, patch in (patches or {}).items():
        block[offset : offset + len(patch)] = patch
    if len(block) != BLOCK:
        raise ValueError("a patch reaches beyond the header")
    value = sum(block) if checksum is None else checksum
    block[148:156] = value if isinstance(value, bytes) else b"%06o\0 " % value
    return bytes(block)


def padded(data: bytes) -> bytes:
    """Return data filled up to whole blocks."""
    return data + bytes(-len(data) % BLOCK)


def record(key: Text, value: Text) -> bytes:
    """Return one PAX record with its right length."""
    body = b" " + raw(key) + b"=" + raw(value) + b"\n"
    length = len(body)
    while length != len(body) + len(str(length)):
        length = len(body) + len(str(length))
    return str(length).encode() + body


def pax(
    records: Mapping[str, Text] | Iterable[tuple[Text, Text]] = (),
    *,
    payload: bytes | None = None,
    kind: bytes = b"x",
) -> bytes:
    """Return a PAX header; ``payload`` replaces the records by raw bytes, ``kind`` g is global."""
    if payload is None:
        pairs = records.items() if hasattr(records, "items") else records
        payload = b"".join(record(key, value) for key, value in pairs)
    return header("PaxHeaders/x", kind=kind, size=len(payload)) + padded(payload)


def gnu_long(name: Text, kind: bytes = b"L") -> bytes:
    """Return a GNU long-name header (kind L), or a long link target (kind K)."""
    payload = raw(name) + b"\0"
    return header("././@LongLink", kind=kind, size=len(payload), magic=GNU) + padded(payload)


def entry(
    name: Text,
    data: bytes = b"",
    *,
    records: Mapping[str, Text] | None = None,
    linkname: Text = b"",
    **fields: object,
) -> bytes:
    """Return an entry with its data; names and targets that are too long become PAX records."""
    extended: dict[str, Text] = dict(records or {})
    name, linkname = raw(name), raw(linkname)
    if len(name) > 100:
        extended.setdefault("path", name)
        name = name[:100]
    if len(linkname) > 100:
        extended.setdefault("linkpath", linkname)
        linkname = linkname[:100]
    fields.setdefault("size", len(data))
    head = header(name, linkname=linkname, **fields)  # type: ignore[arg-type]
    return (pax(extended) if extended else b"") + head + padded(data)


def file(name: Text, data: bytes = b"", **fields: object) -> bytes:
    """Return a regular file."""
    return entry(name, data, **fields)  # type: ignore[arg-type]


def directory(name: Text, **fields: object) -> bytes:
    """Return a directory, its name with the customary slash."""
    fields.setdefault("mode", 0o755)
    encoded = raw(name)
    encoded = encoded if encoded.endswith(b"/") else encoded + b"/"
    return entry(encoded, kind=b"5", **fields)  # type: ignore[arg-type]


def symlink(name: Text, target: Text, **fields: object) -> bytes:
    """Return a symbolic link."""
    fields.setdefault("mode", 0o777)
    return entry(name, linkname=target, kind=b"2", **fields)  # type: ignore[arg-type]


def hardlink(name: Text, target: Text, **fields: object) -> bytes:
    """Return a hard link to an earlier name."""
    return entry(name, linkname=target, kind=b"1", **fields)  # type: ignore[arg-type]


def fifo(name: Text, **fields: object) -> bytes:
    """Return a fifo."""
    return entry(name, kind=b"6", **fields)  # type: ignore[arg-type]


def device(name: Text, major: Number, minor: Number, kind: bytes = b"3", **fields: object) -> bytes:
    """Return a character device (kind 3) or block device (kind 4)."""
    return entry(name, kind=kind, devmajor=major, devminor=minor, **fields)  # type: ignore[arg-type]


def whiteout(name: str) -> bytes:
    """Return the whiteout of ``name``."""
    parent, slash, last = name.rpartition("/")
    return file(f"{parent}{slash}.wh.{last}")


def opaque(name: str) -> bytes:
    """Return the opaque marker of the directory ``name`` ("" for the root)."""
    return file(f"{name}/.wh..wh..opq" if name else ".wh..wh..opq")


def old_sparse(
    name: Text,
    segments: list[tuple[int, int]],
    real: int,
    data: bytes,
    **fields: object,
) -> bytes:
    """Return an old GNU sparse entry, with extension blocks when four segments do not do."""
    slots = [wide(offset, 12) + wide(length, 12) for offset, length in segments]
    rest = [slots[start : start + 21] for start in range(4, len(slots), 21)]
    patches = {386: b"".join(slots[:4]), 482: bytes([bool(rest)]), 483: wide(real, 12)}
    fields.setdefault("size", len(data))
    head = header(name, kind=b"S", magic=GNU, patches=patches, **fields)  # type: ignore[arg-type]
    blocks = [
        b"".join(part).ljust(504, b"\0") + bytes([index < len(rest) - 1]) + bytes(7)
        for index, part in enumerate(rest)
    ]
    return head + b"".join(blocks) + padded(data)


def pax_sparse(
    name: Text,
    version: str,
    segments: list[tuple[int, int]],
    real: int,
    data: bytes,
    **fields: object,
) -> bytes:
    """Return a sparse entry of PAX format ``0.0``, ``0.1`` or ``1.0``."""
    numbers = [str(number) for segment in segments for number in segment]
    records: list[tuple[Text, Text]]
    if version == "0.0":
        records = [("GNU.sparse.size", str(real)), ("GNU.sparse.numblocks", str(len(segments)))]
        for offset, length in segments:
            records += [("GNU.sparse.offset", str(offset)), ("GNU.sparse.numbytes", str(length))]
    elif version == "0.1":
        records = [
            ("GNU.sparse.size", str(real)),
            ("GNU.sparse.numblocks", str(len(segments))),
            ("GNU.sparse.map", ",".join(numbers)),
            ("GNU.sparse.name", name),
        ]
    else:
        records = [
            ("GNU.sparse.major", "1"),
            ("GNU.sparse.minor", "0"),
            ("GNU.sparse.name", name),
            ("GNU.sparse.realsize", str(real)),
        ]
        data = padded("".join(f"{n}\n" for n in [str(len(segments)), *numbers]).encode()) + data
    stand_in = name if version == "0.0" else "GNUSparseFile.0/x"
    return pax(records) + file(stand_in, data, **fields)


def archive(*parts: bytes, end: bytes = END) -> bytes:
    """Return a whole archive; ``end`` replaces the two NUL blocks."""
    return b"".join(parts) + end


def source(data: bytes, chunk: int = 256 << 10) -> Callable[[], bytes]:
    """Return a ``read`` that answers ``data`` in chunks and then ``b""``."""
    pieces = iter([data[start : start + chunk] for start in range(0, len(data), chunk)])
    return lambda: next(pieces, b"")


def gzipped(data: bytes, members: int = 1, level: int = 6) -> bytes:
    """Return ``data`` as so many gzip members."""
    size = max(1, -(-len(data) // members))
    starts = range(0, max(len(data), 1), size)
    return b"".join(zlib.compress(data[start : start + size], level, 31) for start in starts)
