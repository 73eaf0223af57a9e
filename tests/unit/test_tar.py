from __future__ import annotations

import base64
import io
import shutil
import subprocess
import tarfile
import tracemalloc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowray.pipeline import tar_entry
from stowray.pipeline.compress import decompress
from stowray.pipeline.errors import LayerError
from stowray.pipeline.limits import LayerLimits
from stowray.pipeline.tar import TarReader
from tests.support import tars
from tests.support.tars import (
    END,
    GNU,
    V7,
    archive,
    base256,
    device,
    directory,
    entry,
    fifo,
    file,
    gnu_long,
    hardlink,
    header,
    padded,
    pax,
    source,
    symlink,
)
from tests.support.vectors import table

if TYPE_CHECKING:
    from pathlib import Path

    from stowray.pipeline.tar_entry import Entry

LIMITS = LayerLimits()
FIELDS = (
    "name",
    "kind",
    "mode",
    "uid",
    "gid",
    "size",
    "mtime_ns",
    "linkname",
    "devmajor",
    "devminor",
    "xattrs",
    "sparse",
)


@dataclass(frozen=True)
class Member:
    """What was read of one entry, with its data."""

    fields: dict[str, Any]
    data: bytes


def members(layer: bytes, chunk: int = 1 << 20, limits: LayerLimits = LIMITS) -> list[Member]:
    """Read everything, taking data whole where the reader has it whole."""
    reader = TarReader(source(layer, chunk), limits)
    found = []
    for item in reader:
        whole = reader.take()
        data = b"".join(reader.data()) if whole is None else bytes(whole)
        found.append(Member({name: getattr(item, name) for name in FIELDS}, data))
    return found


def names(layer: bytes, chunk: int = 1 << 20, limits: LayerLimits = LIMITS) -> list[bytes]:
    """Return the names alone, leaving all data untaken."""
    return [item.name for item in TarReader(source(layer, chunk), limits)]


def only(layer: bytes) -> Entry:
    (item,) = TarReader(source(layer))
    return item


# Entries one by one.


