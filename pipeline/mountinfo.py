"""What is mounted in this mount namespace, as the kernel tells it (proc_pid_mountinfo(5))."""

from __future__ import annotations

import re
from pathlib import Path

from stowray.pipeline.errors import StorageError
from stowray.pipeline.values import dataclass

MOUNTINFO = Path("/proc/self/mountinfo")
_ESCAPE = re.compile(rb"\\([0-3][0-7]{2})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo; ``point`` and ``source`` are raw bytes."""

    point: bytes
    kind: bytes
    source: bytes
    device: bytes


def _decode(field: bytes) -> bytes:
    # Space, tab, newline and backslash are written as octal escapes.
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), field)


def parse_mountinfo(text: bytes) -> list[Mount]:
    """Return the mounts that ``text`` lists, oldest first."""
    mounts = []
    # Only the newline ends a line: a mount point's name may hold a carriage return as it is.
    for line in text.split(b"\n"):
        if not line:
            continue
        left, separator, right = line.partition(b" - ")
        fields, tail = left.split(b" "), right.split(b" ")
        if not separator or len(fields) < 6 or len(tail) < 2:
            raise StorageError(str(MOUNTINFO), "has a line that is not understood")
        mounts.append(
            Mount(
                point=_decode(fields[4]),
                kind=_decode(tail[0]),
                source=_decode(tail[1]),
                device=fields[2],
            )
        )
    return mounts


def read_mounts(path: Path = MOUNTINFO) -> list[Mount]:
    """Return the mounts of this process's mount namespace, oldest first."""
    try:
        return parse_mountinfo(path.read_bytes())
    except OSError as error:
        raise StorageError(str(path), f"cannot be read: {error.strerror}") from error


def topmost(point: bytes, mounts: list[Mount]) -> Mount | None:
    """Return the mount that is visible at ``point``, when it is a mount point."""
    return next((mount for mount in reversed(mounts) if mount.point == point), None)
