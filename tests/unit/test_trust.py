from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.errors import StorageError
from stowray.pipeline.trust import Stamp, Trust
from tests.support.stores import FIRST_BOOT, NEXT_BOOT, OTHER_HOST

if TYPE_CHECKING:
    from pathlib import Path

    from stowray.pipeline.clock import Boot


class Now:
    """A clock that a test turns on."""

    def __init__(self) -> None:
        self.value = 1000

    def __call__(self) -> int:
        return self.value


@pytest.fixture
def now() -> Now:
    return Now()


def trust(workspace: Path, boot: Boot, now: Now) -> Trust:
    (workspace / "durable").mkdir(exist_ok=True)
    return Trust(workspace / "durable", boot, now)


def sync(judge: Trust, path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        judge.sync(descriptor)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("boot", [NEXT_BOOT, OTHER_HOST], ids=["next boot", "other host"])
def test_a_stamp_counts_on_its_boot_or_once_durable(workspace: Path, boot: Boot, now: Now) -> None:
    first = trust(workspace, FIRST_BOOT, now)
    stamp = first.stamp()
    assert first.trusts(stamp)
    assert not first.is_durable(stamp)
    assert not trust(workspace, boot, now).trusts(stamp)
    now.value = 2000
    sync(first, workspace)
    assert first.is_durable(stamp)
    assert trust(workspace, boot, now).trusts(stamp)
    now.value = 2001
    assert not trust(workspace, boot, now).trusts(first.stamp())


def test_the_same_boot_id_on_another_host_is_another_boot(workspace: Path, now: Now) -> None:
    stamp = trust(workspace, FIRST_BOOT, now).stamp()
    impostor = Stamp(stamp.boot_id, "host-z", stamp.at_ns)
    assert not trust(workspace, FIRST_BOOT, now).trusts(impostor)


def test_an_older_sync_takes_nothing_back(workspace: Path, now: Now) -> None:
    first = trust(workspace, FIRST_BOOT, now)
    now.value = 5000
    stamp = first.stamp()
    sync(first, workspace)
    now.value = 10
    sync(first, workspace)
    assert trust(workspace, NEXT_BOOT, now).trusts(stamp)


def test_after_a_failed_sync_nothing_before_it_is_trusted(workspace: Path, now: Now) -> None:
    first = trust(workspace, FIRST_BOOT, now)
    stamp = first.stamp()
    with pytest.raises(StorageError, match="bring the store to disk"):
        first.sync(-1)  # the kernel's answer to a descriptor that is none: EBADF
    assert not first.trusts(stamp)
    assert first.is_suspect(stamp)
    now.value += 1
    renewed = first.stamp()
    assert first.trusts(renewed)
    now.value += 1
    sync(first, workspace)
    later = trust(workspace, NEXT_BOOT, now)
    assert later.trusts(renewed)
    assert not later.trusts(stamp)


@pytest.mark.parametrize("content", [b"", b"\0" * 200, b"{}"])
def test_a_damaged_mark_makes_nothing_durable(workspace: Path, now: Now, content: bytes) -> None:
    first = trust(workspace, FIRST_BOOT, now)
    stamp = first.stamp()
    sync(first, workspace)
    (mark,) = (workspace / "durable").iterdir()
    mark.write_bytes(content)
    assert not trust(workspace, NEXT_BOOT, now).trusts(stamp)
    # Nor is it trusted on its own boot: the mark may have said that the disk failed.
    again = trust(workspace, FIRST_BOOT, now)
    assert not again.trusts(stamp)
    sync(again, workspace)
    now.value += 1
    fresh = again.stamp()
    sync(again, workspace)
    assert trust(workspace, NEXT_BOOT, now).trusts(fresh)
    assert not trust(workspace, FIRST_BOOT, now).trusts(stamp)


def test_no_stamp_is_never_trusted(workspace: Path, now: Now) -> None:
    judge = trust(workspace, FIRST_BOOT, now)
    assert not judge.trusts(None)
    assert not judge.is_durable(None)


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"boot_id": "b", "host": "h"},
        {"boot_id": "b", "host": "h", "at_ns": "1"},
        {"boot_id": "b", "host": "h", "at_ns": True},
        {"boot_id": 1, "host": "h", "at_ns": 1},
    ],
)
def test_what_is_no_stamp(value: object) -> None:
    assert Stamp.parse(value) is None


def test_stamps_survive_their_record() -> None:
    stamp = Stamp("b", "h", 7)
    assert Stamp.parse(stamp.payload()) == stamp