def test_every_kind() -> None:
    layer = archive(
        directory("d", uid=1, gid=2, mtime=3),
        file("d/f", b"content", mode=0o4755),
        hardlink("h", "d/f"),
        symlink("s", "d/f"),
        device("c", 1, 3),
        device("b", 8, 1, kind=b"4"),
        fifo("p"),
    )
    found = [
        (m.fields["name"], m.fields["kind"], m.fields["mode"], m.fields["linkname"], m.data)
        for m in members(layer)
    ]
    assert found == [
        (b"d/", tar_entry.DIRECTORY, 0o755, b"", b""),
        (b"d/f", tar_entry.FILE, 0o4755, b"", b"content"),
        (b"h", tar_entry.HARDLINK, 0o644, b"d/f", b""),
        (b"s", tar_entry.SYMLINK, 0o777, b"d/f", b""),
        (b"c", tar_entry.CHAR_DEVICE, 0o644, b"", b""),
        (b"b", tar_entry.BLOCK_DEVICE, 0o644, b"", b""),
        (b"p", tar_entry.FIFO, 0o644, b"", b""),
    ]
    first, *_, char, block, _ = members(layer)
    assert (first.fields["uid"], first.fields["gid"], first.fields["mtime_ns"]) == (1, 2, 3 * 10**9)
    assert (char.fields["devmajor"], char.fields["devminor"]) == (1, 3)
    assert (block.fields["devmajor"], block.fields["devminor"]) == (8, 1)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        pytest.param(header("f", kind=b"0"), {"kind": tar_entry.FILE}, id="file"),
        pytest.param(header("f", kind=b"\0"), {"kind": tar_entry.FILE}, id="old file"),
        pytest.param(header("d/", kind=b"\0"), {"kind": tar_entry.DIRECTORY}, id="old directory"),
        pytest.param(
            header("d/", kind=b"\0", size=512),
            {"kind": tar_entry.DIRECTORY, "size": 0},
            id="with size",
        ),
        pytest.param(header("f", kind=b"7"), {"kind": tar_entry.FILE}, id="contiguous file"),
        pytest.param(
            header("f/", kind=b"0"), {"kind": tar_entry.FILE, "name": b"f/"}, id="file with /"
        ),
        pytest.param(
            pax({"path": "long/"}) + header("f", kind=b"\0"),
            {"kind": tar_entry.DIRECTORY, "name": b"long/"},
            id="old directory by its PAX path",
        ),
        pytest.param(
            gnu_long("long/") + header("f", kind=b"\0", magic=V7),
            {"kind": tar_entry.DIRECTORY, "name": b"long/"},
            id="old directory by its long name",
        ),
        pytest.param(header("d", kind=b"5", size=99), {"size": 0}, id="directory with size"),
        pytest.param(header("l", kind=b"1", size=99), {"size": 0}, id="hard link with size"),
        pytest.param(header("l", kind=b"2", size=99), {"size": 0}, id="symlink with size"),
        pytest.param(header("l", kind=b"6", size=99), {"size": 0}, id="fifo with size"),
        pytest.param(
            pax({"size": "99"}) + header("l", kind=b"1"), {"size": 0}, id="link with PAX size"
        ),
        pytest.param(header("n" * 100), {"name": b"n" * 100}, id="name of full width"),
        pytest.param(header(b"cut\0off"), {"name": b"cut"}, id="name ends at NUL"),
        pytest.param(
            header("n", kind=b"2", linkname="t" * 100), {"linkname": b"t" * 100}, id="full target"
        ),
        pytest.param(header("f", prefix="p/q"), {"name": b"p/q/f"}, id="prefix"),
        pytest.param(header("f", prefix="p" * 155), {"name": b"p" * 155 + b"/f"}, id="full prefix"),
        pytest.param(header("f", magic=V7, prefix="p"), {"name": b"f"}, id="no prefix in v7"),
        pytest.param(header(b"\xff\xfe"), {"name": b"\xff\xfe"}, id="bytes that are no UTF-8"),
        pytest.param(header("a\nb\\c"), {"name": b"a\nb\\c"}, id="newline and backslash"),
        pytest.param(header("f", mode=0o100644), {"mode": 0o644}, id="type bits in the mode"),
        pytest.param(header("f", uid=base256(70000, 8)), {"uid": 70000}, id="base-256 user"),
        pytest.param(
            header("f", gid=base256(2**32 - 2, 8)), {"gid": 2**32 - 2}, id="largest group"
        ),
        pytest.param(header("f", uid=b"", gid=b" "), {"uid": 0, "gid": 0}, id="empty owners"),
        pytest.param(
            header("f", mtime=base256(-5, 12)), {"mtime_ns": -5 * 10**9}, id="time before 1970"
        ),
        pytest.param(
            header("f", mtime=base256(2**40, 12)),
            {"mtime_ns": 2**40 * 10**9},
            id="time in base-256",
        ),
        pytest.param(header("c", kind=b"3", magic=V7, devmajor=7), {"devmajor": 0}, id="v7 device"),
        pytest.param(
            pax({"SCHILY.devmajor": "10", "SCHILY.devminor": "229"}) + header("c", kind=b"3"),
            {"devmajor": 10, "devminor": 229},
            id="device numbers in PAX",
        ),
        pytest.param(
            pax({"path": "p", "linkpath": "t", "uid": "70000", "gid": "70001"})
            + header("x", kind=b"2", linkname="y", uid=1, gid=1),
            {"name": b"p", "linkname": b"t", "uid": 70000, "gid": 70001},
            id="PAX overrides",
        ),
        pytest.param(
            pax({"path": "", "uid": "", "mtime": ""}) + header("x", uid=1, mtime=2),
            {"name": b"x", "uid": 1, "mtime_ns": 2 * 10**9},
            id="empty PAX values override nothing",
        ),
        pytest.param(
            pax({"mtime": "1700000000.123456789", "atime": "junk", "comment": "x"}) + header("x"),
            {"mtime_ns": 1_700_000_000_123_456_789},
            id="exact PAX time, other keys left alone",
        ),
        pytest.param(
            pax({"SCHILY.xattr.user.k": b"\0\xff\n"}) + header("x"),
            {"xattrs": {b"user.k": b"\0\xff\n"}},
            id="xattr of any bytes",
        ),
        pytest.param(
            pax({"hdrcharset": "BINARY", "path": b"\xff\xfe"}) + header("x"),
            {"name": b"\xff\xfe"},
            id="binary PAX path",
        ),
        pytest.param(
            gnu_long("n" * 300) + gnu_long("t" * 300, b"K") + header("x", kind=b"2", magic=GNU),
            {"name": b"n" * 300, "linkname": b"t" * 300},
            id="GNU long name and target",
        ),
        pytest.param(
            pax({"path": "pax"}) + gnu_long("gnu") + header("x"),
            {"name": b"gnu"},
            id="GNU wins over PAX",
        ),
        pytest.param(
            gnu_long("gnu") + pax({"path": "pax"}) + header("x"),
            {"name": b"gnu"},
            id="GNU wins over PAX in any order",
        ),
        pytest.param(
            gnu_long("one") + gnu_long("two") + header("x"), {"name": b"two"}, id="last long name"
        ),
        pytest.param(
            pax({"path": "one", "uid": "5"}) + pax({"path": "two"}) + header("x"),
            {"name": b"two", "uid": 0},
            id="last PAX header",
        ),
        pytest.param(
            gnu_long(b"cut\0off") + header("x"), {"name": b"cut"}, id="long name ends at NUL"
        ),
        pytest.param(
            pax({"comment": "c", "path": "g", "size": "9"}, kind=b"g") + header("x"),
            {"name": b"x", "size": 0},
            id="global header changes no entry",
        ),
    ],
)
def test_fields(layer: bytes, expected: dict[str, Any]) -> None:
    item = only(archive(layer))
    assert {name: getattr(item, name) for name in expected} == expected


