"""Whether a blob is fetched over several connections of a host, and what the first one brings.

Invariant: without a sign that a host serves parts (a record of it, or bytes that came as parts
before) the first request is for all that is left, which every server understands; and a first part
ends where bytes lie that an earlier run brought, so that those do not come again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.errors import NotFoundError, RegistryError
from stowray.pipeline.lanes import Lanes
from stowray.pipeline.range_plan import Climb, part_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.blob_stream import RegistryBlob
    from stowray.pipeline.descriptor import Descriptor
    from stowray.pipeline.host_records import HostRecord, HostRecords
    from stowray.pipeline.ingest import Ingest
    from stowray.pipeline.settings import RegistrySettings
    from stowray.pipeline.source import Source


@runtime_checkable
class Ranged(Protocol):
    """A place whose blobs can be fetched in parts."""

    @property
    def host(self) -> str:
        """Under which name what is learned of it is remembered."""

    def open_range(
        self,
        reference: Source,
        descriptor: Descriptor,
        start: int,
        end: int,
        cancelled: Callable[[], bool],
    ) -> RegistryBlob | None:
        """Return the bytes from ``start`` on, not beyond ``end``; None when others came."""

    def spare_connections(self, stream: RegistryBlob) -> int:
        """Return how many more parts could be fetched now from where ``stream`` comes from."""


def open_first_part(
    place: object,
    ingest: Ingest,
    settings: RegistrySettings,
    records: HostRecords,
    fetch_range: tuple[Source, Descriptor],
    cancelled: Callable[[], bool],
) -> tuple[RegistryBlob, int] | None:
    """Return a stream of the next part and where it ends, if the host is known to serve parts.

    Else None: one stream of all that is left.
    """
    if ingest.is_bare or not isinstance(place, Ranged):
        return None
    known = records.find(place.host)
    if known is not None and known.serves_no_parts:
        return None
    start = ingest.offset
    hole = ingest.gap(start, ingest.size)
    end = ingest.size if hole is None else hole[1]
    if known is not None and _is_worth_lanes(ingest, settings, known):
        count = min(known.connections, settings.range_connections, settings.connections)
        if count > 1:
            end = min(end, start + part_size(known.bytes_per_second, ingest.size - start, count))
    if end >= ingest.size:
        return None
    try:
        stream = place.open_range(*fetch_range, start, end, cancelled)
    except (NotFoundError, RegistryError) as error:
        if error.retryable:
            raise
        # It may be elsewhere (foreign URLs), or ranges may be what is refused.
        return None
    if stream is None:
        records.learn(place.host, 1, 0)
        return None
    return stream, end


def open_lanes(
    place: object,
    stream: object,
    ingest: Ingest,
    settings: RegistrySettings,
    records: HostRecords,
    fetch_range: tuple[Source, Descriptor],
    cancelled: Callable[[], bool],
    tell: Callable[[int], None],
    clock: Clock = SYSTEM_CLOCK,
    *,
    end: int,
) -> Lanes | None:
    """Return lanes for what ``stream`` begins, None when one connection is all there is to be.

    ``end`` is where ``stream`` ends: before the blob does, if it is a part itself.
    """
    from stowray.pipeline.blob_stream import RegistryBlob

    if ingest.is_bare or not isinstance(stream, RegistryBlob) or not isinstance(place, Ranged):
        return None
    known = records.find(place.host)
    limit = settings.range_connections if _is_worth_lanes(ingest, settings, known) else 1
    if limit < 2 and end >= ingest.size:
        return None
    climb = Climb(limit, clock.monotonic(), known)
    return Lanes(
        place, stream, ingest, climb, records, fetch_range, cancelled, tell, clock, end=end
    )


def _is_worth_lanes(ingest: Ingest, settings: RegistrySettings, known: HostRecord | None) -> bool:
    left = ingest.size - ingest.offset
    if settings.range_connections < 2 or left < settings.range_minimum_bytes:
        return False
    return known is None or not known.serves_no_parts
