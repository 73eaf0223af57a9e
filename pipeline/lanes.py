"""One blob over several connections of one host: the first stream, and parts beside it.

Invariant: the first stream goes to the blob's end unless others have proven that the host honours
ranges, so whatever becomes of the others nothing is lost by them. Each part's answer is checked for
being that part; a part that breaks is taken up where it broke; answers are read to their end, so
that connections serve again. When :meth:`Lanes.close` returns no thread is left, and the first
error that was not the network's is the one that is raised.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, Self

from stowray.pipeline.errors import (
    CancelledError,
    NodeError,
    NotFoundError,
    RegistryError,
    UnauthorizedError,
    UnavailableError,
)
from stowray.pipeline.range_plan import Parts
from stowray.pipeline.retry import uniform, wait

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.blob_stream import RegistryBlob
    from stowray.pipeline.clock import Clock
    from stowray.pipeline.descriptor import Descriptor
    from stowray.pipeline.host_records import HostRecords
    from stowray.pipeline.ingest import Ingest
    from stowray.pipeline.lane_choice import Ranged
    from stowray.pipeline.range_plan import Climb
    from stowray.pipeline.source import Source

BUFFER_SIZE: Final = 256 * 1024
# What all lanes together may have read and not yet written down: it is lost with the process.
UNWRITTEN_SIZE: Final = 512 * 1024
LOOK_SECONDS: Final = 0.05
# A lane that fails so often in a row is one connection too many.
LANE_FAILURES: Final = 3
PAUSE_SECONDS: Final = 0.5
REFUSALS: Final = 2


class Lanes:
    """The connections of one blob; a context manager that ends all but the first."""

    def __init__(
        self,
        place: Ranged,
        stream: RegistryBlob,
        ingest: Ingest,
        climb: Climb,
        records: HostRecords,
        fetch_range: tuple[Source, Descriptor],
        cancelled: Callable[[], bool],
        tell: Callable[[int], None],
        clock: Clock,
        *,
        end: int,
    ) -> None:
        self._place = place
        self._stream = stream
        self._ingest = ingest
        self._climb = climb
        self._records = records
        self._reference, self._descriptor = fetch_range
        self._cancelled = cancelled
        self._tell = tell
        self._clock = clock
        self._begun = clock.monotonic()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._watcher: threading.Thread | None = None
        self._position = stream.offset  # of the first stream
        self._advanced = (self._begun, 0.0)  # when it was there, and how long it had waited then
        self._is_taken_over = False
        self._has_given_up = False
        self._own_part = (0, 0)  # where the first lane is in its part, and where that ends
        self._parts = Parts(end, ingest.size) if end < ingest.size else None
        self._first_part = end
        self._active = 1
        self._out = 0  # parts that somebody works at
        self._refusals = 0
        self._proven = end < ingest.size
        self._stopped = False
        self._error: BaseException | None = None
        self.end = end  # where the first stream is to stop
        self.received = 0
        self.retries = 0

    def __enter__(self) -> Self:
        if self._climb.may_grow:
            # By a thread of its own: a first stream that stands still is what has to be seen.
            self._watcher = threading.Thread(target=self._watch, name="lane", daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_proven(self) -> bool:
        """Tell whether the host honours ranges: then the rest can go on without the first."""
        return self._proven and not self._stopped

    @property
    def piece_size(self) -> int:
        """Return how much one connection may read before it writes that down."""
        return min(BUFFER_SIZE, UNWRITTEN_SIZE // max(self._climb.wanted, self._active))

    def close(self) -> None:
        """End all lanes, wait for their threads, and remember what was found out."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._watcher is not None:
            self._watcher.join()
        for thread in self._threads:
            thread.join()
        finding = self._climb.finding
        if finding is not None:
            self._climb.finding = None
            self._records.learn(self._place.host, finding.connections, finding.bytes_per_second)

    def advance(self, count: int, position: int) -> None:
        """Take note of ``count`` bytes of the first stream, which is at ``position`` now."""
        with self._changed:
            self.received += count
            if self._error is not None:
                raise self._error
            self._position = position
            self._advanced = self._clock.monotonic(), self._stream.seconds_waited

    def take_over(self, position: int) -> None:
        """Fetch what is left in this thread too: the first stream ended at ``position``.

        Raises UnavailableError when nobody gets on, and what a lane met that is no matter of the
        network. The blob may still be incomplete if the host sends no ranges any more.
        """
        failed: UnavailableError | None = None
        with self._changed:
            self._is_taken_over = True
            if self._parts is not None:
                self._parts.give_back(position, self.end)
        try:
            self._run_lane(is_first=True)
        except UnavailableError as error:
            failed = error
            with self._changed:
                # Those that are left may get on, but no new ones: else this would never end.
                self._has_given_up = True
        except CancelledError:
            if self._cancelled():
                raise
            # Another lane's error ended this one, and is raised below.
        for thread in self._threads:
            thread.join()
        if self._error is not None:
            raise self._error
        if failed is not None and self._ingest.offset < self._ingest.size:
            raise failed

    # -- opening and ending -----------------------------------------------------------------------

    def _watch(self) -> None:
        look_at = 0.0
        try:
            with self._changed:
                while not self._stopped and self._error is None:
                    now = self._clock.monotonic()
                    if now >= look_at:
                        look_at = now + LOOK_SECONDS
                        self._look(now)
                    was_proven = self._proven
                    if self._climb.wanted > self._active and not self._has_given_up:
                        self._open()
                    self._changed.wait(LOOK_SECONDS)
                    if self._proven and not was_proven:
                        look_at = 0.0
        except BaseException as error:  # noqa: BLE001 - raised where somebody waits for it
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _look(self, now: float) -> None:
        left = self._ingest.size - self._ingest.offset
        self._climb.look(now, self.received, self._active, left, self._waiting(now))

    def _waiting(self, now: float) -> float:
        """Return which part of the time the first stream has waited for the host."""
        if self._is_taken_over:
            return 1.0
        waited = self._stream.seconds_waited
        when, then = self._advanced
        if waited == then:
            # It is told when the bytes are there: these are still waited for.
            waited += now - when
        return waited / max(now - self._begun, 1e-6)

    def _open(self) -> None:
        """Start as many lanes as are wanted and allowed; the lock is held."""
        position = self._ingest.offset if self._is_taken_over else self._position
        left = self._ingest.size - position
        if self._parts is None:
            # The first stream reads on while the others begin: they start where it will be soon.
            first = position + self._climb.part_size(left)
            if first >= self._ingest.size:
                return
            self._first_part = first
            self._parts = Parts(first, self._ingest.size)
        if self._parts.is_empty:
            self._share()
        if self._parts.is_empty:
            return
        # One that proves that the host honours ranges, before many are refused.
        most = self._climb.wanted if self._proven else 2
        count = min(most - self._active, self._spare())
        for _ in range(count):
            self._active += 1
            thread = threading.Thread(target=self._run, name="lane", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _share(self) -> None:
        """Let the first lane end its part earlier, if that goes far; the lock is held."""
        at, end = self._own_part
        stop = at + self._climb.part_size(end - at)
        if self._parts is not None and stop + BUFFER_SIZE < end:
            self._own_part = at, stop
            self._parts.give_back(stop, end)

    def _spare(self) -> int:
        return self._place.spare_connections(self._stream)

    def _is_over(self) -> bool:
        return self._stopped or self._error is not None or self._cancelled()

    def _run(self) -> None:
        try:
            self._run_lane(is_first=False)
        except UnavailableError:
            # What it could not fetch was given back, and others go on with it.
            return
        except CancelledError:
            return
        except BaseException as error:  # noqa: BLE001 - raised where somebody waits for it
            with self._changed:
                self._error = self._error or error
        finally:
            with self._changed:
                self._active -= 1
                self._changed.notify_all()

    # -- one lane ---------------------------------------------------------------------------------

    def _run_lane(self, *, is_first: bool) -> None:
        """Fetch parts until there are none; UnavailableError when this lane gets nowhere."""
        buffer = memoryview(bytearray(BUFFER_SIZE))
        failures = 0
        while (part := self._next(is_first=is_first)) is not None:
            start, end = part
            at = start
            try:
                at = self._fetch(start, end, buffer, is_first=is_first)
                failures = 0
            except _PartError as error:
                at = error.position
                failures = 1 if at - start >= BUFFER_SIZE else failures + 1
                self.retries += 1
                if failures >= LANE_FAILURES:
                    raise error.cause from None
            except (NotFoundError, UnauthorizedError, RegistryError, NodeError):
                # Said to the first stream as well, if it is meant: there it is dealt with.
                self._stop()
                return
            finally:
                self._finish_part(at, end, is_first=is_first)
            if failures:
                seconds = uniform(0, PAUSE_SECONDS * 2 ** (failures - 1))
                wait(seconds, self._clock, self._is_over, str(self._descriptor.digest))

    def _next(self, *, is_first: bool) -> tuple[int, int] | None:
        """Return the next part; None when this lane is not needed any more."""
        with self._changed:
            while not self._stopped and self._error is None and self._parts is not None:
                if self._cancelled():
                    raise CancelledError(str(self._descriptor.digest))
                if is_first:
                    self._tell(self._ingest.offset)
                elif self._active > self._climb.wanted or self._spare() < 1:
                    return None
                size = self._climb.part_size(self._parts.left)
                if is_first and self._climb.is_over and self._climb.wanted == 1:
                    # Others bring nothing: each further request would only cost its way there.
                    size = self._ingest.size
                part = self._parts.take(size, self._ingest.offset, self._climb.reach)
                if part is not None:
                    # An earlier run may have left bytes there.
                    gap = self._ingest.gap(*part)
                    if gap is None:
                        continue
                    self._parts.give_back(gap[1], part[1])
                    self._out += 1
                    if is_first:
                        self._own_part = gap
                    return gap
                if self._parts.is_empty and (self._out == 0 or not is_first):
                    # The first lane stays: a part that breaks may come back.
                    return None
                self._changed.wait(LOOK_SECONDS)
        return None

    def _fetch(self, start: int, end: int, buffer: memoryview, *, is_first: bool) -> int:
        """Copy one part into the ingest; return how far it came."""
        at = start
        try:
            stream = self._place.open_range(
                self._reference, self._descriptor, start, end, self._is_over
            )
            if stream is None:
                self._refused()
                return at
            with stream:
                self._prove()
                while at < (stop := self._own_part[1] if is_first else end):
                    count = stream.read_into(buffer[: min(self.piece_size, stop - at)])
                    if count == 0:
                        # Shorter than was asked for, which is allowed.
                        return at
                    self._ingest.write_at(at, buffer[:count])
                    at += count
                    self._count(count, at, is_first=is_first)
                if at >= end:
                    # Past the end of the body's framing, so that the connection is free again.
                    stream.read_into(buffer[:1])
        except UnavailableError as error:
            if at == end:
                return at
            raise _PartError(at, error) from error
        return at

    def _count(self, count: int, at: int, *, is_first: bool) -> None:
        with self._changed:
            self.received += count
            if is_first:
                self._own_part = at, self._own_part[1]
                self._tell(self._ingest.offset)

    def _prove(self) -> None:
        with self._changed:
            self._refusals = 0
            if not self._proven:
                self._proven = True
                self._changed.notify_all()
            self.end = self._first_part

    def _refused(self) -> None:
        """Take note that other bytes came than were asked for."""
        with self._changed:
            self._refusals += 1
            if self._proven and self._refusals < REFUSALS:
                return
            self._stopped = True
            self._changed.notify_all()
        self._records.learn(self._place.host, 1, 0)

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _finish_part(self, at: int, end: int, *, is_first: bool) -> None:
        with self._changed:
            self._out -= 1
            if is_first:
                # It may have been shared meanwhile.
                end = self._own_part[1]
                self._own_part = 0, 0
            if self._parts is not None:
                self._parts.give_back(at, end)
            self._changed.notify_all()


class _PartError(Exception):
    """The network failed a part at ``position``."""

    def __init__(self, position: int, cause: UnavailableError) -> None:
        super().__init__(position)
        self.position = position
        self.cause = cause