def test_pax_size_says_where_the_next_entry_is() -> None:
    layer = archive(
        pax({"size": "700"}), header("f", size=0), padded(b"x" * 700), file("next", b"y")
    )
    assert [(m.fields["name"], m.data) for m in members(layer)] == [
        (b"f", b"x" * 700),
        (b"next", b"y"),
    ]


def test_sparse_records_without_a_map_leave_a_plain_file() -> None:
    layer = archive(pax({"GNU.sparse.name": "real"}) + file("stand-in", b"data"))
    (found,) = members(layer)
    assert (found.fields["name"], found.fields["sparse"], found.data) == (b"real", None, b"data")


def test_entries_show_what_they_are() -> None:
    assert repr(only(archive(file("näme", b"abc")))) == "<Entry b'n\\xc3\\xa4me' 0 3>"


def test_metadata_speaks_of_one_entry_only() -> None:
    layer = archive(
        gnu_long("g"), pax({"uid": "7", "SCHILY.xattr.user.k": "v"}), file("a"), file("b")
    )
    first, second = TarReader(source(layer))
    assert (first.name, first.uid, first.xattrs) == (b"g", 7, {b"user.k": b"v"})
    assert (second.name, second.uid, second.xattrs) == (b"b", 0, None)


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(header("f", checksum=1), id="checksum"),
        pytest.param(header("f", checksum=b"xxxxxxxx"), id="checksum of letters"),
        pytest.param(header("f", checksum=bytes(8)), id="no checksum"),
        pytest.param(b"g" * 512, id="garbage"),
        pytest.param(header("f", size=base256(-512, 12)), id="negative size"),
        pytest.param(header("f", size=b"-0000001000"), id="minus sign"),
        pytest.param(header("f", size=base256(2**63, 12)), id="size of 2^63"),
        pytest.param(header("f", size=base256(2**62, 12)), id="size of 2^62"),
        pytest.param(header("f", size=b"1_0"), id="size with underscore"),
        pytest.param(header("f", size=b"0000000009\0"), id="size with a 9"),
        pytest.param(header("f", mode=b"rw"), id="mode"),
        pytest.param(header("f", mtime=b"now"), id="time"),
        pytest.param(header("f", uid=base256(-1, 8)), id="user -1"),
        pytest.param(header("f", uid=base256(2**32 - 1, 8)), id="user 2^32-1"),
        pytest.param(header("f", gid=base256(2**32 + 5, 8)), id="group 2^32+5"),
        pytest.param(device("c", 1, base256(2**20, 8)), id="minor 2^20"),
        pytest.param(device("c", base256(-1, 8), 1), id="major -1"),
        pytest.param(device("c", b"x", 1), id="major of letters"),
        pytest.param(header("f", kind=b"Z"), id="unknown type"),
        pytest.param(header("f", kind=b"8"), id="type 8"),
        pytest.param(header("f", kind=b"D", magic=GNU), id="GNU directory dump"),
        pytest.param(header("f", kind=b"M", magic=GNU), id="GNU continued file"),
        pytest.param(header("f", kind=b"V", magic=GNU), id="GNU volume label"),
        pytest.param(header("f", kind=b"\xff"), id="type of a high byte"),
        pytest.param(hardlink("h", "f", size=512) + b"d" * 512, id="hard link with data"),
        pytest.param(directory("d", size=512) + b"d" * 512, id="directory with data"),
        pytest.param(pax({"path": b"a\0b"}) + header("f"), id="NUL in PAX path"),
        pytest.param(pax({"linkpath": b"a\0b"}) + header("f", kind=b"2"), id="NUL in PAX target"),
        pytest.param(pax({"GNU.sparse.name": b"a\0b"}) + header("f"), id="NUL in sparse name"),
        pytest.param(pax({"size": "-512"}) + header("f"), id="negative PAX size"),
        pytest.param(pax({"size": str(2**63)}) + header("f"), id="PAX size of 2^63"),
        pytest.param(pax({"uid": "-1"}) + header("f"), id="PAX user -1"),
        pytest.param(pax({"uid": str(2**32 - 1)}) + header("f"), id="PAX user 2^32-1"),
        pytest.param(pax({"gid": str(2**32 + 5)}) + header("f"), id="PAX group 2^32+5"),
        pytest.param(pax({"mtime": "now"}) + header("f"), id="PAX time"),
        pytest.param(pax(payload=b"7 a=b\n") + header("f"), id="PAX record"),
        pytest.param(pax(payload=b"7 a=b\n", kind=b"g") + header("f"), id="global PAX record"),
        pytest.param(header("x", kind=b"x", size=base256(-1, 12)), id="negative PAX header"),
        pytest.param(header("x", kind=b"L", size=base256(1 << 40, 12)), id="long name of 1 TiB"),
        pytest.param(pax({"path": "p" * 65537}) + header("f"), id="path of 64 KiB and a byte"),
        pytest.param(gnu_long("p" * 65537) + header("f"), id="long name of 64 KiB and a byte"),
        pytest.param(
            pax({"path": "p"}) + pax({}, kind=b"g") + header("f"), id="global header between"
        ),
        pytest.param(pax({"path": "p"}), id="PAX header before the end"),
        pytest.param(gnu_long("n"), id="long name before the end"),
    ],
)
@pytest.mark.parametrize(
    "before", [pytest.param(b"", id="first"), pytest.param(file("a", b"b"), id="later")]
)
def test_odd_headers_are_errors(part: bytes, before: bytes) -> None:
    entries = iter(TarReader(source(archive(before, part))))
    if before:
        assert next(entries).name == b"a"
    with pytest.raises(LayerError):
        list(entries)


