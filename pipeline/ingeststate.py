"""The 64 bytes by which a writer tells followers in any process how far it is.

Invariant: a follower that reads the same generation before and after the prefix has a prefix of
that generation. The writer sets the prefix to 0 before it raises the generation, and each field is
one aligned 8-byte store of the running machine. The file is mapped, so that telling costs no system
call and no fsync.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

MAGIC = int.from_bytes(b"STOWING1", "little")
LENGTH = 64
_MAGIC, _GENERATION, _PREFIX, _SIZE, _STATUS = range(5)

GROWING, COMMITTED = 1, 2


class IngestState:
    """A mapped state file; ``descriptor`` stays open because the writer's sign of life is on it."""

    def __init__(self, descriptor: int, *, writable: bool) -> None:
        self.descriptor = descriptor
        self._map = mmap.mmap(
            descriptor, LENGTH, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        )
        self._fields = memoryview(self._map).cast("Q")

    @classmethod
    def create(cls, path: Path) -> IngestState:
        """Open the state of an ingest for its writer, making it when it is missing or short."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        try:
            if os.fstat(descriptor).st_size != LENGTH:
                os.ftruncate(descriptor, 0)
                # Written, not only extended: a full disk must say so here and not by SIGBUS later.
                os.write(descriptor, bytes(LENGTH))
            return cls(descriptor, writable=True)
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
                return cls(descriptor, writable=False)
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
        return self._fields[_PREFIX]

    @prefix.setter
    def prefix(self, value: int) -> None:
        self._fields[_PREFIX] = value

    @property
    def size(self) -> int:
        """The size that the descriptor promised."""
        return self._fields[_SIZE]

    @property
    def status(self) -> int:
        """GROWING or COMMITTED."""
        return self._fields[_STATUS]

    @status.setter
    def status(self, value: int) -> None:
        self._fields[_STATUS] = value

    def begin(self, generation: int, size: int) -> None:
        """Void the prefix, then name the new generation."""
        self._fields[_PREFIX] = 0
        self._fields[_GENERATION] = generation
        self._fields[_SIZE] = size
        self._fields[_STATUS] = GROWING
        self._fields[_MAGIC] = MAGIC
