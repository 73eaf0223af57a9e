"""What goes into ``Authorization``, for whom and for what.

Invariant: a login or token is sent only to the registry that asked for it (a login also to the
realm that this registry names, if that is fit to get it), tokens are cached by host, realm,
service, scopes and login, one is asked for once however many threads need it, and no request is
repeated for the sake of a login more than twice.
"""

from __future__ import annotations

import threading
from dataclasses import field
from typing import TYPE_CHECKING

from stowray.pipeline.addresses import realm_refusal
from stowray.pipeline.challenge import Challenge, choose, parse
from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.endpoint import API_PATH, Connection
from stowray.pipeline.errors import CancelledError, RegistryError, UnauthorizedError
from stowray.pipeline.flight import SingleFlight
from stowray.pipeline.tokens import Token, TokenRequest, ask, merge_scopes, parse_scopes
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from stowray.pipeline.credential import Credential
    from stowray.pipeline.credentials import Logins
    from stowray.pipeline.known_secrets import KnownSecrets
    from stowray.pipeline.notices import Notices
    from stowray.pipeline.response import Headers, Response

    Send = Callable[[str, str, Headers, bytes | None, "Resource"], Response]

RENEW_AT = 0.9


@dataclass(frozen=True, slots=True)
class Resource:
    """What a request is about: ``host`` as on the wire, ``registry`` as in the reference.

    A mirror is a registry of its own. ``anonymous`` hosts (redirect targets) never get a login.
    ``connection`` and ``headers`` are for this host alone.
    """

    host: str
    scheme: str
    registry: str
    repository: str
    anonymous: bool = False
    path: str = API_PATH
    home: bool = True
    connection: Connection = field(default_factory=Connection)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def scope(self) -> str:
        """Return the scope that reading this needs."""
        return f"repository:{self.repository}:pull"


@dataclass(frozen=True, slots=True)
class Grant:
    """The header that a request was sent with, and what stands behind it."""

    header: str = ""
    token: str = ""
    scopes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Grant(scopes={self.scopes!r})"


@dataclass(frozen=True, slots=True)
class _Demand:
    scheme: str
    realm: str = ""
    service: str = ""


@dataclass(frozen=True, slots=True)
class _Kept:
    token: Token
    renew_at: float


