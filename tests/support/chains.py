"""Committed chains of layers in a store, made from tar streams."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from stowray.pipeline.digest import Digest
from stowray.pipeline.snapshot_record import chain_id_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from stowray.pipeline.snapshot import Snapshots
    from stowray.pipeline.snapshot_record import Snapshot


def reader(data: bytes, size: int = 1 << 16) -> Callable[[], bytes]:
    """Return a callable that yields ``data`` in pieces."""
    pieces = iter([data[start : start + size] for start in range(0, len(data), size)])
    return lambda: next(pieces, b"")


class Layer:
    """One layer as a blob, plain tar unless it has a diff ID; counts how often it is opened."""

    def __init__(self, data: bytes, diff_id: str | None = None) -> None:
        self.data = data
        self.diff_id = Digest.of(data) if diff_id is None else Digest(diff_id)
        self.opened = 0

    @contextmanager
    def open_read(self) -> Iterator[Callable[[], bytes]]:
        self.opened += 1
        yield reader(self.data)


def commit_chain(snapshots: Snapshots, layers: Sequence[bytes | Layer]) -> list[Snapshot]:
    """Stage and commit the layers in order; return their snapshots, base first."""
    done: list[Snapshot] = []
    parent: Digest | None = None
    for data in layers:
        layer = data if isinstance(data, Layer) else Layer(data)
        snapshots.stage(layer.diff_id, layer.open_read)
        chain_id = chain_id_of(parent, layer.diff_id)
        done.append(
            snapshots.commit(chain_id, parent, layer.diff_id, layer.diff_id, layer.open_read)
        )
        parent = chain_id
    return done
