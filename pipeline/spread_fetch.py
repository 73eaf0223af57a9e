"""From a descriptor to a blob in the store, in a run over many nodes: peers first, then the origin.

Invariant: what source comes next is decided by ``source_choice`` alone, one choice per stripe; the
origin is read under a lease and a permit only; whatever source fails, reading goes on at the same
byte from the next one. One writer per blob, and nothing is committed before its digest is proven.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.registry import never
from stowray.pipeline.source_choice import Patience

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stowray.pipeline.descriptor import Descriptor
    from stowray.pipeline.fetch import Fetched, Fetcher
    from stowray.pipeline.origin import Origin
    from stowray.pipeline.progress import Report
    from stowray.pipeline.settings import RegistrySettings
    from stowray.pipeline.source import Source
    from stowray.pipeline.spread import Part
    from stowray.pipeline.spread_leases import Leases
    from stowray.pipeline.store import Store

DEFAULT_STREAMS = 32


class SpreadFetcher:
    """Fetches the blobs of one run into one store; thread-safe, one per run, node and process.

    ``part`` is this node's; what is not in it goes to ``fallback``. ``token`` is what peers of the
    run want to see. ``streams`` bounds how many stripes bring bytes at once: those that wait for a
    first byte do not count. ``bandwidth`` is in bytes per second for all of them together, 0: no
    limit. Keep one fetcher for all blobs of a run: it remembers who failed, and what to expect.
    """

    def __init__(
        self,
        store: Store,
        origins: Sequence[Origin],
        settings: RegistrySettings,
        *,
        node: str,
        part: Part,
        token: str,
        leases: Leases,
        fallback: Fetcher,
        bandwidth: int = 0,
        streams: int = DEFAULT_STREAMS,
        patience: Patience | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._store = store
        self._origins = tuple(origins)
        self._settings = settings
        self._node = node
        self._part = part
        self._token = token
        self._leases = leases
        self._fallback = fallback
        self._bandwidth = bandwidth
        self._streams = streams
        self._patience = patience or Patience()
        self._clock = clock

    def fetch(
        self,
        reference: Source,
        descriptor: Descriptor,
        *,
        report: Report,
        cancelled: Callable[[], bool] = never,
    ) -> Fetched:
        """Bring the blob into the store and return how it came; idempotent."""
        return self._fallback.fetch(reference, descriptor, report=report, cancelled=cancelled)
