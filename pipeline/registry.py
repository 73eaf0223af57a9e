"""Registries: what a reference names, documents by digest, and the bytes of blobs.

A registry may have several endpoints: documents and blobs come from the first that has them, a
tag's digest from the first that is trusted with it.

Invariant: a document that is handed out was hashed, whatever its headers say; a tag's digest comes
from a HEAD only when that told digest, length and type, else from the hash of a body; nothing
larger than its limit is read; a tag's manifest is never looked for among the blobs.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from stowray.pipeline.answers import to_error
from stowray.pipeline.blob_stream import (
    RegistryBlob,
    content_length,
    is_encoded,
    is_usable_range,
    whole_blob,
)
from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.endpoints import Endpoints, final_error
from stowray.pipeline.errors import (
    ContentError,
    DeadlineError,
    DigestMismatchError,
    NotFoundError,
    RegistryError,
    SizeMismatchError,
    StowrayError,
    UnauthorizedError,
    UnavailableError,
    UsageError,
)
from stowray.pipeline.media_types import (
    ACCEPT,
    INDEX_TYPES,
    MANIFEST_TYPES,
)
from stowray.pipeline.origin import Resolved
from stowray.pipeline.redact import host_of, public_url
from stowray.pipeline.reference import Reference
from stowray.pipeline.registry_documents import (
    DOCUMENT_LIMIT,
    decoded,
    read_document,
    resolved,
    told_digest,
    told_type,
)
from stowray.pipeline.registry_place import RegistryPlace
from stowray.pipeline.retry import Retries, RetryPolicy
from stowray.pipeline.settings import RegistrySettings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stowray.pipeline.client import Answer, Client
    from stowray.pipeline.endpoint import Endpoint
    from stowray.pipeline.endpoints import Operation
    from stowray.pipeline.limiter import SharedLimits
    from stowray.pipeline.quota import Quota
    from stowray.pipeline.response import Response
    from stowray.pipeline.source import Source

Value = TypeVar("Value")

ACCEPTED = tuple(("Accept", value) for value in (*ACCEPT, "*/*"))
# What one endpoint may fail with while another one need not.
ENDPOINT_ERRORS = (NotFoundError, UnauthorizedError, RegistryError, ContentError, DeadlineError)
_DOCUMENT_TYPES = INDEX_TYPES | MANIFEST_TYPES


def never() -> bool:
    """Return False: nobody cancels."""
    return False


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
    ) -> None:
        """Take what is given; ``shared`` are limits in common with other processes."""
        self._settings = settings or RegistrySettings()
        self._clock = clock
        environment = os.environ if environment is None else environment
        self._endpoints = Endpoints(self._settings, environment, clock)
        self._client = _client(self._settings, environment, clock, warn, shared)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def resolve(self, reference: Source, *, cancelled: Callable[[], bool] = never) -> Resolved:
        """Return what ``reference`` names now, with its document when a GET was needed."""
        reference = _of_registry(reference)
        # Those that brought nothing count as well, a HEAD like a GET.
        requests = 0

        def by_digest(endpoint: Endpoint, digest: Digest) -> Resolved:
            nonlocal requests
            requests += 1
            return self._by_digest(endpoint, reference, digest, None, cancelled)

        def by_tag(endpoint: Endpoint) -> Resolved:
            nonlocal requests
            requests += 1
            found = self._head(endpoint, reference, cancelled)
            if found is None:
                requests += 1
                found = self._get_tag(endpoint, reference, cancelled)
            return found

        def attempt() -> Resolved:
            if (digest := reference.digest) is not None:
                return self._from_any(reference, "pull", lambda place: by_digest(place, digest))
            return self._from_any(reference, "resolve", by_tag)

        found = self._retried(f"resolve {reference.canonical}", attempt, cancelled)
        return replace(found, requests=requests)

    def manifest(
        self,
        reference: Source,
        digest: Digest,
        size: int | None = None,
        *,
        cancelled: Callable[[], bool] = never,
    ) -> bytes:
        """Return the index or manifest ``digest`` of the repository, hashed."""
        named = _of_registry(reference)

        def ask(endpoint: Endpoint) -> bytes:
            body = self._by_digest(endpoint, named, digest, size, cancelled).body
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
        named = _of_registry(reference)
        try:
            stream = self._open_blob(endpoint, named, descriptor, offset, cancelled)
        except NotFoundError:
            if not self._settings.foreign_urls or not descriptor.urls or not endpoint.home:
                raise
            stream = self._open_foreign(descriptor, cancelled)
        return self._limited(stream, endpoint, cancelled)

    def open_range_at(
        self,
        endpoint: Endpoint,
        reference: Source,
        descriptor: Descriptor,
        start: int,
        end: int,
        cancelled: Callable[[], bool],
    ) -> RegistryBlob | None:
        """Return the bytes from ``start`` to ``end``, perhaps fewer; None when another part comes.

        The range is closed, so that the connection serves again once it is read.
        """
        named = _of_registry(reference)
        ranged = (("Range", f"bytes={start}-{end - 1}"),)
        answer = self._blob_request(endpoint, descriptor, ranged, cancelled)
        response = answer.response
        if response.status == 206 and is_usable_range(response, descriptor, start, end):
            stream = RegistryBlob(response, start, endpoint.registry)
            return self._limited(stream, endpoint, cancelled)
        if response.status in (200, 206, 416):
            response.close()
            return None
        raise to_error(answer.refusal(), **_about(endpoint, f"{named.name}@{descriptor.digest}"))

    def quota(self, reference: Source) -> Quota | None:
        """Return how many requests the reference's registry still allows, as far as it told."""
        endpoints = self._endpoints.find(_of_registry(reference), "resolve")
        told = [self._client.quota(endpoint.host) for endpoint in endpoints]
        return next((quota for quota in told if quota is not None), None)

    def spare_connections(self, endpoint: Endpoint, host: str) -> int:
        """Return how many more blob requests to ``host`` would be let pass now."""
        return min(self._client.spare(name) for name in (endpoint.host, host))

    def places(self, reference: Source) -> tuple[RegistryPlace, ...]:
        """Return the endpoints that serve blobs of ``reference``: mirrors, then the registry."""
        found = self._endpoints.find(_of_registry(reference), "pull")
        return tuple(RegistryPlace(self, self._endpoints, endpoint) for endpoint in found)

    # -- documents --------------------------------------------------------------------------------

    def _head(
        self, endpoint: Endpoint, reference: Reference, cancelled: Callable[[], bool]
    ) -> Resolved | None:
        """Return what a HEAD tells of a tag; None when only a GET can."""
        target = f"manifests/{endpoint.tag or reference.target}"
        answer = self._request("HEAD", endpoint, target, cancelled)
        response = answer.response
        response.finish()
        if response.status == 404:
            raise to_error(answer.refusal(), **_about(endpoint, reference.canonical))
        if response.status != 200:
            # 405, or a 403 whose reason only the GET's body tells; HEADs have no bodies.
            return None
        media_type = told_type(response)
        if media_type not in _DOCUMENT_TYPES or is_encoded(response):
            return None
        digest = told_digest(response)
        size = content_length(response)
        if digest is None or not size:
            return None
        source = host_of(response.url)
        return Resolved(Descriptor(media_type=media_type, digest=digest, size=size), source=source)

    def _get_tag(
        self, endpoint: Endpoint, reference: Reference, cancelled: Callable[[], bool]
    ) -> Resolved:
        target = f"manifests/{endpoint.tag or reference.target}"
        answer = self._request("GET", endpoint, target, cancelled)
        response = answer.response
        if response.status != 200:
            raise to_error(answer.refusal(), **_about(endpoint, reference.canonical))
        with response:
            body = read_document(response, reference.canonical, DOCUMENT_LIMIT)
            told = told_digest(response)
            if is_encoded(response) and not (told is not None and told.matches(body)):
                body = decoded(body, reference.canonical)
            if told is not None and not told.matches(body):
                actual = Digest.of(body, told.algorithm)
                raise DigestMismatchError(reference.canonical, told, actual)
            return resolved(response, body, told or Digest.of(body))

    def _by_digest(
        self,
        endpoint: Endpoint,
        reference: Reference,
        digest: Digest,
        size: int | None,
        cancelled: Callable[[], bool],
    ) -> Resolved:
        try:
            return self._get_digest(endpoint, reference, digest, size, cancelled)
        except ContentError:
            if not endpoint.home:
                raise
            # One fresh answer: a cache or proxy in between may have had a bad moment.
            return self._get_digest(endpoint, reference, digest, size, cancelled)

    def _get_digest(
        self,
        endpoint: Endpoint,
        reference: Reference,
        digest: Digest,
        size: int | None,
        cancelled: Callable[[], bool],
    ) -> Resolved:
        what = f"{reference.name}@{digest}"
        answer = self._request("GET", endpoint, f"manifests/{digest}", cancelled)
        if answer.response.status == 404:
            refused = answer.refusal()
            # Old registries keep documents that no tag names among the blobs only.
            answer = self._request("GET", endpoint, f"blobs/{digest}", cancelled)
            if answer.response.status == 404:
                answer.response.finish()
                raise to_error(refused, **_about(endpoint, what))
        response = answer.response
        if response.status != 200:
            raise to_error(answer.refusal(), **_about(endpoint, what))
        with response:
            limit = DOCUMENT_LIMIT if size is None else min(size, DOCUMENT_LIMIT)
            body = read_document(response, what, DOCUMENT_LIMIT)
            if is_encoded(response) and not digest.matches(body):
                body = decoded(body, what)
            if not digest.matches(body):
                raise DigestMismatchError(what, digest, Digest.of(body, digest.algorithm))
            if size is not None and len(body) != limit:
                raise SizeMismatchError(what, size, len(body))
            return resolved(response, body, digest)

    # -- blobs ------------------------------------------------------------------------------------

    def _open_blob(
        self,
        endpoint: Endpoint,
        reference: Reference,
        descriptor: Descriptor,
        offset: int,
        cancelled: Callable[[], bool],
    ) -> RegistryBlob:
        what = f"{reference.name}@{descriptor.digest}"
        if 0 < offset < descriptor.size:
            # Closed: an open range makes some servers close the connection. None at 0: some
            # refuse "bytes=0-".
            ranged = (("Range", f"bytes={offset}-{descriptor.size - 1}"),)
            answer = self._blob_request(endpoint, descriptor, ranged, cancelled)
            response = answer.response
            if response.status == 206:
                if is_usable_range(response, descriptor, offset):
                    return RegistryBlob(response, offset, endpoint.registry)
                # Another part than was asked for, or one that cannot be placed: ask for all.
                response.close()
            elif response.status == 200:
                return _checked(response, descriptor, endpoint.registry)
            elif response.status == 416:
                response.finish()
            else:
                raise to_error(answer.refusal(), **_about(endpoint, what))
        answer = self._blob_request(endpoint, descriptor, (), cancelled)
        response = answer.response
        if response.status == 200:
            return _checked(response, descriptor, endpoint.registry)
        if response.status < 300:
            response.close()
            raise RegistryError(response.shown_url, response.status, "", "not the blob")
        raise to_error(answer.refusal(), **_about(endpoint, what))

    def _blob_request(
        self,
        endpoint: Endpoint,
        descriptor: Descriptor,
        headers: tuple[tuple[str, str], ...],
        cancelled: Callable[[], bool],
    ) -> Answer:
        return self._client.request(
            "GET",
            endpoint.host,
            endpoint.target(f"blobs/{descriptor.digest}"),
            registry=endpoint.registry,
            repository=endpoint.repository,
            headers=headers,
            document=False,
            endpoint=endpoint,
            cancelled=cancelled,
        )

    def _limited(
        self, stream: RegistryBlob, endpoint: Endpoint, cancelled: Callable[[], bool]
    ) -> RegistryBlob:
        if self._settings.bytes_per_second:
            host = endpoint.host
            stream.limit(lambda count: self._client.spend(host, count, cancelled))
        return stream

    def _open_foreign(self, descriptor: Descriptor, cancelled: Callable[[], bool]) -> RegistryBlob:
        """Return a layer from one of its own URLs: as nobody, public https only."""
        from stowray.pipeline.addresses import foreign_refusal

        failed: StowrayError | None = None
        for url in descriptor.urls:
            reason = foreign_refusal(url)
            if reason:
                failed = failed or RegistryError(public_url(url), 0, "", f"not fetched: {reason}")
                continue
            try:
                answer = self._client.get_foreign(url, cancelled)
            except RegistryError as error:
                failed = error
                continue
            if answer.response.status == 200:
                return _checked(answer.response, descriptor, host_of(url))
            about = {"what": str(descriptor.digest), "registry": host_of(url), "scope": ""}
            failed = to_error(answer.refusal(), **about)
        raise failed or NotFoundError(str(descriptor.digest), "its URLs")

    # -- requests ---------------------------------------------------------------------------------

    def _request(
        self, method: str, endpoint: Endpoint, rest: str, cancelled: Callable[[], bool]
    ) -> Answer:
        return self._client.request(
            method,
            endpoint.host,
            endpoint.target(rest),
            registry=endpoint.registry,
            repository=endpoint.repository,
            headers=ACCEPTED,
            endpoint=endpoint,
            cancelled=cancelled,
        )

    def _from_any(
        self, reference: Reference, operation: Operation, ask: Callable[[Endpoint], Value]
    ) -> Value:
        """Return what the first endpoint that can answer says."""
        failed: list[tuple[Endpoint, StowrayError]] = []
        found = self._endpoints.find(reference, operation)
        for endpoint in self._endpoints.well_first(found):
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
    return Client(
        transport,
        Credentials(environment, settings.authfile),
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


def _about(endpoint: Endpoint, what: str) -> dict[str, str]:
    return {
        "what": what,
        "registry": endpoint.registry,
        "scope": f"repository:{endpoint.repository}:pull",
    }


def _checked(response: Response, descriptor: Descriptor, source: str) -> RegistryBlob:
    try:
        return whole_blob(response, descriptor, source)
    except StowrayError:
        response.close()
        raise
