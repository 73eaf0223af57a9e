"""The making of a store directory, and the test whether a directory is one.

Invariant: a directory is a store only once its version file is there, which is written last; a half
made store is finished by whoever opens it next, and nothing is ever put into a directory that holds
something else.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from typing import TYPE_CHECKING

from stowray.pipeline.digest import HEX_LENGTHS
from stowray.pipeline.errors import StorageError
from stowray.pipeline.failpoint import failpoint
from stowray.pipeline.files import (
    PROBE,
    TEMPORARY,
    make_directory,
    read_regular,
    replace_file,
    translated,
)

if TYPE_CHECKING:
    from pathlib import Path

    from stowray.pipeline.probe import Capabilities

FORMAT = 1
_DIRECTORIES = (
    "blobs",
    *(f"blobs/{algorithm}" for algorithm in HEX_LENGTHS),
    "refs",
    "sources",
    *(f"sources/{algorithm}" for algorithm in HEX_LENGTHS),
    "durable",
    "ingest",
    "layers",
    "snapshots",
    "leases",
    "locks",
    "quarantine",
    "trash",
)
# Also made later by others; what else lies there makes it somebody else's directory.
_OTHERS = {
    "oci-layout",
    "index.json",
    "nonce",
    "version",
    "capabilities.json",
    "hosts.json",
    "mounts",
}


def open_root(path: Path, *, create: bool) -> int:
    """Open the store's directory, with ``create`` making it (mode 0700) when there is none."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    with translated(path, "open the store"):
        try:
            return os.open(path, flags)
        except FileNotFoundError:
            if not create:
                raise StorageError(
                    str(path), "no store here: pull an image into it first"
                ) from None
            path.parent.mkdir(parents=True, exist_ok=True)
            make_directory(path)
            return os.open(path, flags)


def require_owner(path: Path, descriptor: int) -> None:
    """Refuse root a store of somebody else, before anything is written to it.

    What root left there the owner could neither read nor remove, and whoever owns a directory can
    lead by a link whoever writes below it. ``StorageError`` says whom to run as.
    """
    owner = os.fstat(descriptor).st_uid
    if os.geteuid() != 0 or owner == 0 or not os.access(path, os.W_OK | os.X_OK):
        return
    # Some file systems give every file one owner, whoever makes it (CIFS, 9p, FUSE, NFS that
    # squashes root): only what is made there shows it.
    name = f"{PROBE}{os.urandom(8).hex()}"
    with translated(path, "look whose the files in the store are"):
        # Not closed to the owner, who may have to remove it.
        os.mkdir(name, 0o755, dir_fd=descriptor)
        try:
            made = os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_uid
        finally:
            os.rmdir(name, dir_fd=descriptor)
    if made != owner:
        raise StorageError(
            str(path),
            f"belongs to user {owner}, who could not read what root leaves in it: run as that user "
            f"(`sudo -u '#{owner}' stowray`) or choose another --store",
        )


def read_version(path: Path) -> int | None:
    """Return the store's format, or None when the directory is no (finished) store.

    Nothing waits for the disk when a store is made, so a power cut may leave empty files: making it
    once more mends them.
    """
    with translated(path, "open the store"):
        try:
            text = read_regular(path / "version", 64)
            nonce = read_regular(path / "nonce", 256)
        except FileNotFoundError:
            return None
    if not text.strip(b"\0") or not nonce.strip(b"\0"):
        return None
    if not re.fullmatch(rb"[0-9]{1,9}\n", text):
        raise StorageError(
            str(path / "version"),
            "damaged: `stowray verify --repair` writes it anew",
        )
    return int(text)


def mend_version(path: Path, *, repair: bool) -> str:
    """Return what is wrong with the version file of a store, empty when nothing is.

    With ``repair`` it is written anew where all else is as this program makes it; StorageError
    where it is not, for then nobody knows what format the store has.
    """
    from stowray.pipeline.layout import LAYOUT_FILE

    try:
        read_version(path)
    except StorageError as error:
        if error.args[0] != str(path / "version"):
            raise
        wrong = "is no version of a store"
    else:
        return ""
    if not repair:
        return wrong
    with translated(path, "mend the store's version"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            missing = [name for name in _DIRECTORIES if not (path / name).is_dir()]
            nonce = read_regular(path / "nonce", 256)
            if not re.fullmatch(rb"[0-9a-f]{32}\n", nonce):
                missing.append("nonce")
            if read_regular(path / "oci-layout", 4096) != LAYOUT_FILE:
                missing.append("oci-layout")
            if missing:
                raise StorageError(
                    str(path / "version"),
                    f"damaged, and so is {', '.join(missing)}: choose another --store, or write "
                    f"{FORMAT} into it if this stowray made the store",
                )
            replace_file(path / "version", f"{FORMAT}\n".encode())
        finally:
            os.close(descriptor)
    return wrong


def create_store(path: Path, descriptor: int) -> Capabilities | None:
    """Make a store in an empty (or half made) directory; the version file is written last."""
    from stowray.pipeline.layout import LAYOUT_FILE, other_entries, write_index
    from stowray.pipeline.probe import probe
    from stowray.pipeline.references import MARKER

    with translated(path, "make a store"):
        # The directory itself is the lock: two first pulls must not see each other's halves.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            if read_version(path) is not None:
                return None
            ours = {name.partition("/")[0] for name in _DIRECTORIES} | _OTHERS
            for entry in path.iterdir():
                if entry.name not in ours and not entry.name.startswith((TEMPORARY, PROBE)):
                    raise StorageError(
                        str(path), "not empty and not a store: choose another --store"
                    )
            found = probe(path)
            found.require(path)
            os.fchmod(descriptor, stat.S_IRWXU)
            for name in _DIRECTORIES:
                make_directory(path / name)
            replace_file(path / "nonce", os.urandom(16).hex().encode() + b"\n")
            replace_file(path / "oci-layout", LAYOUT_FILE, mode=0o644)
            if other_entries(path, "") is None:
                write_index(path, [], [])
                if any((path / "refs").iterdir()):
                    # It was cut short: the marker has it derived at the next change.
                    (path / "refs" / MARKER).touch(mode=0o600)
            failpoint("create-before-version")
            replace_file(path / "version", f"{FORMAT}\n".encode())
            return found
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
