"""What one answer of one source brings into an ingest.

Invariant: bytes go where the source says they belong, never beyond the descriptor's size, and a
body that goes on after it is an error; what is there already is dropped. Where it helps, other
connections of the same host fetch parts beside the first one (``lanes``).
"""

from __future__ import annotations

from dataclasses import field
from functools import partial
from typing import TYPE_CHECKING

from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.errors import (
    CancelledError,
    SizeMismatchError,
    StowrayError,
    UnavailableError,
)
from stowray.pipeline.lane_choice import open_first_part, open_lanes
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.descriptor import Descriptor
    from stowray.pipeline.host_records import HostRecords
    from stowray.pipeline.ingest import Ingest
    from stowray.pipeline.lanes import Lanes
    from stowray.pipeline.origin import BlobStream, Origin, Place
    from stowray.pipeline.progress import Report
    from stowray.pipeline.retry import Retries
    from stowray.pipeline.settings import RegistrySettings
    from stowray.pipeline.source import Source
    from stowray.pipeline.source_actions import Report as Remark

BUFFER_SIZE = 256 * 1024
SMALLEST_GAP = 1 << 20
REPORT_EVERY = 1 << 20
REPORT_SECONDS = 0.1


@dataclass(slots=True)
class Work:
    """One fetch under way."""

    reference: Source
    descriptor: Descriptor
    report: Report
    cancelled: Callable[[], bool]
    retries: Retries
    sources: tuple[Origin | Place, ...]
    origins: list[
        Origin | Place
    ]  # those of the sources that are still worth a try, the next one first
    source: str = ""
    received: int = 0
    reported: int = 0
    reported_at: float = 0.0
    wrong: int = 0
    short: int = 0
    opened: bool = False
    failure: tuple[Source, StowrayError] | None = None  # an earlier one, when this began
    writers: set[int] = field(default_factory=set)  # who wrote into this generation
    by_source: dict[str, int] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)

    def count(self, source: str, received: int) -> None:
        """Add what ``source`` sent since ``received`` bytes had come in all."""
        more = self.received - received
        if more:
            self.by_source[source] = self.by_source.get(source, 0) + more

    def tell(self, status: str, current: int) -> None:
        """Report how far the blob is."""
        self.report("blob", str(self.descriptor.digest), status, current, self.descriptor.size)


@dataclass(slots=True)
class _Copying:
    """One stream on its way into the ingest."""

    stream: BlobStream
    ingest: Ingest
    writer: int
    end: int  # of what it brings: the blob's, or of a part
    received: int = 0
    position: int = field(init=False)

    def __post_init__(self) -> None:
        self.position = self.stream.offset


