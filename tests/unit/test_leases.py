from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import InvalidDigestError, StorageError
from stowray.pipeline.leases import end_mount_lease, leases
from stowray.pipeline.store import Store
from tests.support.stores import (
    FIRST_BOOT,
    NEXT_BOOT,
    OTHER_HOST,
    kill,
    listen,
    run,
    run_killed,
    start,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ONE, TWO = Digest.of(b"1"), Digest.of(b"2")

HOLD = """
store = Store.open(sys.argv[1], boot=Boot(sys.argv[2], sys.argv[3]))
lease = store.lease("pull", [Digest.of(b"1")], persistent=sys.argv[4] == "mount", mount_point="/m")
say("held")
sys.stdin.read()
"""


@pytest.fixture
def store(workspace: Path) -> Iterator[Store]:
    with Store.open(workspace / "store", boot=FIRST_BOOT) as store:
        yield store


def files(store: Store) -> list[str]:
    return os.listdir(store.path / "leases")


def test_a_lease_holds_until_it_is_closed(store: Store) -> None:
    with store.lease("pull", [ONE], [str(TWO)]) as lease:
        (held,) = leases(store)
        assert (held.holder, held.digests, held.chain_ids) == ("pull", {ONE}, {TWO})
        lease.add([TWO])
        lease.add(chain_ids=[ONE])
        lease.add([TWO])
        (held,) = leases(store)
        assert (held.digests, held.chain_ids) == ({ONE, TWO}, {ONE, TWO})
    lease.close()
    assert leases(store) == []
    assert files(store) == []


def test_what_is_no_digest_is_not_leased(store: Store) -> None:
    with pytest.raises(InvalidDigestError):
        store.lease("pull", [ONE], ["nonsense"])
    assert files(store) == []


def test_a_dead_holder_holds_nothing(store: Store) -> None:
    process = start(HOLD, store.path, FIRST_BOOT.boot_id, FIRST_BOOT.host, "pull")
    listen(process, "held")
    assert len(leases(store, sweep=True)) == 1
    kill(process)
    assert leases(store) == []
    assert len(files(store)) == 1
    assert leases(store, sweep=True) == []
    assert files(store) == []


def test_a_half_made_lease_is_swept(store: Store) -> None:
    code = 'Store.open(sys.argv[1]).lease("pull", [Digest.of(b"1")])'
    run_killed(code, store.path, failpoint="lease-before-rename")
    assert len(files(store)) == 1
    assert leases(store, sweep=True) == []
    assert files(store) == []


@pytest.mark.parametrize(
    ("boot", "held"),
    [
        pytest.param(FIRST_BOOT, True, id="same boot"),
        pytest.param(NEXT_BOOT, False, id="after a reboot"),
        pytest.param(OTHER_HOST, True, id="another host cannot know"),
    ],
)
def test_a_mount_holds_until_it_is_removed_or_the_host_reboots(
    store: Store, boot: object, held: bool
) -> None:
    code = HOLD.replace("sys.stdin.read()", "lease.close()")
    run(code, store.path, FIRST_BOOT.boot_id, FIRST_BOOT.host, "mount")
    with Store.open(store.path, boot=boot) as other:  # type: ignore[arg-type]
        found = leases(other, sweep=True)
        assert [(lease.mount_point, lease.persistent) for lease in found] == [("/m", True)] * held
        assert len(files(store)) == int(held)
        assert end_mount_lease(other, "/other") == 0
        assert end_mount_lease(other, "/m") == int(held)
        assert files(store) == []


def test_a_persistent_lease_can_be_removed_by_its_maker(store: Store) -> None:
    lease = store.lease("mount", [ONE], persistent=True, mount_point="/m")
    lease.remove()
    assert files(store) == []
    lease = store.lease("mount", [ONE], persistent=True, mount_point="/m")
    lease.close()
    assert len(leases(store)) == 1
    lease.remove()
    assert files(store) == []


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"{}"])
def test_a_lease_in_force_that_cannot_be_read_stops_the_collector(
    store: Store, persistent: bool, content: bytes
) -> None:
    with store.lease("pull", [ONE], persistent=persistent) as lease:
        lease.path.write_bytes(content)
        with pytest.raises(StorageError, match="verify --repair") as caught:
            leases(store)
        assert caught.value.path == str(lease.path)
    if not persistent:
        assert leases(store) == []


def test_a_dead_lease_that_cannot_be_read_is_swept(store: Store) -> None:
    (store.path / "leases" / "00.json").write_bytes(b"")
    assert leases(store, sweep=True) == []
    assert files(store) == []


def test_leases_leave_no_descriptors(store: Store) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with store.lease("pull", [ONE]) as lease:
            lease.add([TWO])
            leases(store, sweep=True)
    assert len(os.listdir("/proc/self/fd")) == before
