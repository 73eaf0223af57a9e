from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowray.pipeline.errors import LayerError
from stowray.pipeline.limits import LayerLimits
from stowray.pipeline.tar import TarReader
from stowray.pipeline.tar_entry import FILE, Entry
from tests.support import tars
from tests.support.tars import archive, file, source

if TYPE_CHECKING:
    from pathlib import Path

Segments = list[tuple[int, int]]
PAX_VERSIONS = ["0.0", "0.1", "1.0"]
VERSIONS = ["old", *PAX_VERSIONS]


def sparse(version: str, segments: Segments, real: int, data: bytes, **fields: object) -> bytes:
    if version == "old":
        return tars.old_sparse("holes", segments, real, data, **fields)
    return tars.pax_sparse("holes", version, segments, real, data, **fields)


def expand(entry: Entry, reader: TarReader) -> bytes:
    """Return the content of a sparse file, holes filled."""
    stored = b"".join(reader.data())
    assert entry.sparse is not None
    content = bytearray(entry.size)
    position = 0
    for offset, length in entry.sparse:
        content[offset : offset + length] = stored[position : position + length]
        position += length
    assert position == len(stored)
    return bytes(content)


def read_one(layer: bytes, limits: LayerLimits | None = None) -> tuple[Entry, bytes]:
    """Return the first entry and its content, and see that the entry behind it is read too."""
    reader = TarReader(source(layer), limits or LayerLimits())
    entries = iter(reader)
    entry = next(entries)
    content = expand(entry, reader)
    assert [(after.name, bytes(reader.take() or b"")) for after in entries] == [(b"after", b"!")]
    return entry, content


SHAPES: list[tuple[str, Segments, int]] = [
    ("one hole", [(1024, 512)], 4096),
    ("data at both ends", [(0, 512), (8192, 512)], 8704),
    ("hole at the end", [(0, 512)], 1 << 20),
    ("empty segment marks the end", [(0, 512), (4096, 0)], 4096),
    ("odd last segment", [(512, 512), (2048, 100)], 2148),
    ("all hole", [(8192, 0)], 8192),
    ("four segments", [(n * 1024, 512) for n in range(4)], 4096),
    ("five segments", [(n * 1024, 512) for n in range(5)], 5120),
    ("25 segments", [(n * 1024, 512) for n in range(25)], 25600),
    ("26 segments", [(n * 1024, 512) for n in range(26)], 26624),
    ("300 segments", [(n * 1024, 512) for n in range(300)], 307_200),
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(("segments", "real"), [pytest.param(*s[1:], id=s[0]) for s in SHAPES])
def test_content_is_exact(version: str, segments: Segments, real: int) -> None:
    data = b"".join(bytes([65 + n % 26]) * length for n, (_, length) in enumerate(segments))
    layer = archive(sparse(version, segments, real, data), file("after", b"!"))
    entry, content = read_one(layer)
    assert (entry.name, entry.kind, entry.size) == (b"holes", FILE, real)
    with tarfile.open(fileobj=io.BytesIO(layer)) as judge:
        extracted = judge.extractfile("holes")
        assert extracted is not None
        assert content == extracted.read()


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_is_allocated_for_holes(version: str) -> None:
    (entry,) = list(TarReader(source(archive(sparse(version, [(1 << 36, 1)], 1 << 37, b"x")))))
    assert entry.size == 1 << 37
    assert entry.sparse == [(1 << 36, 1)]


BAD: list[tuple[str, Segments, int, int]] = [
    ("overlap", [(0, 512), (256, 512)], 4096, 1024),
    ("out of order", [(1024, 512), (0, 512)], 4096, 1024),
    ("beyond the end", [(0, 512), (4096, 512)], 4100, 1024),
    ("names more data than there is", [(0, 1024)], 4096, 512),
    ("names less data than there is", [(0, 512)], 4096, 1024),
    ("offset plus length overflows 64 bits", [((1 << 33) - 1, 512)], 512, 512),
]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("segments", "real", "stored"), [pytest.param(*case[1:], id=case[0]) for case in BAD]
)
def test_impossible_maps_are_refused(
    version: str, segments: Segments, real: int, stored: int
) -> None:
    layer = archive(sparse(version, segments, real, bytes(stored)))
    with pytest.raises(LayerError, match="sparse"):
        list(TarReader(source(layer)))


@pytest.mark.parametrize("version", VERSIONS)
def test_segments_are_limited(version: str) -> None:
    segments = [(n * 1024, 512) for n in range(100)]
    layer = archive(sparse(version, segments, 102_400, bytes(51_200)), file("after", b"!"))
    read_one(layer, LayerLimits(sparse_segments=100))
    with pytest.raises(LayerError, match="more than 99 sparse segments"):
        list(TarReader(source(layer), LayerLimits(sparse_segments=99)))


@pytest.mark.parametrize("version", VERSIONS)
def test_claimed_size_counts_as_unpacked(version: str) -> None:
    layer = archive(sparse(version, [(0, 512)], 1 << 30, bytes(512)))
    with pytest.raises(LayerError, match="beyond"):
        list(TarReader(source(layer), LayerLimits(unpacked_size=(1 << 30) - 1)))


