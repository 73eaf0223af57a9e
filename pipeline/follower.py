"""Readers of blobs that are here, are arriving or have not begun yet.

Invariant: a follower returns bytes of one generation only, in order, and never more than the
descriptor's size. They are **unproven** until the blob is committed (``proven``). It holds no lock:
a stopped or slow follower stands in nobody's way.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from stowray.pipeline.errors import (
    CancelledError,
    NodeError,
    NotFoundError,
    SizeMismatchError,
    StorageError,
)
from stowray.pipeline.files import translated
from stowray.pipeline.ingest_home import GenerationChanged
from stowray.pipeline.ingeststate import COMMITTED, IngestState, boot_key
from stowray.pipeline.locks import is_current, try_lock, unlock

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from stowray.pipeline.clock import Boot
    from stowray.pipeline.digest import Digest

READ_SIZE = 1 << 20
GRACE_SECONDS = 30.0
_SHORT_PAUSE, _LONG_PAUSE = 0.001, 0.02
_SHORT_FOR = 1.0  # seconds of idleness after which the pauses grow
_TEST_EVERY = 0.05


class Home(Protocol):
    """What a follower needs of its store."""

    boot: Boot

    def ingest_path(self, digest: Digest) -> Path:
        """Return the directory of a digest's ingest."""

    def blob_path(self, digest: Digest) -> Path:
        """Return the path of a committed blob."""

    def open_blob(self, digest: Digest) -> int:
        """Return a read-only descriptor of a committed and trusted blob."""


