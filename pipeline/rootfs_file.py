"""An image's root filesystem as one file: a tar, or a squashfs image made by mksquashfs.

Invariant: the file bears its name only once it is whole; owners, devices and attributes in it are
the image's, whoever makes it. Squashfs keeps times to the second, from 1970 to 2106, and attributes
of the namespaces user, trusted and security. Its root directory is the exception: squashfs-tools
4.5 reads a tar with root:root as its owner and the time of making, or ``SOURCE_DATE_EPOCH``.
"""

from __future__ import annotations

import os
import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from stowray.pipeline.deliver_program import failure, find_program, run_program
from stowray.pipeline.errors import NodeError, StorageError
from stowray.pipeline.files import translated
from stowray.pipeline.tree_tar import Written, write_tar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.overlay import ChainView
    from stowray.pipeline.store import Store

Format = Literal["tar", "squashfs"]

PROGRAM = "mksquashfs"
ADVICE = "install squashfs-tools 4.5 or newer (Debian: apt-get install squashfs-tools)"
SECONDS = 24 * 3600.0
_TIME_MOST = 2**32 - 1


def check_file(path: Path, form: Format) -> None:
    """Raise unless ``path`` is free and its format can be made; nothing is made yet."""
    if os.path.lexists(path):
        raise StorageError(str(path), "exists already: name a new file")
    if not path.parent.is_dir():
        raise StorageError(str(path.parent), "no such directory")
    if form == "squashfs":
        find_program(PROGRAM, ADVICE)


def write_file(
    store: Store,
    chain_id: Digest | None,
    path: Path,
    form: Format,
    *,
    cancelled: Callable[[], bool] = lambda: False,
) -> Written:
    """Write the tree of a committed chain to the new file ``path``."""
    from stowray.pipeline.snapshot import Snapshots

    check_file(path, form)
    with Snapshots(store).held(chain_id, "rootfs") as view, _appearing(path) as temporary:
        if form == "squashfs":
            return _write_squashfs(view, temporary, cancelled)
        with translated(path, "write the tar"):
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                return write_tar(view, descriptor, cancelled=cancelled)
            finally:
                os.close(descriptor)


def write_stream(
    store: Store,
    chain_id: Digest | None,
    descriptor: int,
    *,
    cancelled: Callable[[], bool] = lambda: False,
) -> Written:
    """Write the tree of a committed chain as a tar to an open pipe or file."""
    from stowray.pipeline.snapshot import Snapshots

    with Snapshots(store).held(chain_id, "rootfs") as view:
        return write_tar(view, descriptor, cancelled=cancelled)


@contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.stowray-{secrets.token_hex(8)}")
    try:
        yield temporary
        with translated(path, "put the file in place"):
            # A link and not a rename: what somebody else made there meanwhile stays.
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_squashfs(view: ChainView, path: Path, cancelled: Callable[[], bool]) -> Written:
    root = view.lookup(b"")
    written: list[Written] = []
    command = [
        find_program(PROGRAM, ADVICE),
        "-",
        str(path),
        "-tar",
        "-no-progress",
        "-quiet",
        "-reproducible",
        # It takes this variable for the same option and refuses both.
        *(() if "SOURCE_DATE_EPOCH" in os.environ else ("-mkfs-time", "0")),
        # The root's entry of a tar is ignored.
        "-root-mode",
        f"{root.mode:o}",
        "-root-uid",
        str(root.uid),
        "-root-gid",
        str(root.gid),
        "-root-time",
        str(min(max(root.mtime_ns // 1_000_000_000, 0), _TIME_MOST)),
    ]
    ended = run_program(
        command,
        seconds=SECONDS,
        cancelled=cancelled,
        feed=lambda pipe: written.append(write_tar(view, pipe, root=False, cancelled=cancelled)),
    )
    if ended.status:
        if "-tar" in ended.said and "invalid" in ended.said.lower():
            raise NodeError(PROGRAM, f"too old to read a tar: {ADVICE}")
        raise failure(PROGRAM, ended, "make the file system")
    return written[0]
