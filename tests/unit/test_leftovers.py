from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.leftovers import sweep_leftovers
from stowray.pipeline.locks import open_lock, try_lock
from stowray.pipeline.store import Store
from tests.support.stores import kill, listen, start, stow

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DAY = 86400.0


@pytest.fixture
def store(workspace: Path) -> Iterator[Store]:
    with Store.open(workspace / "store") as store:
        stow(store, "a:1", "base")
        yield store


def age(path: Path, seconds: float) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def names(store: Store) -> list[str]:
    return sorted(str(path.relative_to(store.path)) for path in store.path.rglob("*"))


@pytest.mark.parametrize(
    "folder", ["", "refs/*", "sources/sha256", "sources/sha512", "snapshots", "durable"]
)
def test_old_temporary_files_go(store: Store, folder: str) -> None:
    before = names(store)
    for directory in store.path.glob(folder) if folder else [store.path]:
        (directory / ".tmp-1234").write_bytes(b"half")
        age(directory / ".tmp-1234", DAY)
    assert sweep_leftovers(store) == 1
    assert names(store) == before


def test_old_probes_go(store: Store) -> None:
    probe = store.path / ".probe-1234"
    (probe / "deep").mkdir(parents=True)
    age(probe, DAY)
    assert sweep_leftovers(store) == 1
    assert not probe.exists()


@pytest.mark.parametrize("seconds", [0.0, -DAY], ids=["young", "clock set back"])
def test_young_ones_stay(store: Store, seconds: float) -> None:
    (store.path / ".tmp-1234").write_bytes(b"half")
    age(store.path / ".tmp-1234", seconds)
    assert sweep_leftovers(store) == 0


def test_locked_ones_stay_however_old(store: Store) -> None:
    path = store.path / "snapshots" / ".tmp-1234"
    descriptor = open_lock(path)
    assert try_lock(descriptor, shared=True)
    age(path, DAY)
    assert sweep_leftovers(store) == 0
    os.close(descriptor)
    assert sweep_leftovers(store) == 1


def test_lock_files_of_the_dead_go_and_those_of_the_living_stay(store: Store) -> None:
    code = """
with Store.open(sys.argv[1]).lock("commit-" + "a" * 64, wait_seconds=5):
    say("held")
    sys.stdin.read()
"""
    before = names(store)
    process = start(code, store.path)
    listen(process, "held")
    assert sweep_leftovers(store) == 0
    kill(process)
    assert sweep_leftovers(store) == 1
    assert names(store) == before
