"""The few system calls that the standard library has no name for, each raising OSError.

Invariant: nothing here changes what other threads of the process see: the working directory that a
mount needs is set on a thread of its own that shares none of it with the others.
"""

from __future__ import annotations

import ctypes
import os
import threading
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# <linux/sched.h>
CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
# <linux/mount.h>
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
UMOUNT_NOFOLLOW = 8
MNT_DETACH = 2
# <linux/fs.h>: _IOW(0x94, 9, int)
FICLONE = 0x40049409


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, path: bytes | None = None) -> None:
    if result != 0:
        number = ctypes.get_errno()
        name = os.fsdecode(path) if path is not None else None
        raise OSError(number, os.strerror(number), name)


def mount(source: bytes, target: bytes, kind: bytes, flags: int = 0, options: bytes = b"") -> None:
    """Attach a file system at ``target``."""
    call = _libc().mount
    call.argtypes = [
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_ulong,
        ctypes.c_char_p,
    ]
    _check(call(source, target, kind, flags, options), target)


def unmount(target: bytes, flags: int = UMOUNT_NOFOLLOW) -> None:
    """Detach what is mounted at ``target``; a symlink as the last part is not followed."""
    _check(_libc().umount2(ctypes.c_char_p(target), ctypes.c_int(flags)), target)


def unshare(flags: int) -> None:
    """Give the calling thread contexts of its own."""
    _check(_libc().unshare(ctypes.c_int(flags)))


def in_directory(directory: bytes, action: Callable[[], None]) -> None:
    """Run ``action`` with ``directory`` as the working directory, unseen by other threads.

    chdir(2) acts on all tasks that share the file system context; unshare(CLONE_FS) gives the
    helper thread one of its own, which needs no privilege.
    """
    failure: list[OSError] = []

    def work() -> None:
        try:
            unshare(CLONE_FS)
            os.chdir(directory)
            action()
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="in-directory")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
