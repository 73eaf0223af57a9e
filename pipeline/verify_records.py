"""The files in which the store says what it holds: whether each is whole, and how it is mended.

Invariant: what is wrong is named before anything is touched. A mend puts the damaged file aside and
makes it anew from what does not depend on it: a reference's record from the index, the index from
the records, a mark by a ``syncfs``, a mount's lease from the mounts that stand. What only a pull
can make anew counts as absent from then on.
"""

from __future__ import annotations

import os
import re
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from stowray.pipeline.digest import HEX_LENGTHS, Digest
from stowray.pipeline.errors import InvalidDigestError, StorageError
from stowray.pipeline.files import SCARCITY, TEMPORARY, read_regular, replace_file, translated
from stowray.pipeline.layout import LAYOUT_FILE, REFERENCE, is_entry_of, read_index
from stowray.pipeline.leases import unreadable_leases
from stowray.pipeline.mount import mend_lease
from stowray.pipeline.recordfile import read_record_file
from stowray.pipeline.references import (
    MARKER,
    derive_index,
    reference_directory,
    remembered,
    restore,
)
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from pathlib import Path

    from stowray.pipeline.records import ReferenceRecord
    from stowray.pipeline.snapshot_record import Snapshot
    from stowray.pipeline.store import Store

_LOCK_SECONDS = 60.0
_LOST = "is damaged, and so is what the index repeats of it: which image it named is lost"
_ALGORITHMS = {length: algorithm for algorithm, length in HEX_LENGTHS.items()}


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is not as it should be; ``digest`` is a blob's, a layer's or a chain ID."""

    kind: str
    digest: str
    path: str
    reason: str

    def to_dict(self) -> dict[str, str]:
        """Return the damage as an object of the report."""
        return {
            "kind": self.kind,
            "digest": self.digest,
            "path": self.path,
            "reason": self.reason,
        }


class OwnFiles:
    """A look at the store's own files; ``names`` limits it to those of some references."""

    def __init__(self, store: Store, names: Collection[str] | None) -> None:
        self._store = store
        self._names = names
        self.damaged: list[Damage] = []
        self.lost: dict[Path, ReferenceRecord] = {}
        # Snapshots that cannot be used any more, and layers whose trees count as absent.
        self.chains: set[str] = set()
        self.layers: set[str] = set()
        # Whether a mark is damaged: whatever it vouched for is proven or made anew.
        self.is_trust_lost = False
        self._aside: list[Path] = []
        self._leases: list[Path] = []
        self._is_index_false = False

    def references(self) -> None:
        """Look at the records of references and at the index, as one state of both."""
        with self._store.lock("refs", wait_seconds=_LOCK_SECONDS):
            self.lost = {
                path: record
                for path, record in remembered(self._store).items()
                if self._names is None or record.reference in self._names
            }
            for path, record in self.lost.items():
                what = f"{record.reference} for {record.platform}"
                state = "is damaged" if os.path.lexists(path) else "is missing"
                self._add("record", record.manifest, path, f"{state}: {what}")
                self._aside.append(path)
            for path in self._reference_paths():
                if path not in self.lost and not _is_whole(path):
                    self._add("record", "", path, _LOST)
                    self._aside.append(path)
            if self._names is None:
                self._index()

    def others(self, links: Iterable[Snapshot], wanted: Iterable[ReferenceRecord]) -> None:
        """Look at all other records: of snapshots, layers, sources, marks, leases."""
        links = list(links)
        chains: set[str] | None = None
        layers: set[str] | None = None
        wanted = list(wanted)
        if self._names is not None:
            by_chain = {str(link.chain_id): link for link in links}
            chains = set()
            for record in wanted:
                current: str | None = record.chain_id or None
                while current is not None:
                    chains.add(current)
                    link = by_chain.get(current)
                    current = link.parent if link is not None else None
            layers = {link.layer for link in links if str(link.chain_id) in chains}
        self._snapshots(chains)
        self._missing(links, wanted)
        self._layers(links, layers)
        if self._names is None:
            self._sources()
            self._marks()
            self._held()
            self._small_files()

    def is_lost(self, name: str) -> bool:
        """Say whether a record of a reference was found that nothing can be made of any more."""
        folder = str(reference_directory(self._store, name))
        return any(
            damage.reason == _LOST and damage.path.startswith(f"{folder}/")
            for damage in self.damaged
        )

    def mend(self) -> list[Damage]:
        """Put aside and make anew; return what only the user can mend."""
        left = [damage for damage in self.damaged if damage.reason == _LOST]
        if not self.damaged:
            return left
        store = self._store
        for path in self._aside:
            aside = store.path / "quarantine" / f"record-{secrets.token_hex(8)}"
            with translated(path, "put a damaged record aside"), suppress(FileNotFoundError):
                if store.trust.is_own(path):
                    store.sync()
                else:
                    path.rename(aside)
        if self.lost:
            restore(store)
        for path in self._leases:
            reason = mend_lease(store, path)
            if reason:
                left.append(Damage("lease", "", str(path), reason))
        self._mend_small_files()
        if self._is_index_false or self.lost:
            derive_index(store)
        return left

    # -- what there is ----------------------------------------------------------------------------

    def _reference_paths(self) -> Iterator[Path]:
        root = self._store.path / "refs"
        if self._names is None:
            yield from _files(root)
            return
        for name in self._names:
            yield from _files(reference_directory(self._store, name))

    def _index(self) -> None:
        """Compare the index with the records, while nobody changes either."""
        if os.path.lexists(self._store.path / "refs" / MARKER):
            return  # a change was cut short: the next one derives the index anew
        found = read_index(self._store.path)
        if found is None:
            self._index_damage("is damaged")
            return
        left: dict[str, list[ReferenceRecord]] = {}
        for record in (*self._store.references(), *self.lost.values()):
            left.setdefault(record.reference, []).append(record)
        for entry in found:
            name = entry["annotations"][REFERENCE]
            of_name = left.get(name, [])
            match = next((record for record in of_name if is_entry_of(entry, record)), None)
            if match is None:
                self._index_damage(f"says of {name} what is not on record", _digest_in(entry))
            else:
                of_name.remove(match)
        for record in (record for of_name in left.values() for record in of_name):
            what = f"lacks what is on record of {record.reference} for {record.platform}"
            self._index_damage(what, record.manifest)

    def _index_damage(self, reason: str, digest: str = "") -> None:
        self._is_index_false = True
        self._add("index", digest, self._store.path / "index.json", reason)

    def _snapshots(self, chains: set[str] | None) -> None:
        for path in _files(self._store.path / "snapshots"):
            chain_id = _digest_of(path.name.rpartition("-")[2])
            if (chains is None or chain_id in chains) and not _is_whole(path):
                self._add("record", chain_id, path, "is damaged: the record of a snapshot")
                self._aside.append(path)
                self.chains.add(chain_id)

    def _missing(self, links: list[Snapshot], records: Iterable[ReferenceRecord]) -> None:
        """Name what images need that were unpacked and no record speaks of."""
        by_chain: dict[str, Snapshot] = {str(link.chain_id): link for link in links}
        present = {path.name.rpartition("-")[2] for path in _files(self._store.path / "snapshots")}
        for record in records:
            current: str | None = record.chain_id if record.unpacked else None
            while current:
                link = by_chain.get(current)
                if link is None:
                    # Another user's trees, in a format of their own, are not for us to follow.
                    if current.partition(":")[2] not in present and current not in self.chains:
                        self.chains.add(current)
                        path = self._store.path / "snapshots"
                        self._add("snapshot", current, path, f"is missing: {record.reference}")
                    break
                current = link.parent

    def _layers(self, links: list[Snapshot], layers: set[str] | None) -> None:
        root = self._store.path / "layers"
        with translated(root, "list the layer trees"):
            names = sorted(os.listdir(root))
        for name in names:
            path = root / name / "layer.json"
            if name.startswith(TEMPORARY) or (layers is not None and name not in layers):
                continue
            if _is_whole(path) or not os.path.lexists(root / name):
                continue
            state = "is damaged" if os.path.lexists(path) else "is missing"
            if state == "is missing" and not any(link.layer == name for link in links):
                continue  # being removed, or never to be used
            diff_id = _digest_of(name.split("-")[1] if "-" in name else "")
            self._add("record", diff_id, path, f"{state}: the record of a layer's tree")
            self._aside.append(path)
            self.layers.add(name)
            self.chains |= {link.chain_id for link in links if link.layer == name}

    def _sources(self) -> None:
        for algorithm in HEX_LENGTHS:
            for path in _files(self._store.path / "sources" / algorithm):
                if not _is_whole(path):
                    self._add("record", _digest_of(path.name), path, "is damaged")
                    self._aside.append(path)

    def _marks(self) -> None:
        for path in self._store.trust.marks():
            if not _is_whole(path):
                self._add("record", "", path, "is damaged: the mark of what is durable")
                self.is_trust_lost = True
                self._aside.append(path)

    def _held(self) -> None:
        for path in unreadable_leases(self._store):
            self._add("lease", "", path, "is damaged")
            self._leases.append(path)

    def _small_files(self) -> None:
        for name, reason in self._false_small_files():
            self._add("file", "", self._store.path / name, reason)

    def _false_small_files(self) -> Iterator[tuple[str, str]]:
        if _content(self._store.path / "oci-layout") != LAYOUT_FILE:
            yield "oci-layout", "is not that of an OCI image layout of version 1.0.0"
        if not re.fullmatch(rb"[0-9a-f]{32}\n", _content(self._store.path / "nonce") or b""):
            yield "nonce", "is damaged: what tells this store from others"

    def _mend_small_files(self) -> None:
        contents = {"oci-layout": LAYOUT_FILE, "nonce": secrets.token_hex(16).encode() + b"\n"}
        for name, _ in list(self._false_small_files()):
            path = self._store.path / name
            with translated(path, "write a file of the store"):
                mode = 0o644 if name == "oci-layout" else 0o600
                replace_file(path, contents[name], mode=mode)

    def _add(self, kind: str, digest: str, path: Path, reason: str) -> None:
        self.damaged.append(Damage(kind, digest, str(path), reason))


def _files(root: Path) -> Iterator[Path]:
    """Yield the record files below a folder (those of references lie one level deeper)."""
    with translated(root, "list the records"):
        found = [entry for entry in root.rglob("[!.]*") if entry.is_symlink() or not entry.is_dir()]
    yield from sorted(found)


def _is_whole(path: Path) -> bool:
    """Say whether a record is whole, or gone since it was listed."""
    try:
        whole = read_record_file(path) is not None
    except StorageError as error:
        if getattr(error.__cause__, "errno", None) in SCARCITY:
            raise
        return False
    return whole or (path.name != "layer.json" and not os.path.lexists(path))


def _content(path: Path) -> bytes | None:
    try:
        return read_regular(path, 4096)
    except (OSError, StorageError) as error:
        if getattr(error, "errno", None) in SCARCITY:
            raise
        return None


def _digest_of(text: str) -> str:
    """Return the digest whose hexadecimal digits these are, empty for anything else."""
    try:
        return str(Digest(f"{_ALGORITHMS.get(len(text), '')}:{text}"))
    except InvalidDigestError:
        return ""


def _digest_in(entry: dict[str, Any]) -> str:
    digest = entry.get("digest")
    return digest if isinstance(digest, str) else ""
