"""What a plain user's tree cannot hold is read back exactly, and damage is noticed."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.entry_list import (
    Record,
    entry_list_path,
    read_entry_list,
    write_entry_list,
)
from stowray.pipeline.errors import StorageError

if TYPE_CHECKING:
    from pathlib import Path

RECORDS = {
    b"dev/null": Record(stat.S_IFCHR, 0o666, 0, 5, 10**18, (1, 3), {}),
    b"caf\xe9": Record(
        stat.S_IFREG, 0, 4294967294, 7, -1, (0, 0), {b"security.capability": b"\0\xff"}
    ),
    b"": Record(stat.S_IFDIR, 0o1777, 1, 1, 2**70, (0, 0), {}),
}


def test_records_come_back(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    assert read_entry_list(tree) == {}
    write_entry_list(tree, RECORDS.items())
    assert read_entry_list(tree) == RECORDS


def test_the_list_lies_beside_its_tree(tmp_path: Path) -> None:
    assert entry_list_path(tmp_path / "tree").parent == tmp_path


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-3], id="cut off"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"\x81\xa7version\x63" + data[10:], id="other version"),
        pytest.param(lambda data: data[:12] + b"\xc1" * 8 + data[20:], id="garbage"),
        pytest.param(lambda data: data + b"\x91\x01", id="short record"),
    ],
)
def test_damage_is_a_storage_error(tmp_path: Path, damage: object) -> None:
    tree = tmp_path / "tree"
    write_entry_list(tree, RECORDS.items())
    path = entry_list_path(tree)
    assert callable(damage)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StorageError):
        read_entry_list(tree)


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    entry_list_path(tmp_path / "tree").symlink_to("/etc/hostname")
    with pytest.raises(StorageError):
        read_entry_list(tmp_path / "tree")
