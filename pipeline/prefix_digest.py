"""The digest of a growing blob's prefix, kept up to date while several threads write.

Invariant: bytes are hashed in order and each once, by one thread at a time; a thread whose bytes
are next hashes them from memory, everything else is read back. Every ``CHECKPOINT_EVERY`` bytes,
and whenever asked, the digest so far goes into the journal.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import hashlib
    from collections.abc import Callable

CHECKPOINT_EVERY = 8 << 20
_READ_SIZE = 1 << 20


class PrefixDigest:
    """Hashes up to ``prefix()``; ``read`` gives bytes back, ``keep`` writes a checkpoint down.

    ``read(offset, length)`` returns at least one byte or raises; ``keep(offset, digest)`` is called
    with the lock held.
    """

    def __init__(
        self,
        hasher: hashlib._Hash,
        prefix: Callable[[], int],
        read: Callable[[int, int], bytes],
        keep: Callable[[int, bytes], None],
    ) -> None:
        self._prefix = prefix
        self._read = read
        self._keep = keep
        self._lock = threading.Lock()
        self._hasher = hasher
        self._hashed = 0
        self._checkpoint = 0

    def reset(self, hasher: hashlib._Hash, hashed: int = 0, checkpoint: int = 0) -> None:
        """Go on from ``hashed`` bytes, which ``hasher`` has had; the last checkpoint is given."""
        with self._lock:
            self._hasher = hasher
            self._hashed = hashed
            self._checkpoint = checkpoint

    def hexdigest(self) -> str:
        """Return the digest of what has been hashed."""
        return self._hasher.hexdigest()

    def catch_up(self, view: memoryview | None = None, start: int = 0, *, wait: bool) -> None:
        """Hash up to the prefix: from memory where ``view`` goes on, else what is read back.

        Without ``wait`` the work is left to a thread that is at it: it looks again in the end.
        """
        while self._hashed < self._prefix():
            if not self._lock.acquire(blocking=wait):
                return
            try:
                while self._hashed < self._prefix():
                    if view is not None and start == self._hashed:
                        self._feed(view)
                        view = None
                        continue
                    length = min(_READ_SIZE, self._prefix() - self._hashed)
                    self._feed(memoryview(self._read(self._hashed, length)))
            finally:
                self._lock.release()

    def note(self) -> None:
        """Keep a checkpoint of where it stands; nobody hashes meanwhile."""
        with self._lock:
            self._note()

    def _feed(self, view: memoryview) -> None:
        while view:
            due = self._checkpoint + CHECKPOINT_EVERY - self._hashed
            part, view = view[:due], view[due:]
            self._hasher.update(part)
            self._hashed += len(part)
            if len(part) == due:
                self._note()

    def _note(self) -> None:
        if self._hashed != self._checkpoint:
            self._keep(self._hashed, self._hasher.copy().digest())
            self._checkpoint = self._hashed
