"""Blobs that are being written: one writer per digest, any number of followers.

Invariant: bytes that were exposed are never rewritten within a generation. The writer holds two
``flock``s, on ``lock`` (exclusion) and on ``state`` (a sign of life that followers may test without
ever standing in a writer's way); ``state`` says how long the contiguous prefix is. Nothing is
visible under ``blobs/`` before its size and digest are proven, and a resumed prefix is hashed again
from the disk and compared with the journal before a byte is added to it. What was written beyond
the prefix is kept for the next writer of the same boot, and proven with the whole; followers see it
only where a blob comes in stripes (``stripe_state``).
"""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_left
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from stowray.pipeline.errors import DigestMismatchError, SizeMismatchError, StorageError
from stowray.pipeline.failpoint import failpoint
from stowray.pipeline.files import make_directory, storage_error, translated
from stowray.pipeline.ingeststate import COMMITTED, GIVEN_UP, GROWING, IngestState, boot_key
from stowray.pipeline.journal import Checkpoint, Journal, prove_prefix
from stowray.pipeline.locks import is_current, open_lock, try_lock, unlock
from stowray.pipeline.stripe_state import StripeState, are_within, end_showing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    from stowray.pipeline.clock import Boot
    from stowray.pipeline.digest import Digest

CHECKPOINT_EVERY = 8 << 20
SMALLEST_ISLAND = 4 << 10
_READ_SIZE = 1 << 20
_LIFE_SIGN_ATTEMPTS = 1000


class GenerationChanged(Exception):  # noqa: N818 - a signal to begin again, not an error
    """The bytes read so far are void: drop what was made of them and call ``rewind()``."""


class Home(Protocol):
    """What an ingest needs of its store."""

    boot: Boot
    reserve_bytes: int

    def ingest_path(self, digest: Digest) -> Path:
        """Return the directory of a digest's ingest."""

    def blob_path(self, digest: Digest) -> Path:
        """Return the path of a committed blob."""

    def has(self, digest: Digest, size: int | None = None) -> bool:
        """Say whether the blob is committed and trusted."""

    def void_proof(self, digest: Digest) -> None:
        """Forget that a blob was proven, before other bytes take its name."""

    def record_blob(self, digest: Digest, size: int, repository: str = "") -> None:
        """Record that the committed blob has just been proven, and who (if named) served it."""


def acquire(home: Home, digest: Digest, size: int) -> Ingest | None:
    """Become the writer of ``digest`` without waiting; None when another live writer is."""
    directory = home.ingest_path(digest)
    with translated(directory, "begin an ingest"):
        while True:
            try:
                make_directory(directory)
                lock = open_lock(directory / "lock")
            except FileNotFoundError:
                continue  # another writer has just committed and removed the directory
            if not try_lock(lock):
                os.close(lock)
                return None
            if is_current(lock, directory / "lock"):
                break
            os.close(lock)
        try:
            ingest = Ingest(home, digest, size, directory, lock)
        except BaseException:
            os.close(lock)
            raise
    try:
        alive = ingest.open()
    except BaseException:
        ingest.close()
        raise
    return ingest if alive else None


