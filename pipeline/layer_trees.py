"""The layer trees of a store: ``layers/<format>-<diff>[-<parent chain>]/{tree,layer.json}``.

Invariant: a tree bears its name only when it is complete and its diff ID is proven; until then it
lies in a locked ``.tmp-`` directory that any later run may remove once its writer is gone. A tree
is used only as long as its stamp is trusted. Each lies below a directory of mode 0700, so that no
other user reaches a setuid file or a device in it (CVE-2021-41103). Trees made as root and as a
plain user differ in what they can hold and are never shared: the format is part of the name.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import InvalidDigestError, StorageError
from stowray.pipeline.failpoint import failpoint
from stowray.pipeline.files import TEMPORARY, make_directory, translated
from stowray.pipeline.locks import is_current, try_lock
from stowray.pipeline.records import read_record, write_record
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stowray.pipeline.layer import Staged
    from stowray.pipeline.store import Store

_VERSION = 1
# A layer may have millions of odd entries; a person reads the first few.
_MOST_WARNINGS = 100
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What is known of a finished tree; ``notes`` is what only its parent chain can settle.

    ``shared`` when some chain uses the tree as it is in spite of its notes: it must not be changed
    any more. ``blob`` is the one it was staged from, if that was proven by then.
    """

    diff_id: Digest
    parent: Digest | None
    tar_size: int
    unpacked_size: int
    entries: int
    notes: dict[str, Any]
    warnings: tuple[str, ...] = ()
    shared: bool = False
    blob: Digest | None = None

    @classmethod
    def of(cls, staged: Staged, parent: Digest | None, blob: Digest | None = None) -> LayerRecord:
        """Return the record of a layer that was just staged: alone, or above ``parent``."""
        return cls(
            diff_id=staged.diff_id,
            parent=parent,
            tar_size=staged.tar_size,
            unpacked_size=staged.unpacked_size,
            entries=staged.entries,
            notes=staged.notes,
            warnings=staged.warnings[:_MOST_WARNINGS],
            blob=blob,
        )

    def staged(self) -> Staged:
        """Return what the stage reported."""
        from stowray.pipeline.layer import Staged

        return Staged(
            diff_id=self.diff_id,
            tar_size=self.tar_size,
            unpacked_size=self.unpacked_size,
            entries=self.entries,
            notes=self.notes,
        )

    def payload(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {
            "version": _VERSION,
            "diff_id": self.diff_id,
            "parent": self.parent,
            "tar_size": self.tar_size,
            "unpacked_size": self.unpacked_size,
            "entries": self.entries,
            "notes": self.notes,
            "warnings": list(self.warnings),
            "shared": self.shared,
            "blob": self.blob,
        }

    @classmethod
    def parse(cls, payload: dict[str, Any]) -> LayerRecord | None:
        """Return the record that :meth:`payload` described; None for any other version."""
        if payload.get("version") != _VERSION:
            return None
        try:
            parent, blob = payload["parent"], payload.get("blob")
            return cls(
                diff_id=Digest(str(payload["diff_id"])),
                parent=None if parent is None else Digest(str(parent)),
                tar_size=int(payload["tar_size"]),
                unpacked_size=int(payload["unpacked_size"]),
                entries=int(payload["entries"]),
                notes=dict(payload["notes"]),
                warnings=tuple(map(str, payload["warnings"])),
                shared=bool(payload.get("shared")),
                blob=None if blob is None else Digest(str(blob)),
            )
        except (KeyError, TypeError, ValueError, InvalidDigestError):
            return None


class Workspace:
    """A private directory in which a tree is made; ``publish`` gives it its name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tree = path / "tree"
        self.published = False


class LayerTrees:
    """Names, finds, publishes and drops layer trees of one format."""

    def __init__(self, store: Store, privileged: bool) -> None:
        self._store = store
        self.privileged = privileged
        self.format = "o1" if privileged else f"u1.{_outer_user()}"
        self.directory = store.path / "layers"

    def alone(self, diff_id: Digest) -> str:
        """Return the directory name of a layer as it is staged alone."""
        return f"{self.format}-{diff_id.encoded}"

    def settled(self, diff_id: Digest, parent: Digest | None) -> str:
        """Return the directory name of a layer that depends on ``parent``, or on nothing below."""
        # A base layer may have a sha512 chain ID: 64 digits of it name the parent well enough and
        # keep the name within 255 bytes.
        below = "base" if parent is None else parent.encoded[:64]
        return f"{self.alone(diff_id)}-{below}"

    def owns(self, name: str) -> bool:
        """Return whether ``name`` is that of a tree of this format."""
        return name.startswith(f"{self.format}-") and "/" not in name

    def tree(self, name: str) -> Path:
        """Return the path of a layer's tree."""
        return self.directory / name / "tree"

    def find(self, name: str) -> LayerRecord | None:
        """Return the record of a tree that is there, complete and trusted."""
        record = self._read(self.directory / name, trusted=True)
        if record is None:
            return None
        with translated(self.tree(name), "look at a layer tree"):
            return record if self.tree(name).is_dir() else None

    @property
    def reserve_bytes(self) -> int:
        """Bytes of the store's file system that stay free for others."""
        return self._store.reserve_bytes

    def check_reserve(self, tree: Path) -> None:
        """Raise ``StorageError`` when a tree that grows has come to the room kept in reserve."""
        with translated(tree, "ask for free space"):
            system = os.statvfs(tree)
        free = system.f_bavail * system.f_frsize
        if system.f_blocks and free < self.reserve_bytes:
            raise StorageError(
                str(self._store.path),
                f"{free} bytes are free while a layer is unpacked and "
                f"{self.reserve_bytes} stay in reserve: free space (`stowray gc`) or choose "
                "another --store",
            )

    def names(self) -> list[str]:
        """Return the names of all trees of this format, trusted or not."""
        with translated(self.directory, "list the layer trees"):
            try:
                return sorted(name for name in os.listdir(self.directory) if self.owns(name))
            except FileNotFoundError:
                return []

    @contextmanager
    def workspace(self) -> Iterator[Workspace]:
        """Give a new, locked workspace with an empty ``tree``; what is not published is removed."""
        while True:
            path = self._temporary()
            with translated(path, "make a directory for a layer"):
                make_directory(self.directory)
                path.mkdir(0o700)
                try:
                    descriptor = os.open(path, _OPEN_DIRECTORY)
                except FileNotFoundError:
                    continue
                try:
                    if try_lock(descriptor) and is_current(descriptor, path):
                        break
                except BaseException:
                    os.close(descriptor)
                    raise
            # A collector took it for a leftover in the instant before the lock.
            os.close(descriptor)
        with self._held(Workspace(path), descriptor) as workspace:
            with translated(path, "make a directory for a layer"):
                # Not readable by others while it grows; the root's own mode is set by the layer.
                workspace.tree.mkdir(0o700)
            yield workspace

    @contextmanager
    def take(self, name: str) -> Iterator[tuple[Workspace, LayerRecord] | None]:
        """Take a published tree out of sight to change it; None when another has taken it."""
        source = self.directory / name
        try:
            descriptor = os.open(source, _OPEN_DIRECTORY)
        except FileNotFoundError:
            yield None
            return
        except OSError as error:
            raise StorageError(str(source), f"cannot be opened: {error.strerror}") from error
        path = self._temporary()
        try:
            # Locked before it is renamed, so that no collector ever sees it as a leftover.
            moved = try_lock(descriptor) and _rename(source, path)
        except BaseException:
            os.close(descriptor)
            raise
        if not moved:
            os.close(descriptor)
            yield None
            return
        with self._held(Workspace(path), descriptor) as workspace:
            record = self._read(path, trusted=True)
            yield None if record is None else (workspace, record)

    def publish(self, workspace: Workspace, name: str, record: LayerRecord) -> None:
        """Give a finished tree its name; a tree that has the name already wins."""
        stamp = self._store.trust.stamp()
        write_record(workspace.path / "layer.json", record.payload(), stamp)
        failpoint("layer-before-rename")
        target = self.directory / name
        try:
            with translated(target, "publish a layer"):
                os.rename(workspace.path, target)
        except StorageError:
            # rename(2) refuses a directory that is not empty: somebody else published this layer.
            if self.find(name) is None:
                raise
            return
        workspace.published = True
        failpoint("layer-after-rename")

    def share(self, name: str, record: LayerRecord) -> LayerRecord:
        """Note that a chain uses the tree ``name`` as it is; return its record as it is then."""
        path = self.directory / name / "layer.json"
        known = read_record(path, self._store.trust)
        if known is None:
            raise StorageError(str(path), "was removed by another program")
        shared = replace(record, shared=True)
        # Of when the tree was complete, which this does not change.
        write_record(path, shared.payload(), known.stamp)
        failpoint("layer-shared")
        return shared

    def drop(self, name: str) -> None:
        """Remove a tree; out of sight at once, whatever happens during the removal."""
        with self.take(name):
            # What is taken and not published again is removed.
            pass

    def sweep(self) -> int:
        """Remove the workspaces whose writers are gone; return how many there were."""
        from stowray.pipeline.removal import remove_tree

        removed = 0
        with translated(self.directory, "list the layer trees"):
            if not self.directory.is_dir():
                return 0
            names = [name for name in os.listdir(self.directory) if name.startswith(TEMPORARY)]
        for name in names:
            try:
                descriptor = os.open(self.directory / name, _OPEN_DIRECTORY)
            except OSError:
                # Published or removed since the listing, or no directory: not a workspace.
                continue
            try:
                if try_lock(descriptor):
                    remove_tree(self.directory / name)
                    removed += 1
            finally:
                os.close(descriptor)
        return removed

    @contextmanager
    def _held(self, workspace: Workspace, descriptor: int) -> Iterator[Workspace]:
        from stowray.pipeline.removal import remove_tree

        try:
            yield workspace
        finally:
            try:
                if not workspace.published:
                    remove_tree(workspace.path)
            finally:
                os.close(descriptor)

    def _temporary(self) -> Path:
        return self.directory / f"{TEMPORARY}{os.urandom(8).hex()}"

    def _read(self, path: Path, *, trusted: bool) -> LayerRecord | None:
        record = read_record(path / "layer.json", self._store.trust)
        if record is None or (trusted and not record.trusted):
            return None
        return LayerRecord.parse(record.payload)


def _outer_user() -> int:
    """Return this user's ID outside of the user namespace (user_namespaces(7), ``uid_map``)."""
    user = os.geteuid()
    if user != 0:
        return user
    for line in Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines():
        inside, outside, count = map(int, line.split())
        if inside <= user < inside + count:
            return outside + user - inside
    return user


def _rename(source: Path, target: Path) -> bool:
    """Rename; False when ``source`` is gone."""
    try:
        os.rename(source, target)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageError(str(source), f"cannot be moved aside: {error.strerror}") from error
    return True
