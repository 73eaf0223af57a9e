"""Moves a layer's stream through three threads: read and decompress, hash, and the caller's own.

Invariant: at most ``_DEPTH`` chunks wait for each consumer; the hash covers exactly the chunks that
were handed out, to the end of the stream; when the pump is closed, both threads have ended: a
``read`` in flight is waited for, so that a pump that is closed early asks its source to hurry.
"""

from __future__ import annotations

import hashlib
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Self

from stowray.pipeline.compress import decompress
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import CancelledError

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.limits import LayerLimits

_DEPTH = 8


class _Lane:
    """A bounded queue of chunks whose two ends give up when the pump is closed."""

    def __init__(self) -> None:
        self._chunks: SimpleQueue[bytes] = SimpleQueue()
        self._room = threading.Semaphore(_DEPTH)

    def put(self, chunk: bytes) -> None:
        self._room.acquire()
        self._chunks.put(chunk)

    def get(self) -> bytes:
        chunk = self._chunks.get()
        self._room.release()
        return chunk

    def give_up(self) -> None:
        """Free the writer, and end the stream for the reader."""
        # The writer sees that the pump is closed before its next chunk: it puts one more here at
        # most. (A large count costs: Semaphore.release notifies that many times in a loop.)
        self._room.release(2)
        self._chunks.put(b"")


class ChunkPump:
    """Gives out the uncompressed chunks of a layer and knows their digest in the end."""

    def __init__(
        self,
        read: Callable[[], bytes],
        limits: LayerLimits,
        report: Callable[[int], None] | None,
        cancelled: Callable[[], bool] | None,
        *,
        algorithm: str = "sha256",
        interrupt: Callable[[], None] | None = None,
    ) -> None:
        self.size = 0
        self._interrupt = interrupt
        self._read = decompress(read, limits)
        self._report = report
        self._cancelled = cancelled
        self._closed = False
        self._ended = False
        self._failure: BaseException | None = None
        self._algorithm = algorithm
        self._hasher = hashlib.new(algorithm)
        self._to_caller = _Lane()
        self._to_hasher = _Lane()
        self._threads = [
            threading.Thread(target=self._fetch, name="layer-read", daemon=True),
            threading.Thread(target=self._hash, name="layer-hash", daemon=True),
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        if self._interrupt is not None and not self._ended:
            # The reader may be waiting for bytes that nobody wants any more.
            self._interrupt()
        self._to_caller.give_up()
        self._to_hasher.give_up()
        for thread in self._threads:
            thread.join()

    def next(self) -> bytes:
        """Return the next chunk, ``b""`` at the end; raise what reading or decompressing raised."""
        chunk = b"" if self._ended else self._to_caller.get()
        self._ended = not chunk
        if chunk:
            self.size += len(chunk)
            if self._report is not None:
                self._report(self.size)
        elif self._failure is not None:
            raise self._failure
        return chunk

    def digest(self) -> Digest:
        """Return the digest of the stream; the caller has seen its end."""
        self._threads[1].join()
        return Digest(f"{self._algorithm}:{self._hasher.hexdigest()}")

    def _fetch(self) -> None:
        try:
            while not self._closed:
                if self._cancelled is not None and self._cancelled():
                    raise CancelledError("staging a layer")
                chunk = self._read()
                self._to_hasher.put(chunk)
                self._to_caller.put(chunk)
                if not chunk:
                    return
        # Whatever it is, it belongs to the caller: it is raised there, unchanged.
        except BaseException as error:  # noqa: BLE001
            self._failure = error
            self._to_hasher.put(b"")
            self._to_caller.put(b"")

    def _hash(self) -> None:
        while chunk := self._to_hasher.get():
            self._hasher.update(chunk)