class Ingest:
    """The one writer of a blob; a context manager that keeps the partial for the next one."""

    def __init__(self, home: Home, digest: Digest, size: int, directory: Path, lock: int) -> None:
        """Take over the held ``lock``; use ``acquire``."""
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
        self._hasher = digest.hasher()
        self._prefix = 0
        self._hashed = 0
        self._checkpoint = 0
        self._reserved = 0
        self._islands: list[tuple[int, int]] = []  # written or being written beyond the prefix
        self._done: set[tuple[int, int]] = set()
        self._guard = threading.Lock()
        self._hashing = threading.Lock()
        self._finished = False
        self._is_given_up = False

    # -- life -------------------------------------------------------------------------------------

    def open(self) -> bool:
        """Find the resume point; False when a follower's test never let the sign of life go."""
        if self._home.has(self.digest, self.size):
            # Committed between the caller's look and our lock: nothing to write.
            self._finished = True
            self._prefix = self._hashed = self.size
            self._remove()
            return True
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the locks and keep what was written for the next writer; idempotent."""
        if self._lock < 0:
            return
        try:
            if not self._finished and self._journal is not None and self._data >= 0:
                # The exact end, so that a later resume has proof up to here. On a full disk there
                # is none, and the resume goes back to the last checkpoint.
                with suppress(StorageError):
                    self._catch_up(None, 0, wait=True)
                    self._note(self._journal)
                if self._prefix == 0 and not self._islands and not self._is_given_up:
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
    def offset(self) -> int:
        """How many bytes from the start are there: where the next ``write`` goes."""
        return self._prefix

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append ``data``, expose it to followers and hash it in this thread."""
        self.write_at(self._prefix, data)

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write ``data`` at ``offset``; only the contiguous prefix is exposed.

        Safe from several threads. Parts that are there already, or that another thread is writing,
        are dropped. Threads of one generation must have ended before ``restart``.
        """
        view = memoryview(data).cast("B")
        if offset + len(view) > self.size:
            raise SizeMismatchError(str(self.digest), self.size, offset + len(view))
        if offset >= self._reserved + CHECKPOINT_EVERY:
            # Others fill the disk as well: stop before it is full for everybody.
            self._reserved = offset
            self._reserve()
        for start, end in self._claim(offset, offset + len(view)):
            part = view[start - offset : end - offset]
            try:
                self._put(part, start)
            except BaseException:
                with self._guard:
                    self._islands.remove((start, end))
                raise
            if self._expose(start, end):
                self._catch_up(part, start)
            elif end - start >= SMALLEST_ISLAND and self._journal is not None:
                # A writer that dies leaves it to the next one.
                with translated(self._directory, "write the journal"):
                    self._journal.append_island(self.generation, start, end)

    def gap(self, start: int, end: int, *, written: bool = False) -> tuple[int, int] | None:
        """Return the first part of a range that nobody has written yet, None when all is there.

        What a thread is writing just now counts as there, except with ``written``.
        """
        with self._guard:
            at = max(start, self._prefix)
            for left, right in self._islands:
                if written and (left, right) not in self._done:
                    continue
                if left > at:
                    return (at, min(left, end)) if at < end else None
                at = max(at, right)
            return (at, end) if at < end else None

    def read(self, start: int, length: int) -> bytes:
        """Return bytes that have been written in this generation."""
        with translated(self._data_path, "read a blob that is being written"):
            return os.pread(self._data, length, start)

    def show_stripes(self, count: int, unit: int) -> StripeState:
        """Return what tells other processes how far each of ``count`` stripes is.

        Whoever writes a stripe advances it there when the bytes are written.
        """
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
        if self._state is None:
            raise StorageError(str(self._directory), "this ingest is over: acquire it again")
        if self._prefix == 0 and not self._islands:
            return
        with self._guard, self._hashing, translated(self._directory, "begin a new generation"):
            if self._journal is not None:
                self.condemned = self.checkpoints()
            self.drop_wrong()
            if self.keeps_wrong and self._has_room(self.size):
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
        if self._prefix != self.size:
            raise SizeMismatchError(str(self.digest), self.size, self._prefix)
        self._catch_up(None, 0, wait=True)
        actual = f"{self.digest.algorithm}:{self._hasher.hexdigest()}"
        if actual != self.digest:
            self.restart()
            raise DigestMismatchError(str(self.digest), str(self.digest), actual)
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

    @property
    def _data_path(self) -> Path:
        return self._directory / f"data.{self.generation}"

    def _claim(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the parts of a range that nobody has written or is writing, and claim them."""
        with self._guard:
            parts: list[tuple[int, int]] = []
            at = max(start, self._prefix)
            for left, right in self._islands:
                if left >= end:
                    break
                if left > at:
                    parts.append((at, left))
                at = max(at, right)
            if at < end:
                parts.append((at, end))
            for part in parts:
                self._islands.insert(bisect_left(self._islands, part), part)
            return parts

    def _put(self, view: memoryview, offset: int) -> None:
        while view:
            try:
                written = os.pwrite(self._data, view, offset)
            except OSError as error:
                missing = self.size - offset
                raise storage_error(
                    error,
                    self._data_path,
                    f"write the {missing} bytes that {self.digest} ({self.size} bytes) still needs",
                ) from error
            view = view[written:]
            offset += written

    def _expose(self, start: int, end: int) -> bool:
        """Take note of a written range; return whether the prefix goes beyond its start now."""
        with self._guard:
            self._done.add((start, end))
            while self._islands and self._islands[0] in self._done:
                if self._islands[0][0] != self._prefix:
                    break
                part = self._islands.pop(0)
                self._done.discard(part)
                self._prefix = part[1]
            if self._state is not None:
                try:
                    self._state.expose(self._prefix)
                except OSError as error:
                    raise storage_error(error, self._directory, "tell how far it is") from error
            return self._prefix > start

    def _catch_up(self, view: memoryview | None, start: int, *, wait: bool = False) -> None:
        """Hash up to the prefix: from memory where ``view`` goes on, else back from the file."""
        while self._hashed < self._prefix:
            if not self._hashing.acquire(blocking=wait):
                return  # the thread that is hashing sees our bytes when it looks again
            try:
                while self._hashed < self._prefix:
                    if view is not None and start == self._hashed:
                        self._feed(view)
                        view = None
                        continue
                    length = min(_READ_SIZE, self._prefix - self._hashed)
                    part = os.pread(self._data, length, self._hashed)
                    if not part:
                        raise StorageError(str(self._data_path), "was cut short by another program")
                    self._feed(memoryview(part))
            finally:
                self._hashing.release()

    def _feed(self, view: memoryview) -> None:
        while view:
            due = self._checkpoint + CHECKPOINT_EVERY - self._hashed
            part, view = view[:due], view[due:]
            self._hasher.update(part)
            self._hashed += len(part)
            if len(part) == due and self._journal is not None:
                self._note(self._journal)

    def _note(self, journal: Journal) -> None:
        if self._hashed == self._checkpoint:
            return
        digest = self._hasher.copy().digest()
        with translated(self._directory, "write the journal"):
            journal.append_checkpoint(Checkpoint(self.generation, self._hashed, digest))
        self._checkpoint = self._hashed

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
        # On the same boot the page cache has what was written; else only checkpoints are proof.
        same_boot = history.boot == (self._home.boot.boot_id, self._home.boot.host)
        kept, self._hasher = prove_prefix(
            self._data, self.digest, history.checkpoints, exposed, tail=same_boot
        )
        # Islands may lack from the disk after a crash, and bytes that are wrong make doubtful
        # whatever the same hand wrote.
        islands: list[tuple[int, int]] = []
        if same_boot and kept == exposed:
            islands = history.beyond(kept, min(self.size, os.fstat(self._data).st_size))
        shown = end_showing(self._directory, generation, self.size)
        if kept < exposed or not are_within(shown, [(0, kept), *islands]):
            # Followers saw more than is kept: what comes now may differ, so they must begin again.
            old = self._data_path
            state.begin(generation + 1, self.size, self._boot)
            self.generation = generation + 1
            old.rename(self._data_path)
        os.ftruncate(self._data, islands[-1][1] if islands else kept)
        self._prefix = self._hashed = self._checkpoint = kept
        journal.rewrite(self.generation, self._home.boot, history.until(kept), islands)
        self._checkpoint = history.last(kept)
        self.is_resumed = bool(kept or islands)
        self._islands = islands
        self._done = set(islands)
        if islands and islands[0][0] == kept:
            self._prefix = self._islands.pop(0)[1]
            self._done.discard((kept, self._prefix))
            self._catch_up(None, 0, wait=True)
        self._note(journal)
        state.expose(self._prefix)
        state.set_status(GROWING, self._boot)

    def _begin(self, state: IngestState, generation: int) -> None:
        """Start ``generation`` in a new empty file; followers of the old one are told first."""
        if self._data >= 0:
            os.close(self._data)
            self._data = -1
        state.begin(generation, self.size, self._boot)
        if self._stripes is not None:
            self._stripes.begin(generation)
        old = [entry for entry in self._directory.iterdir() if entry.name.startswith("data.")]
        self.generation = generation
        self._data = os.open(
            self._data_path,
            os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC,
            0o600,
        )
        for entry in old:
            if entry != self._data_path:
                with suppress(FileNotFoundError):
                    entry.unlink()
        self._hasher = self.digest.hasher()
        self._prefix = self._hashed = self._checkpoint = 0
        self._islands.clear()
        self._done.clear()
        if self._journal is not None:
            self._journal.rewrite(generation, self._home.boot, [], [])

    def _reserve(self) -> None:
        """Refuse before the first byte what the disk has no room for; nothing is allocated."""
        with translated(self._directory, "ask for free space"):
            system = os.statvfs(self._directory)
        needed = self.size - self._prefix
        free = system.f_bavail * system.f_frsize
        if needed and system.f_blocks and free < needed + self._home.reserve_bytes:
            raise StorageError(
                str(self._directory.parent.parent),
                f"{self.digest} needs {needed} more bytes, {free} are free and "
                f"{self._home.reserve_bytes} stay in reserve: free space (`stowray gc`) or choose "
                "another --store",
            )

    def _has_room(self, size: int) -> bool:
        system = os.statvfs(self._directory)
        free = system.f_bavail * system.f_frsize
        return not system.f_blocks or free >= size + self._home.reserve_bytes

    def _remove(self) -> None:
        with translated(self._directory, "remove an ingest"):
            discard_ingest(self._directory)


def discard_ingest(directory: Path) -> None:
    """Remove an ingest whose lock is held: the lock last, so that the next locker finds it gone."""
    for entry in list(directory.iterdir()):
        if entry.name != "lock":
            entry.unlink(missing_ok=True)
    failpoint("ingest-before-unlock")
    (directory / "lock").unlink(missing_ok=True)
    # A new writer may have made its own lock file in between: then the directory is its.
    with suppress(OSError):
        directory.rmdir()
