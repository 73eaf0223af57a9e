"""Layers that are made to be read in pieces are ordinary tars to whoever reads them whole."""

from __future__ import annotations

import gzip
import json
import struct
import sys
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.engine import PullOptions
from stowray.pipeline.reference import Reference
from tests.support.registry import FakeRegistry
from tests.support.small import local_engine, small_tar

if TYPE_CHECKING:
    from pathlib import Path

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

FILES = {"a": b"1" * 5000, "dir/b": b"2" * 70_000, "c": b""}


def pieces(tar: bytes) -> list[bytes]:
    return [tar[start : start + 3000] for start in range(0, len(tar), 3000)]


def estargz() -> bytes:
    """One gzip member per piece, the table of contents as a last entry, and a footer.

    The footer is an empty member whose extra field points to the table (stargz-snapshotter,
    docs/estargz.md).
    """
    tar = small_tar({**FILES, "stargz.index.json": json.dumps({"version": 1}).encode()})
    body = b"".join(gzip.compress(piece, mtime=0) for piece in pieces(tar))
    extra = b"SG" + struct.pack("<H", 22) + f"{len(body):016x}STARGZ".encode()
    footer = b"\x1f\x8b\x08\x04" + b"\0" * 4 + b"\0\xff" + struct.pack("<H", len(extra)) + extra
    return body + footer + b"\x01\0\0\xff\xff" + b"\0" * 8


def zstd_chunked() -> bytes:
    """One frame per piece, and manifest and footer in skippable frames (containers/storage)."""
    body = b"".join(zstd.compress(piece) for piece in pieces(small_tar(FILES)))
    manifest, footer = zstd.compress(b'{"version": 1}'), b"\0" * 56 + b"GNUlInUx"
    frames = (struct.pack("<II", 0x184D2A50, len(data)) + data for data in (manifest, footer))
    return body + b"".join(frames)


def tree_of(folder: Path, *layers: bytes, diff_of: bytes) -> dict[str, bytes]:
    from stowray.pipeline.digest import Digest
    from stowray.pipeline.rootfs import write_rootfs

    with FakeRegistry() as registry, local_engine(folder / "store") as engine:
        rootfs = {"type": "layers", "diff_ids": [str(Digest.of(diff_of))]}
        registry.add_image("a/b", "1", layers, config_overrides={"rootfs": rootfs})
        result = engine.pull(Reference.parse(f"{registry.host}/a/b:1"), PullOptions())
        write_rootfs(engine.store, Digest(result.chain_id), folder / "tree")
    found = (folder / "tree").rglob("*")
    return {
        str(path.relative_to(folder / "tree")): path.read_bytes()
        for path in found
        if path.is_file()
    }


def test_estargz_is_read_as_a_tar_with_its_table_of_contents(tmp_path: Path) -> None:
    index = json.dumps({"version": 1}).encode()
    tar = small_tar({**FILES, "stargz.index.json": index})
    found = tree_of(tmp_path, estargz(), diff_of=tar)
    # As in containerd, the table is a file like any other: the diff ID covers it.
    assert found == {**FILES, "stargz.index.json": index}


def test_zstd_chunked_is_read_as_a_tar(tmp_path: Path) -> None:
    assert tree_of(tmp_path, zstd_chunked(), diff_of=small_tar(FILES)) == FILES


@pytest.mark.parametrize("make", [estargz, zstd_chunked])
def test_they_are_what_their_names_say(make) -> None:
    blob = make()
    if make is estargz:
        assert gzip.decompress(blob)[257:262] == b"ustar"
    else:
        assert zstd.decompress(blob)[257:262] == b"ustar"
