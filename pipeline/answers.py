"""What a registry's answer means: errors by what the caller can do, lengths and ranges.

Invariant: whatever a registry sends becomes one of our errors or a checked value; of an error body
at most 64 KiB are read, and what is shown of it is redacted and free of control characters.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

from stowray.pipeline.challenge import parse
from stowray.pipeline.errors import (
    NotFoundError,
    RegistryError,
    StowrayError,
    UnauthorizedError,
    UnavailableError,
)
from stowray.pipeline.retry import is_transient
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stowray.pipeline.response import Response

NOT_FOUND_ADVICE: Final = "check name and tag; a private repository may need a login"
BODY_LIMIT = 64 * 1024
WARNING_LIMIT = 4096
TEXT_LIMIT = 4096
# Error codes that mean "come again", whatever the status.
TEMPORARY_CODES = frozenset({"TOOMANYREQUESTS", "UNAVAILABLE", "BLOB_UPLOAD_INVALID"})

_TAGS = re.compile(r"<(?:script|style)\b.*?</(?:script|style)>|<[^>]*>", re.DOTALL | re.IGNORECASE)
_XML_CODE = re.compile(r"<Code>([A-Za-z0-9_.-]{1,64})</Code>")
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", re.ASCII)
_UNSATISFIED = re.compile(r"bytes \*/([0-9]{1,18})", re.ASCII)
_WARNING = re.compile(r'299 - "((?:[^"\\]|\\.)*)"')
_EXPIRED = re.compile(r"expired|reauthenticate", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ContentRange:
    """The part of a body that a 206 holds; ``last`` inclusive, ``total`` None when not told."""

    first: int
    last: int
    total: int | None


def parse_content_range(value: str | None) -> ContentRange | None:
    """Return a ``Content-Range`` (RFC 9110, section 14.4), ``None`` when it is not well-formed."""
    match = _RANGE.fullmatch(value or "")
    if match is None:
        return None
    first, last = int(match[1]), int(match[2])
    total = None if match[3] == "*" else int(match[3])
    if last < first or (total is not None and last >= total):
        return None
    return ContentRange(first, last, total)


def parse_unsatisfied(value: str | None) -> int | None:
    """Return the whole size that a 416 tells, ``None`` when it does not."""
    match = _UNSATISFIED.fullmatch(value or "")
    return int(match[1]) if match else None


def parse_length(values: Sequence[str]) -> int | None:
    """Return the ``Content-Length``, ``None`` without one; raise ValueError for anything else.

    Two of them, even equal ones, or a list are refused: they are how requests are smuggled.
    """
    if not values:
        return None
    if len(values) > 1 or not re.fullmatch(r"[0-9]{1,18}[ \t]*", values[0], re.ASCII):
        raise ValueError("the Content-Length is not one number")
    return int(values[0])


def parse_warning(value: str) -> str:
    """Return the text of a ``Warning: 299 - "text"`` header, ``""`` for any other."""
    if len(value) > WARNING_LIMIT:
        return ""
    match = _WARNING.fullmatch(value.strip())
    if match is None:
        return ""
    text = re.sub(r"\\(.)", r"\1", match[1], flags=re.DOTALL)
    return "" if any(ord(character) < 32 or ord(character) == 127 for character in text) else text


def describe(body: bytes) -> tuple[str, str]:
    """Return code and message of an error body: JSON as specified, S3's XML, or plain text."""
    try:
        document: Any = json.loads(body)
    except (ValueError, RecursionError):
        # Short, because the patterns' time grows with the square of the length.
        text = body[:TEXT_LIMIT].decode("utf-8", "replace")
        code = _XML_CODE.search(text)
        return (code[1] if code else ""), " ".join(_TAGS.sub(" ", text).split())
    if not isinstance(document, dict):
        return "", ""
    errors = document.get("errors")
    first: Any = errors[0] if isinstance(errors, list) and errors else document
    if not isinstance(first, dict):
        return "", str(first)
    code, message = first.get("code"), first.get("message") or first.get("error_description")
    message = message or first.get("error") or first.get("details") or first.get("detail")
    return (
        str(code) if isinstance(code, str | int) else "",
        message if isinstance(message, str) else "",
    )


@dataclass(frozen=True, slots=True)
class Refusal:
    """An answer that is no success, its body read."""

    url: str
    status: int
    code: str
    message: str
    challenged: bool

    @property
    def is_expired_login(self) -> bool:
        """Return whether a login that was good has expired, told without a challenge.

        ECR answers 403 with a sentence, S3 400 with a code.
        """
        if self.challenged:
            return False
        if self.status == 400:
            return self.code in ("ExpiredToken", "RequestExpired")
        return self.status == 403 and _EXPIRED.search(self.message) is not None


def is_challenge(response: Response) -> bool:
    """Return whether another login may be let in: a 401, or a 403 for want of a scope.

    RFC 6750, section 3.1, has ``insufficient_scope`` come with 403, most registries send 401.
    """
    if response.status != 403:
        return response.status == 401
    return any(
        challenge.scheme == "bearer" and challenge.parameters.get("error") == "insufficient_scope"
        for challenge in parse(response.header_values("WWW-Authenticate"))
    )


def refusal(response: Response) -> Refusal:
    """Return what an answer says went wrong, and give its connection back."""
    try:
        body = response.read(BODY_LIMIT)[:BODY_LIMIT]
    except StowrayError:
        # The status says enough, and its connection is closed below.
        body = b""
    challenged = bool(response.header_values("WWW-Authenticate"))
    response.finish()
    code, message = describe(body)
    return Refusal(
        url=response.shown_url,
        status=response.status,
        code=response.secrets.redact(code, 64),
        message=response.secrets.redact(message),
        challenged=challenged,
    )


def to_error(refused: Refusal, *, what: str, registry: str, scope: str) -> StowrayError:
    """Return the error for an answer, by what the caller can do next."""
    detail = " ".join(filter(None, (refused.code, refused.message)))
    if refused.status == 404:
        # What a digest names was named by the registry itself, or copied from somewhere.
        return NotFoundError(what, registry, "" if "@" in what else NOT_FOUND_ADVICE)
    if refused.status in (401, 403) and refused.code not in TEMPORARY_CODES:
        return UnauthorizedError(registry, scope, detail or f"status {refused.status}")
    kind = RegistryError
    if is_transient(refused.status) or refused.code in TEMPORARY_CODES:
        kind = UnavailableError
    message = refused.message
    if refused.status == 429:
        message = f"rate limited{': ' if message else ''}{message}"
    return kind(refused.url, refused.status, refused.code, message)
