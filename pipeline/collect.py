"""Removal of what no image, pin, lease or running pull needs any more: mark, set aside, delete.

Invariant: what a lease in force names is never touched, nor what was made since the beginning of a
pull whose lease names nothing yet (it may be about to). Nothing is guessed: while a reference or
lease cannot be read, nothing is collected. Marking and setting aside happen under the exclusive
half of the lock whose shared half makes a lease; the deletion itself, which may take long, keeps
nobody waiting.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import suppress
from dataclasses import field
from typing import TYPE_CHECKING

from stowray.pipeline.digest import HEX_LENGTHS, Digest
from stowray.pipeline.errors import InvalidDigestError, NotFoundError
from stowray.pipeline.failpoint import failpoint
from stowray.pipeline.files import TEMPORARY, make_directory, translated
from stowray.pipeline.ingest_home import discard_ingest
from stowray.pipeline.leases import LOCK, LOCK_SECONDS, leases
from stowray.pipeline.leftovers import is_abandoned, sweep_leftovers
from stowray.pipeline.locks import is_current, open_lock, try_lock
from stowray.pipeline.records import BlobRecord, read_record
from stowray.pipeline.references import last_used, remove_records, require_references
from stowray.pipeline.removal import remove_tree
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from stowray.pipeline.leases import Held
    from stowray.pipeline.records import Record, ReferenceRecord
    from stowray.pipeline.store import Store
    from stowray.pipeline.trust import Stamp

INGEST_SECONDS = 24 * 3600.0
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed, or would remove; sizes in bytes."""

    references: tuple[tuple[str, str], ...]
    blobs: tuple[str, ...]
    snapshots: tuple[str, ...]
    layers: tuple[str, ...]
    ingests: tuple[str, ...]
    freed: int
    kept: int


def remove(store: Store, canonical: str, platform: str | None = None) -> int:
    """Forget an image; its content goes with the next collection. ``NotFoundError`` for none."""
    removed = store.remove_reference(canonical, platform)
    if not removed:
        what = canonical if platform is None else f"{canonical} for {platform}"
        raise NotFoundError(what, str(store.path))
    return removed


def collect(
    store: Store,
    *,
    dry_run: bool = False,
    max_size: int | None = None,
    min_free: int | None = None,
    ingest_seconds: float | None = None,
) -> Collected:
    """Remove what nothing needs; with a limit also forget the oldest unpinned, unused images."""
    with store.lock(LOCK, wait_seconds=LOCK_SECONDS):
        records = require_references(store)
        held = leases(store, sweep=not dry_run)
        stock = _Stock.take(store)
        evicted = _choose(store, stock, records, held, max_size, min_free)
        doomed = [*stock.unneeded([record for record in records if record not in evicted], held)]
        age = INGEST_SECONDS if ingest_seconds is None else ingest_seconds
        ingests = _stale_ingests(store, age)
        report = Collected(
            references=tuple((record.reference, record.platform) for record in evicted),
            blobs=tuple(item.name for item in doomed if item.kind == "blob"),
            snapshots=tuple(item.name for item in doomed if item.kind == "snapshot"),
            layers=tuple(item.name for item in doomed if item.kind == "layer"),
            ingests=tuple(path.name for path in ingests),
            freed=sum(item.size for item in doomed),
            kept=sum(item.size for item in stock.items) - sum(item.size for item in doomed),
        )
        if dry_run:
            return report
        remove_records(store, evicted)
        bin_path, bin_lock = _new_bin(store)
        try:
            _set_aside(doomed, bin_path)
            for path in ingests:
                _drop_ingest(path)
        except BaseException:
            os.close(bin_lock)
            raise
    from stowray.pipeline.mount import sweep

    failpoint("collect-before-delete")
    try:
        remove_tree(bin_path)
    finally:
        os.close(bin_lock)
    _empty_bins(store)
    sweep_leftovers(store)
    sweep(store)
    store.trust.prune(stock.boots)
    return report


@dataclass(frozen=True, slots=True)
class _Item:
    """One removable thing; ``made`` is when, ``unclaimed`` that nobody can ever want it."""

    kind: str
    name: str
    path: Path
    size: int
    made: Stamp | None
    unclaimed: bool = False


