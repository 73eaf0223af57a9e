"""Stages one layer: its stored bytes become a private tree in overlay format, and a diff ID.

Invariant: three threads share the work on the same chunks (read and decompress, hash, apply), with
bounded queues between them; the diff ID covers every byte of the uncompressed stream, also those
behind the end of the tar. Whatever fails, all threads have ended when the call returns, and what
``read`` raises passes through unchanged.
"""

from __future__ import annotations

import errno
from dataclasses import field
from typing import TYPE_CHECKING, Any

from stowray.pipeline.apply import LayerApplier
from stowray.pipeline.chunks import ChunkPump
from stowray.pipeline.entry_list import write_entry_list
from stowray.pipeline.errors import LayerError, escape
from stowray.pipeline.files import storage_error
from stowray.pipeline.limits import DEFAULT_LIMITS, LayerLimits
from stowray.pipeline.notes import below_notes, make_notes
from stowray.pipeline.staged_tree import PHANTOM, DependsOnBelowError
from stowray.pipeline.tar import TarReader
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.overlay import ChainView


@dataclass(frozen=True, slots=True)
class Staged:
    """What is known of a staged layer; ``notes`` empty: it is the same whatever lies below.

    ``notes`` are JSON values for ``reconcile.settle``. ``warnings`` are sentences for the user.
    """

    diff_id: Digest
    tar_size: int
    unpacked_size: int
    entries: int
    notes: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def stage_layer(
    read: Callable[[], bytes],
    directory: Path,
    *,
    limits: LayerLimits = DEFAULT_LIMITS,
    privileged: bool,
    lower: ChainView | None = None,
    reserve: int = 0,
    report: Callable[[int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    interrupt: Callable[[], None] | None = None,
    algorithm: str = "sha256",
) -> Staged:
    """Apply the layer that ``read`` yields (compressed or not) to the empty ``directory``.

    Without ``lower`` nothing is known of what lies below, and what is assumed is noted for
    ``reconcile.settle``; with it, the tree is exactly right above that chain. What is large is made
    only if ``reserve`` bytes of the file system stay free. ``report`` is given
    the bytes of the uncompressed stream so far. ``interrupt`` is called when the stage fails before
    the stream ends: it makes a ``read`` in flight, which must end before this returns, end soon.
    ``algorithm`` is that of the diff ID. On any failure the tree is useless.
    """
    with ChunkPump(
        read, limits, report, cancelled, algorithm=algorithm, interrupt=interrupt
    ) as pump:
        reader = TarReader(pump.next, limits)
        try:
            applier = LayerApplier(reader, directory, privileged, lower, reserve)
        except OSError as error:
            raise storage_error(error, directory, "stage a layer") from error
        try:
            notes = _apply(applier, reader, directory)
        finally:
            applier.close()
        diff_id = pump.digest()
        return Staged(
            diff_id=diff_id,
            tar_size=pump.size,
            unpacked_size=reader.unpacked_size,
            entries=applier.entries,
            notes=notes,
            warnings=tuple(applier.maker.warnings),
        )


def _apply(applier: LayerApplier, reader: TarReader, directory: Path) -> dict[str, Any]:
    name = b""
    try:
        entries = iter(reader)
        for entry in entries:
            name = entry.name
            try:
                applier.apply(entry)
            except DependsOnBelowError:
                # It is staged again above its chain; only the diff ID is still of use.
                for _ in entries:
                    continue
                return below_notes(name)
        name = b""
        phantoms = {id(found) for found in applier.tree.assumed if found.state == PHANTOM}
        applier.finish()
        if not applier.maker.privileged:
            write_entry_list(directory, applier.maker.records())
    except OSError as error:
        raise _translated(error, name, directory) from error
    return make_notes(applier.tree, phantoms)


def _translated(error: OSError, name: bytes, directory: Path) -> Exception:
    if error.errno == errno.ENAMETOOLONG:
        return LayerError(escape(name), "has a name or target that is too long for Linux")
    return storage_error(error, f"{directory}/{escape(name)}", "stage a layer")
