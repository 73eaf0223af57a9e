"""Moves a layer's stream through three threads: read and decompress, hash, and the caller's own.

Invariant: at most ``_DEPTH`` chunks wait for each consumer; the hash covers exactly the chunks that
were handed out, to the end of the stream; when the pump is closed, both threads have ended: a
``read`` in flight is waited for, so that a pump that is closed early asks its source to hurry. A
layer that ends within its first ``_ALONE`` bytes has no threads: the caller does it all.
"""

from __future__ import annotations

import hashlib
import threading
from itertools import repeat
from queue import SimpleQueue
from typing import TYPE_CHECKING, Self

from stowray.pipeline.compress import decompress
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import CancelledError

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.limits import LayerLimits

_DEPTH = 16
_ALONE = 512 << 10


class _Lane:
    """A bounded queue of chunks whose two ends give up when the pump is closed."""

    def __init__(self) -> None:
        self._chunks: SimpleQueue[bytes] = SimpleQueue()
        # A token for each chunk that there is room for: a queue in C, where Semaphore is Python.
        self._room: SimpleQueue[None] = SimpleQueue()
        for token in repeat(None, _DEPTH):
            self._room.put(token)

    def put(self, chunk: bytes) -> None:
        self._room.get()
        self._chunks.put(chunk)

    def get(self) -> bytes:
        chunk = self._chunks.get()
        self._room.put(None)
        return chunk

    def give_up(self) -> None:
        """Free the writer, and end the stream for the reader."""
        # The writer sees that the pump is closed before its next chunk: it puts one more here at
        # most.
        self._room.put(None)
        self._room.put(None)
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
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
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
        if self._ended:
            chunk = b""
        elif self._threads:
            chunk = self._to_caller.get()
        else:
            chunk = self._next_alone()
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
        if self._threads:
            self._threads[1].join()
        return Digest(f"{self._algorithm}:{self._hasher.hexdigest()}")

    def _next_alone(self) -> bytes:
        """Do what the threads would; start them when the layer turns out to be worth it."""
        self._check_cancelled()
        chunk = self._read()
        self._hasher.update(chunk)
        if chunk and self.size + len(chunk) >= _ALONE:
            self._threads = [
                threading.Thread(target=self._fetch, name="layer-read", daemon=True),
                threading.Thread(target=self._hash, name="layer-hash", daemon=True),
            ]
            for thread in self._threads:
                thread.start()
        return chunk

    def _check_cancelled(self) -> None:
        if self._cancelled is not None and self._cancelled():
            raise CancelledError("staging a layer")

    def _fetch(self) -> None:
        try:
            while not self._closed:
                self._check_cancelled()
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