def test_errors_name_the_entry() -> None:
    layer = archive(file("fine"), pax({"path": "bad\nname", "SCHILY.xattr.": "v"}) + header("x"))
    with pytest.raises(LayerError) as caught:
        names(layer)
    assert caught.value.entry == "bad\\nname"


# Where an archive ends.


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(b"", id="no bytes"),
        pytest.param(bytes(512), id="one NUL block"),
        pytest.param(bytes(1024), id="two NUL blocks"),
        pytest.param(bytes(10240), id="ten KiB of NULs"),
        pytest.param(bytes(1024) + b"trailing", id="bytes behind the end"),
        pytest.param(bytes(700), id="one NUL block and some NULs"),
        pytest.param(pax({"comment": "c"}, kind=b"g") + END, id="global header alone"),
    ],
)
def test_empty_layers(layer: bytes) -> None:
    assert names(layer) == []


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(b"", id="no end blocks"),
        pytest.param(bytes(512), id="one end block"),
        pytest.param(END, id="two end blocks"),
        pytest.param(bytes(8192), id="record padding"),
        pytest.param(END + b"anything" * 1000, id="bytes behind the end"),
        pytest.param(END + file("hidden"), id="archive behind the end"),
    ],
)
@pytest.mark.parametrize("chunk", [512, 1000, 1 << 20])
def test_ends(end: bytes, chunk: int) -> None:
    layer = archive(file("a", b"data"), file("b"), end=end)
    read = source(layer, chunk)
    total = 0

    def counted() -> bytes:
        nonlocal total
        piece = read()
        total += len(piece)
        return piece

    assert [item.name for item in TarReader(counted)] == [b"a", b"b"]
    assert total == len(layer)


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(file("a") + bytes(512) + file("b") + END, id="members behind one NUL block"),
        pytest.param(bytes(512) + file("b") + END, id="one NUL block first"),
        pytest.param(file("a") + bytes(512) + b"x", id="one byte behind one NUL block"),
        pytest.param(file("a") + header("b")[:100], id="header cut off"),
        pytest.param(file("a") + bytes(100), id="NULs, but no block"),
        pytest.param(b"x", id="one byte"),
        pytest.param(header("a", size=600) + b"x" * 512, id="data cut off at a block"),
        pytest.param(header("a", size=600) + b"x" * 599, id="last byte missing"),
        pytest.param(header("a", size=600), id="no data"),
        pytest.param(pax({"path": "p" * 600})[:700], id="PAX header cut off"),
        pytest.param(pax({"path": "p"})[:-1], id="padding of a PAX header cut off"),
        pytest.param(gnu_long("n" * 600)[:700], id="long name cut off"),
    ],
)
@pytest.mark.parametrize("chunk", [100, 1 << 20])
def test_what_is_cut_off_is_an_error(layer: bytes, chunk: int) -> None:
    with pytest.raises(LayerError):
        names(layer, chunk)
    with pytest.raises(LayerError):
        members(layer, chunk)


