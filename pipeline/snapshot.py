"""Snapshots: committed chains of layer trees, each named by its chain ID.

Invariant: a snapshot exists only on a snapshot of its parent, with a tree whose diff ID was proven,
and equals the layers applied one after the other. A layer is staged alone, in parallel with others;
what in it depends on the layers below is settled here, in chain order, before the chain ID becomes
visible. A record or tree that the trust rule does not cover counts as absent and is made anew.

The same tree serves every chain that holds its diff ID as long as nothing in it depends on its
parent, or what depends on it comes out as the tree has it already; then it is never changed again,
and other chains get trees of their own.

When one tree appears twice in a chain only the topmost is mounted, for the kernel refuses a lower
directory twice. Nothing is lost by it: the lower one could show or hide a path only if the
look-up passed the upper one, that is, where the upper one (being equal) has neither the name nor a
whiteout, file or opaque directory on the way to it; there the lower one has nothing either.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from stowray.pipeline.errors import (
    DigestMismatchError,
    NotFoundError,
    StorageError,
)
from stowray.pipeline.failpoint import failpoint
from stowray.pipeline.files import translated
from stowray.pipeline.layer_trees import LayerRecord, LayerTrees
from stowray.pipeline.limits import DEFAULT_LIMITS
from stowray.pipeline.records import read_record, write_record
from stowray.pipeline.snapshot_record import Snapshot, chain_id_of
from stowray.pipeline.staging import LayerSource, Stager
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.limits import LayerLimits
    from stowray.pipeline.overlay import ChainView
    from stowray.pipeline.staging import OpenRead
    from stowray.pipeline.store import Store

# How long one waits for another process to stage the same layer before giving up.
WAIT_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class StageOutcome:
    """What staging one layer came to; ``existed`` when its tree was there already.

    ``blob`` is the one that the tree is proven to come from, if that is known.
    """

    existed: bool
    tar_size: int
    unpacked_size: int
    entries: int
    seconds: float
    warnings: tuple[str, ...] = ()
    blob: Digest | None = None


class Snapshots:
    """The snapshots of a store that this user can use: those in his own tree format."""

    def __init__(self, store: Store, privileged: bool | None = None) -> None:
        self._store = store
        # What this user can really do here: root of a container or user namespace may be no more
        # than a plain user to the file system.
        self.privileged = store.capabilities.privileged if privileged is None else privileged
        self.trees = LayerTrees(store, self.privileged)
        self._stager = Stager(self.trees)
        self.directory = store.path / "snapshots"
        # Links that a commit of this object has seen; a chain ID names one content for ever.
        self._seen: dict[Digest, Snapshot] = {}
        # The one committed last: chains are committed from the bottom up.
        self._last: Digest | None = None
        self._places: dict[str, Path] = {}

    def stage(
        self,
        diff_id: Digest,
        open_read: OpenRead,
        *,
        parent: Digest | None = None,
        limits: LayerLimits = DEFAULT_LIMITS,
        report: Callable[[int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        interrupt: Callable[[], None] | None = None,
        proven: Callable[[], Digest | None] | None = None,
        wait_seconds: float = WAIT_SECONDS,
    ) -> StageOutcome:
        """Make the tree of one layer alone, from its blob as ``open_read`` gives it.

        Whoever stages a layer that another process is staging waits and finds its tree; one that
        was settled onto ``parent`` meanwhile will do as well. ``interrupt`` makes a read in flight
        end soon when the stage fails meanwhile, ``proven`` tells which blob was read. Raises
        DigestMismatchError, with nothing left behind, when the layer is not ``diff_id``.
        """
        started = time.monotonic()
        source = LayerSource(open_read, limits, report, cancelled, interrupt, proven)
        with self._stage_lock(diff_id, cancelled, wait_seconds):
            record = self.trees.find(self.trees.settled(diff_id, parent))
            existed = record is not None
            if record is None:
                record, existed = self._alone(diff_id, source)
        return StageOutcome(
            existed=existed,
            tar_size=record.tar_size,
            unpacked_size=record.unpacked_size,
            entries=record.entries,
            seconds=time.monotonic() - started,
            warnings=record.warnings,
            blob=record.blob,
        )

    def _stage_lock(
        self, diff_id: Digest, cancelled: Callable[[], bool] | None, wait_seconds: float
    ) -> AbstractContextManager[None]:
        """Keep others from making, settling or sharing the layer's tree."""
        return self._store.lock(
            f"stage-{self.trees.alone(diff_id)}", wait_seconds=wait_seconds, cancelled=cancelled
        )

    def _alone(self, diff_id: Digest, source: LayerSource) -> tuple[LayerRecord, bool]:
        """Return the record of the tree staged alone, and whether it was there already."""
        name = self.trees.alone(diff_id)
        record = self.trees.find(name)
        if record is not None:
            return record, True
        self.trees.drop(name)
        return self._stager.stage(name, diff_id, source), False

    def commit(
        self,
        chain_id: Digest,
        parent: Digest | None,
        diff_id: Digest,
        blob: Digest,
        open_read: OpenRead,
        *,
        limits: LayerLimits = DEFAULT_LIMITS,
        report: Callable[[int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
        interrupt: Callable[[], None] | None = None,
        proven: Callable[[], Digest | None] | None = None,
        wait_seconds: float = WAIT_SECONDS,
    ) -> Snapshot:
        """Publish ``chain_id``: the layer ``diff_id`` on the committed snapshot ``parent``.

        Idempotent. The layer is staged here when its tree is not there (any more), so ``open_read``
        must be able to give its blob, which by now is proven.
        """
        expected = chain_id_of(parent, diff_id)
        if chain_id != expected:
            raise DigestMismatchError(f"chain ID of layer {diff_id}", expected, chain_id)
        with self._store.lock(
            f"commit-{self.trees.format}-{chain_id.encoded}",
            wait_seconds=wait_seconds,
            cancelled=cancelled,
        ):
            present = self._find(chain_id)
            if present is not None:
                self._seen[chain_id] = present
                return present
            if parent is not None and parent != self._last:
                # It stands on a complete chain itself, or it could not have been committed.
                self._seen[parent] = self.get(parent)
            source = LayerSource(open_read, limits, report, cancelled, interrupt, proven)
            layer, record = self._layer(diff_id, parent, source, wait_seconds)
            snapshot = Snapshot(
                chain_id=chain_id,
                parent=parent,
                diff_id=diff_id,
                blob=blob,
                layer=layer,
                tar_size=record.tar_size,
                unpacked_size=record.unpacked_size,
                entries=record.entries,
                created=time.time(),
            )
            self._write(snapshot)
            self._seen[chain_id] = snapshot
            self._last = chain_id
            return snapshot

    def has(self, chain_id: Digest) -> bool:
        """Return whether the snapshot and all below it are here and trusted."""
        try:
            self.chain(chain_id)
        except NotFoundError:
            return False
        return True

    def get(self, chain_id: Digest) -> Snapshot:
        """Return the snapshot, which is here and trusted; NotFoundError otherwise."""
        snapshot = self._find(chain_id)
        if snapshot is None:
            raise NotFoundError(f"snapshot {chain_id}", str(self.directory))
        return snapshot

    def chain(self, chain_id: Digest) -> tuple[Snapshot, ...]:
        """Return the snapshots from the base layer up to ``chain_id``."""
        links: list[Snapshot] = []
        current: Digest | None = chain_id
        while current is not None:
            snapshot = self.get(current)
            links.append(snapshot)
            # Chain IDs are hashes of those below, so this cannot run in a circle.
            current = snapshot.parent
        return tuple(reversed(links))

    def lowers(self, chain_id: Digest | None) -> list[Path]:
        """Return the trees of a chain, the top one first, each once; none for no chain."""
        if chain_id is None:
            return []
        layers = dict.fromkeys(link.layer for link in reversed(self.chain(chain_id)))
        return [self.trees.tree(layer) for layer in layers]

    @contextmanager
    def held(self, chain_id: Digest | None, holder: str) -> Iterator[ChainView]:
        """Give the merged tree of a chain, which no collector removes meanwhile."""
        from stowray.pipeline.overlay import ChainView

        chain_ids = [] if chain_id is None else [chain_id]
        with ExitStack() as stack:
            if self._store.writable:
                # Nobody collects in a store that cannot be written to.
                stack.enter_context(self._store.lease(holder, chain_ids=chain_ids))
            lowers = self.lowers(chain_id)
            yield stack.enter_context(ChainView(lowers, self.privileged))

    def knows(self, diff_id: Digest, blob: Digest) -> bool:
        """Return whether a snapshot was committed from ``blob`` as the layer ``diff_id``."""
        return any(snapshot.diff_id == diff_id and snapshot.blob == blob for snapshot in self.all())

    def depends(self, snapshot: Snapshot) -> bool:
        """Return whether the snapshot's tree is right only above the layers below it."""
        if snapshot.layer != self.trees.alone(snapshot.diff_id):
            return True
        record = self.trees.find(snapshot.layer)
        return record is None or bool(record.notes)

    def blob_mapping(self) -> dict[Digest, Digest]:
        """Return the blob digest of each snapshot by its chain ID."""
        return {snapshot.chain_id: snapshot.blob for snapshot in self.all()}

    def all(self) -> list[Snapshot]:
        """Return every snapshot of this format that is readable, trusted or not."""
        found = (self._read(path, trusted=False) for path in self._paths())
        return [snapshot for snapshot in found if snapshot is not None]

    def remove(self, chain_id: Digest) -> bool:
        """Remove a snapshot, and its tree when no other uses it; False when it is not here.

        Raises StorageError while another snapshot stands on it, or while it is mounted or in use.
        """
        from stowray.pipeline.leases import leases

        path = self._path(chain_id)
        for held in leases(self._store):
            if chain_id in held.chain_ids:
                user = f"mounted at {held.mount_point}" if held.mount_point else "in use"
                raise StorageError(str(path), f"the snapshot is {user}")
        snapshot = self._read(path, trusted=False)
        others = [other for other in self.all() if other.chain_id != chain_id]
        for other in others:
            if other.parent == chain_id:
                raise StorageError(str(path), f"snapshot {other.chain_id} stands on it")
        with translated(path, "remove a snapshot"):
            try:
                path.unlink()
            except FileNotFoundError:
                return False
        if snapshot is not None and all(other.layer != snapshot.layer for other in others):
            self.trees.drop(snapshot.layer)
        return True

    def discard(self, layer: str) -> list[Digest]:
        """Remove a damaged tree with every snapshot that uses it; return their chain IDs.

        Snapshots above stay recorded and count as absent until those below are made again.
        """
        gone = [snapshot.chain_id for snapshot in self.all() if snapshot.layer == layer]
        for chain_id in gone:
            path = self._path(chain_id)
            with translated(path, "remove a snapshot"):
                path.unlink(missing_ok=True)
        self.trees.drop(layer)
        return gone

    @contextmanager
    def rebuilt(
        self, snapshot: Snapshot, open_read: OpenRead, limits: LayerLimits = DEFAULT_LIMITS
    ) -> Iterator[Path]:
        """Give the snapshot's layer tree made anew from its blob, gone after the block."""
        below = self.lowers(snapshot.parent) if self.depends(snapshot) else None
        source = LayerSource(open_read, limits)
        with self._stager.fresh(snapshot.diff_id, source, below) as tree:
            yield tree

    def _layer(
        self, diff_id: Digest, parent: Digest | None, source: LayerSource, wait_seconds: float
    ) -> tuple[str, LayerRecord]:
        """Return name and record of a tree that equals the layer applied onto ``parent``."""
        alone, settled = self.trees.alone(diff_id), self.trees.settled(diff_id, parent)
        record = self.trees.find(settled)
        if record is not None:
            return settled, record
        self.trees.drop(settled)
        record = self.trees.find(alone)
        if record is not None and not record.notes:
            return alone, record
        with self._stage_lock(diff_id, source.cancelled, wait_seconds):
            record, _ = self._alone(diff_id, source)
            if not record.notes:
                return alone, record
            below = self._lowers_below(parent)
            if self._stager.fits(alone, record, below):
                if not record.shared:
                    record = self.trees.share(alone, record)
                return alone, record
            if not record.shared:
                with self.trees.take(alone) as taken:
                    if taken is not None:
                        done = self._stager.settle(*taken, settled, parent=parent, below=below)
                        if done is not None:
                            return settled, done
            # What depends on more than attributes, or serves other chains as it is.
            record = self._stager.stage(settled, diff_id, source, parent=parent, below=below)
            return settled, record

    def _lowers_below(self, parent: Digest | None) -> list[Path]:
        """Return the lowers of the chain that a commit goes onto.

        Whoever commits holds a lease on the whole chain and has just found its top, so that links
        seen before are there: reading all of them again for each of n layers takes n² reads.
        """
        layers: dict[str, Path] = {}
        current = parent
        while current is not None:
            link = self._seen.get(current)
            if link is None:
                link = self._seen[current] = self.get(current)
            place = self._places.get(link.layer)
            if place is None:
                place = self._places[link.layer] = self.trees.tree(link.layer)
            layers[link.layer] = place
            current = link.parent
        return [*layers.values()]

    def _find(self, chain_id: Digest) -> Snapshot | None:
        snapshot = self._read(self._path(chain_id), trusted=True)
        if snapshot is None or snapshot.chain_id != chain_id:
            return None
        record = self.trees.find(snapshot.layer) if self.trees.owns(snapshot.layer) else None
        if record is None or record.diff_id != snapshot.diff_id:
            return None
        return snapshot

    def _path(self, chain_id: Digest) -> Path:
        return self.directory / f"{self.trees.format}-{chain_id.encoded}"

    def _paths(self) -> Iterator[Path]:
        with translated(self.directory, "list the snapshots"):
            try:
                names = sorted(os.listdir(self.directory))
            except FileNotFoundError:
                return
        for name in names:
            if self.trees.owns(name):
                yield self.directory / name

    def _read(self, path: Path, *, trusted: bool) -> Snapshot | None:
        record = read_record(path, self._store.trust)
        if record is None or (trusted and not record.trusted):
            return None
        return Snapshot.parse(record.payload)

    def _write(self, snapshot: Snapshot) -> None:
        failpoint("snapshot-before-record")
        stamp = self._store.trust.stamp()
        write_record(self._path(snapshot.chain_id), snapshot.payload(), stamp)
        failpoint("snapshot-after-record")
