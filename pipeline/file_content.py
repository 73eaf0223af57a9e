"""Contents of regular files, copied between descriptors in the cheapest way that works.

Invariant: the copy has the same bytes and size, and holes stay holes; shared blocks (reflinks) are
copied by the file system when either side is written to, so that nothing written to one file ever
shows in the other.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress

from stowray.pipeline.kernel import FICLONE

# Up to here two calls through a buffer cost less than setting up a copy in the kernel.
_SMALL = 128 << 10
_CHUNK = 1 << 30
_NO_CLONE = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM}


def clone(source: int, target: int) -> bool:
    """Share the source's blocks with the target; False where the file systems cannot."""
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        if error.errno in _NO_CLONE:
            return False
        raise
    return True


def copy(source: int, target: int, size: int) -> None:
    """Copy ``size`` bytes from the start of ``source`` to the empty ``target``."""
    if size <= _SMALL:
        data = os.read(source, size)
        if len(data) == size and os.write(target, data) == size:
            return
    os.ftruncate(target, size)
    position = 0
    while position < size:
        try:
            start = os.lseek(source, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                # Nothing but a hole up to the end.
                return
            raise
        end = min(os.lseek(source, start, os.SEEK_HOLE), size)
        _copy_range(source, target, start, end)
        position = end


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    offset = start
    with suppress(OSError):
        while offset < end:
            count = os.copy_file_range(source, target, min(_CHUNK, end - offset), offset, offset)
            if count == 0:
                break
            offset += count
    # Other file systems, or a kernel that refuses: the portable way for what is left, which reports
    # for good what is wrong.
    while offset < end:
        data = os.pread(source, min(1 << 20, end - offset), offset)
        if not data:
            raise OSError(errno.EIO, "the file became shorter while it was copied")
        offset += os.pwrite(target, data, offset)
