"""Stages layers as a pull does: each alone, then settled onto, or staged again above, its chain."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from stowray.pipeline.layer import Staged, stage_layer
from stowray.pipeline.overlay import ChainView
from stowray.pipeline.reconcile import settle
from tests.support.entries import Entry, write_tar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path


def tar_bytes(entries: Iterable[Entry]) -> bytes:
    out = io.BytesIO()
    write_tar(entries, out)
    return out.getvalue()


def reader(data: bytes, size: int = 1 << 16) -> Callable[[], bytes]:
    stream = io.BytesIO(data)
    return lambda: stream.read(size)


def commit(blob: bytes, directory: Path, below: Sequence[Path], *, privileged: bool) -> Staged:
    """Stage a layer at a new ``directory`` above the trees ``below``, topmost first."""
    directory.mkdir()
    staged = stage_layer(reader(blob), directory, privileged=privileged)
    with ChainView(below, privileged) as chain:
        if settle(directory, staged, chain):
            return staged
        directory.rename(directory.with_name(directory.name + ".dropped"))
        directory.mkdir()
        again = stage_layer(reader(blob), directory, privileged=privileged, lower=chain)
        assert again.diff_id == staged.diff_id
        assert not again.notes
        return again


def commit_all(blobs: Iterable[bytes], base: Path, *, privileged: bool) -> list[Path]:
    """Commit layers, base first; return the trees, topmost first."""
    trees: list[Path] = []
    for number, blob in enumerate(blobs):
        tree = base / f"layer{number}"
        commit(blob, tree, trees, privileged=privileged)
        trees.insert(0, tree)
    return trees