@pytest.mark.parametrize("missing", [1, 100, 412])
def test_padding_of_the_last_data_may_be_missing(missing: int) -> None:
    layer = file("a", b"x" * 100)[:-missing]
    assert [m.data for m in members(layer)] == [b"x" * 100]
    assert names(layer, chunk=50) == [b"a"]


# Data.


def test_views_show_the_chunk_itself() -> None:
    layer = archive(file("a", b"abc"), file("empty"), file("b", b"x" * 5000))
    reader = TarReader(source(layer))
    views = [reader.take() for _ in reader]
    assert [view is not None and view.obj is layer for view in views] == [True, True, True]
    assert [bytes(view or b"") for view in views] == [b"abc", b"", b"x" * 5000]


def test_data_in_pieces() -> None:
    layer = archive(file("big", b"0123456789" * 500), file("after", b"!"))
    reader = TarReader(source(layer, 1024))
    entries = iter(reader)
    assert next(entries).size == 5000
    assert reader.take() is None
    pieces = [bytes(piece) for piece in reader.data()]
    assert b"".join(pieces) == b"0123456789" * 500
    assert [len(piece) for piece in pieces] == [512, 1024, 1024, 1024, 1024, 392]
    assert list(reader.data()) == []
    assert next(entries).name == b"after"
    assert bytes(reader.take() or b"") == b"!"


def test_data_that_begins_with_a_chunk_is_taken_whole() -> None:
    layer = archive(file("a", b"abc"))
    pieces = iter([layer[:512], layer[512:]])
    reader = TarReader(lambda: next(pieces, b""))
    assert [bytes(reader.take() or b"") for _ in reader] == [b"abc"]


def test_data_left_halfway_is_skipped() -> None:
    layer = archive(file("a", b"x" * 3000), file("b", b"y" * 3000), file("c"))
    found = []
    reader = TarReader(source(layer, 700))
    for item in reader:
        found.append(item.name)
        for piece in reader.data():
            assert piece
            break
    assert found == [b"a", b"b", b"c"]


def test_drain_reads_to_the_end() -> None:
    layer = archive(file("a", b"x" * 3000), file("b"))
    read = source(layer, 700)
    reader = TarReader(read)
    assert next(iter(reader)).name == b"a"
    reader.drain()
    assert read() == b""
    assert reader.offset == len(layer)


# Limits.


def test_entries_are_limited() -> None:
    layer = archive(*[file(f"f{n}") for n in range(10)])
    assert len(names(layer, limits=LayerLimits(entries=10))) == 10
    with pytest.raises(LayerError, match="more than 9 entries"):
        names(layer, limits=LayerLimits(entries=9))


def test_unpacked_size_is_limited() -> None:
    layer = archive(file("a", b"x" * 600), file("b", b"x" * 400))
    assert len(names(layer, limits=LayerLimits(unpacked_size=1000))) == 2
    with pytest.raises(LayerError, match="beyond 999 bytes"):
        names(layer, limits=LayerLimits(unpacked_size=999))


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(gnu_long("n"), id="long names"),
        pytest.param(pax({"path": "p"}), id="PAX"),
        pytest.param(pax({"path": "p"}, kind=b"g"), id="global"),
    ],
)
def test_chains_of_metadata_are_limited(part: bytes) -> None:
    assert len(names(archive(part * 8, file("f")))) == 1
    with pytest.raises(LayerError, match="more than 8 headers"):
        names(archive(part * 9, file("f")))
    with pytest.raises(LayerError, match="more than 8 headers"):
        names(archive(part * 5000, file("f")))


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_metadata_is_limited_and_refused_unread(kind: bytes) -> None:
    size = (1 << 20) + 1
    asked = 0

    def read() -> bytes:
        nonlocal asked
        asked += 1
        return header("x", kind=kind, size=size) if asked == 1 else b"n" * 512

    with pytest.raises(LayerError, match=f"header of {size} bytes"):
        list(TarReader(read))
    assert asked == 1


