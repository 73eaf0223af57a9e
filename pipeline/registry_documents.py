"""Documents as registries answer with them: type, digest, limits, encodings.

Invariant: not one byte beyond the limit is kept, not even of what an encoding blows up, and a web
page that answers in a manifest's place is told apart from a manifest.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

from stowray.pipeline.blob_stream import content_length
from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import InvalidDigestError, ManifestError, RegistryError, escape
from stowray.pipeline.media_types import UNSPECIFIC_TYPES
from stowray.pipeline.origin import Resolved
from stowray.pipeline.redact import host_of

if TYPE_CHECKING:
    from stowray.pipeline.response import Response

DOCUMENT_LIMIT = 4 << 20


def told_type(response: Response) -> str:
    """Return the media type that the headers tell, without parameters; may be empty."""
    return (response.header("Content-Type") or "").partition(";")[0].strip().lower()


def told_digest(response: Response) -> Digest | None:
    """Return the digest that the headers tell, if it is one that can be checked."""
    told = response.header("Docker-Content-Digest")
    if not told:
        return None
    try:
        return Digest(told.strip())
    except InvalidDigestError:
        # An algorithm that cannot be checked here, or nonsense: the body is hashed instead.
        return None


def read_document(response: Response, what: str, limit: int) -> bytes:
    """Return the whole body; ManifestError when it is longer than ``limit``."""
    length = content_length(response)
    if length is not None and length > limit:
        response.close()
        raise ManifestError(what, f"{length} bytes are more than the limit of {limit}")
    body = response.read(limit)
    if len(body) > limit:
        response.close()
        raise ManifestError(what, f"larger than the limit of {limit} bytes")
    response.finish()
    return body


def decoded(body: bytes, what: str) -> bytes:
    """Undo a Content-Encoding that nobody asked for; only gzip is met in the field."""
    decoder = zlib.decompressobj(31)
    try:
        plain = decoder.decompress(body, DOCUMENT_LIMIT + 1)
    except zlib.error as error:
        raise ManifestError(what, "came in a Content-Encoding that is not gzip") from error
    if len(plain) > DOCUMENT_LIMIT or not decoder.eof:
        raise ManifestError(what, f"larger than the limit of {DOCUMENT_LIMIT} bytes")
    return plain


def resolved(response: Response, body: bytes, digest: Digest) -> Resolved:
    """Return a hashed body with the type that it is said, or else seen, to have."""
    media_type = told_type(response)
    if media_type == "text/html":
        # A captive portal or a login page answers everything with 200.
        url = response.shown_url
        raise RegistryError(url, response.status, "", "a web page came instead of a manifest")
    if media_type in UNSPECIFIC_TYPES:
        from stowray.pipeline.documents import detect_media_type

        media_type = detect_media_type(body)
    descriptor = Descriptor(media_type=escape(media_type), digest=digest, size=len(body))
    return Resolved(descriptor, body, host_of(response.url))