class Copier:
    """Copies answers into ingests; thread-safe."""

    def __init__(
        self, settings: RegistrySettings, hosts: HostRecords, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._settings = settings
        self._hosts = hosts
        self._clock = clock

    def take_part(self, work: Work, ingest: Ingest, origin: Origin | Place) -> None:
        """Append what one answer of one source brings, perhaps not all that is left."""
        work.opened = False
        before = work.received
        wanted = (work.reference, work.descriptor)
        first = open_first_part(origin, ingest, self._settings, self._hosts, wanted, work.cancelled)
        stream: BlobStream
        if first is not None:
            stream, end = first
        else:
            end = ingest.size
            stream = origin.open_blob(
                work.reference, work.descriptor, ingest.offset, cancelled=work.cancelled
            )
        with stream:
            work.source = stream.source
            work.opened = True
            try:
                self._take_stream(work, ingest, origin, stream, end)
            finally:
                work.count(stream.source, before)

    def _take_stream(
        self, work: Work, ingest: Ingest, origin: Origin | Place, stream: BlobStream, end: int
    ) -> None:
        copying = _Copying(stream, ingest, id(origin), end)
        lanes = open_lanes(
            origin,
            stream,
            ingest,
            self._settings,
            self._hosts,
            (work.reference, work.descriptor),
            work.cancelled,
            partial(self._tell_progress, work),
            self._clock,
            end=end,
        )
        if lanes is None:
            self._copy(work, copying, None)
            return
        try:
            with lanes:
                self._copy_along(work, copying, lanes)
        finally:
            # What the first stream brought is counted where it is read.
            work.received += lanes.received - copying.received
            work.retries.count += lanes.retries

    def _copy_along(self, work: Work, copying: _Copying, lanes: Lanes) -> None:
        try:
            self._copy(work, copying, lanes)
        except UnavailableError:
            if not lanes.is_proven:
                raise
            work.retries.count += 1
            work.tell("retrying", copying.ingest.offset)
        if lanes.is_proven and copying.ingest.offset < work.descriptor.size:
            # It would go on with what the others fetch.
            copying.stream.close()
            lanes.take_over(copying.position)

    def _copy(self, work: Work, copying: _Copying, lanes: Lanes | None) -> None:
        size = work.descriptor.size
        ingest, stream = copying.ingest, copying.stream
        buffer = memoryview(bytearray(BUFFER_SIZE))
        read_into = reader(stream)
        if stream.offset > ingest.offset:
            raise UnavailableError(stream.source, 0, "RANGE", "answered a later part of the blob")
        # One that begins before what was asked for would do so again.
        honours_ranges = stream.offset == ingest.offset
        while copying.position < (size if lanes is None else lanes.end):
            if work.cancelled():
                raise CancelledError(str(work.descriptor.digest))
            ahead = ingest.offset - copying.position
            if honours_ranges and ahead >= SMALLEST_GAP:
                # An earlier answer left bytes further on: from behind them with another request.
                return
            most = BUFFER_SIZE if lanes is None else lanes.piece_size
            piece = buffer[: min(most, copying.end - copying.position)]
            count, broken = _fill(read_into, piece) if ingest.is_bare else (read_into(piece), None)
            if count == 0:
                return
            work.received += count
            copying.received += count
            if count > ahead:
                work.writers.add(copying.writer)
                # No ranges there: what is here already comes again, and is dropped.
                ingest.write_at(copying.position, buffer[:count])
            copying.position += count
            if not ahead > 0:
                self._tell_progress(work, ingest.offset)
            if broken is not None:
                raise broken
            if lanes is not None:
                lanes.advance(count, copying.position)
        if copying.position == size:
            self._expect_end(work, read_into, buffer)
        elif copying.position == copying.end:
            # Past the end of the body's framing, so that the connection is free again.
            read_into(buffer[:1])

    def _expect_end(
        self, work: Work, read_into: Callable[[memoryview], int], buffer: memoryview
    ) -> None:
        """Raise SizeMismatchError if more comes; the last bytes of a body's framing are read."""
        try:
            surplus = read_into(buffer[:1])
        except UnavailableError:
            # Cut after its last byte: everything is here.
            return
        if surplus:
            size = work.descriptor.size
            raise SizeMismatchError(str(work.descriptor.digest), size, size + surplus)

    def _tell_progress(self, work: Work, offset: int) -> None:
        now = self._clock.monotonic()
        if offset - work.reported >= REPORT_EVERY or now - work.reported_at >= REPORT_SECONDS:
            work.reported = offset
            work.reported_at = now
            work.tell("downloading", offset)


def _fill(
    read_into: Callable[[memoryview], int], piece: memoryview
) -> tuple[int, UnavailableError | None]:
    """Read until ``piece`` is full; return how much came, and what the body broke off with."""
    count = read_into(piece)
    try:
        while 0 < count < len(piece) and (more := read_into(piece[count:])):
            count += more
    except UnavailableError as error:
        return count, error
    return count, None


def reader(stream: BlobStream) -> Callable[[memoryview], int]:
    """Return what fills a buffer from ``stream``: its own way, or by way of bytes objects."""
    own: Callable[[memoryview], int] | None = getattr(stream, "read_into", None)
    if own is not None:
        return own

    def read_into(buffer: memoryview) -> int:
        piece = stream.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    return read_into
