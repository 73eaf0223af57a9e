"""Stages one layer: its stored bytes become a private tree in overlay format, and a diff ID.

Invariant: three threads share the work on the same chunks (read and decompress, hash, apply), with
bounded queues between them; the diff ID covers every byte of the uncompressed stream, also those
behind the end of the tar. Whatever fails, all threads have ended when the call returns, and what
``read`` raises passes through unchanged.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stowray.pipeline.apply import LayerApplier
from stowray.pipeline.chunks import ChunkPump
from stowray.pipeline.entry_list import write_entry_list
from stowray.pipeline.errors import LayerError, escape
from stowray.pipeline.files import storage_error
from stowray.pipeline.limits import DEFAULT_LIMITS, LayerLimits
from stowray.pipeline.staged_tree import IMPLIED, PHANTOM, DependsOnBelowError
from stowray.pipeline.tar import TarReader

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.overlay import ChainView

# Keys of ``Staged.notes``; the values are lists of paths, undecodable bytes as surrogates.
# Directories without an entry of their own: they take the attributes of the directory below.
IMPLIED_NOTE = "implied"
# Directories that only hold whiteouts: they are only there if there is a directory below.
WHITEOUTS_NOTE = "whiteouts"
# Names that were passed through; no symlink may stand there below.
WALKED_NOTE = "walked"
# Entries that can only be applied when what lies below is known.
BELOW_NOTE = "below"


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
    report: Callable[[int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Staged:
    """Apply the layer that ``read`` yields (compressed or not) to the empty ``directory``.

    Without ``lower`` nothing is known of what lies below, and what is assumed is noted for
    ``reconcile.settle``; with it, the tree is exactly right above that chain. ``report`` is given
    the bytes of the uncompressed stream so far. On any failure the tree is useless.
    """
    with ChunkPump(read, limits, report, cancelled) as pump:
        reader = TarReader(pump.next, limits)
        try:
            applier = LayerApplier(reader, directory, privileged, lower)
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
            unpacked_size=applier.unpacked_size,
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
                return {BELOW_NOTE: _names([name])}
        name = b""
        phantoms = {id(found) for _, found in applier.tree.assumed if found.state == PHANTOM}
        applier.finish()
        if not applier.maker.privileged:
            write_entry_list(directory, applier.maker.records())
    except OSError as error:
        raise _translated(error, name, directory) from error
    return _notes(applier, phantoms)


def _notes(applier: LayerApplier, phantoms: set[int]) -> dict[str, Any]:
    tree = applier.tree
    implied: list[bytes] = []
    whiteouts: list[bytes] = []
    walked = set(tree.walked)
    for path, directory in tree.assumed:
        if directory.state != IMPLIED or not directory.inherits or not tree.has(path, directory):
            walked.add(path)
        elif id(directory) in phantoms:
            whiteouts.append(path)
        else:
            implied.append(path)
    found = {IMPLIED_NOTE: implied, WHITEOUTS_NOTE: whiteouts, WALKED_NOTE: sorted(walked)}
    return {key: _names(paths) for key, paths in found.items() if paths}


def _names(paths: list[bytes]) -> list[str]:
    return [os.fsdecode(path) for path in paths]


def _translated(error: OSError, name: bytes, directory: Path) -> Exception:
    if error.errno == errno.ENAMETOOLONG:
        return LayerError(escape(name), "has a name or target that is too long for Linux")
    return storage_error(error, f"{directory}/{escape(name)}", "stage a layer")
