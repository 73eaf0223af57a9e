from __future__ import annotations

import errno
import os
import pickle
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.errors import StorageError
from stowray.pipeline.files import (
    make_directory,
    open_regular,
    read_regular,
    replace_file,
    translated,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.ENOSPC, "disk is full.*stowray gc"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EPERM, "not permitted"),
        (errno.EIO, "stowray verify"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENFILE, "on this machine"),
        (errno.ELOOP, "symbolic link"),
        (errno.ENOMEM, "out of memory"),
    ],
)
def test_system_errors_become_sentences(code: int, advice: str) -> None:
    with pytest.raises(StorageError, match=f"cannot do it: .*{advice}") as caught:  # noqa: SIM117
        with translated("/a/path", "do it"):
            raise OSError(code, os.strerror(code))
    assert caught.value.path == "/a/path"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_modes_are_exact(workspace: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        assert make_directory(workspace / "directory", 0o700)
        assert not make_directory(workspace / "directory")
        replace_file(workspace / "file", b"1", mode=0o644)
    finally:
        os.umask(previous)
    assert (workspace / "directory").stat().st_mode & 0o777 == 0o700
    assert (workspace / "file").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_and_nothing_else_is_left(workspace: Path, durable: bool) -> None:
    replace_file(workspace / "file", b"old")
    with (workspace / "file").open("rb") as reader:
        replace_file(workspace / "file", b"new", durable=durable)
        assert reader.read() == b"old"
    assert (workspace / "file").read_bytes() == b"new"
    assert os.listdir(workspace) == ["file"]


def test_a_link_is_replaced_and_not_followed(workspace: Path) -> None:
    (workspace / "outside").write_bytes(b"canary")
    (workspace / "file").symlink_to("outside")
    replace_file(workspace / "file", b"new")
    assert (workspace / "outside").read_bytes() == b"canary"


def test_a_failed_replacement_leaves_nothing(workspace: Path) -> None:
    (workspace / "file").mkdir()
    with pytest.raises(OSError, match="directory"):
        replace_file(workspace / "file", b"new")
    assert os.listdir(workspace) == ["file"]


def test_only_regular_files_are_read(workspace: Path) -> None:
    (workspace / "file").write_bytes(b"12345")
    assert read_regular(workspace / "file", 5) == b"12345"
    with pytest.raises(StorageError, match="larger than 4 bytes"):
        read_regular(workspace / "file", 4)
    (workspace / "link").symlink_to("file")
    with pytest.raises(OSError, match="symbolic"):
        open_regular(workspace / "link")
    os.mkfifo(workspace / "fifo")
    with pytest.raises(StorageError, match="not a regular file"):
        open_regular(workspace / "fifo")
    assert len(os.listdir("/proc/self/fd")) < 200
