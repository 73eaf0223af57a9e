from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from stowray.pipeline.errors import StorageError
from stowray.pipeline.removal import remove_tree
from tests.support.plain_user import plain_directory, run_plain


def _deep(top: Path, depth: int) -> None:
    directory = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=directory)
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
        os.close(directory)
        directory = below
    os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
    os.close(directory)


def test_missing_is_success(tmp_path: Path) -> None:
    remove_tree(tmp_path / "nothing")
    remove_tree(tmp_path / "no" / "parent")


def test_deeper_than_descriptors_and_stack_allow(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    _deep(top, 3000)
    remove_tree(top)
    assert not top.exists()


def test_links_are_removed_and_never_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    top = tmp_path / "top"
    (top / "a" / "b").mkdir(parents=True)
    (top / "a" / "b" / "link").symlink_to(outside)
    (top / "link").symlink_to(outside / "kept")
    os.mkfifo(top / "fifo")
    remove_tree(top)
    assert not top.exists()
    assert (outside / "kept").read_text() == "kept"


def test_a_link_as_the_top_is_unlinked(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "link").symlink_to(outside)
    remove_tree(tmp_path / "link")
    assert outside.is_dir()
    assert not (tmp_path / "link").is_symlink()


def test_names_that_are_no_text(tmp_path: Path) -> None:
    top = os.fsencode(tmp_path / "top")
    os.mkdir(top)
    os.mkdir(top + b"/\xff\n")
    Path(os.fsdecode(top + b"/\xff\n/\xfe")).touch()
    remove_tree(tmp_path / "top")
    assert not (tmp_path / "top").exists()


CLOSED = """
import sys
from pathlib import Path
from stowray.pipeline.removal import remove_tree
become_plain()
top = Path(sys.argv[1]) / "top"
(top / "a" / "b" / "c").mkdir(parents=True)
(top / "a" / "b" / "f").write_text("x")
(top / "a" / "b" / "c").chmod(0)
(top / "a" / "b").chmod(0o555)
(top / "a").chmod(0)
top.chmod(0o555)
remove_tree(top)
print(top.exists())
"""


def test_closed_directories_stop_no_plain_user() -> None:
    with plain_directory() as work:
        assert run_plain(CLOSED, work) == "False\n"


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="needs root: a mount inside stands for any refusal")
def test_refusal_is_a_storage_error(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "mounted").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", str(top / "mounted")], check=True)
    try:
        with pytest.raises(StorageError, match="cannot be removed"):
            remove_tree(top)
    finally:
        subprocess.run(["umount", str(top / "mounted")], check=True)
