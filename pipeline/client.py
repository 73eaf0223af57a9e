"""Requests to registries: scheme, login, redirects, permits; and their answers.

Invariant: a login never follows a redirect to another scheme, host or port; at most ten hops and
two answered challenges per request. Single exchanges are made by ``exchanges``.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from stowray.pipeline.addresses import (
    canonical_address,
    is_loopback,
    realm_refusal,
    same_origin,
    scheme_of,
)
from stowray.pipeline.answers import is_challenge
from stowray.pipeline.auth import Authenticator, Grant, Resource
from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.endpoint import Endpoint
from stowray.pipeline.errors import RegistryError, UnauthorizedError, UnavailableError
from stowray.pipeline.exchange_errors import NOT_TLS
from stowray.pipeline.exchanges import Answer, Exchanges, RefusedAnswer
from stowray.pipeline.limiter import HostMeter
from stowray.pipeline.notices import Notices
from stowray.pipeline.redact import host_of, public_url

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from stowray.pipeline.credentials import Logins
    from stowray.pipeline.limiter import Limiter
    from stowray.pipeline.quota import Quota
    from stowray.pipeline.response import Headers, Response
    from stowray.pipeline.transport import Transport

REDIRECTS = frozenset({301, 302, 303, 307, 308})
HOP_LIMIT = 10
CHALLENGE_LIMIT = 2
PROBE_SECONDS = 2.0
FOREIGN = "a layer's descriptor"


def never() -> bool:
    """Return False: nobody cancels."""
    return False


class Client:
    """Sends requests to any number of registries; thread-safe, one per process."""

    def __init__(
        self,
        transport: Transport,
        credentials: Logins,
        limiter: Limiter,
        *,
        plain_http: Collection[str] = (),
        clock: Clock = SYSTEM_CLOCK,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._transport = transport
        self._limiter = limiter
        self._plain_http = frozenset(plain_http)
        self._secrets = transport.secrets
        self._secrets.add_source(credentials.known_secrets)
        self._notices = Notices(self._secrets, limiter, warn)
        self._lock = threading.Lock()
        self._schemes: dict[tuple[str, bool], str] = {}
        self._exchanges = Exchanges(transport, limiter, self._notices, plain_http, clock)
        self._auth = Authenticator(
            self._ask_realm,
            credentials,
            self._secrets,
            self._notices,
            trusted=plain_http,
            clock=clock,
        )

    def request(
        self,
        method: str,
        host: str,
        path: str,
        *,
        registry: str,
        repository: str,
        headers: Headers = (),
        document: bool = True,
        anonymous: bool = False,
        endpoint: Endpoint | None = None,
        asked: Callable[[], None] | None = None,
        cancelled: Callable[[], bool] = never,
    ) -> Answer:
        """Return the answer to ``method`` on ``path``; of whatever status, but no redirect or 401.

        ``endpoint`` tells how ``host`` is reached when that is not the usual way; ``asked`` is
        called before each request for ``path``, as challenges and lost logins make several of one.
        Raises UnauthorizedError for a 401 that no login can answer.
        """
        endpoint = endpoint or Endpoint(host, registry, repository)
        with self._notices.held():
            return self._request(
                method,
                host,
                path,
                registry,
                repository,
                headers,
                document,
                anonymous,
                endpoint,
                asked,
                cancelled,
            )

    def _request(
        self,
        method: str,
        host: str,
        path: str,
        registry: str,
        repository: str,
        headers: Headers,
        document: bool,
        anonymous: bool,
        endpoint: Endpoint,
        asked: Callable[[], None] | None,
        cancelled: Callable[[], bool],
    ) -> Answer:
        challenges = 0
        renewed = False
        # Plain http by leave of one endpoint's file is not learned for another one's.
        place = (host, endpoint.plain_http)
        while True:
            known = endpoint.scheme or self._schemes.get(place)
            # Where plain http is allowed it is tried first: no login was asked for yet, and what a
            # TLS server makes of it shows at once.
            tentative = not known and (endpoint.plain_http or self.may_be_plain(host))
            scheme = known or ("http" if tentative else "https")
            resource = Resource(
                host,
                scheme,
                registry,
                repository,
                anonymous,
                path=endpoint.path,
                home=endpoint.home,
                connection=endpoint.connection,
                headers=endpoint.headers,
            )
            grant = self._auth.grant(resource, cancelled)
            if asked is not None:
                asked()
            try:
                answer = self._follow(method, resource, path, headers, grant, document, cancelled)
            except UnavailableError as error:
                if not tentative or error.code not in ("CUT", "PROTOCOL"):
                    raise
                if not self._speaks_tls(resource, cancelled):
                    raise
                self._learn_scheme(place, "https")
                continue
            status = answer.response.status
            if tentative and status == 400 and self._speaks_tls(resource, cancelled):
                answer.response.close()
                self._learn_scheme(place, "https")
                continue
            if not known:
                self._learn_scheme(place, scheme)
            if is_challenge(answer.response) and not answer.redirected:
                if method == "HEAD" and challenges >= CHALLENGE_LIMIT:
                    # A HEAD tells no reason; the GET that follows does.
                    return answer
                refused = answer.refusal()
                if challenges >= CHALLENGE_LIMIT:
                    detail = refused.message or "every login is refused"
                    raise UnauthorizedError(registry, resource.scope, detail)
                challenges += 1
                self._auth.challenged(
                    resource,
                    answer.response.header_values("WWW-Authenticate"),
                    grant,
                    partial(self._root_challenge, resource, cancelled),
                    cancelled,
                )
                continue
            if status in (400, 401, 403) and not renewed and method == "GET":
                refused = answer.refusal()
                renewed = True
                if answer.redirected or (
                    refused.is_expired_login and self._auth.expired(resource, grant)
                ):
                    # A signed URL lives for minutes: the registry has a new one.
                    continue
                return RefusedAnswer(answer, refused)
            return answer

    def get_foreign(self, url: str, cancelled: Callable[[], bool]) -> Answer:
        """Return the answer to a GET of a layer's own URL; nobody's login goes there."""
        scheme, host = scheme_of(url), host_of(url)
        ask = partial(self._exchanges.make, "GET", headers=(), document=False, cancelled=cancelled)
        response = ask(url, sent_by=FOREIGN, is_foreign=True)
        for _ in range(HOP_LIMIT):
            if response.status not in REDIRECTS:
                return Answer(response, Grant(), redirected=False)
            url = self._exchanges.next_url(response, url, Resource(host, scheme, host, ""))
            response = ask(url, sent_by=FOREIGN, is_foreign=True)
        response.close()
        raise RegistryError(response.shown_url, 0, "REDIRECT", f"more than {HOP_LIMIT} redirects")

    def quota(self, host: str) -> Quota | None:
        """Return how many requests ``host`` still allows, None when it has not told."""
        return self._notices.quota(host)

    def meter(self, host: str, cancelled: Callable[[], bool]) -> HostMeter:
        """Return what the bytes of one answer of ``host`` are shared by."""
        return HostMeter(self._limiter, host, cancelled)

    def rest(self, host: str) -> float:
        """Return for how many seconds ``host`` has asked to be left alone."""
        return self._limiter.rest(host)

    def spare(self, host: str) -> int:
        """Return how many more exchanges for blobs ``host`` gets now without a wait."""
        return self._limiter.spare(host)

    def close(self) -> None:
        """Close all connections."""
        self._transport.close()
        self._limiter.close()

    def may_be_plain(self, host: str) -> bool:
        """Return whether plain http to ``host`` is allowed: loopback, or named in the settings."""
        return is_loopback(host) or any(
            known == host or canonical_address("http", known) == canonical_address("http", host)
            for known in self._plain_http
        )

    # -- one request ------------------------------------------------------------------------------

    def _follow(
        self,
        method: str,
        resource: Resource,
        path: str,
        headers: Headers,
        grant: Grant,
        document: bool,
        cancelled: Callable[[], bool],
    ) -> Answer:
        url = first = f"{resource.scheme}://{resource.host}{path}"
        own = resource.headers
        if grant.header:
            others = (pair for pair in own if pair[0].lower() != "authorization")
            own = (*others, ("Authorization", grant.header))
        left = False
        for hop in range(HOP_LIMIT + 1):
            if not same_origin(first, url):
                # Once left, the registry gets no login either: it was not it that led back.
                left, own = True, ()
            response = self._exchanges.make(
                method,
                url,
                (*headers, *own),
                resource=resource,
                document=document,
                cancelled=cancelled,
                is_foreign=hop > 0,
            )
            if response.status == 401 and left:
                response = self._ask_elsewhere(
                    response, method, url, headers, resource, document, cancelled
                )
            if response.status not in REDIRECTS:
                return Answer(response, grant, redirected=left)
            if hop == HOP_LIMIT:
                break
            url = self._exchanges.next_url(response, url, resource)
        response.close()
        raise RegistryError(public_url(first), 0, "REDIRECT", f"more than {HOP_LIMIT} redirects")

    def _ask_elsewhere(
        self,
        response: Response,
        method: str,
        url: str,
        headers: Headers,
        resource: Resource,
        document: bool,
        cancelled: Callable[[], bool],
    ) -> Response:
        """Answer the challenge of a host that a redirect led to, as nobody."""
        demanded = response.header_values("WWW-Authenticate")
        if not demanded:
            return response
        response.finish()
        there = Resource(
            host_of(url), scheme_of(url), host_of(url), resource.repository, anonymous=True
        )
        try:
            self._auth.challenged(there, demanded, Grant(), lambda: ())
        except UnauthorizedError:
            # Nothing that nobody could answer, so what stands in the URL is no longer good.
            return response
        grant = self._auth.grant(there, cancelled)
        own = (("Authorization", grant.header),) if grant.header else ()
        return self._exchanges.make(
            method,
            url,
            (*headers, *own),
            resource=resource,
            document=document,
            cancelled=cancelled,
            is_foreign=True,
        )

    def _ask_realm(
        self, method: str, url: str, headers: Headers, body: bytes | None, resource: Resource
    ) -> Response:
        """Make the exchange for a token; a redirect is followed without the login."""
        for _ in range(HOP_LIMIT):
            response = self._exchanges.make(
                method,
                url,
                headers,
                body=body,
                resource=resource,
                document=True,
                cancelled=never,
                is_foreign=True,
            )
            if response.status not in REDIRECTS or method != "GET":
                return response
            target = self._exchanges.next_url(response, url, resource)
            reason = realm_refusal(
                target,
                registry=resource.host,
                scheme=scheme_of(url),
                trusted=self._plain_http,
            )
            if reason:
                raise RegistryError(response.shown_url, response.status, "REDIRECT", reason)
            if not same_origin(url, target):
                headers = ()
            url = target
        raise RegistryError(response.shown_url, 0, "REDIRECT", f"more than {HOP_LIMIT} redirects")

    def _root_challenge(self, resource: Resource, cancelled: Callable[[], bool]) -> Iterable[str]:
        url = f"{resource.scheme}://{resource.host}{resource.path}/"
        with self._exchanges.make(
            "GET", url, resource.headers, resource=resource, document=True, cancelled=cancelled
        ) as response:
            demanded = response.header_values("WWW-Authenticate")
            response.finish()
        return demanded

    # -- scheme -----------------------------------------------------------------------------------

    def _speaks_tls(self, resource: Resource, cancelled: Callable[[], bool]) -> bool:
        """Return whether a host, which did not understand plain http, answers over TLS.

        An untrusted certificate is an error and nothing to fall back from. The patience is short,
        because a plain server may wait for the end of what it takes for a long first line.
        """
        try:
            with self._exchanges.make(
                "GET",
                f"https://{resource.host}{resource.path}/",
                (),
                resource=replace(resource, scheme="https"),
                document=True,
                cancelled=cancelled,
                patience_seconds=PROBE_SECONDS,
            ) as response:
                response.finish()
        except UnavailableError:
            return False
        except RegistryError as error:
            if error.code != NOT_TLS:
                raise
            return False
        return True

    def _learn_scheme(self, place: tuple[str, bool], scheme: str) -> None:
        with self._lock:
            self._schemes[place] = scheme
