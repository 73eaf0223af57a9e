"""One endpoint asked for a document: what a tag names, or the bytes of a digest.

Invariant: a document that is handed out was hashed, whatever its headers say; a tag's digest comes
from a HEAD only when that told digest, length and type, else from the hash of a body; a tag's
manifest is never looked for among the blobs; every request for a manifest is counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stowray.pipeline.answers import to_error
from stowray.pipeline.blob_stream import content_length, is_encoded
from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import (
    ContentError,
    DigestMismatchError,
    NotFoundError,
    RegistryError,
    SizeMismatchError,
    UnauthorizedError,
)
from stowray.pipeline.media_types import ACCEPT, INDEX_TYPES, MANIFEST_TYPES
from stowray.pipeline.origin import Resolved
from stowray.pipeline.redact import host_of
from stowray.pipeline.registry_documents import (
    DOCUMENT_LIMIT,
    decoded,
    read_document,
    resolved,
    told_digest,
    told_type,
)
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.answers import Refusal
    from stowray.pipeline.client import Client
    from stowray.pipeline.endpoint import Endpoint
    from stowray.pipeline.exchanges import Answer
    from stowray.pipeline.reference import Reference

ACCEPTED = tuple(("Accept", value) for value in (*ACCEPT, "*/*"))
_DOCUMENT_TYPES = INDEX_TYPES | MANIFEST_TYPES


@dataclass(frozen=True, slots=True)
class Question:
    """Who asks: for which reference, for how long, and who counts the requests."""

    reference: Reference
    asked: Callable[[], None]
    cancelled: Callable[[], bool]


class DocumentRequests:
    """Asks one endpoint at a time; thread-safe."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def by_tag(self, endpoint: Endpoint, question: Question) -> Resolved:
        """Return what a tag names now, with its document when a GET was needed."""
        return self._head(endpoint, question) or self._get_tag(endpoint, question)

    def by_digest(
        self, endpoint: Endpoint, question: Question, digest: Digest, size: int | None = None
    ) -> Resolved:
        """Return the document ``digest``, hashed, of ``size`` bytes if that is known."""
        try:
            return self._get_digest(endpoint, question, digest, size)
        except ContentError:
            if not endpoint.home:
                raise
            # One fresh answer: a cache or proxy in between may have had a bad moment.
            return self._get_digest(endpoint, question, digest, size)

    def _head(self, endpoint: Endpoint, question: Question) -> Resolved | None:
        """Return what a HEAD tells of a tag; None when only a GET can."""
        reference = question.reference
        answer = self._request("HEAD", endpoint, f"manifests/{_tag(endpoint, reference)}", question)
        response = answer.response
        response.finish()
        wants_pause = response.status == 429 or (
            response.status == 503 and response.header("Retry-After") is not None
        )
        if response.status == 404 or wants_pause:
            raise to_error(answer.refusal(), **about(endpoint, reference.canonical))
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

    def _get_tag(self, endpoint: Endpoint, question: Question) -> Resolved:
        reference = question.reference
        answer = self._request("GET", endpoint, f"manifests/{_tag(endpoint, reference)}", question)
        response = answer.response
        if response.status != 200:
            raise to_error(answer.refusal(), **about(endpoint, reference.canonical))
        with response:
            body = read_document(response, reference.canonical, DOCUMENT_LIMIT)
            told = told_digest(response)
            if is_encoded(response) and not (told is not None and told.matches(body)):
                body = decoded(body, reference.canonical)
            if told is not None and not told.matches(body):
                actual = Digest.of(body, told.algorithm)
                raise DigestMismatchError(reference.canonical, told, actual)
            return resolved(response, body, told or Digest.of(body))

    def _get_digest(
        self, endpoint: Endpoint, question: Question, digest: Digest, size: int | None
    ) -> Resolved:
        what = f"{question.reference.name}@{digest}"
        answer = self._request("GET", endpoint, f"manifests/{digest}", question)
        if answer.response.status == 404:
            refused = answer.refusal()
            # Old registries keep documents that no tag names among the blobs only.
            answer = self._request("GET", endpoint, f"blobs/{digest}", question)
            if answer.response.status == 404:
                answer.response.finish()
                if question.reference.digest is None:
                    return self._as_tagged(endpoint, question, digest, refused)
                raise to_error(refused, **about(endpoint, what))
        response = answer.response
        if response.status != 200:
            raise to_error(answer.refusal(), **about(endpoint, what))
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

    def _as_tagged(
        self, endpoint: Endpoint, question: Question, digest: Digest, refused: Refusal
    ) -> Resolved:
        """Return what the tag has, when that is ``digest``, which the registry does not find.

        Some know documents by tag only; and one whose HEAD tells a digest that is nobody's shall
        be called wrong, not empty.
        """
        missing = to_error(refused, **about(endpoint, f"{question.reference.name}@{digest}"))
        try:
            found = self._get_tag(endpoint, question)
        except DigestMismatchError as error:
            raise (error if error.expected == digest else missing) from None
        except (NotFoundError, UnauthorizedError, RegistryError, ContentError):
            raise missing from None
        if found.descriptor.digest != digest:
            raise missing
        return found

    def _request(self, method: str, endpoint: Endpoint, rest: str, question: Question) -> Answer:
        return self._client.request(
            method,
            endpoint.host,
            endpoint.target(rest),
            registry=endpoint.registry,
            repository=endpoint.repository,
            headers=ACCEPTED,
            endpoint=endpoint,
            asked=question.asked if rest.startswith("manifests/") else None,
            cancelled=question.cancelled,
        )


def about(endpoint: Endpoint, what: str) -> dict[str, str]:
    """Return what an error of ``endpoint`` says it is about."""
    return {
        "what": what,
        "registry": endpoint.registry,
        "scope": f"repository:{endpoint.repository}:pull",
    }


def _tag(endpoint: Endpoint, reference: Reference) -> str:
    return endpoint.tag or reference.target
