"""One endpoint as a source of blobs, beside others that have the same ones.

Invariant: an endpoint that made others wait lately is not asked again before they had their turn,
and is asked again when they bring the blob no further.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stowray.pipeline.errors import StowrayError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.blob_stream import RegistryBlob
    from stowray.pipeline.descriptor import Descriptor
    from stowray.pipeline.endpoint import Endpoint
    from stowray.pipeline.endpoints import Endpoints
    from stowray.pipeline.registry import Registry
    from stowray.pipeline.source import Source

RESTING = "RESTING"


class RegistryPlace:
    """One endpoint for one blob; see :class:`stowray.pipeline.origin.Place`."""

    def __init__(self, registry: Registry, endpoints: Endpoints, endpoint: Endpoint) -> None:
        self._registry = registry
        self._endpoints = endpoints
        self._endpoint = endpoint
        self._passed_at = -1

    def open_blob(
        self,
        reference: Source,
        descriptor: Descriptor,
        offset: int = 0,
        *,
        cancelled: Callable[[], bool] | None = None,
    ) -> RegistryBlob:
        """Return the bytes that this endpoint sends, or pass the turn on with UnavailableError."""
        if self._registry.is_resting(self._endpoint) and offset != self._passed_at:
            self._passed_at = offset
            raise UnavailableError(self._endpoint.host, 0, RESTING, "it failed a moment ago")
        return self._registry.open_blob_at(
            self._endpoint, reference, descriptor, offset, cancelled or _never
        )

    @property
    def host(self) -> str:
        """Return under which name what is learned of it is remembered."""
        return self._endpoint.host

    def open_range(
        self,
        reference: Source,
        descriptor: Descriptor,
        start: int,
        end: int,
        cancelled: Callable[[], bool],
    ) -> RegistryBlob | None:
        """Return one part of the blob, None when another one comes than was asked for."""
        return self._registry.open_range_at(
            self._endpoint, reference, descriptor, start, end, cancelled
        )

    def spare_connections(self, stream: RegistryBlob) -> int:
        """Return how many more parts could be fetched now from where ``stream`` comes from."""
        return self._registry.spare_connections(self._endpoint, stream.served_by)

    def blame(self, error: StowrayError) -> None:
        """Let the endpoint rest for a while if it gave wrong bytes or made its reader wait."""
        self._endpoints.blame(self._endpoint, error)


def _never() -> bool:
    return False