class Authenticator:
    """Answers challenges; thread-safe, one per process."""

    def __init__(
        self,
        send: Send,
        credentials: Logins,
        secrets: KnownSecrets,
        notices: Notices,
        *,
        trusted: Collection[str] = (),
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._send = send
        self._credentials = credentials
        self._secrets = secrets
        self._notices = notices
        self._trusted = trusted
        self._clock = clock
        self._lock = threading.Lock()
        self._demands: dict[str, _Demand] = {}
        self._needed: dict[tuple[str, str], tuple[str, ...]] = {}
        self._tokens: dict[tuple[str, ...], _Kept] = {}
        self._flights: SingleFlight[Token] = SingleFlight(0, clock)

    def grant(self, resource: Resource, cancelled: Callable[[], bool] = lambda: False) -> Grant:
        """Return what a request for ``resource`` is to be sent with, by what is known so far."""
        with self._lock:
            demand = self._demands.get(resource.host)
            scopes = self._needed.get((resource.host, resource.scope), (resource.scope,))
        if demand is None:
            return Grant()
        credential = self._credential(resource, cancelled)
        if demand.scheme == "basic":
            if credential is None or not credential.password:
                return Grant()
            return Grant(credential.basic)
        if credential is not None and credential.registry_token:
            token = credential.registry_token
        else:
            request = TokenRequest(resource.registry, demand.realm, demand.service, scopes)
            token = self._token(resource, request, credential, cancelled).value
        return Grant(f"Bearer {token}", token, scopes)

    def challenged(
        self,
        resource: Resource,
        headers: Iterable[str],
        sent: Grant,
        ask_for_challenge: Callable[[], Iterable[str]],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Learn from a 401, so that the next ``grant`` is better; raise when it cannot be.

        ``ask_for_challenge`` gives the challenge of the API's root, for servers that send a 401
        without any.
        """
        challenges = parse(headers)
        if not challenges:
            with self._lock:
                known = resource.host in self._demands
            if not known or not sent.header:
                challenges = parse(ask_for_challenge())
        challenge = choose(challenges)
        if challenge is None:
            names = ", ".join(sorted({known.scheme for known in challenges}))
            names = self._secrets.redact(names)
            reason = f"it asks for {names}, which is not spoken here" if names else "401"
            raise UnauthorizedError(resource.registry, resource.scope, reason)
        if challenge.scheme == "basic":
            self._challenged_basic(resource, sent, cancelled)
        else:
            self._challenged_bearer(resource, challenge, sent)

    def expired(self, resource: Resource, sent: Grant) -> bool:
        """Forget a login that expired without a challenge; False when there is none to renew."""
        if not sent.header:
            return False
        self._credentials.forget(resource.registry)
        self._drop(resource, sent.token)
        return True

    def _challenged_basic(
        self, resource: Resource, sent: Grant, cancelled: Callable[[], bool]
    ) -> None:
        credential = self._credential(resource, cancelled)
        if sent.header.startswith("Basic "):
            self._credentials.forget(resource.registry)
            raise UnauthorizedError(resource.registry, resource.scope, "the login is refused")
        if credential is None or not credential.password:
            raise UnauthorizedError(resource.registry, resource.scope, "it needs a login")
        with self._lock:
            self._demands[resource.host] = _Demand("basic")

    def _challenged_bearer(self, resource: Resource, challenge: Challenge, sent: Grant) -> None:
        realm = challenge.parameters.get("realm", "")
        if not realm:
            raise UnauthorizedError(resource.registry, resource.scope, "its challenge has no realm")
        reason = realm_refusal(
            realm, registry=resource.host, scheme=resource.scheme, trusted=self._trusted
        )
        if reason:
            raise RegistryError(
                self._secrets.url(realm),
                0,
                "",
                f"not asked for a token for {resource.host}: {reason}",
            )
        asked = parse_scopes(challenge.parameters.get("scope", ""))
        key = (resource.host, resource.scope)
        if sent.token:
            if challenge.parameters.get("error") == "insufficient_scope":
                wanted = merge_scopes((*asked, *sent.scopes))
                if not asked or wanted == merge_scopes(sent.scopes):
                    # A realm may grant less than it was asked for and say nothing about it.
                    reason = "it does not exist, or this login does not reach that far"
                    scope = self._secrets.redact(" ".join(wanted))
                    raise UnauthorizedError(resource.registry, scope, reason)
                asked = wanted
            self._drop(resource, sent.token)
        with self._lock:
            service = challenge.parameters.get("service", "")
            self._demands[resource.host] = _Demand("bearer", realm, service)
            if asked:
                self._needed[key] = asked

    def _credential(self, resource: Resource, cancelled: Callable[[], bool]) -> Credential | None:
        if resource.anonymous:
            return None
        found = self._credentials.find(resource.registry, resource.repository, cancelled)
        if found is not None:
            self._secrets.learn(*found.secrets)
        return found

    def _token(
        self,
        resource: Resource,
        request: TokenRequest,
        credential: Credential | None,
        cancelled: Callable[[], bool],
    ) -> Token:
        identity = credential.identity if credential is not None else ""
        key = (resource.host, request.realm, request.service, *request.scopes, identity)

        def kept() -> Token | None:
            with self._lock:
                known = self._tokens.get(key)
            if known is not None and self._clock.monotonic() < known.renew_at:
                return known.token
            return None

        def fly(abandoned: Callable[[], bool]) -> Token:
            # Between the look into the cache and this flight another one may have landed.
            token = kept()
            if token is not None:
                return token
            begun = self._clock.monotonic()

            def send(method: str, url: str, headers: Headers, body: bytes | None) -> Response:
                return self._send(method, url, headers, body, resource)

            # What a realm warns of is shown when it is known which token it gave out.
            with self._notices.held():
                try:
                    token = ask(send, request, credential)
                except UnauthorizedError:
                    # A helper may have a better one the next time; a session lives for long.
                    self._credentials.forget(resource.registry)
                    raise
                self._secrets.learn(token.value)
            with self._lock:
                self._tokens[key] = _Kept(token, begun + RENEW_AT * token.seconds)
            return token

        try:
            return kept() or self._flights.do(key, fly, cancelled)
        except CancelledError:
            # A flight names its key, and this one tells the login.
            raise CancelledError(f"token for {resource.registry}") from None

    def _drop(self, resource: Resource, token: str) -> None:
        with self._lock:
            # By value: meanwhile another thread may have put a new one in its place.
            self._tokens = {
                key: known
                for key, known in self._tokens.items()
                if key[0] != resource.host or known.token.value != token
            }