@dataclass(slots=True)
class _Stock:
    """Everything removable that is in the store, and what needs what."""

    items: list[_Item] = field(default_factory=list)
    parents: dict[str, str] = field(default_factory=dict)  # chain ID -> chain ID below
    layers: dict[str, set[str]] = field(default_factory=dict)  # chain ID -> layer directories
    boots: set[tuple[str, str]] = field(default_factory=set)  # boots and hosts of all stamps

    @classmethod
    def take(cls, store: Store) -> _Stock:
        """List what is there, under the collector's lock."""
        stock = cls()
        with translated(store.path, "list what can be collected"):
            stock._take_blobs(store)
            stock._take_snapshots(store)
            stock._take_layers(store)
            for path in sorted((store.path / "quarantine").iterdir()):
                with suppress(FileNotFoundError):
                    size = path.lstat().st_size
                    stock.items.append(_Item("quarantined", path.name, path, size, None, True))
        return stock

    def _take_blobs(self, store: Store) -> None:
        for algorithm in HEX_LENGTHS:
            for kind, folder in (("blob", "blobs"), ("source", "sources")):
                for path in sorted((store.path / folder / algorithm).iterdir()):
                    try:
                        digest = Digest(f"{algorithm}:{path.name}")
                    except InvalidDigestError:
                        continue  # not ours
                    try:
                        size = path.lstat().st_size if kind == "blob" else 0
                    except FileNotFoundError:
                        continue  # quarantined by a pull since it was listed
                    record = read_record(store.source_path(digest), store.trust)
                    made = self._note(record)
                    if record is not None and kind == "source":
                        self._note_stamp(BlobRecord.parse(record.payload).verified)
                    self.items.append(_Item(kind, str(digest), path, size, made))

    def _take_snapshots(self, store: Store) -> None:
        for path in sorted((store.path / "snapshots").iterdir()):
            if path.name.startswith("."):
                continue
            record = read_record(path, store.trust)
            if record is None:
                # Damaged: whoever needs this snapshot takes it as absent and makes it anew.
                self.items.append(_Item("snapshot", path.name, path, 0, None, True))
                continue
            chain_id = str(record.payload.get("chain_id"))
            self.items.append(_Item("snapshot", chain_id, path, 0, self._note(record)))
            parent, layer = record.payload.get("parent"), record.payload.get("layer")
            if isinstance(parent, str):
                self.parents[chain_id] = parent
            if isinstance(layer, str):
                self.layers.setdefault(chain_id, set()).add(layer)

    def _take_layers(self, store: Store) -> None:
        for path in sorted((store.path / "layers").iterdir()):
            if path.name.startswith(TEMPORARY):
                if is_abandoned(path):
                    self.items.append(_Item("workspace", path.name, path, 0, None, True))
                continue
            record = read_record(path / "layer.json", store.trust)
            size = 0 if record is None else record.payload.get("unpacked_size")
            made = self._note(record)
            self.items.append(
                _Item("layer", path.name, path, size if isinstance(size, int) else 0, made)
            )

    def _note(self, record: Record | None) -> Stamp | None:
        """Return when something was made, and remember on which boot."""
        stamp = None if record is None else record.stamp
        self._note_stamp(stamp)
        return stamp

    def _note_stamp(self, stamp: Stamp | None) -> None:
        if stamp is not None:
            self.boots.add((stamp.boot_id, stamp.host))

    def needs(self, digests: Iterable[str], chain_ids: Iterable[str]) -> set[tuple[str, str]]:
        """Return kind and name of all that these digests and chain IDs need."""
        needed: set[tuple[str, str]] = set()
        for digest in digests:
            needed |= {("blob", str(digest)), ("source", str(digest))}
        for chain_id in map(str, chain_ids):
            link: str | None = chain_id
            while link and ("snapshot", link) not in needed:
                needed.add(("snapshot", link))
                needed |= {("layer", layer) for layer in self.layers.get(link, ())}
                link = self.parents.get(link)
        return needed

    def unneeded(self, records: Iterable[ReferenceRecord], held: Iterable[Held]) -> Iterator[_Item]:
        """Yield what neither these records nor these leases need, snapshots first."""
        needed: set[tuple[str, str]] = set()
        for record in records:
            needed |= self.needs(record.digests, [record.chain_id])
        # A lease that names nothing yet is of a pull that does not know yet what it will need.
        running = [lease for lease in held if not lease.digests and not lease.chain_ids]
        # Trees that were staged but not committed yet are named by their diff IDs only. Who leases
        # a chain ID that is not here yet may be about to commit any of them.
        committing = any(
            not lease.persistent and not lease.chain_ids <= self.layers.keys() for lease in held
        )
        leased_hex: set[str] = set()
        for lease in held:
            needed |= self.needs(lease.digests, lease.chain_ids)
            leased_hex |= {digest.partition(":")[2] for digest in lease.digests}
        order = {"snapshot": 0, "layer": 1, "workspace": 2}
        for item in sorted(self.items, key=lambda item: order.get(item.kind, 3)):
            if (item.kind, item.name) in needed or _may_be_wanted(item, running):
                continue
            if item.kind == "layer" and (committing or leased_hex & set(item.name.split("-"))):
                continue
            yield item


def _may_be_wanted(item: _Item, running: list[Held]) -> bool:
    """Say whether a pull that has named nothing yet may have made it."""
    if item.unclaimed:
        return False
    if item.made is None:
        return bool(running)
    return any(
        item.made.host != lease.begun.host
        or (item.made.boot_id == lease.begun.boot_id and item.made.at_ns >= lease.begun.at_ns)
        for lease in running
    )


