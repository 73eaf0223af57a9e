"""The overlay mount itself: a chain's trees as lower directories, within the kernel's limits.

Invariant: whatever the length of the chain and whatever characters the paths have, the options are
short names of links in one directory (mount(2) takes 4096 bytes of them), there are never more than
500 lower directories, and the mounted tree is what :class:`ChainView` shows, its root included. The
directory must live as long as the mount: some of its members can be lower directories themselves.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING

from stowray.pipeline.errors import StorageError
from stowray.pipeline.files import storage_error, translated
from stowray.pipeline.overlay import ChainView

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# OVL_MAX_STACK of the kernel (fs/overlayfs/params.h).
MOST_LOWERS = 500
SOURCE = b"stowray"
_NO_XATTR = {errno.ENOTSUP, errno.EPERM, errno.EACCES}


def prepare(directory: Path, lowers: Sequence[Path], privileged: bool, upper: Path | None) -> bytes:
    """Fill ``directory`` with what the mount needs and return the options, relative to it.

    With ``upper`` the mount is writable: changes go there, and a directory ``<upper>.work`` is made
    beside it (the kernel wants both on one file system).
    """
    with ChainView(lowers, privileged) as view, translated(directory, "prepare a mount"):
        trees = list(view.effective_lowers)
        # A chain of no layers has no root at all; one whose topmost layer has no entry for the root
        # gets the root's attributes from a layer below, which the kernel would not look at.
        own_root = not trees or not view.shows_root
        names = _link(directory, trees, privileged, MOST_LOWERS - 1 if own_root else MOST_LOWERS)
        if own_root:
            (directory / "root").mkdir(0o700)
            _dress(directory / "root", view)
            names.insert(0, "root")
        options = []
        if upper is None:
            if len(names) == 1:
                # A single lower directory without an upper one is refused.
                (directory / "empty").mkdir(0o700)
                names.append("empty")
        else:
            _prepare_upper(directory, upper, view)
            options = ["upperdir=upper", "workdir=work"]
    options.insert(0, "lowerdir=" + ":".join(names))
    if not privileged:
        options.append("userxattr")
    return ",".join(options).encode("ascii")


def attach(directory: Path, options: bytes, target: Path, *, writable: bool) -> None:
    """Mount what :func:`prepare` made at ``target``."""
    from stowray.pipeline import kernel

    point = os.fsencode(target)
    flags = 0 if writable else kernel.MS_RDONLY

    def call() -> None:
        kernel.mount(SOURCE, point, b"overlay", flags, options)

    try:
        kernel.in_directory(os.fsencode(directory), call)
    except OSError as error:
        raise _refused(error, target) from error


def _link(directory: Path, trees: list[Path], privileged: bool, most: int) -> list[str]:
    below: list[Path] = []
    if len(trees) > most:
        trees, below = trees[: most - 1], trees[most - 1 :]
    names = []
    for number, tree in enumerate(trees):
        name = _short(number)
        (directory / name).symlink_to(tree)
        names.append(name)
    if below:
        from stowray.pipeline.rootfs import flatten

        # At the very bottom nothing lies below, so that the plain merged tree says all.
        with ChainView(below, privileged) as view:
            flatten(view, directory / "merged")
        names.append("merged")
    return names


def _short(number: int) -> str:
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    text = digits[number % 36]
    while number := number // 36:
        text = digits[number % 36] + text
    return text


def _prepare_upper(directory: Path, upper: Path, view: ChainView) -> None:
    upper = upper.absolute()
    work = upper.with_name(upper.name + ".work")
    try:
        upper.mkdir(0o700)
    except FileExistsError:
        if not upper.is_dir():
            raise StorageError(str(upper), "is no directory: it takes the changes") from None
    else:
        # The upper directory gives the mounted root its attributes.
        _dress(upper, view)
    work.mkdir(0o700, exist_ok=True)
    (directory / "upper").symlink_to(upper)
    (directory / "work").symlink_to(work)


def _dress(path: Path, view: ChainView) -> None:
    """Give a new directory the attributes of the image's root."""
    node = view.lookup(b"")
    if os.geteuid() == 0 and view.privileged:
        os.chown(path, node.uid, node.gid)
    for key, value in view.xattrs(node).items():
        try:
            os.setxattr(path, key, value)
        except OSError as error:
            if error.errno not in _NO_XATTR:
                raise
    path.chmod(stat.S_IMODE(node.mode))
    os.utime(path, ns=(node.mtime_ns, node.mtime_ns))


def _refused(error: OSError, target: Path) -> StorageError:
    if error.errno in (errno.EPERM, errno.EACCES):
        return StorageError(
            str(target),
            "this user may not mount: run as root, or use `stowray unshare REF DIR -- COMMAND`",
        )
    if error.errno == errno.ENODEV:
        return StorageError(str(target), "this kernel has no overlay file system: load it")
    if error.errno == errno.EBUSY:
        return StorageError(str(target), "the upper directory is in use by another mount")
    if error.errno == errno.EINVAL:
        return StorageError(
            str(target),
            "the kernel refuses this overlay mount: `dmesg` says why (an upper directory must not "
            "lie on an overlay or network file system)",
        )
    return storage_error(error, target, "mount")
