"""The 64 bytes by which a writer tells followers in other processes how far it is.

Invariant: a follower that reads the same generation before and after the prefix has a prefix of
that generation; the writer voids the prefix before it raises the generation. A prefix counts only
together with its complement, so that a value caught in the middle of its change is never used.

Followers map the file, which costs them no system call. The writer writes it instead of storing
into a map: where a full disk has no room for a copy of the page (btrfs), the one is an error and
the other would be a SIGBUS. No fsync: after another boot only checkpoints count anyway.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from stowray.pipeline.clock import Boot

MAGIC = int.from_bytes(b"STOWING1", "little")
LENGTH = 64
GROWING, COMMITTED, GIVEN_UP = 1, 2, 3
_MASK = (1 << 64) - 1
_MAGIC, _GENERATION, _PREFIX, _COMPLEMENT, _SIZE, _STATUS, _BOOT, _CONDEMNED = range(8)
_TORN_LIMIT = 1000


def boot_key(boot: Boot) -> int:
    """Return what stands for a boot of a host in the state."""
    text = f"{boot.boot_id}\0{boot.host}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


class IngestState:
    """A state file; ``descriptor`` stays open because the writer's sign of life is on it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, LENGTH, access=mmap.ACCESS_READ)
        self._fields = memoryview(self._map).cast("Q")

    @classmethod
    def create(cls, path: Path) -> IngestState:
        """Open the state of an ingest for its writer, making it when it is missing or short."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        try:
            if os.fstat(descriptor).st_size != LENGTH:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, bytes(LENGTH), 0)
            return cls(descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def follow(cls, path: Path) -> IngestState | None:
        """Open the state for a follower; None when there is none yet."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            if os.fstat(descriptor).st_size == LENGTH:
                return cls(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def close(self) -> None:
        """Unmap and close; the sign of life goes with it."""
        self._fields.release()
        self._map.close()
        os.close(self.descriptor)

    @property
    def valid(self) -> bool:
        """Whether a writer has filled the fields."""
        return self._fields[_MAGIC] == MAGIC

    @property
    def generation(self) -> int:
        """The number of the data file that grows."""
        return self._fields[_GENERATION]

    @property
    def prefix(self) -> int:
        """How many contiguous bytes may be read."""
        for _ in range(_TORN_LIMIT):
            prefix = self._fields[_PREFIX]
            if self._fields[_COMPLEMENT] == prefix ^ _MASK:
                return prefix
        return 0  # the writer died in the middle of a change: whoever takes over mends it

    @property
    def size(self) -> int:
        """The size that the descriptor promised."""
        return self._fields[_SIZE]

    @property
    def status(self) -> int:
        """GROWING, COMMITTED, or GIVEN_UP: the writer got wrong bytes only and tries no more."""
        return self._fields[_STATUS]

    @property
    def boot(self) -> int:
        """The ``boot_key`` of the writer: only its own host sees its bytes as they are written."""
        return self._fields[_BOOT]

    @property
    def condemned(self) -> int:
        """The last generation whose bytes proved wrong, 0: none; others may be void as well."""
        return self._fields[_CONDEMNED]

    def expose(self, prefix: int) -> None:
        """Let followers read the first ``prefix`` bytes."""
        self._put(_PREFIX, prefix, prefix ^ _MASK)

    def set_status(self, status: int, boot: int) -> None:
        """Say who writes and whether the blob is committed."""
        self._put(_STATUS, status, boot)

    def begin(self, generation: int, size: int, boot: int) -> None:
        """Void the prefix, then name the new generation."""
        self.expose(0)
        self._put(_MAGIC, MAGIC, generation, 0, _MASK, size, GROWING, boot)

    def condemn(self, generation: int) -> None:
        """Tell that the bytes of a generation proved wrong, before another one begins."""
        self._put(_CONDEMNED, generation)

    def _put(self, field: int, *values: int) -> None:
        os.pwrite(self.descriptor, struct.pack(f"={len(values)}Q", *values), 8 * field)
