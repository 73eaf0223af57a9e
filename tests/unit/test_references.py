from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import StorageError
from stowray.pipeline.leases import LOCK
from stowray.pipeline.records import write_record
from stowray.pipeline.references import (
    derive_index,
    pin_reference,
    record_path,
    references,
    remove_records,
    require_references,
)
from stowray.pipeline.store import Store
from tests.support.stores import FIRST_BOOT, NEXT_BOOT, record, run_killed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ONE, TWO = Digest.of(b"1"), Digest.of(b"2")

RECORD = """
from stowray.pipeline.references import remove_reference
from tests.support.stores import record
store = Store.open(sys.argv[1])
if sys.argv[2] == "record":
    store.record_reference(record(Digest.of(b"2"), sys.argv[3]))
else:
    remove_reference(store, sys.argv[3])
"""


@pytest.fixture
def store(workspace: Path) -> Iterator[Store]:
    with Store.open(workspace / "store", boot=FIRST_BOOT) as store:
        yield store


def index(store: Store) -> list[tuple[str, str]]:
    document: dict[str, Any] = json.loads((store.path / "index.json").read_text())
    return [
        (entry["annotations"]["org.opencontainers.image.ref.name"], entry["digest"])
        for entry in document["manifests"]
    ]


def test_images_are_recorded_found_listed_and_forgotten(store: Store) -> None:
    amd = record(ONE, "docker.io/library/a:1")
    arm = record(TWO, "docker.io/library/a:1", "linux/arm64")
    other = record(TWO, "docker.io/library/b:1")
    for known in (other, arm, amd):
        store.record_reference(known)
    assert store.find_reference("docker.io/library/a:1", "linux/arm64") == arm
    assert store.find_reference("docker.io/library/a:1", "linux/s390x") is None
    assert store.find_reference("docker.io/library/c:1", "linux/amd64") is None
    assert store.references() == [amd, arm, other]
    assert references(store, "docker.io/library/a:1") == [amd, arm]
    assert store.remove_reference("docker.io/library/a:1", "linux/arm64") == 1
    assert store.remove_reference("docker.io/library/a:1", "linux/arm64") == 0
    assert store.references() == [amd, other]
    assert store.remove_reference("docker.io/library/a:1") == 1
    assert store.references() == [other]
    assert index(store) == [("docker.io/library/b:1", TWO)]
    assert remove_records(store, [other]) == 1
    assert index(store) == []
    assert os.listdir(store.path / "refs") == []


def test_a_moved_tag_replaces_its_record(store: Store) -> None:
    store.record_reference(record(ONE))
    store.record_reference(record(TWO, created=2.0))
    (known,) = store.references()
    assert known.manifest == TWO
    assert index(store) == [("docker.io/library/debian:latest", TWO)]


def test_the_same_image_again_only_notes_its_use(store: Store) -> None:
    first = record(ONE, created=1.0)
    store.record_reference(first)
    path = record_path(store, first.reference, first.platform)
    os.utime(path, (0, 0))
    before = (store.path / "index.json").stat().st_ino
    store.record_reference(replace(first, created=2.0))
    assert store.references() == [first]
    assert path.stat().st_mtime > 0
    assert (store.path / "index.json").stat().st_ino == before


def test_a_pin_survives_the_next_pull(store: Store) -> None:
    store.record_reference(record(ONE))
    assert pin_reference(store, "docker.io/library/debian:latest") == 1
    store.record_reference(record(TWO))
    assert [known.pinned for known in store.references()] == [True]
    assert pin_reference(store, "docker.io/library/debian:latest", pinned=False) == 1
    assert [known.pinned for known in store.references()] == [False]
    assert pin_reference(store, "docker.io/library/other:latest") == 0


@pytest.mark.parametrize("action", ["record", "remove"])
@pytest.mark.parametrize("failpoint", ["references-changed", "index-derived"])
def test_a_crash_leaves_no_stale_index(store: Store, action: str, failpoint: str) -> None:
    names = ["docker.io/library/a:1", "docker.io/library/b:1", "docker.io/library/c:1"]
    for name in names[:2]:
        store.record_reference(record(ONE, name))
    changed = names[2] if action == "record" else names[0]
    run_killed(RECORD, store.path, action, changed, failpoint=failpoint)
    store.record_reference(record(ONE, "docker.io/library/z:1"))
    assert index(store) == [(known.reference, known.manifest) for known in store.references()]
    assert (changed in dict(index(store))) == (action == "record")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"manifests":[{"digest":1}]}'])
def test_a_damaged_index_is_derived_anew(store: Store, content: bytes) -> None:
    store.record_reference(record(ONE, "docker.io/library/a:1"))
    (store.path / "index.json").write_bytes(content)
    store.record_reference(record(TWO, "docker.io/library/b:1"))
    assert index(store) == [("docker.io/library/a:1", ONE), ("docker.io/library/b:1", TWO)]
    (store.path / "index.json").write_bytes(content)
    derive_index(store)
    assert len(index(store)) == 2


@pytest.mark.parametrize("content", [b"", b"\0" * 500, b"{}"])
def test_a_damaged_record_is_absent_but_stops_whoever_must_know_all(
    store: Store, content: bytes
) -> None:
    known = record(ONE)
    store.record_reference(known)
    store.record_reference(record(ONE, "docker.io/library/a:1"))
    path = record_path(store, known.reference, known.platform)
    path.write_bytes(content)
    assert store.find_reference(known.reference, known.platform) is None
    assert len(store.references()) == 1
    with pytest.raises(StorageError, match="pull its image again") as caught:
        require_references(store)
    assert caught.value.path == str(path)
    store.record_reference(known)
    assert len(require_references(store)) == 2


def test_a_damaged_record_can_be_forgotten(store: Store) -> None:
    known = record(ONE)
    store.record_reference(known)
    record_path(store, known.reference, known.platform).write_bytes(b"")
    assert store.remove_reference(known.reference) == 1
    assert require_references(store) == []


def test_records_outlive_a_reboot(store: Store) -> None:
    known = record(ONE)
    store.record_reference(known)
    with Store.open(store.path, boot=NEXT_BOOT) as other:
        assert other.references() == [known]


def test_a_pin_waits_for_a_collector_and_brings_nothing_back(store: Store) -> None:
    kept = record(ONE, "docker.io/library/a:1")
    store.record_reference(kept)
    with ThreadPoolExecutor(1) as pool:
        with store.lock(LOCK, wait_seconds=60.0):
            # As a collector that has chosen the image already.
            pinning = pool.submit(pin_reference, store, kept.reference)
            wait([pinning], timeout=0.3)
            remove_records(store, [kept])
        assert pinning.result(60) == 0
    assert references(store) == []
    assert index(store) == []


def test_a_pin_that_comes_while_an_image_is_recorded_anew_stays(store: Store) -> None:
    known = record(ONE, "docker.io/library/a:1")
    moved = record(TWO, "docker.io/library/a:1")
    store.record_reference(known)
    with ThreadPoolExecutor(1) as pool:
        with store.lock("refs", wait_seconds=60.0):
            recording = pool.submit(store.record_reference, moved)
            wait([recording], timeout=0.3)
            path = record_path(store, known.reference, known.platform)
            write_record(path, replace(known, pinned=True).payload(), store.trust.stamp())
        recording.result(60)
    assert [(each.manifest, each.pinned) for each in references(store)] == [(TWO, True)]


def test_threads_lose_no_image(store: Store) -> None:
    def work(first: int) -> None:
        for number in range(first, first + 8):
            store.record_reference(record(ONE, f"docker.io/library/a:{number}"))

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 8, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.references()) == len(index(store)) == 24