def test_memory_is_bounded_by_the_chunk() -> None:
    """Neither entries nor their data pile up."""

    def stream() -> Any:
        for number in range(4_000):
            yield file(f"f{number}", b"x" * 700, mtime=number)
        yield END

    pieces = stream()
    reader = TarReader(lambda: next(pieces, b""))
    tracemalloc.start()
    try:
        count = sum(1 for _ in reader)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 4_000
    assert peak < 1 << 20


# Against other writers and readers.


@pytest.mark.parametrize("row", table("fixtures")["layers"], ids=lambda row: row["name"])
def test_layers_of_the_field(row: dict[str, Any]) -> None:
    read = decompress(source(base64.b64decode(row["blob"])))
    found = [item.name.rstrip(b"/").decode() for item in TarReader(read)]
    assert found == row["members"]


FORMATS = {
    "ustar": tarfile.USTAR_FORMAT,
    "gnu": tarfile.GNU_FORMAT,
    "pax": tarfile.PAX_FORMAT,
}
TYPES = [
    tarfile.REGTYPE,
    tarfile.DIRTYPE,
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.FIFOTYPE,
]
PARTS = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=40)
PATHS = st.lists(PARTS, min_size=1, max_size=8).map("/".join)


@st.composite
def tarinfos(draw: st.DrawFn) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(draw(PATHS))
    info.type = draw(st.sampled_from(TYPES))
    info.mode = draw(st.integers(0, 0o7777))
    info.uid = draw(st.one_of(st.integers(0, 2000), st.integers(0, 2**32 - 2)))
    info.gid = draw(st.integers(0, 2000))
    info.mtime = draw(st.integers(0, 2**33 - 1))
    data = draw(st.binary(max_size=1500)) if info.type == tarfile.REGTYPE else b""
    info.size = len(data)
    if info.type in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        info.linkname = draw(PATHS)
    if info.type == tarfile.CHRTYPE:
        info.devmajor, info.devminor = draw(st.integers(0, 4095)), draw(st.integers(0, 2**20 - 1))
    return info, data


@settings(max_examples=120, deadline=None)
@given(
    infos=st.lists(tarinfos(), max_size=5),
    form=st.sampled_from(sorted(FORMATS)),
    chunk=st.integers(1, 2500),
)
def test_archives_of_tarfile(
    infos: list[tuple[tarfile.TarInfo, bytes]], form: str, chunk: int
) -> None:
    buffer = io.BytesIO()
    expected = []
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[form]) as writer:
        for info, data in infos:
            try:
                writer.addfile(info, io.BytesIO(data))
            except ValueError:
                continue  # ustar cannot hold this name or number.
            name = info.name + ("/" if info.isdir() else "")
            expected.append(
                (
                    name.encode(),
                    info.type,
                    info.mode,
                    info.uid,
                    info.gid,
                    info.mtime * 10**9,
                    info.linkname.encode(),
                    info.devmajor,
                    info.devminor,
                    data,
                )
            )
    found = [
        (
            m.fields["name"],
            bytes([m.fields["kind"]]),
            m.fields["mode"],
            m.fields["uid"],
            m.fields["gid"],
            m.fields["mtime_ns"],
            m.fields["linkname"],
            m.fields["devmajor"],
            m.fields["devminor"],
            m.data,
        )
        for m in members(buffer.getvalue(), chunk)
    ]
    assert found == expected


