"""What of a URL or of foreign text may be shown.

Invariant: nothing that passes through here carries a password, a token or a signed query string.
Errors name URLs by :func:`public_url`; text that others wrote goes through :func:`redact_text`.
"""

from __future__ import annotations

import base64
import re
from urllib.parse import parse_qsl, unquote, urlsplit

from stowray.pipeline.errors import escape

# Queries that name what is asked for and grant nothing.
HARMLESS_QUERIES = frozenset({"ns", "scope", "service"})
# Fields of a token request that say who asks for what.
HARMLESS_FORM = frozenset(
    {"access_type", "client_id", "grant_type", "scope", "service", "username"}
)
DETAIL_LIMIT = 500

# Compiled when first used, which is when something went wrong: they take as long as a request.
_URL = r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+"
_CREDENTIALS = r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}"
_JWT = r"\beyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)*"
_ASSIGNED = (
    r"(?i)(?P<name>[\w-]*(?:token|password|secret|signature|authorization|credential)[\w-]*"
    r"[\"']?\s*[=:]\s*[\"']?)(?P<value>[^\s\"'&,;}<>]{4,})"
)
_TARGET = r"(/[^\s\"'?<>]*)\?[^\s\"'<>]+"


def redact_url(url: str) -> str:
    """Return ``url`` with its password and all query values that may grant something replaced."""
    rest, mark, fragment = url.partition("#")
    rest, _, query = rest.partition("?")
    rest = _without_password(rest, "xxxxx")
    if query:
        pairs = sorted(
            (name, value if name in HARMLESS_QUERIES else "REDACTED")
            for name, _, value in (pair.partition("=") for pair in query.split("&"))
        )
        rest += "?" + "&".join(f"{name}={value}" for name, value in pairs)
    return escape(rest + mark + fragment)


def public_url(url: str) -> str:
    """Return scheme, host and path of ``url``: of a signed URL nothing else may be shown."""
    return escape(_without_password(re.split(r"[?#]", url, maxsplit=1)[0], None))


def query_secrets(url: str) -> tuple[str, ...]:
    """Return the values of a URL's query that nobody else should see."""
    query = url.partition("#")[0].partition("?")[2]
    pairs = (pair.partition("=") for pair in query.split("&"))
    return tuple(
        form
        for name, _, value in pairs
        if name not in HARMLESS_QUERIES and len(value) >= 8
        for form in (value, unquote(value))
    )


def url_secrets(url: str) -> tuple[str, ...]:
    """Return the password in a URL, as it is written there and as it is meant."""
    try:
        password = urlsplit(url).password
    except ValueError:
        return ()
    return (password, unquote(password)) if password else ()


def host_of(url: str) -> str:
    """Return ``host[:port]`` of ``url``."""
    return urlsplit(url).netloc.rpartition("@")[2]


def sent_secrets(authorization: str) -> tuple[str, ...]:
    """Return what the value of an ``Authorization`` header that was sent says in secret."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() != "basic":
        return (value,)
    try:
        password = base64.b64decode(value).partition(b":")[2].decode()
    except ValueError:
        return (value,)
    return (value, password)


def form_secrets(body: bytes) -> tuple[str, ...]:
    """Return the values of a form that may grant something: passwords and tokens (RFC 6749)."""
    pairs = parse_qsl(body.decode("ascii", "replace"))
    return tuple(value for name, value in pairs if name not in HARMLESS_FORM)


def redact_text(text: str, secrets: tuple[str, ...] = (), limit: int = DETAIL_LIMIT) -> str:
    """Return foreign text fit to be shown: no secrets, no control characters, not endless."""
    for secret in secrets:
        if len(secret) >= 4:
            text = text.replace(secret, "REDACTED")
    # Before the patterns, whose time grows with the square of the length.
    text = text[: 2 * limit]
    text = re.sub(_URL, lambda match: public_url(match[0]), text)
    text = re.sub(_TARGET, r"\1", text)
    text = re.sub(_CREDENTIALS, r"\1 REDACTED", text)
    text = re.sub(_JWT, "REDACTED", text)
    text = re.sub(_ASSIGNED, r"\g<name>REDACTED", text)
    text = escape(text.strip())
    return text if len(text) <= limit else text[:limit] + "…"


def _without_password(rest: str, replacement: str | None) -> str:
    scheme, mark, tail = rest.partition("://")
    if not mark:
        return rest
    authority, slash, path = tail.partition("/")
    userinfo, at, host = authority.rpartition("@")
    if at:
        user, colon, _ = userinfo.partition(":")
        if replacement is None:
            authority = host
        elif colon:
            authority = f"{user}:{replacement}@{host}"
    return f"{scheme}://{authority}{slash}{path}"
