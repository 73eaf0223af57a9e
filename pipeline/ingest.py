"""Blobs that are being written: one writer per digest, any number of followers.

Invariant: bytes that were exposed are never rewritten within a generation. The writer holds two
``flock``s, on ``lock`` (exclusion) and on ``state`` (a sign of life that followers may test without
ever standing in a writer's way); ``state`` says how long the contiguous prefix is. Nothing is
visible under ``blobs/`` before its size and digest are proven, and a resumed prefix is hashed again
from the disk and compared with the journal before a byte is added to it. What was written beyond
the prefix is kept for the next writer of the same boot, and proven with the whole; followers see it
only where a blob comes in stripes (``stripe_state``).

A blob that comes whole at once needs none of that: an ingest that is opened *bare* has its lock
alone until something must be kept or shown.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from stowray.pipeline.errors import DigestMismatchError, SizeMismatchError, StorageError
from stowray.pipeline.failpoint import failpoint
from stowray.pipeline.files import translated
from stowray.pipeline.ingest_home import (
    create_data,
    discard_ingest,
    has_room,
    put_at,
    require_room,
)
from stowray.pipeline.ingest_rest import find_rest
from stowray.pipeline.ingeststate import COMMITTED, GIVEN_UP, GROWING, IngestState, boot_key
from stowray.pipeline.journal import Checkpoint, Journal
from stowray.pipeline.locks import try_lock, unlock
from stowray.pipeline.prefix_digest import CHECKPOINT_EVERY, PrefixDigest
from stowray.pipeline.stripe_state import StripeState, end_showing
from stowray.pipeline.written_ranges import WrittenRanges

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.ingest_home import IngestHome

SMALLEST_ISLAND = 4 << 10
_LIFE_SIGN_ATTEMPTS = 1000


class Ingest:
    """The one writer of a blob; a context manager that keeps the partial for the next one."""

    def __init__(
        self, home: IngestHome, digest: Digest, size: int, directory: Path, lock: int
    ) -> None:
        """Take over the held ``lock``; use :func:`stowray.pipeline.acquire.acquire`."""
        self.digest = digest
        self.repository = ""  # on whose behalf it is fetched, for the blob's record
        self.size = size
        self.generation = 0
        self.is_resumed = False  # whether an earlier writer's bytes are in it
        self.condemned: Mapping[int, bytes] = {}  # the checkpoints of the bytes given up last
        # The bytes given up last, if the caller wants to compare them and there is room; else -1.
        self.keeps_wrong = False
        self.wrong_data = -1
        self._home = home
        self._boot = boot_key(home.boot)
        self._directory = directory
        self._lock = lock
        self._state: IngestState | None = None
        self._stripes: StripeState | None = None
        self._journal: Journal | None = None
        self._data = -1
        self._reserved = 0
        self._ranges = WrittenRanges()
        self._hash = PrefixDigest(
            digest.hasher(), lambda: self._ranges.prefix, self._read_back, self._keep_checkpoint
        )
        self._finished = False
        self._is_given_up = False
        self._is_begun = False  # what an earlier writer left was looked at: the ranges tell of it
        self._is_bare = False  # nothing is on disk but the lock
        self._whole = memoryview(b"")  # all of a blob that came at once, while it is bare

    # -- life -------------------------------------------------------------------------------------

    def open(self, *, bare: bool = False) -> bool:
        """Find the resume point; False when a follower's test never let the sign of life go.

        With ``bare``, and nothing of an earlier writer, no file is made before one is needed.
        """
        if self._home.has(self.digest, self.size):
            # Committed between the caller's look and our lock: nothing to write.
            self._finished = True
            self._ranges.reset(self.size)
            self._remove()
            return True
        if bare and not os.path.lexists(self._directory / "state"):
            self._is_bare = True
            self.generation = 1
            self._reserve()
            return True
        return self._begin_files()

    def _begin_files(self) -> bool:
        with translated(self._directory, "open an ingest"):
            state = self._state = IngestState.create(self._directory / "state")
            for _ in range(_LIFE_SIGN_ATTEMPTS):
                if try_lock(state.descriptor):
                    break
                time.sleep(0.001)
            else:
                return False
            self._journal = Journal(self._directory / "journal")
            self._resume(state)
        self._reserve()
        return True

    def __enter__(self) -> Ingest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the locks and keep what was written for the next writer; idempotent."""
        if self._lock < 0:
            return
        try:
            if self._is_bare and not self._finished:
                self._remove()
            elif not self._finished and self._is_begun and self._data >= 0:
                # The exact end, so that a later resume has proof up to here. On a full disk there
                # is none, and the resume goes back to the last checkpoint.
                with suppress(StorageError):
                    self._hash.catch_up(wait=True)
                    self._hash.note()
                if self._ranges.is_empty and not self._is_given_up:
                    self._remove()
        finally:
            with translated(self._directory, "close an ingest"):
                self._close()

    def _close(self) -> None:
        data, lock, self._data, self._lock = self._data, self._lock, -1, -1
        self.drop_wrong()
        try:
            if self._journal is not None:
                self._journal.close()
            if self._stripes is not None:
                self._stripes.close()
            if self._state is not None:
                unlock(self._state.descriptor)
                self._state.close()
            if data >= 0:
                os.close(data)
        finally:
            unlock(lock)
            os.close(lock)

    # -- writing ----------------------------------------------------------------------------------

    @property
    def is_bare(self) -> bool:
        """Whether nothing is written down yet: a blob that comes whole at once is cheapest."""
        return self._is_bare

    @property
    def offset(self) -> int:
        """How many bytes from the start are there: where the next ``write`` goes."""
        return self._ranges.prefix

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append ``data``, expose it to followers and hash it in this thread."""
        self.write_at(self._ranges.prefix, data)

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write ``data`` at ``offset``; only the contiguous prefix is exposed.

        Safe from several threads. Parts that are there already, or that another thread is writing,
        are dropped. Threads of one generation must have ended before ``restart``.
        """
        view = memoryview(data).cast("B")
        if offset + len(view) > self.size:
            raise SizeMismatchError(str(self.digest), self.size, offset + len(view))
        if self._is_bare and len(view) == self.size:
            self._whole = memoryview(bytes(view))
            self._ranges.reset(self.size)
            self._hash.catch_up(self._whole, wait=True)
            return
        self._show()
        if offset >= self._reserved + CHECKPOINT_EVERY:
            # Others fill the disk as well: stop before it is full for everybody.
            self._reserved = offset
            self._reserve()
        for start, end in self._ranges.claim(offset, offset + len(view)):
            part = view[start - offset : end - offset]
            try:
                self._put(part, start)
            except BaseException:
                self._ranges.give_back((start, end))
                raise
            if self._ranges.note((start, end), self._expose):
                self._hash.catch_up(part, start, wait=False)
            elif end - start >= SMALLEST_ISLAND and self._journal is not None:
                # A writer that dies leaves it to the next one.
                with translated(self._directory, "write the journal"):
                    self._journal.append_island(self.generation, start, end)

    def gap(self, start: int, end: int, *, written: bool = False) -> tuple[int, int] | None:
        """Return the first part of a range that nobody has written yet, None when all is there.

        What a thread is writing just now counts as there, except with ``written``.
        """
        return self._ranges.gap(start, end, written=written)

    def read(self, start: int, length: int) -> bytes:
        """Return bytes that have been written in this generation."""
        self._show()
        with translated(self._data_path, "read a blob that is being written"):
            return os.pread(self._data, length, start)

    def show_stripes(self, count: int, unit: int) -> StripeState:
        """Return what tells other processes how far each of ``count`` stripes is.

        Whoever writes a stripe advances it there when the bytes are written.
        """
        self._show()
        if self._stripes is not None:
            self._stripes.close()
        with translated(self._directory, "tell how far the stripes are"):
            self._stripes = StripeState.create(self._directory, self.generation, count, unit)
        return self._stripes

    def checkpoints(self) -> Mapping[int, bytes]:
        """Return the digests of all bytes before each offset that was noted in this generation."""
        if self._journal is None:
            return {}
        with translated(self._directory, "read the journal"):
            history = self._journal.read()
        return {point.offset: point.digest for point in history.checkpoints}

    def restart(self) -> None:
        """Give up the bytes so far, which proved wrong: a new generation begins at offset 0."""
        self._show()
        if self._state is None:
            raise StorageError(str(self._directory), "this ingest is over: acquire it again")
        if self._ranges.is_empty:
            return
        with translated(self._directory, "begin a new generation"):
            if self._journal is not None:
                self.condemned = self.checkpoints()
            self.drop_wrong()
            if self.keeps_wrong and has_room(self._home, self._directory, self.size):
                self.wrong_data = os.dup(self._data)
            self._state.condemn(self.generation)
            self._begin(self._state, self.generation + 1)

    def drop_wrong(self) -> None:
        """Let go of the bytes that were given up last."""
        if self.wrong_data >= 0:
            os.close(self.wrong_data)
            self.wrong_data = -1

    def give_up(self) -> None:
        """Tell followers that the bytes prove wrong wherever they come from: none will come."""
        self._show()
        if self._state is not None and not self._finished:
            with translated(self._directory, "give an ingest up"):
                self._state.set_status(GIVEN_UP, self._boot)
            self._is_given_up = True

    def commit(self) -> None:
        """Prove size and digest and publish the blob; success as well when it was there already.

        After a ``DigestMismatchError`` the bytes are gone and the ingest stands at the start of a
        new generation, ready for another source.
        """
        if self._finished:
            return
        if self.offset != self.size:
            raise SizeMismatchError(str(self.digest), self.size, self.offset)
        self._hash.catch_up(wait=True)
        actual = f"{self.digest.algorithm}:{self._hash.hexdigest()}"
        if actual != self.digest:
            self.restart()
            raise DigestMismatchError(str(self.digest), str(self.digest), actual)
        if self._is_bare:
            self._put_whole()
        failpoint("ingest-proven")
        target = self._home.blob_path(self.digest)
        self._home.void_proof(self.digest)
        with translated(target, "commit a blob"):
            os.fchmod(self._data, 0o444)
            # Some file systems tell only here that the bytes found no room (close(2)).
            data, self._data = self._data, -1
            os.close(data)
            failpoint("ingest-before-rename")
            self._data_path.rename(target)
        self._finished = True
        failpoint("ingest-after-rename")
        self._home.record_blob(self.digest, self.size, self.repository)
        failpoint("ingest-after-record")
        with translated(self._directory, "tell that the blob is committed"):
            if self._state is not None:
                self._state.set_status(COMMITTED, self._boot)
        self._remove()

    # -- internals --------------------------------------------------------------------------------

    def _show(self) -> None:
        """Make a bare ingest one that is seen and resumed; what it has is written down."""
        if not self._is_bare:
            return
        whole, self._whole = self._whole, memoryview(b"")
        self._is_bare = False
        self._ranges.reset(0)
        if not self._begin_files():
            raise StorageError(str(self._directory), "is held by another program")
        if whole:
            self.write_at(0, whole)

    def _put(self, view: memoryview, offset: int) -> None:
        put_at(self._data, self._data_path, view, offset, self.digest, self.size)

    def _put_whole(self) -> None:
        """Write all of a blob that came at once; nobody but us knows of the file."""
        with translated(self._directory, "write a blob"):
            self._data = create_data(self._data_path)
        self._put(self._whole, 0)

    @property
    def _data_path(self) -> Path:
        return self._directory / f"data.{self.generation}"

    def _expose(self, prefix: int) -> None:
        if self._state is not None:
            with translated(self._directory, "tell how far it is"):
                self._state.expose(prefix)

    def _read_back(self, offset: int, length: int) -> bytes:
        with translated(self._data_path, "read back what was written"):
            part = os.pread(self._data, length, offset)
        if not part:
            raise StorageError(str(self._data_path), "was cut short by another program")
        return part

    def _keep_checkpoint(self, offset: int, digest: bytes) -> None:
        if self._journal is not None:
            with translated(self._directory, "write the journal"):
                self._journal.append_checkpoint(Checkpoint(self.generation, offset, digest))

    def _resume(self, state: IngestState) -> None:
        journal = self._journal
        if journal is None:
            return
        history = journal.read()
        generation = max(state.generation if state.valid else 0, history.generation)
        if not state.valid or state.size != self.size or history.generation != generation:
            self._begin(state, generation + 1)
            return
        self.generation = generation
        try:
            self._data = os.open(self._data_path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            self._begin(state, generation + 1)
            return
        exposed = state.prefix
        shown = end_showing(self._directory, generation, self.size)
        rest = find_rest(
            self._data, self.digest, self.size, exposed, shown, history, self._home.boot
        )
        if rest.lacks_shown:
            # Followers saw more than is kept: what comes now may differ, so they must begin again.
            old = self._data_path
            state.begin(generation + 1, self.size, self._boot)
            self.generation = generation + 1
            old.rename(self._data_path)
        kept, islands = rest.kept, rest.islands
        os.ftruncate(self._data, islands[-1][1] if islands else kept)
        journal.rewrite(self.generation, self._home.boot, history.until(kept), islands)
        self._hash.reset(rest.hasher, kept, history.last(kept))
        self._ranges.reset(kept, islands)
        self.is_resumed = bool(kept or islands)
        self._hash.catch_up(wait=True)
        self._hash.note()
        state.expose(self._ranges.prefix)
        state.set_status(GROWING, self._boot)
        self._is_begun = True

    def _begin(self, state: IngestState, generation: int) -> None:
        """Start ``generation`` in a new empty file; followers of the old one are told first."""
        if self._data >= 0:
            os.close(self._data)
            self._data = -1
        state.begin(generation, self.size, self._boot)
        if self._stripes is not None:
            self._stripes.begin(generation)
        self.generation = generation
        self._data = create_data(self._data_path)
        self._ranges.reset(0)
        self._hash.reset(self.digest.hasher())
        if self._journal is not None:
            self._journal.rewrite(generation, self._home.boot, [], [])
        self._is_begun = True

    def _reserve(self) -> None:
        """Refuse before the first byte what the disk has no room for; nothing is allocated."""
        require_room(self._home, self._directory, self.digest, self.size - self.offset)

    def _remove(self) -> None:
        discard_ingest(self._directory)
