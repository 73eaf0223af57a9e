"""Registries: what a reference names, documents by digest, and the bytes of blobs.

A registry may have several endpoints: documents and blobs come from the first that has them, a
tag's digest from the first that is trusted with it. Invariant: what one endpoint fails with is not
final before all have failed, and then the registry's own word counts; how one is asked is told by
``document_requests`` and ``blob_requests``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeVar

from stowray.pipeline.blob_requests import BlobRequests
from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.document_requests import DocumentRequests, Question
from stowray.pipeline.endpoints import Endpoints, final_error
from stowray.pipeline.errors import (
    ContentError,
    DeadlineError,
    NotFoundError,
    RegistryError,
    StowrayError,
    UnauthorizedError,
    UnavailableError,
    UsageError,
)
from stowray.pipeline.limiter import PATIENCE_SECONDS
from stowray.pipeline.reference import Reference
from stowray.pipeline.registry_place import RegistryPlace
from stowray.pipeline.retry import Retries, RetryPolicy
from stowray.pipeline.settings import RegistrySettings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stowray.pipeline.access import Access
    from stowray.pipeline.blob_stream import RegistryBlob
    from stowray.pipeline.client import Client
    from stowray.pipeline.credentials import Logins
    from stowray.pipeline.descriptor import Descriptor
    from stowray.pipeline.digest import Digest
    from stowray.pipeline.endpoint import Endpoint
    from stowray.pipeline.endpoints import Operation
    from stowray.pipeline.limiter import SharedLimits
    from stowray.pipeline.origin import Resolved
    from stowray.pipeline.quota import Quota
    from stowray.pipeline.source import Source

Value = TypeVar("Value")

# What one endpoint may fail with while another one need not.
ENDPOINT_ERRORS = (NotFoundError, UnauthorizedError, RegistryError, ContentError, DeadlineError)


def never() -> bool:
    """Return False: nobody cancels."""
    return False


def nothing() -> None:
    """Take no note of it."""


class Registry:
    """All registries as one origin; thread-safe, one per process, connections kept until closed."""

    def __init__(
        self,
        settings: RegistrySettings | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        clock: Clock = SYSTEM_CLOCK,
        warn: Callable[[str], None] | None = None,
        shared: Sequence[SharedLimits] = (),
        access: Access | None = None,
    ) -> None:
        """Take what is given; ``shared`` are limits in common with other processes.

        What ``access`` knows comes before what this machine's files say.
        """
        self._settings = settings or RegistrySettings()
        self._clock = clock
        environment = os.environ if environment is None else environment
        known = access.endpoints if access is not None else None
        self._endpoints = Endpoints(self._settings, environment, clock, known=known)
        self._client = _client(self._settings, environment, clock, warn, shared, access)
        self._documents = DocumentRequests(self._client)
        self._blobs = BlobRequests(
            self._client,
            foreign_urls=self._settings.foreign_urls,
            is_metered=self._settings.bytes_per_second > 0,
        )

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def resolve(
        self,
        reference: Source,
        *,
        asked: Callable[[], None] = nothing,
        cancelled: Callable[[], bool] = never,
    ) -> Resolved:
        """Return what ``reference`` names now, with its document when a GET was needed.

        ``asked`` is called with each request for a manifest, also those that bring nothing.
        """
        named = _of_registry(reference)
        question = Question(named, asked, cancelled)

        def attempt() -> Resolved:
            if (digest := named.digest) is not None:
                return self._from_any(
                    named, "pull", lambda place: self._documents.by_digest(place, question, digest)
                )
            return self._from_any(
                named, "resolve", lambda place: self._documents.by_tag(place, question)
            )

        return self._retried(f"resolve {named.canonical}", attempt, cancelled)

    def manifest(
        self,
        reference: Source,
        digest: Digest,
        size: int | None = None,
        *,
        asked: Callable[[], None] = nothing,
        cancelled: Callable[[], bool] = never,
    ) -> bytes:
        """Return the index or manifest ``digest`` of the repository, hashed; see ``resolve``."""
        named = _of_registry(reference)
        question = Question(named, asked, cancelled)

        def ask(endpoint: Endpoint) -> bytes:
            body = self._documents.by_digest(endpoint, question, digest, size).body
            return body if body is not None else b""

        def attempt() -> bytes:
            return self._from_any(named, "pull", ask)

        return self._retried(f"get {named.name}@{digest}", attempt, cancelled)

    def open_blob(
        self,
        reference: Source,
        descriptor: Descriptor,
        offset: int = 0,
        *,
        cancelled: Callable[[], bool] | None = None,
    ) -> RegistryBlob:
        """Return the unverified bytes of a blob, from ``offset`` on if the registry knows ranges.

        One attempt at each endpoint: whoever reads it knows how far it got, and tries again from
        there; to go on at another endpoint in mid-blob there are :meth:`places`.
        """
        return self._from_any(
            _of_registry(reference),
            "pull",
            lambda endpoint: self.open_blob_at(
                endpoint, reference, descriptor, offset, cancelled or never
            ),
        )

    def open_blob_at(
        self,
        endpoint: Endpoint,
        reference: Source,
        descriptor: Descriptor,
        offset: int,
        cancelled: Callable[[], bool],
    ) -> RegistryBlob:
        """Return the bytes that one endpoint sends; see :meth:`open_blob`."""
        return self._blobs.open(endpoint, _of_registry(reference), descriptor, offset, cancelled)

    def open_range_at(
        self,
        endpoint: Endpoint,
        reference: Source,
        descriptor: Descriptor,
        start: int,
        end: int,
        cancelled: Callable[[], bool],
    ) -> RegistryBlob | None:
        """Return one part of a blob; see :meth:`BlobRequests.open_range`."""
        named = _of_registry(reference)
        return self._blobs.open_range(endpoint, named, descriptor, start, end, cancelled)

    def quota(self, reference: Source) -> Quota | None:
        """Return how many requests the reference's registry still allows, as far as it told."""
        endpoints = self._endpoints.find(_of_registry(reference), "resolve")
        told = [self._client.quota(endpoint.host) for endpoint in endpoints]
        return next((quota for quota in told if quota is not None), None)

    def is_resting(self, endpoint: Endpoint) -> bool:
        """Return whether others should be asked first: it failed, or wants to be left alone."""
        if self._endpoints.is_resting(endpoint):
            return True
        # Waiting for the registry itself is what its answer asks for; a mirror is there to save it.
        return not endpoint.home and self._client.rest(endpoint.host) > PATIENCE_SECONDS

    def spare_connections(self, endpoint: Endpoint, host: str) -> int:
        """Return how many more blob requests to ``host`` would be let pass now."""
        return min(self._client.spare(name) for name in (endpoint.host, host))

    def places(self, reference: Source) -> tuple[RegistryPlace, ...]:
        """Return the endpoints that serve blobs of ``reference``: mirrors, then the registry."""
        found = self._endpoints.find(_of_registry(reference), "pull")
        return tuple(RegistryPlace(self, self._endpoints, endpoint) for endpoint in found)

    # -- requests ---------------------------------------------------------------------------------

    def _from_any(
        self, reference: Reference, operation: Operation, ask: Callable[[Endpoint], Value]
    ) -> Value:
        """Return what the first endpoint that can answer says."""
        failed: list[tuple[Endpoint, StowrayError]] = []
        found = self._endpoints.find(reference, operation)
        # A stable sort: the order of the file holds among those that are well.
        for endpoint in sorted(found, key=self.is_resting):
            try:
                return ask(endpoint)
            except ENDPOINT_ERRORS as error:
                self._endpoints.blame(endpoint, error)
                failed.append((endpoint, error))
        raise final_error(failed)

    def _retried(
        self, what: str, attempt: Callable[[], Value], cancelled: Callable[[], bool]
    ) -> Value:
        retries = Retries(what, policy(self._settings), self._clock)
        while True:
            try:
                return attempt()
            except UnavailableError as error:
                retries.pause(error, cancelled, weight=weight(error))


