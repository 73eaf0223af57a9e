"""Whether what the store holds is still what it was proven to be.

Invariant: every byte that a digest covers is hashed again from the disk, and with ``deep`` every
tree is compared with one made anew from its blob; nothing is changed unless ``repair`` is set, and
then damage is only put aside, so that a pull makes it anew from the source.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stowray.pipeline.digest import HEX_LENGTHS, Digest
from stowray.pipeline.documents import CONFIG_LIMIT, parse_config
from stowray.pipeline.entry_list import entry_list_path
from stowray.pipeline.errors import (
    CancelledError,
    InvalidDigestError,
    LayerError,
    ManifestError,
    NotFoundError,
    StorageError,
    escape,
)
from stowray.pipeline.files import SCARCITY, open_regular, storage_error, translated
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.tree_compare import compare_trees
from stowray.pipeline.values import dataclass
from stowray.pipeline.verify_records import Damage, OwnFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from stowray.pipeline.records import ReferenceRecord
    from stowray.pipeline.snapshot_record import Snapshot
    from stowray.pipeline.store import Store

_READ_SIZE = 1 << 20
# Of one tree that many differing paths are named, and the rest counted.
_MOST_PATHS = 1000


@dataclass(frozen=True, slots=True)
class Report:
    """What was checked and what was found.

    ``references`` are the images that the damage concerns, ``(reference, platform, unpacked)``: a
    pull of each makes the store whole after a repair. ``left`` is what a repair could not mend, and
    ``repaired`` is None when none was tried.
    """

    blobs: int
    size: int
    trees: int
    damaged: tuple[Damage, ...]
    references: tuple[tuple[str, str, bool], ...]
    left: tuple[Damage, ...] = ()
    repaired: bool | None = None

    def with_repair(self, mended: bool) -> Report:
        """Return the report after everything concerned was pulled again, or was not."""
        return replace(self, repaired=mended and not self.left)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as one JSON object."""
        return {
            "blobs": self.blobs,
            "size": self.size,
            "trees": self.trees,
            "damaged": [damage.to_dict() for damage in self.damaged],
            "references": sorted({reference for reference, _, _ in self.references}),
            "left": [damage.to_dict() for damage in self.left],
            "repaired": self.repaired,
        }

    def text(self) -> str:
        """Return the report for people: a line per damage and a last one that sums up."""
        lines = [
            " ".join(filter(None, ["damaged", damage.kind, damage.digest, damage.path]))
            + f": {damage.reason}"
            for damage in self.damaged
        ]
        lines += [f"not mended {damage.path}: {damage.reason}" for damage in self.left]
        checked = f"{self.blobs} blobs ({self.size} bytes)"
        if self.trees:
            checked += f", {self.trees} trees"
        if not self.damaged:
            return "\n".join([*lines, f"{checked}: no damage"])
        outcome = {
            None: "run again with --repair to mend it",
            True: "mended",
            False: "put aside, but not all could be made anew",
        }[self.repaired]
        return "\n".join([*lines, f"{checked}: {len(self.damaged)} damaged; {outcome}"])


def verify(
    store: Store,
    references: Sequence[str] | None = None,
    deep: bool = False,
    repair: bool = False,
    *,
    cancelled: Callable[[], bool] | None = None,
) -> Report:
    """Check the blobs of the named images (canonical references), or of the whole store.

    With ``deep`` the snapshots too; with ``repair`` what is damaged is put aside. Raises
    NotFoundError for a reference that is not here.
    """
    own = OwnFiles(store, references)
    own.references()
    records = _records(store, references, own)
    with ExitStack() as stack:
        if store.writable:
            lease = store.lease(
                "verify",
                digests={digest for record in records for digest in record.digests},
                chain_ids={record.chain_id for record in records if record.chain_id},
            )
            stack.enter_context(lease)
            # What was removed before the lease could hold it is not damage.
            records = _records(store, None, own, known=records)
        check = _Check(store, own, cancelled or (lambda: False))
        own.others(check.links.values(), records)
        check.blobs(records, everything=references is None)
        if deep:
            check.trees(records, everything=references is None)
        if repair:
            check.put_aside()
        return check.report(records, references or ())


def _records(
    store: Store,
    names: Sequence[str] | None,
    own: OwnFiles,
    known: Sequence[ReferenceRecord] | None = None,
) -> list[ReferenceRecord]:
    """Return the records of the named images, or all (of those ``known``), lost ones included."""
    records = [*store.references(), *own.lost.values()]
    if known is not None:
        here = {(record.reference, record.platform) for record in records}
        return [record for record in known if (record.reference, record.platform) in here]
    if names is None:
        return records
    for name in names:
        if all(record.reference != name for record in records) and not own.is_lost(name):
            raise NotFoundError(name, str(store.path))
    return [record for record in records if record.reference in names]