class Follower:
    """One reader of one blob; a context manager."""

    def __init__(
        self,
        home: Home,
        digest: Digest,
        size: int,
        *,
        cancelled: Callable[[], bool] | None = None,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        """Prepare to read; nothing is waited for before the first ``read``."""
        self.digest = digest
        self.size = size
        self.generation = 0
        self._home = home
        self._cancelled = cancelled
        self._grace_seconds = grace_seconds
        self._offset = 0
        self._data = -1
        self._state: IngestState | None = None
        self._committed = False
        self._stale = False  # the bytes read so far belong to nothing that exists any more

    def __enter__(self) -> Follower:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the files go; idempotent."""
        self._detach()

    @property
    def offset(self) -> int:
        """How many bytes of this generation were returned."""
        return self._offset

    @property
    def proven(self) -> bool:
        """Whether the bytes come from a committed blob: their digest has been proven."""
        self._look()
        return self._committed and not self._stale

    def read(self, size: int = READ_SIZE) -> bytes:
        """Return up to ``size`` bytes, waiting for the first; ``b""`` at the descriptor's size."""
        length = self._wait(size)
        if length == 0:
            return b""
        with translated(self._home.blob_path(self.digest), "read a blob"):
            data = os.pread(self._data, length, self._offset)
        self._took(len(data))
        return data

    def read_into(self, buffer: bytearray | memoryview) -> int:
        """Fill ``buffer`` as far as there are bytes, waiting for the first; 0 at the end."""
        view = memoryview(buffer).cast("B")
        length = self._wait(len(view))
        if length == 0:
            return 0
        with translated(self._home.blob_path(self.digest), "read a blob"):
            count = os.preadv(self._data, [view[:length]], self._offset)
        self._took(count)
        return count

    def wait_proven(self) -> None:
        """Wait until the blob is committed; ``GenerationChanged`` when what was read is void."""
        waiting = _Waiting(self)
        while not self.proven:
            if self._stale:
                raise GenerationChanged(str(self.digest))
            waiting.pause()

    def rewind(self) -> None:
        """Begin again at the first byte of whatever generation there is now."""
        self._detach()
        self._offset = 0
        self._stale = False

    # -- internals --------------------------------------------------------------------------------

    def _took(self, count: int) -> None:
        # The generation is compared after the read as well: a taker-over may reuse the file.
        if not self._is_current_generation():
            # The first bytes are void as well, though none were returned before.
            raise GenerationChanged(str(self.digest))
        if count == 0:
            raise StorageError(
                str(self._home.blob_path(self.digest)),
                "was cut short by another program: run `stowray verify --repair`",
            )
        self._offset += count

    def _wait(self, wanted: int) -> int:
        """Return how many bytes can be read now, at most ``wanted``; 0 at the end."""
        available = self._look()
        if available <= self._offset < self.size:
            waiting = _Waiting(self)
            while available <= self._offset:
                waiting.pause()
                available = self._look()
        elif self._cancelled is not None and self._cancelled():
            raise CancelledError(f"reading {self.digest}")
        return max(0, min(wanted, available - self._offset))

    def _look(self) -> int:
        """Return the readable length, attaching to whatever holds the bytes now."""
        if self._stale:
            raise GenerationChanged(str(self.digest))
        if self._data < 0 and not self._attach():
            return 0
        if self._committed:
            return self.size
        state = self._state
        if state is None:
            return 0
        prefix = state.prefix
        if not self._is_current_generation():
            return 0
        if state.status == COMMITTED:
            self._committed = True
        return min(prefix, self.size)

    def _is_current_generation(self) -> bool:
        """Say whether what is attached still counts; ``GenerationChanged`` when bytes are void."""
        if self._committed or self._state is None or self._state.generation == self.generation:
            return True
        self._detach()
        if self._offset > 0:
            self._stale = True
            raise GenerationChanged(str(self.digest))
        return False

    def _attach(self) -> bool:
        """Open the committed blob or the growing one; False while there is neither."""
        try:
            self._data = self._home.open_blob(self.digest)
        except NotFoundError:
            return self._attach_ingest()
        actual = os.fstat(self._data).st_size
        if actual != self.size:
            self._detach()
            raise SizeMismatchError(str(self.digest), self.size, actual)
        self._committed = True
        return True

    def _attach_ingest(self) -> bool:
        directory = self._home.ingest_path(self.digest)
        with translated(directory, "follow an ingest"):
            state = IngestState.follow(directory / "state")
            if state is None:
                return False
            try:
                generation = state.generation
                # What another host writes is seen when it is whole: network file systems show a
                # growing file and its state in any order.
                ours = state.boot == boot_key(self._home.boot)
                if state.valid and state.size == self.size and ours:
                    self._data = os.open(
                        directory / f"data.{generation}",
                        os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                    )
            except FileNotFoundError:
                self._data = -1  # just renamed into blobs/, or the next generation is being made
            finally:
                if self._data < 0:
                    state.close()
        if self._data < 0:
            return False
        self._state = state
        self.generation = generation
        return True

    def _detach(self) -> None:
        if self._data >= 0:
            os.close(self._data)
            self._data = -1
        if self._state is not None:
            self._state.close()
            self._state = None
        self._committed = False

    def _writer_lives(self) -> bool:
        """Say whether somebody writes; when nobody does, attach to what is there now, if anything.

        The test is a shared lock on the state file, held for a moment: the writer's exclusion is on
        another file, so that a test never turns a new writer away.
        """
        state = self._state
        if state is None:
            return self._others_live()
        if not try_lock(state.descriptor, shared=True):
            return True
        unlock(state.descriptor)
        directory = self._home.ingest_path(self.digest)
        if is_current(state.descriptor, directory / "state") and not os.path.lexists(
            self._home.blob_path(self.digest)
        ):
            return False  # its writer is dead, and a new one takes over this very file
        # Committed under our descriptor, or the ingest was collected and perhaps begun anew.
        before, offset = os.fstat(self._data), self._offset
        self._detach()
        if self._attach():
            after = os.fstat(self._data)
            same = (before.st_dev, before.st_ino) == (after.st_dev, after.st_ino)
            if offset > 0 and not same:
                self._detach()
                self._stale = True
                raise GenerationChanged(str(self.digest))
        elif offset > 0:
            self._stale = True
            raise GenerationChanged(str(self.digest))
        return self._committed

    def _others_live(self) -> bool:
        """Say whether somebody writes whose bytes cannot be read yet."""
        state = IngestState.follow(self._home.ingest_path(self.digest) / "state")
        if state is None:
            return False
        try:
            if not try_lock(state.descriptor, shared=True):
                return True
            unlock(state.descriptor)
            return False
        finally:
            state.close()


class _Waiting:
    """The pauses of one wait, and when it has lasted too long."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower
        self._begun = self._tested = self._alive = time.monotonic()
        self._length = _SHORT_PAUSE

    def pause(self) -> None:
        """Sleep a little; raise when cancelled or when no live writer appeared in time."""
        follower = self._follower
        if follower._cancelled is not None and follower._cancelled():
            raise CancelledError(f"reading {follower.digest}")
        now = time.monotonic()
        if now - self._tested >= _TEST_EVERY:
            self._tested = now
            with suppress(FileNotFoundError):
                if follower._writer_lives():
                    self._alive = now
        if now - self._alive > follower._grace_seconds:
            raise NodeError(
                str(follower._home.ingest_path(follower.digest)),
                f"nobody has been writing {follower.digest} for {follower._grace_seconds:g} s: "
                "its writer ended; pull again to go on from where it was",
            )
        time.sleep(self._length)
        if now - self._begun > _SHORT_FOR:
            self._length = min(self._length * 1.5, _LONG_PAUSE)
