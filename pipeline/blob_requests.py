"""One endpoint asked for a blob: all of it, the rest of it, one part of it.

Invariant: ranges are closed, and none is asked for at the first byte; an answer that is another
part than was asked for is never taken for it; the URLs of a layer itself are asked as nobody.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stowray.pipeline.answers import to_error
from stowray.pipeline.blob_stream import RegistryBlob, is_usable_range, whole_blob
from stowray.pipeline.document_requests import about
from stowray.pipeline.errors import NotFoundError, RegistryError, StowrayError, UnavailableError
from stowray.pipeline.redact import host_of, public_url

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.client import Client
    from stowray.pipeline.descriptor import Descriptor
    from stowray.pipeline.endpoint import Endpoint
    from stowray.pipeline.exchanges import Answer
    from stowray.pipeline.reference import Reference
    from stowray.pipeline.response import Response

# What a host that cannot do ranges may say to one; a fault of the request itself shows again when
# all is asked for.
RANGE_REFUSALS = frozenset({400, 405, 406, 412, 416, 501})


class BlobRequests:
    """Asks one endpoint at a time; thread-safe.

    ``foreign_urls`` allows a layer's own URLs where the registry itself has not got it, and
    ``is_metered`` lets every piece wait for its share of the line.
    """

    def __init__(self, client: Client, *, foreign_urls: bool, is_metered: bool) -> None:
        self._client = client
        self._foreign_urls = foreign_urls
        self._is_metered = is_metered

    def open(
        self,
        endpoint: Endpoint,
        reference: Reference,
        descriptor: Descriptor,
        offset: int,
        cancelled: Callable[[], bool],
    ) -> RegistryBlob:
        """Return the unverified bytes from ``offset`` on, or from an earlier one."""
        try:
            stream = self._open_blob(endpoint, reference, descriptor, offset, cancelled)
        except NotFoundError:
            if not self._foreign_urls or not descriptor.urls or not endpoint.home:
                raise
            stream = self._open_foreign(descriptor, cancelled)
        return self._limited(stream, endpoint, cancelled)

    def open_range(
        self,
        endpoint: Endpoint,
        reference: Reference,
        descriptor: Descriptor,
        start: int,
        end: int,
        cancelled: Callable[[], bool],
    ) -> RegistryBlob | None:
        """Return the bytes from ``start`` to ``end``, perhaps fewer; None when another part comes.

        The range is closed, so that the connection serves again once it is read.
        """
        ranged = (("Range", f"bytes={start}-{end - 1}"),)
        answer = self._blob_request(endpoint, descriptor, ranged, cancelled)
        response = answer.response
        if response.status == 206 and is_usable_range(response, descriptor, start, end):
            stream = RegistryBlob(response, start, endpoint.registry)
            return self._limited(stream, endpoint, cancelled)
        if response.status in (200, 206, 416):
            response.close()
            return None
        raise to_error(answer.refusal(), **about(endpoint, f"{reference.name}@{descriptor.digest}"))

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
            elif response.status in RANGE_REFUSALS:
                response.finish()
            else:
                raise to_error(answer.refusal(), **about(endpoint, what))
        answer = self._blob_request(endpoint, descriptor, (), cancelled)
        response = answer.response
        if response.status == 200:
            return _checked(response, descriptor, endpoint.registry)
        if response.status < 300 or response.status == 416:
            # Nobody asked for a part: something in between had a bad moment.
            response.close()
            raise UnavailableError(response.shown_url, response.status, "", "not the blob")
        raise to_error(answer.refusal(), **about(endpoint, what))

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
        if self._is_metered:
            stream.limit(self._client.meter(endpoint.host, cancelled))
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
            failed = to_error(
                answer.refusal(), what=str(descriptor.digest), registry=host_of(url), scope=""
            )
        raise failed or NotFoundError(str(descriptor.digest), "its URLs")


def _checked(response: Response, descriptor: Descriptor, source: str) -> RegistryBlob:
    try:
        return whole_blob(response, descriptor, source)
    except StowrayError:
        response.close()
        raise
