"""A disk that is full for real: a small tmpfs under the store."""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.recordfile import encode_record
from tests.support.command import Stowray
from tests.support.invariants import check_store, read_record
from tests.support.registry import FakeRegistry, incompressible
from tests.support.small import small_tar

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.root

MIB = 1 << 20
RESERVE = 64 * MIB


@contextlib.contextmanager
def small_disk(path: Path, size: int, inodes: int = 10_000) -> Iterator[Path]:
    path.mkdir()
    options = f"size={size},nr_inodes={inodes}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as made:
        made.add_image("a/small", "1", [small_tar({"f": incompressible(MIB)})])
        made.add_image("a/large", "1", [small_tar({"f": incompressible(30 * MIB, 2)})])
        many = {f"f{number}": b"1" for number in range(2000)}
        made.add_image("a/many", "1", [small_tar(many)])
        yield made


def command(disk: Path, home: Path) -> Stowray:
    return Stowray(disk / "store", home)


def test_what_has_no_room_is_refused_before_a_byte_and_says_how_much_it_needs(
    workspace: Path, home: Path, registry: FakeRegistry
) -> None:
    with small_disk(workspace / "disk", RESERVE + 20 * MIB) as disk:
        stowray = command(disk, home)
        stowray.run("pull", f"{registry.host}/a/small:1")
        answer = stowray.attempt("pull", f"{registry.host}/a/large:1")
        assert answer.status == 7
        assert "more bytes" in answer.stderr and "reserve" in answer.stderr
        assert "gc" in answer.stderr
        check_store(stowray.store)
        # Usable at once, for what has room.
        stowray.run("pull", f"{registry.host}/a/small:1")
        stowray.run("verify")


def test_a_disk_that_others_fill_ends_a_pull_in_words_and_it_goes_on_later(
    workspace: Path, home: Path, registry: FakeRegistry
) -> None:
    # Room for the blob and not for its tree: a plan cannot know what a layer unpacks to.
    with small_disk(workspace / "disk", RESERVE + 90 * MIB) as disk:
        stowray = command(disk, home)
        stowray.run("pull", f"{registry.host}/a/small:1")
        ballast = disk / "ballast"
        with ballast.open("wb") as stream:
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            os.posix_fallocate(stream.fileno(), 0, free - RESERVE - 32 * MIB)
        answer = stowray.attempt("pull", f"{registry.host}/a/large:1")
        assert answer.status == 7, answer.stderr
        assert "full" in answer.stderr or "reserve" in answer.stderr
        check_store(stowray.store)
        stowray.run("pull", f"{registry.host}/a/small:1")
        ballast.unlink()
        stowray.run("pull", f"{registry.host}/a/large:1")
        check_store(stowray.store)


def test_no_inodes_left_is_a_full_disk(workspace: Path, home: Path, registry: FakeRegistry) -> None:
    with small_disk(workspace / "disk", 4 * RESERVE, inodes=600) as disk:
        stowray = command(disk, home)
        answer = stowray.attempt("pull", f"{registry.host}/a/many:1")
        assert answer.status == 7
        assert "full" in answer.stderr
        check_store(stowray.store)
        stowray.run("pull", f"{registry.host}/a/small:1")


def test_a_full_disk_can_be_emptied(workspace: Path, home: Path, registry: FakeRegistry) -> None:
    with small_disk(workspace / "disk", RESERVE + 40 * MIB) as disk:
        stowray = command(disk, home)
        stowray.run("pull", f"{registry.host}/a/small:1")
        with (disk / "ballast").open("wb") as stream, contextlib.suppress(OSError):
            while True:
                stream.write(bytes(64 << 10))
                stream.flush()
        # After a reboot too, when what the file system can do would be tried out again.
        found = read_record(stowray.store / "capabilities.json")
        assert found is not None
        found["key"]["boot_id"] = "of another boot"
        data = encode_record({name: found[name] for name in ("key", "capabilities")})
        with (stowray.store / "capabilities.json").open("r+b") as stream:
            stream.write(data)
            stream.truncate()
        before = os.statvfs(disk).f_bfree
        stowray.attempt("rm", f"{registry.host}/a/small:1")
        stowray.run("gc")
        assert os.statvfs(disk).f_bfree > before
        check_store(stowray.store)