def map_1_0(text: bytes, data: bytes = b"", **records: str) -> bytes:
    fields = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "4096"}
    payload = tars.padded(text) + data
    return archive(tars.pax({**fields, **records}) + file("holes", payload))


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(map_1_0(b""), id="no map"),
        pytest.param(map_1_0(b"\0"), id="no count"),
        pytest.param(map_1_0(b"x\n"), id="count is no number"),
        pytest.param(map_1_0(b"-1\n"), id="negative count"),
        pytest.param(map_1_0(b"1\n0\n"), id="one number missing"),
        pytest.param(map_1_0(b"1\n0\n-5\n"), id="negative length"),
        pytest.param(map_1_0(b"1\n 0\n0\n"), id="space in a number"),
        pytest.param(map_1_0(b"1\n+0\n0\n"), id="sign in a number"),
        pytest.param(map_1_0(b"2000000000\n"), id="absurd count"),
        pytest.param(map_1_0(b"1\n" + b"0" * 4000 + b"\n0\n"), id="endless number"),
        pytest.param(map_1_0(b"9" * 600 + b"\n"), id="endless count"),
        pytest.param(map_1_0(b"0\n", **{"GNU.sparse.minor": "7"}), id="unknown minor version"),
        pytest.param(map_1_0(b"0\n", **{"GNU.sparse.major": "2"}), id="unknown major version"),
        pytest.param(map_1_0(b"0\n", **{"GNU.sparse.realsize": "-1"}), id="negative real size"),
        pytest.param(
            archive(tars.pax({"GNU.sparse.major": "0", "GNU.sparse.minor": "1"}) + file("holes")),
            id="0.1 without a map",
        ),
        pytest.param(
            archive(tars.pax({"GNU.sparse.map": "0,1,2"}) + file("holes", b"x")), id="odd map"
        ),
        pytest.param(
            archive(tars.pax({"GNU.sparse.map": "0,x"}) + file("holes")), id="map of words"
        ),
        pytest.param(
            archive(
                tars.pax({"GNU.sparse.map": "0,1", "GNU.sparse.numblocks": "2"})
                + file("holes", b"x")
            ),
            id="another count than the map's",
        ),
        pytest.param(
            archive(tars.pax([("GNU.sparse.numbytes", "1"), ("GNU.sparse.offset", "0")])),
            id="0.0 length before offset",
        ),
        pytest.param(
            archive(tars.pax([("GNU.sparse.offset", "0")]) + file("holes")), id="0.0 half a pair"
        ),
        pytest.param(
            archive(tars.pax([("GNU.sparse.offset", "0,1"), ("GNU.sparse.numbytes", "1")])),
            id="0.0 comma in a number",
        ),
        pytest.param(
            archive(tars.pax({"GNU.sparse.map": "0,0"}) + tars.directory("holes")),
            id="sparse directory",
        ),
        pytest.param(
            archive(tars.header("holes", kind=b"S", patches={483: b"0" * 11})), id="S without GNU"
        ),
        pytest.param(
            archive(tars.old_sparse("holes", [], -1 & 7, b"", mode=0)[:482] + b"\1" + bytes(29)),
            id="checksum of a changed map",
        ),
        pytest.param(
            archive(
                tars.header(
                    "holes",
                    kind=b"S",
                    magic=tars.GNU,
                    patches={483: tars.base256(-512, 12)},
                )
            ),
            id="negative real size in the header",
        ),
        pytest.param(
            tars.header("holes", kind=b"S", magic=tars.GNU, patches={482: b"\1", 483: b"1000"}),
            id="extension block missing",
        ),
    ],
)
def test_broken_maps_are_refused(layer: bytes) -> None:
    with pytest.raises(LayerError):
        list(TarReader(source(layer)))


@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 3)), max_size=30),
    tail=st.integers(0, 5),
    version=st.sampled_from(VERSIONS),
    chunk=st.integers(1, 3000),
)
def test_round_trip(gaps: list[tuple[int, int]], tail: int, version: str, chunk: int) -> None:
    segments: Segments = []
    position = 0
    content = b""
    for number, (gap, blocks) in enumerate(gaps):
        segments.append((position + gap * 512, blocks * 512))
        content += bytes(gap * 512) + bytes([1 + number]) * (blocks * 512)
        position = len(content)
    content += bytes(tail * 512)
    data = b"".join(content[offset : offset + length] for offset, length in segments)
    # A file that is all hole is written as one empty segment at its end.
    segments = segments or [(len(content), 0)]
    reader = TarReader(source(archive(sparse(version, segments, len(content), data)), chunk))
    for entry in reader:
        assert expand(entry, reader) == content


@pytest.mark.skipif(shutil.which("tar") is None, reason="GNU tar is not installed")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--format=gnu"], id="old GNU"),
        pytest.param(["--format=pax", "--sparse-version=0.0"], id="0.0"),
        pytest.param(["--format=pax", "--sparse-version=0.1"], id="0.1"),
        pytest.param(["--format=pax", "--sparse-version=1.0"], id="1.0"),
    ],
)
def test_files_of_gnu_tar(options: list[str], tmp_path: Path) -> None:
    content = bytearray(2_000_000)
    for position in range(0, 2_000_000, 65536):
        content[position : position + 5000] = bytes([position % 251 + 1]) * 5000
    path = tmp_path / "holes"
    with path.open("wb") as handle:
        for position in range(0, len(content), 4096):
            block = content[position : position + 4096]
            if any(block):
                handle.seek(position)
                handle.write(block)
        handle.truncate(len(content))
    (tmp_path / "after").write_bytes(b"!")
    command = ["tar", *options, "-S", "-cf", "-", "holes", "after"]
    layer = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout
    entry, read = read_one(layer)
    assert entry.name == b"holes"
    assert read == content
    assert len(layer) < 1_000_000
