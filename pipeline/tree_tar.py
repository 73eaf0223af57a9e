"""A merged tree as one tar stream, for whoever reads tars: owners and devices stay what they are.

Invariant: the stream is POSIX.1-2001 (pax): what the 1988 header cannot hold (long names, times
below a second, attributes, large numbers) is in extended records. The same tree makes the same
bytes. Nothing of it needs rights: a plain user's store keeps owners and devices as notes.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stowray.pipeline.errors import CancelledError, StorageError, escape
from stowray.pipeline.files import write_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.overlay import ChainView
    from stowray.pipeline.overlay_node import Node

BLOCK = 512
# tar(1) reads and writes records of 20 blocks; a shorter last one draws warnings.
RECORD = 20 * BLOCK
_COPY = 1 << 20
_SECOND = 1_000_000_000
_TYPES = {
    stat.S_IFREG: b"0",
    stat.S_IFLNK: b"2",
    stat.S_IFCHR: b"3",
    stat.S_IFBLK: b"4",
    stat.S_IFDIR: b"5",
    stat.S_IFIFO: b"6",
}
_LINK = b"1"
# Largest values of the header's octal fields.
_ID_MOST = 0o7777777
_SIZE_MOST = 0o77777777777


@dataclass(slots=True)
class Written:
    """What went out: entries, bytes of files, bytes in all; ``skipped`` are names of sockets."""

    entries: int = 0
    size: int = 0
    length: int = 0
    skipped: tuple[str, ...] = ()


def write_tar(
    view: ChainView,
    descriptor: int,
    *,
    root: bool = True,
    cancelled: Callable[[], bool] = lambda: False,
) -> Written:
    """Write the tree to an open file or pipe; ``root`` with an entry for the root itself.

    Further names of a file are links to its first one.
    """
    written = Written()
    names: dict[tuple[int, int], bytes] = {}
    for node in view.walk():
        if cancelled():
            raise CancelledError("rootfs")
        if not node.path and not root:
            continue
        kind = _TYPES.get(node.file_type)
        if kind is None:
            written.skipped += (escape(node.path),)
            continue
        target = b""
        if not node.is_directory and node.links > 1:
            first = names.setdefault(node.inode, node.path)
            if first != node.path:
                kind, target = _LINK, first
        if node.is_symlink and kind != _LINK:
            target = view.readlink(node)
        attributes = {} if kind == _LINK else view.xattrs(node)
        head = entry_head(node, kind, target, attributes)
        write_all(descriptor, head)
        written.entries += 1
        written.length += len(head)
        if kind == b"0":
            written.size += node.size
            written.length += _write_content(view, node, descriptor)
    ending = bytes(2 * BLOCK + -(written.length + 2 * BLOCK) % RECORD)
    write_all(descriptor, ending)
    written.length += len(ending)
    return written


def entry_head(node: Node, kind: bytes, target: bytes, attributes: dict[bytes, bytes]) -> bytes:
    """Return the header blocks of one entry, extended records first where they are needed."""
    name = node.path or b"."
    if node.is_directory:
        name += b"/"
    size = node.size if kind == b"0" else 0
    seconds, rest = divmod(node.mtime_ns, _SECOND)
    records: list[tuple[bytes, bytes]] = []
    if len(name) > 100 or not name.isascii():
        records.append((b"path", name))
    if len(target) > 100 or not target.isascii():
        records.append((b"linkpath", target))
    if rest or not 0 <= seconds <= _SIZE_MOST:
        records.append((b"mtime", _time(node.mtime_ns)))
    if size > _SIZE_MOST:
        records.append((b"size", b"%d" % size))
    for key, value in ((b"uid", node.uid), (b"gid", node.gid)):
        if value > _ID_MOST:
            records.append((key, b"%d" % value))
    records += [(b"SCHILY.xattr." + key, value) for key, value in sorted(attributes.items())]
    head = b""
    if records:
        body = b"".join(map(_record, *zip(*records, strict=True)))
        head = _header(b"PaxHeaders/entry", b"x", 0o644, 0, 0, len(body), 0, b"", (0, 0))
        head += body + bytes(-len(body) % BLOCK)
    fields = (
        min(node.uid, _ID_MOST),
        min(node.gid, _ID_MOST),
        min(size, _SIZE_MOST),
        min(max(seconds, 0), _SIZE_MOST),
    )
    device = node.device if kind in (b"3", b"4") else (0, 0)
    return head + _header(name, kind, node.mode, *fields, target, device)


def _header(
    name: bytes,
    kind: bytes,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    mtime: int,
    target: bytes,
    device: tuple[int, int],
) -> bytes:
    parts = [
        name[:100].ljust(100, b"\0"),
        b"%07o\0" % mode,
        b"%07o\0" % uid,
        b"%07o\0" % gid,
        b"%011o\0" % size,
        b"%011o\0" % mtime,
        b" " * 8,
        kind,
        target[:100].ljust(100, b"\0"),
        b"ustar\x0000",
        bytes(64),
        b"%07o\0%07o\0" % device,
    ]
    block = b"".join(parts).ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _record(key: bytes, value: bytes) -> bytes:
    """Return an extended record; its length counts its own digits too."""
    body = b" " + key + b"=" + value + b"\n"
    length = len(body)
    while len(body) + len(str(length)) != length:
        length = len(body) + len(str(length))
    return str(length).encode() + body


def _time(nanoseconds: int) -> bytes:
    """Return decimal seconds with as many digits as there are."""
    sign = "-" if nanoseconds < 0 else ""
    seconds, rest = divmod(abs(nanoseconds), _SECOND)
    return f"{sign}{seconds}.{rest:09d}".rstrip("0").rstrip(".").encode()


def _write_content(view: ChainView, node: Node, descriptor: int) -> int:
    source = view.open(node)
    try:
        left = node.size
        while left:
            data = os.read(source, min(left, _COPY))
            if not data:
                raise StorageError(escape(node.path), "was cut short: run `stowray verify --deep`")
            write_all(descriptor, data)
            left -= len(data)
    finally:
        os.close(source)
    padding = -node.size % BLOCK
    write_all(descriptor, bytes(padding))
    return node.size + padding