class _Check:
    def __init__(self, store: Store, own: OwnFiles, cancelled: Callable[[], bool]) -> None:
        self._store = store
        self._own = own
        self._cancelled = cancelled
        self._snapshots = Snapshots(store)
        self._damaged: list[Damage] = []
        self._bad_blobs: set[str] = set()
        self._bad_chains: set[str] = set()
        self._bad_layers: set[str] = set()
        self._unproven: set[str] = set()
        self._left: list[Damage] = []
        self._layers: dict[Digest, Digest] | None = None  # of all images, by diff ID
        self._counts = {"blobs": 0, "size": 0, "trees": 0}
        self.links: dict[str, Snapshot] = {link.chain_id: link for link in self._snapshots.all()}

    def report(self, records: Iterable[ReferenceRecord], names: Iterable[str]) -> Report:
        bad_chains = self._bad_chains | self._own.chains
        concerned = [
            (record.reference, record.platform, record.unpacked)
            for record in records
            if self._own.is_trust_lost
            or self._bad_blobs.intersection(record.digests)
            or bad_chains.intersection(self._chain_ids(record.chain_id))
        ]
        # Of an image whose record is lost the user still knows the name.
        concerned += [(name, "", True) for name in names if self._own.is_lost(name)]
        return Report(
            self._counts["blobs"],
            self._counts["size"],
            self._counts["trees"],
            (*self._damaged, *self._own.damaged),
            tuple(concerned),
            tuple(self._left),
        )

    def blobs(self, records: Iterable[ReferenceRecord], *, everything: bool) -> None:
        """Hash the blobs that the records name; with ``everything`` all that are there."""
        wanted = {digest for record in records for digest in record.digests}
        for digest in sorted(wanted | (self._present() if everything else set())):
            self._check_cancelled()
            reason = self._blob(digest, needed=digest in wanted)
            if reason:
                self._bad_blobs.add(digest)
                path = str(self._store.blob_path(digest))
                self._damaged.append(Damage("blob", digest, path, reason))

    def trees(self, records: Iterable[ReferenceRecord], *, everything: bool) -> None:
        """Compare the trees of the records' chains, or of all snapshots, from the base up."""
        chains: dict[str, Snapshot] = {}
        for top in self.links if everything else [record.chain_id for record in records]:
            for link in reversed(list(self._chain(top))):
                chains[link.chain_id] = link
        done: set[str] = set()
        for link in chains.values():
            self._check_cancelled()
            tree = self._snapshots.trees.tree(link.layer)
            if link.layer in self._bad_layers:
                self._bad_chains.add(link.chain_id)
            elif not self._is_directory(tree):
                self._tree_damage(link, str(tree), "is missing")
            elif link.blob in self._bad_blobs:
                # Nothing to compare with: a repair makes this tree anew, whatever it is like.
                self._unproven.add(link.layer)
            elif self._depends(link, self._bad_layers):
                # What it is compared with would be made on top of a tree that is damaged.
                self._unproven.add(link.layer)
            elif link.layer not in done and self._snapshots.has(link.chain_id):
                # What is unproven since a reboot counts as absent: a pull makes it anew anyway.
                done.add(link.layer)
                self._tree(link)

    def put_aside(self) -> None:
        """Quarantine bad blobs; drop bad trees and what was made on top of them."""
        for digest in sorted(self._bad_blobs):
            # Once more: a pull may have brought it anew while the rest was looked at.
            if self._blob(Digest(digest), needed=True, counts=False):
                self._store.quarantine(Digest(digest))
        # What a layer took from a damaged one below (a copied-up file, a directory's attributes) is
        # part of its own tree now, so that trees settled above go too.
        gone = self._bad_layers | self._unproven
        gone |= {link.layer for link in self.links.values() if self._depends(link, gone)}
        for layer in sorted(gone):
            self._bad_chains.update(self._snapshots.discard(layer))
        self._left = self._own.mend()

    def _is_directory(self, path: Path) -> bool:
        with translated(path, "look at a layer tree"):
            return path.is_dir()

    def _depends(self, snapshot: Snapshot, layers: set[str]) -> bool:
        if not self._snapshots.depends(snapshot):
            return False
        return any(link.layer in layers for link in self._chain(snapshot.chain_id))

    def _blob(self, digest: Digest, *, needed: bool, counts: bool = True) -> str:
        """Return what is wrong with a blob; empty if nothing is."""
        path = self._store.blob_path(digest)
        try:
            descriptor = open_regular(path)
        except FileNotFoundError:
            return "is missing" if needed else ""
        except StorageError as error:
            return f"cannot be opened: {error}"
        except OSError as error:
            if error.errno in SCARCITY:
                raise storage_error(error, path, "verify a blob") from error
            return f"cannot be opened: {error.strerror}"
        try:
            hasher, size = digest.hasher(), 0
            try:
                # What counts is what the disk gives back, not what memory still has of it.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                while data := os.pread(descriptor, _READ_SIZE, size):
                    hasher.update(data)
                    size += len(data)
                    self._check_cancelled()
            except OSError as error:
                return f"cannot be read: {error.strerror}"
        finally:
            os.close(descriptor)
        if counts:
            self._counts["blobs"] += 1
            self._counts["size"] += size
        actual = f"{digest.algorithm}:{hasher.hexdigest()}"
        return "" if actual == digest else f"has the digest {actual}"

    def _tree(self, snapshot: Snapshot) -> None:
        self._counts["trees"] += 1
        tree = self._snapshots.trees.tree(snapshot.layer)
        more = 0
        try:
            blob = self._blob_of(snapshot)
            with self._snapshots.rebuilt(snapshot, self._open_read(blob)) as fresh:
                for number, (path, reason) in enumerate(compare_trees(fresh, tree)):
                    if number < _MOST_PATHS:
                        place = f"{tree}/{escape(path)}" if path else str(tree)
                        if not path and reason.startswith("entry list"):
                            place = str(entry_list_path(tree))
                        self._tree_damage(snapshot, place, reason)
                    else:
                        more += 1
        except NotFoundError:
            # The blob is not kept here (any more): there is nothing to compare with.
            self._counts["trees"] -= 1
            return
        except LayerError as error:
            self._tree_damage(snapshot, str(tree), f"cannot be made anew: {error}")
        if more:
            self._tree_damage(snapshot, str(tree), f"and {more} more paths differ")

    def _blob_of(self, snapshot: Snapshot) -> Digest:
        """Return the blob that a tree is made anew from: the one it came from, if that is kept.

        Another image may have the same layer in another blob, and share the tree.
        """
        if self._store.has(snapshot.blob):
            return snapshot.blob
        if self._layers is None:
            self._layers = dict(self._known_layers())
        return self._layers.get(snapshot.diff_id, snapshot.blob)

    def _known_layers(self) -> Iterator[tuple[Digest, Digest]]:
        """Yield diff ID and blob of each layer of the images that are here."""
        for record in self._store.references():
            try:
                config = parse_config(
                    self._store.read_blob(record.config, CONFIG_LIMIT), record.config
                )
            except (NotFoundError, ManifestError):
                continue  # told of already, with the blobs
            for diff_id, blob in zip(config.diff_ids, record.layers, strict=False):
                if blob not in self._bad_blobs and self._store.has(blob):
                    yield diff_id, blob

    def _tree_damage(self, snapshot: Snapshot, path: str, reason: str) -> None:
        self._bad_layers.add(snapshot.layer)
        self._bad_chains.add(snapshot.chain_id)
        self._damaged.append(Damage("tree", snapshot.chain_id, path, reason))

    def _open_read(self, blob: Digest) -> Callable[[], AbstractContextManager[Callable[[], bytes]]]:
        @contextmanager
        def open_read() -> Iterator[Callable[[], bytes]]:
            descriptor = self._store.open_blob(blob)
            try:
                yield lambda: os.read(descriptor, _READ_SIZE)
            finally:
                os.close(descriptor)

        return open_read

    def _present(self) -> set[Digest]:
        found: set[Digest] = set()
        for algorithm in HEX_LENGTHS:
            directory = self._store.path / "blobs" / algorithm
            with translated(directory, "list the blobs"):
                names = os.listdir(directory)
            for name in names:
                try:
                    found.add(Digest(f"{algorithm}:{name}"))
                except InvalidDigestError:
                    # Not a blob's name: put there by something else, and used by nobody.
                    continue
        return found

    def _chain_ids(self, chain_id: str) -> Iterator[str]:
        """Yield the chain IDs from the top down, up to the first that no record is of."""
        current: str | None = chain_id or None
        while current is not None:
            yield current
            link = self.links.get(current)
            current = link.parent if link is not None else None

    def _chain(self, chain_id: str) -> Iterator[Snapshot]:
        """Yield the links of a chain from the top down, as far as they are recorded."""
        link = self.links.get(chain_id)
        while link is not None:
            yield link
            link = self.links.get(link.parent or "")

    def _check_cancelled(self) -> None:
        if self._cancelled():
            raise CancelledError("verify")