def _choose(
    store: Store,
    stock: _Stock,
    records: list[ReferenceRecord],
    held: list[Held],
    max_size: int | None,
    min_free: int | None,
) -> list[ReferenceRecord]:
    """Choose the images to forget so that the limits hold: those not used for longest first."""
    if max_size is None and min_free is None:
        return []
    with translated(store.path, "ask for free space"):
        system = os.statvfs(store.path)
    free = system.f_bavail * system.f_frsize
    sizes = {(item.kind, item.name): item.size for item in stock.items}
    unneeded = list(stock.unneeded(records, held))
    freed = sum(item.size for item in unneeded)
    total = sum(sizes.values()) - freed
    leased = {text for lease in held for text in (*lease.digests, *lease.chain_ids)}
    needs = {id(record): stock.needs(record.digests, [record.chain_id]) for record in records}
    users = Counter(name for needed in needs.values() for name in needed)
    for lease in held:
        users.update(stock.needs(lease.digests, lease.chain_ids))
    chosen: list[ReferenceRecord] = []
    for record in sorted(records, key=lambda record: last_used(store, record)):
        if (max_size is None or total <= max_size) and (
            min_free is None or free + freed >= min_free
        ):
            break
        if record.pinned or {str(record.manifest), record.chain_id} & leased:
            continue
        chosen.append(record)
        for name in needs[id(record)]:
            users[name] -= 1
            if not users[name]:
                total -= sizes.get(name, 0)
                freed += sizes.get(name, 0)
    return chosen


def _stale_ingests(store: Store, ingest_seconds: float) -> list[Path]:
    """Return what is left of ingests whose writers are gone: old ones, and half written files."""
    root = store.path / "ingest"
    stale: list[Path] = []
    with translated(root, "list the ingests"):
        for path in sorted(root.iterdir()):
            try:
                if path.name.startswith(TEMPORARY):
                    abandoned = is_abandoned(path)
                else:
                    abandoned = _is_stale(store, path, ingest_seconds) and not _is_written(path)
            except FileNotFoundError:
                continue  # committed since it was listed
            if abandoned:
                stale.append(path)
    return stale


def _is_stale(store: Store, path: Path, ingest_seconds: float) -> bool:
    """Say whether an ingest is too old to be resumed, or of a blob that is here already."""
    algorithm, _, encoded = path.name.partition("-")
    if os.path.lexists(store.path / "blobs" / algorithm / encoded):
        return True  # its writer died between the commit and the removal
    # A clock that was set back makes ages negative: then it stays.
    newest = max(
        (entry.lstat().st_mtime for entry in path.iterdir()), default=path.lstat().st_mtime
    )
    return time.time() - newest > ingest_seconds


def _is_written(directory: Path) -> bool:
    """Say whether an ingest has a live writer."""
    try:
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(descriptor)
    finally:
        os.close(descriptor)


def _drop_ingest(path: Path) -> None:
    """Remove a stale ingest while holding its writer's lock, so that none takes it over."""
    with translated(path, "remove a stale ingest"):
        if path.name.startswith(TEMPORARY):
            path.unlink(missing_ok=True)
            return
        lock_path = path / "lock"
        try:
            lock = open_lock(lock_path)
        except FileNotFoundError:
            return  # committed since it was listed
        try:
            if try_lock(lock) and is_current(lock, lock_path):
                discard_ingest(path)
        finally:
            os.close(lock)


def _new_bin(store: Store) -> tuple[Path, int]:
    """Return a new directory under ``trash/``, locked against other collectors."""
    while True:
        path = store.path / "trash" / os.urandom(8).hex()
        with translated(path, "set aside what nobody needs"):
            # A copy of a store may lack what was empty.
            make_directory(path.parent)
            try:
                make_directory(path)
                descriptor = os.open(path, _OPEN_DIRECTORY)
            except FileNotFoundError:
                continue
            try:
                if try_lock(descriptor) and is_current(descriptor, path):
                    return path, descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
        # Another collector took it for a leftover in the instant before the lock.


def _set_aside(doomed: list[_Item], target: Path) -> None:
    for number, item in enumerate(doomed):
        with translated(item.path, "set aside what nobody needs"), suppress(FileNotFoundError):
            if item.kind == "workspace":
                _set_workspace_aside(item.path, target / str(number))
            else:
                item.path.rename(target / str(number))
        failpoint("collect-while-setting-aside")


def _set_workspace_aside(path: Path, target: Path) -> None:
    """Move a workspace that was left; one that had just been made when it was listed stays."""
    descriptor = os.open(path, _OPEN_DIRECTORY)
    try:
        # Under its lock: its maker finds it moved, and makes another one.
        if try_lock(descriptor):
            path.rename(target)
    finally:
        os.close(descriptor)


def _empty_bins(store: Store) -> None:
    """Finish what collectors that died have left."""
    root = store.path / "trash"
    with translated(root, "empty the trash"):
        for path in sorted(root.iterdir()):
            try:
                descriptor = os.open(path, _OPEN_DIRECTORY)
            except FileNotFoundError:
                continue
            try:
                if try_lock(descriptor):
                    remove_tree(path)
            finally:
                os.close(descriptor)
