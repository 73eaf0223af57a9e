"""Bearer tokens: asking for one and reading the answer (distribution's token specification).

Invariant: a login goes to the realm only when the realm was found fit for it, once per request and
never on to where the realm redirects; an answer is small, and a token that could not stand in a
header is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from stowray.pipeline.blob_stream import is_encoded
from stowray.pipeline.credential import TOKEN_USER, Credential
from stowray.pipeline.errors import (
    ManifestError,
    RegistryError,
    StowrayError,
    UnauthorizedError,
    UnavailableError,
)
from stowray.pipeline.registry_documents import decoded
from stowray.pipeline.retry import is_transient
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from stowray.pipeline.response import Headers, Response

ANSWER_LIMIT = 1 << 20
DETAIL_READ = 64 * 1024
CLIENT_ID = "stowray"
SHORTEST_SECONDS = 60.0

# A token stands in a header: no control characters, no spaces (RFC 6750, section 2.1, is stricter
# than what registries send).
_TOKEN = re.compile(r"[\x21-\x7e]+")
_POST_REFUSED = frozenset({400, 401, 404, 405})
# What realms that speak OAuth2 alone say to a GET.
_GET_REFUSED = frozenset({400, 404, 405, 501})


@dataclass(frozen=True, slots=True)
class Token:
    """A token and how many seconds it may be used from when it was asked for."""

    value: str = field(repr=False)
    seconds: float = SHORTEST_SECONDS


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What is asked of a realm; ``scopes`` are sorted and merged."""

    registry: str
    realm: str
    service: str
    scopes: tuple[str, ...]


def parse_scopes(text: str) -> tuple[str, ...]:
    """Return the scopes of a challenge, or ``()`` when one of them is not ``type:name:actions``."""
    parts = text.split()
    if any(part.count(":") < 2 for part in parts):
        return ()
    return merge_scopes(parts)


def merge_scopes(scopes: Iterable[str]) -> tuple[str, ...]:
    """Return scopes sorted, each resource once with all its actions sorted.

    The name may hold colons (a port), so the type ends at the first and the actions begin after the
    last one.
    """
    merged: dict[str, set[str]] = {}
    for scope in scopes:
        resource, _, actions = scope.rpartition(":")
        merged.setdefault(resource, set()).update(filter(None, actions.split(",")))
    return tuple(
        sorted(f"{resource}:{','.join(sorted(actions))}" for resource, actions in merged.items())
    )


def ask(
    send: Callable[[str, str, Headers, bytes | None], Response],
    request: TokenRequest,
    credential: Credential | None,
) -> Token:
    """Return a token for ``request``; ``send(method, url, headers, body)`` makes one exchange.

    Raises UnauthorizedError when the realm refuses the login, UnavailableError when it cannot
    answer now, RegistryError when it answers something else.
    """
    if credential is not None and credential.identity_token:
        try:
            return _post(send, request, credential)
        except _PostRefusedError:
            # Realms without OAuth2 take the token as a password (Artifactory, old ACR).
            return _get(send, request, Credential(TOKEN_USER, credential.identity_token))
    try:
        return _get(send, request, credential)
    except RegistryError as error:
        if credential is None or not credential.password or error.status not in _GET_REFUSED:
            raise
        refused = error
    try:
        return _post(send, request, credential)
    except _PostRefusedError:
        raise refused from None


class _PostRefusedError(RegistryError):
    """The realm does not speak OAuth2, or not for this login."""


def _get(
    send: Callable[[str, str, Headers, bytes | None], Response],
    request: TokenRequest,
    credential: Credential | None,
) -> Token:
    pairs = [("service", request.service)] if request.service else []
    pairs += [("scope", scope) for scope in request.scopes]
    headers: Headers = ()
    if credential is not None:
        if credential.username != TOKEN_USER:
            pairs.append(("account", credential.username))
        headers = (("Authorization", credential.basic),)
    # What follows a '#' is never sent, and would take the scopes along.
    realm = request.realm.partition("#")[0]
    mark = "&" if "?" in realm else "?"
    url = f"{realm}{mark}{urlencode(pairs)}" if pairs else realm
    with send("GET", url, headers, None) as response:
        return _read(response, request)


def _post(
    send: Callable[[str, str, Headers, bytes | None], Response],
    request: TokenRequest,
    credential: Credential,
) -> Token:
    form = {
        "service": request.service,
        "client_id": CLIENT_ID,
        "scope": " ".join(request.scopes),
    }
    if credential.identity_token:
        form |= {"grant_type": "refresh_token", "refresh_token": credential.identity_token}
    else:
        form |= {
            "grant_type": "password",
            "username": credential.username,
            "password": credential.password,
        }
    headers = (("Content-Type", "application/x-www-form-urlencoded"),)
    with send("POST", request.realm, headers, urlencode(form).encode("ascii")) as response:
        if response.status in _POST_REFUSED:
            detail = _detail(response)
            response.finish()
            raise _PostRefusedError(response.shown_url, response.status, "", detail)
        return _read(response, request)


def _read(response: Response, request: TokenRequest) -> Token:
    url = response.shown_url
    if response.status in (401, 403):
        detail = f"{url}: {_detail(response)}"
        response.finish()
        scope = response.secrets.redact(" ".join(request.scopes))
        raise UnauthorizedError(request.registry, scope, detail)
    if response.status != 200:
        detail = _detail(response)
        response.finish()
        kind = UnavailableError if is_transient(response.status) else RegistryError
        raise kind(url, response.status, "", detail)
    body = response.read(ANSWER_LIMIT)
    if len(body) > ANSWER_LIMIT:
        raise RegistryError(url, 200, "", "the token answer is too long")
    response.finish()
    try:
        return parse_answer(decoded(body, url) if is_encoded(response) else body)
    except (ValueError, ManifestError) as error:
        raise RegistryError(url, 200, "", str(error)) from None


def parse_answer(body: bytes) -> Token:
    """Return the token in a realm's answer; raise ValueError, which quotes nothing of it.

    ``issued_at`` is not looked at: the life counts from when we asked, by our own clock, so a
    realm whose clock is wrong can neither prolong a token nor void it.
    """
    try:
        answer: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the token answer is not JSON") from None
    if not isinstance(answer, dict):
        raise ValueError("the token answer is not a JSON object")
    value = answer.get("token") or answer.get("access_token")
    if not isinstance(value, str) or not value:
        raise ValueError("the answer has no token")
    if not _TOKEN.fullmatch(value):
        raise ValueError("the token has characters that no header may have")
    return Token(value, _life(answer.get("expires_in")))


def _life(expires: Any) -> float:
    if isinstance(expires, str) and re.fullmatch(r"[0-9]{1,9}", expires, re.ASCII):
        expires = int(expires)
    if isinstance(expires, bool) or not isinstance(expires, int | float):
        return SHORTEST_SECONDS
    # Clients must not count on less than 60 s (specification); NaN compares false.
    return float(min(expires, 86400 * 365)) if expires > SHORTEST_SECONDS else SHORTEST_SECONDS


def _detail(response: Response) -> str:
    try:
        body = response.read(DETAIL_READ)[:DETAIL_READ]
    except StowrayError:
        return ""
    from stowray.pipeline.answers import describe

    code, message = describe(body)
    return response.secrets.redact(" ".join(filter(None, (code, message))))
