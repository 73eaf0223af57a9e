"""Damages one file of a store after the other and holds ``verify`` and ``pull`` to their promises.

A round: copy the template store, damage one file as a failing disk does (its times stay), look
whether ``verify --deep`` names it, mend with ``verify --repair`` and the pulls that this asks for,
and compare all with the template. What only unfinished work or a guess depends on need not be
named, but must hurt nobody.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
from typing import TYPE_CHECKING

from stowray.pipeline.collect import collect
from stowray.pipeline.digest import Digest
from stowray.pipeline.engine import PullOptions
from stowray.pipeline.errors import DigestMismatchError, StorageError
from stowray.pipeline.host_records import HostRecords
from stowray.pipeline.platform import Platform
from stowray.pipeline.recordfile import decode_record, encode_record
from stowray.pipeline.references import find_reference, pin_reference
from stowray.pipeline.rootfs import write_rootfs
from stowray.pipeline.source import parse_source
from stowray.pipeline.store import Store
from stowray.pipeline.verify import verify
from tests.support import scenarios
from tests.support.faults import copied
from tests.support.invariants import age, check_store, fingerprint, trees_of
from tests.support.scenarios import IMAGES_VARIABLE, engine, make_images, pull_all, reference
from tests.support.stores import FIRST_BOOT, pattern

if TYPE_CHECKING:
    from pathlib import Path

    from stowray.pipeline.verify import Report

NAMES = ("one", "two", "three")
# What need not be named: it is made anew, or proven, before anything is made of it.
UNNAMED = ("ingest", "locks", "capabilities.json", "hosts.json", "version", "nonce", "mounts")
_PROBED = ("capabilities.json", "nonce", "version")
HOWS = ("first bit", "a bit", "last bit", "cut", "emptied", "zeroed")
PARTIAL = pattern(3_000_000, 77)


class Flips:
    """The template store and its rounds; a context manager."""

    def __init__(self, folder: Path, *, plain: bool = False) -> None:
        """Make the template; with ``plain`` its trees are as a plain user keeps them."""
        self.folder = folder
        self.template = folder / "template" / "store"
        self.template.parent.mkdir()
        self._numbers = itertools.count(1)
        self._plain = plain
        self._before = os.environ.get(IMAGES_VARIABLE)
        os.environ[IMAGES_VARIABLE] = str(make_images(folder / "images"))
        if plain:
            _make_plain(self.template)
        pull_all(self.template)
        self.trees = trees_of(self.template)
        with Store.open(self.template, boot=FIRST_BOOT) as store:
            pin_reference(store, reference("two"))
            store.lease("mount 1", chain_ids=[], persistent=True, mount_point="/nowhere").close()
            ingest = store.acquire(Digest.of(PARTIAL), len(PARTIAL))
            assert ingest is not None
            with ingest:
                ingest.write(PARTIAL[:1_000_000])
                ingest.write_at(2_000_000, PARTIAL[2_000_000:2_500_000])
            HostRecords(store.path).learn("registry.example", 2, 1_000_000)
            self.roots = {name: self._root(store, name) for name in NAMES}
        self.state = self._state(self.template)

    def __enter__(self) -> Flips:
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            del os.environ[IMAGES_VARIABLE]
        else:
            os.environ[IMAGES_VARIABLE] = self._before

    def files(self) -> list[str]:
        """Return the names of all files of the template that have content."""
        paths = (path for path in sorted(self.template.rglob("*")) if not path.is_symlink())
        files = [path for path in paths if path.is_file() and path.stat().st_size]
        names = [str(path.relative_to(self.template)) for path in files]
        # Once these are probed or made anew, root is root again, and other trees count.
        return [name for name in names if not (self._plain and name in _PROBED)]

    def round(self, name: str, how: str, seed: int = 0) -> str:
        """Damage a file, mend it; an AssertionError says what is wrong. Return what came of it."""
        place = self.folder / f"round-{next(self._numbers)}"
        with copied(self.template, place) as path:
            if not damage(path / name, how, seed):
                return "unchanged"
            try:
                with Store.open(path, boot=FIRST_BOOT) as store:
                    report = verify(store, deep=True)
            except StorageError:
                assert name == "version", f"{name} stops everything"
                return "refused"
            named = [found for found in report.damaged if found.path.startswith(str(path / name))]
            kind = name.partition("/")[0]
            if kind not in UNNAMED:
                assert named, f"not named: {[found.to_dict() for found in report.damaged]}"
            self._mend(path)
            self._check(path)
            return "named" if report.damaged else "harmless"

    def _mend(self, path: Path) -> None:
        with Store.open(path, boot=FIRST_BOOT) as store:
            report = verify(store, deep=True, repair=True)
        assert not report.left, report.left
        self._pull_again(path, report)
        with Store.open(path, boot=FIRST_BOOT) as store:
            again = verify(store, deep=True)
            assert not again.damaged, f"not mended: {[found.to_dict() for found in again.damaged]}"

    def _pull_again(self, path: Path, report: Report) -> None:
        """Do as the command does after a repair."""
        with engine(path, FIRST_BOOT) as local:
            for name, platform, unpacked in report.references:
                options = PullOptions(
                    platform=Platform.parse(platform) if platform else None,
                    policy="missing",
                    unpack=unpacked,
                )
                local.pull(parse_source(name), options)

    def _check(self, path: Path) -> None:
        with Store.open(path, boot=FIRST_BOOT) as store:
            known = find_reference(store, reference("two"), "linux/amd64")
            assert known is not None and known.pinned, "the pin is lost"
            for name in NAMES:
                assert self._root(store, name) == self.roots[name], f"{name} IS ANOTHER TREE"
            ingest = store.acquire(Digest.of(PARTIAL), len(PARTIAL))
            assert ingest is not None
            with ingest:
                try:
                    ingest.write(PARTIAL[ingest.offset :])
                    ingest.commit()
                except DigestMismatchError:
                    # What lay beyond the prefix was damaged: all of it is fetched anew.
                    assert ingest.offset == 0
                    ingest.write(PARTIAL)
                    ingest.commit()
            assert store.has(Digest.of(PARTIAL), len(PARTIAL))
        scenarios.pull_all(path)
        for lease in (path / "leases").iterdir():
            lease.unlink()
        age(path)
        with Store.open(path, boot=FIRST_BOOT) as store:
            collect(store)
        check_store(path, self.trees, finished=True)
        found = self._state(path)
        assert found == self.state, f"differs in {sorted(found ^ self.state)}"

    def _root(self, store: Store, name: str) -> str:
        record = find_reference(store, reference(name), "linux/amd64")
        assert record is not None, f"{name} is forgotten"
        folder = self.folder / f"root-{next(self._numbers)}"
        folder.mkdir()
        try:
            write_rootfs(store, Digest(record.chain_id), folder / "root")
            return fingerprint(folder / "root")
        finally:
            shutil.rmtree(folder)

    def _state(self, store: Path) -> set[str]:
        folders = ("blobs/sha256", "layers", "snapshots", "refs")
        return {
            f"{folder}/{path.name}"
            for folder in folders
            for path in (store / folder).iterdir()
            if not path.name.startswith(".")
        }


def damage(path: Path, how: str, seed: int = 0) -> bool:
    """Damage a file and keep its mode and times; False when it is as it was."""
    status = path.stat()
    before = path.read_bytes()
    content = bytearray(before)
    if how == "cut":
        del content[len(content) // 2 :]
    elif how == "emptied":
        content.clear()
    elif how == "zeroed":
        content[:] = bytes(len(content))
    else:
        choice = random.Random(f"{path.name} {how} {seed}")
        place = {"first bit": 0, "last bit": len(content) - 1}.get(how)
        place = choice.randrange(len(content)) if place is None else place
        content[place] ^= 1 << choice.randrange(8)
    if content == before:
        return False
    path.chmod(0o600)
    with path.open("r+b") as stream:
        stream.write(content)
        stream.truncate()
    path.chmod(status.st_mode & 0o7777)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return True


def _make_plain(path: Path) -> None:
    """Make an empty store whose file system has no room for what only root can do."""
    with Store.open(path, boot=FIRST_BOOT) as store:
        assert store.capabilities
    record = path / "capabilities.json"
    content = decode_record(record.read_bytes())
    assert content is not None
    content["capabilities"]["privileged"] = False
    record.write_bytes(encode_record(content))