@pytest.mark.skipif(shutil.which("tar") is None, reason="GNU tar is not installed")
@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_archives_of_gnu_tar(form: str, tmp_path: Path) -> None:
    long = "/".join(["component-of-a-long-path"] * (3 if form == "v7" else 6))
    (tmp_path / long).mkdir(parents=True)
    (tmp_path / long / "file").write_bytes(b"x" * 1000)
    (tmp_path / "näme").write_bytes(b"")
    (tmp_path / "link").symlink_to("näme")
    (tmp_path / "hard").hardlink_to(tmp_path / "näme")
    tree = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    command = ["tar", f"--format={form}", "--no-recursion", "-cf", "-", *tree]
    layer = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout
    listed = subprocess.run(
        ["tar", "--quoting-style=literal", "-tf", "-"], input=layer, check=True, capture_output=True
    ).stdout
    assert names(layer) == listed.splitlines()
    by_name = {m.fields["name"]: m for m in members(layer, chunk=777)}
    assert by_name[f"{long}/file".encode()].data == b"x" * 1000
    assert by_name[b"link"].fields["linkname"] == "näme".encode()
    file_time = (tmp_path / long / "file").stat().st_mtime_ns
    read_time = by_name[f"{long}/file".encode()].fields["mtime_ns"]
    assert read_time == (file_time if form == "posix" else file_time // 10**9 * 10**9)


# Damage and chunks.

SAMPLE = archive(
    directory("d", mtime=1_700_000_000),
    file("d/f", b"x" * 700),
    pax({"path": "p" * 200, "mtime": "1.5", "SCHILY.xattr.user.k": "v"}) + file("short", b"y"),
    gnu_long("n" * 200) + header("n", magic=GNU),
    symlink("s", "d/f"),
    tars.old_sparse("holes", [(n * 1024, 512) for n in range(6)], 6144, b"z" * 3072),
    tars.pax_sparse("more", "1.0", [(512, 512)], 2048, b"z" * 512),
    entry("näme", b"data"),
)
EXPECTED = members(SAMPLE)


def header_offsets() -> list[int]:
    """Return where the sample's headers begin, told by their magic."""
    return [at for at in range(0, len(SAMPLE), 512) if SAMPLE[at + 257 : at + 262] == b"ustar"]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=30))
def test_any_chunking_gives_the_same_entries(sizes: list[int]) -> None:
    pieces = []
    position = 0
    while position < len(SAMPLE):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(SAMPLE[position : position + size])
        position += size
    stream = iter(pieces)
    reader = TarReader(lambda: next(stream, b""))
    found = []
    for item in reader:
        data = b"".join(reader.data())
        found.append(Member({name: getattr(item, name) for name in FIELDS}, data))
    assert found == EXPECTED


@settings(max_examples=300, deadline=None)
@given(
    at=st.sampled_from(header_offsets()),
    inside=st.integers(0, 511),
    flip=st.integers(1, 255),
)
def test_a_changed_header_is_an_error_or_changes_nothing(at: int, inside: int, flip: int) -> None:
    changed = bytearray(SAMPLE)
    changed[at + inside] ^= flip
    try:
        found = members(bytes(changed))
    except LayerError:
        return
    assert found == EXPECTED


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damage_never_shows_as_another_error(data: st.DataObject) -> None:
    changed = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(changed) - 1))
        changed[position] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(changed)), st.integers(0, len(changed))))
    try:
        members(bytes(changed[:cut]), chunk=data.draw(st.sampled_from([100, 5000, 1 << 20])))
    except LayerError:
        return


@settings(max_examples=200, deadline=None)
@given(
    fields=st.dictionaries(
        st.sampled_from(["mode", "uid", "gid", "size", "mtime", "devmajor", "devminor"]),
        st.binary(max_size=8),
    ),
    kind=st.binary(min_size=1, max_size=1),
    magic=st.sampled_from([tars.POSIX, GNU, V7]),
    patch=st.binary(max_size=160),
    records=st.lists(
        st.tuples(
            st.sampled_from(
                ["path", "size", "uid", "mtime", "GNU.sparse.map", "GNU.sparse.major", "hdrcharset"]
            ),
            st.binary(max_size=20),
        ),
        max_size=3,
    ),
)
def test_headers_of_nonsense_are_read_or_refused(
    fields: dict[str, Any],
    kind: bytes,
    magic: bytes,
    patch: bytes,
    records: list[tuple[str, bytes]],
) -> None:
    part = header("x", kind=kind, magic=magic, patches={345: patch}, **fields)
    for layer in (archive(part), archive(pax(records), part), archive(part, bytes(4096))):
        try:
            found = members(layer)
        except LayerError:
            continue
        for member in found:
            assert 0 <= member.fields["size"] < 2**63
            assert 0 <= member.fields["uid"] <= 2**32 - 2
            assert tar_entry.FILE <= member.fields["kind"] <= tar_entry.FIFO