def policy(settings: RegistrySettings) -> RetryPolicy:
    """Return how patient the settings want us to be."""
    return RetryPolicy(attempts=settings.attempts, deadline_seconds=settings.deadline_seconds)


def weight(error: StowrayError) -> int:
    """Return for how many failures one counts: a host that is not there rarely appears soon."""
    return 2 if isinstance(error, UnavailableError) and error.code == "UNREACHABLE" else 1


def _client(
    settings: RegistrySettings,
    environment: Mapping[str, str],
    clock: Clock,
    warn: Callable[[str], None] | None,
    shared: Sequence[SharedLimits],
    access: Access | None,
) -> Client:
    # Here and not above: a pull that finds everything in the store needs none of this.
    from stowray.pipeline.client import Client
    from stowray.pipeline.credentials import Credentials
    from stowray.pipeline.limiter import Limiter
    from stowray.pipeline.proxies import Proxies
    from stowray.pipeline.transport import Transport

    transport = Transport(
        ca_file=settings.ca_file,
        connect_seconds=settings.connect_timeout_seconds,
        stall_seconds=settings.stall_timeout_seconds,
        minimum_rate=settings.minimum_bytes_per_second,
        proxies=Proxies.read(environment),
        clock=clock,
    )
    credentials: Logins = Credentials(environment, settings.authfile)
    if access is not None:
        from stowray.pipeline.access import CarriedCredentials

        credentials = CarriedCredentials(access, credentials)
    return Client(
        transport,
        credentials,
        Limiter(
            settings.connections,
            clock,
            requests_per_second=settings.requests_per_second,
            bytes_per_second=settings.bytes_per_second,
            shared=shared,
        ),
        plain_http=settings.plain_http,
        clock=clock,
        warn=warn,
    )


def _of_registry(reference: Source) -> Reference:
    if not isinstance(reference, Reference):
        raise UsageError(reference.canonical, "not an image of a registry")
    return reference
