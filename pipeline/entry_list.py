"""The entry list beside a layer tree: what a plain user's files cannot say about themselves.

Invariant: tree plus list describe each entry exactly as the layer has it. A name without a record
is owned by ``OWNER`` and is what it looks like; owners, devices, modes that would lock the user
out of his own tree, and attributes that he may not set are records. The list is written once,
complete, before the tree is published.
"""

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

from stowray.pipeline.errors import StorageError
from stowray.pipeline.files import replace_file, translated

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

VERSION = 1
OWNER = (0, 0)
SUFFIX = ".entries"
_LONGEST_ARRAY = 16
_MOST_ATTRIBUTES = 1 << 20


class Record(NamedTuple):
    """The exact attributes of one entry; ``file_type`` holds the ``S_IFMT`` bits."""

    file_type: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    device: tuple[int, int]
    xattrs: dict[bytes, bytes]


def entry_list_path(tree: Path) -> Path:
    """Return where the entry list of ``tree`` lies: beside it, so that both move together."""
    return tree.with_name(tree.name + SUFFIX)


def write_entry_list(tree: Path, records: Iterable[tuple[bytes, Record]]) -> None:
    """Write the list of ``tree`` in one step."""
    import msgpack

    packer = msgpack.Packer(use_bin_type=True)
    body = b"".join(
        packer.pack([path, *record[:4], _nanoseconds(record.mtime_ns), *record[5:]])
        for path, record in records
    )
    header = packer.pack({"version": VERSION, "crc32": zlib.crc32(body), "size": len(body)})
    path = entry_list_path(tree)
    with translated(path, "write the entry list of a layer"):
        replace_file(path, header + body)


def read_entry_list(tree: Path) -> dict[bytes, Record]:
    """Return the records of ``tree`` by path; a tree that needs none has no list."""
    import msgpack

    path = entry_list_path(tree)
    records: dict[bytes, Record] = {}
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return records
    except OSError as error:
        raise StorageError(str(path), f"cannot be read: {error.strerror}") from error
    try:
        with open(descriptor, "rb") as stream:
            data = stream.read()
    except OSError as error:
        raise StorageError(str(path), f"cannot be read: {error.strerror}") from error
    # Without bounds of their own a damaged length has as much memory asked for as it says.
    unpacker = msgpack.Unpacker(
        raw=False,
        max_buffer_size=0,
        strict_map_key=False,
        use_list=False,
        max_array_len=_LONGEST_ARRAY,
        max_map_len=_MOST_ATTRIBUTES,
        max_str_len=len(data),
        max_bin_len=len(data),
        max_ext_len=0,
    )
    unpacker.feed(data)
    try:
        header: Any = unpacker.unpack()
        body = data[unpacker.tell() :]
        if not isinstance(header, dict) or header.get("version") != VERSION:
            raise StorageError(str(path), "written by another version: pull the image again")
        if (header.get("crc32"), header.get("size")) != (zlib.crc32(body), len(body)):
            raise StorageError(str(path), "damaged: pull the image again")
        for name, file_type, mode, uid, gid, mtime, device, xattrs in unpacker:
            records[name] = Record(
                file_type, mode, uid, gid, int(mtime), (device[0], device[1]), xattrs
            )
    except (msgpack.UnpackException, ValueError, TypeError, LookupError) as error:
        raise StorageError(str(path), f"damaged: {error}; pull the image again") from error
    return records


def _nanoseconds(value: int) -> int | str:
    # msgpack holds 64 bits; a time outside of them (which no disk stores either) goes as text.
    return value if -(1 << 63) <= value < 1 << 64 else str(value)
