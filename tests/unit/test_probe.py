from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.errors import StorageError
from stowray.pipeline.probe import Capabilities, network_kind, probe
from stowray.pipeline.recordfile import encode_record, read_record_file
from stowray.pipeline.store import Store
from tests.support.plain_user import plain_directory, run_plain
from tests.support.stores import FIRST_BOOT, NEXT_BOOT

if TYPE_CHECKING:
    from pathlib import Path

ALL = Capabilities(
    privileged=True,
    flock=True,
    rename=True,
    symlinks=True,
    hard_links=True,
    case_sensitive=True,
    user_xattrs=True,
    trusted_xattrs=True,
    devices=True,
    whiteouts=True,
    same_device=True,
    network="",
)


@pytest.mark.parametrize("privileged", [True, False], ids=["root", "plain user"])
@pytest.mark.parametrize(
    ("lost", "text", "needed_by"),
    [
        ("flock", "file locks", (True, False)),
        ("rename", "atomic rename", (True, False)),
        ("symlinks", "symbolic links", (True, False)),
        ("case_sensitive", "only in case", (True, False)),
        ("whiteouts", "whiteout devices", (True, False)),
        ("same_device", "one file system", (True, False)),
        ("user_xattrs", r"user\.\*", (False,)),
        ("hard_links", "", ()),
    ],
)
def test_one_sentence_names_what_is_missing(
    lost: str, text: str, needed_by: tuple[bool, ...], privileged: bool, workspace: Path
) -> None:
    found = replace(ALL, privileged=privileged, **{lost: False})  # type: ignore[arg-type]
    if privileged in needed_by:
        with pytest.raises(StorageError, match=f"lacks .*{text}"):
            found.require(workspace)
    else:
        found.require(workspace)


def test_the_sentence_names_everything_and_the_kind_of_file_system(workspace: Path) -> None:
    found = replace(ALL, flock=False, symlinks=False, network="CIFS")
    with pytest.raises(StorageError, match=r"\(CIFS\).* lacks file locks .*, symbolic"):
        found.require(workspace)


def test_a_probe_leaves_nothing_behind(workspace: Path) -> None:
    found = probe(workspace)
    assert list(workspace.iterdir()) == []
    assert found.privileged == (os.geteuid() == 0)
    assert found.missing() == []
    assert found.network == network_kind(workspace) == ""


@pytest.mark.root
def test_parts_on_other_file_systems_are_noticed(workspace: Path) -> None:
    (workspace / "ingest").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", workspace / "ingest"], check=True)
    try:
        with pytest.raises(StorageError, match="one file system for ingest/"):
            Store.open(workspace)
    finally:
        subprocess.run(["umount", workspace / "ingest"], check=True)


@pytest.mark.root
def test_a_file_system_without_what_is_needed_is_refused(workspace: Path) -> None:
    subprocess.run(["mount", "-t", "ramfs", "ramfs", workspace], check=True)
    try:
        with pytest.raises(StorageError, match=r"lacks user\.\* extended attributes: choose"):
            Store.open(workspace / "store")
        # Nothing but the directory was made.
        assert list((workspace / "store").iterdir()) == []
    finally:
        subprocess.run(["umount", workspace], check=True)


@pytest.mark.root
def test_root_without_its_rights_keeps_trees_as_a_plain_user(workspace: Path) -> None:
    code = """
import sys
from pathlib import Path
from stowray.pipeline.store import Store
print(Store.open(Path(sys.argv[1])).capabilities.privileged)
"""
    # Root of a user namespace: what root of an ordinary container is, too.
    command = ["unshare", "-r", sys.executable, "-c", code, str(workspace / "store")]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    assert answer.stdout.strip() == "False"


def test_a_plain_user_can_have_a_store() -> None:
    code = """
from stowray.pipeline.store import Store
from stowray.pipeline.digest import Digest
import stowray.pipeline.probe, stowray.pipeline.layout, stowray.pipeline.references
import encodings.ascii, sys
become_plain()
store = Store.open(sys.argv[1] + "/store")
store.put_blob(Digest.of(b"x"), b"x")
print(store.capabilities.privileged, store.capabilities.devices, store.capabilities.whiteouts)
"""
    with plain_directory() as folder:
        assert run_plain(code, folder).split() == ["False", "False", "True"]


class TestCache:
    def test_a_probe_is_done_once_per_boot(self, workspace: Path) -> None:
        path = workspace / "store"
        Store.open(path, boot=FIRST_BOOT).close()
        record = path / "capabilities.json"
        content = read_record_file(record)
        assert content is not None
        content["capabilities"]["hard_links"] = False
        record.write_bytes(encode_record(content))
        with Store.open(path, boot=FIRST_BOOT) as store:
            assert not store.capabilities.hard_links
        with Store.open(path, boot=NEXT_BOOT) as store:
            assert store.capabilities.hard_links

    @pytest.mark.parametrize("content", [b"", b"{}", encode_record({"capabilities": {}})])
    def test_a_damaged_result_is_made_again(self, workspace: Path, content: bytes) -> None:
        path = workspace / "store"
        Store.open(path).close()
        (path / "capabilities.json").write_bytes(content)
        with Store.open(path) as store:
            assert store.capabilities.flock

    def test_results_come_back(self) -> None:
        assert Capabilities.parse(ALL.payload()) == ALL
        for field in fields(Capabilities):
            assert Capabilities.parse({**ALL.payload(), field.name: 1}) is None
        assert Capabilities.parse({**ALL.payload(), "more": True}) is None
