"""One exchange with a permit, and where an answer leads on to.

Invariant: a permit is out only while an exchange is; a redirect leads neither to anything but
http(s), nor from https to http, nor to an address nearer than the registry; a pause that a host
asks for holds for all threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote, urljoin

from stowray.pipeline.addresses import canonical_address, refusal, same_origin, scheme_of
from stowray.pipeline.answers import refusal as read_refusal
from stowray.pipeline.endpoint import Connection
from stowray.pipeline.errors import RegistryError
from stowray.pipeline.redact import host_of
from stowray.pipeline.retry import retry_after

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from stowray.pipeline.answers import Refusal
    from stowray.pipeline.auth import Grant, Resource
    from stowray.pipeline.clock import Clock
    from stowray.pipeline.limiter import Limiter
    from stowray.pipeline.notices import Notices
    from stowray.pipeline.response import Response
    from stowray.pipeline.transport import Transport

# A mirror may save time, not cost it: the registry itself answers within seconds.
MIRROR_SECONDS = 10.0
_ASCII = "".join(map(chr, range(128)))


class Exchanges:
    """Exchanges of one transport within the limits of each host; thread-safe."""

    def __init__(
        self,
        transport: Transport,
        limiter: Limiter,
        notices: Notices,
        trusted: Collection[str],
        clock: Clock,
    ) -> None:
        """Take what is given; ``trusted`` hosts are those that the user vouches for."""
        self._transport = transport
        self._limiter = limiter
        self._notices = notices
        self._trusted = frozenset(trusted)
        self._clock = clock
        self._secrets = transport.secrets

    def make(
        self,
        method: str,
        url: str,
        headers: Iterable[tuple[str, str]],
        *,
        body: bytes | None = None,
        document: bool,
        cancelled: Callable[[], bool],
        patience_seconds: float | None = None,
        resource: Resource | None = None,
        sent_by: str = "",
        is_foreign: bool = False,
    ) -> Response:
        """Make one exchange with a permit; ``is_foreign`` when others named ``url``."""
        host = host_of(url)
        connection = Connection()
        if resource is not None:
            is_there = same_origin(url, f"{resource.scheme}://{resource.host}")
            connection = resource.connection if is_there else resource.connection.elsewhere
            if host != resource.host:
                sent_by = resource.host
            if document and not resource.home and patience_seconds is None:
                patience_seconds = min(MIRROR_SECONDS, self._transport.patience_seconds)
        release = self._limiter.acquire(
            host,
            document=document,
            cancelled=cancelled,
            can_leave=resource is not None and not resource.home,
        )
        try:
            response = self._transport.exchange(
                method,
                url,
                headers,
                body=body,
                cancelled=cancelled,
                patience_seconds=patience_seconds,
                connection=connection,
                sent_by="" if self._is_trusted(url) else sent_by,
                is_foreign=is_foreign,
            )
        except BaseException:
            release()
            raise
        response.on_close(release)
        if response.status in (429, 503):
            seconds = retry_after(response.header("Retry-After"), self._clock.wall())
            if seconds is not None:
                # All threads slow down, not only the one that was told.
                self._limiter.pause(host, seconds)
        self._notices.read(response, host)
        return response

    def next_url(self, response: Response, url: str, resource: Resource) -> str:
        """Return where a redirect leads, its answer's connection given back."""
        location = response.header("Location")
        status = response.status
        response.finish()
        if not location:
            raise RegistryError(response.shown_url, status, "REDIRECT", "a redirect to nowhere")
        try:
            # A header is bytes. What is not ASCII in it is UTF-8 that its sender forgot to escape.
            target = urljoin(url, quote(location, safe=_ASCII, encoding="latin-1"))
            reason = refusal(
                target,
                registry=resource.host,
                scheme=scheme_of(url),
                trusted=self._trusted,
            )
        except ValueError:
            target, reason = "", "not a URL"
        if reason:
            where = self._secrets.url(target) or "somewhere"
            detail = f"the redirect to {where} is refused: {reason}"
            raise RegistryError(response.shown_url, status, "REDIRECT", detail)
        return target

    def _is_trusted(self, url: str) -> bool:
        scheme, host = scheme_of(url), host_of(url)
        wanted = canonical_address(scheme, host)
        return any(canonical_address(scheme, known) == wanted for known in self._trusted)


class Answer:
    """The last answer of a request, past redirects and challenges, and how it was asked for."""

    def __init__(self, response: Response, grant: Grant, *, redirected: bool) -> None:
        self.response = response
        self.grant = grant
        self.redirected = redirected

    def refusal(self) -> Refusal:
        """Return what the answer says went wrong; its connection is given back."""
        return read_refusal(self.response)


class RefusedAnswer(Answer):
    """An answer whose refusal was read already."""

    def __init__(self, answer: Answer, refused: Refusal) -> None:
        super().__init__(answer.response, answer.grant, redirected=answer.redirected)
        self._refused = refused

    def refusal(self) -> Refusal:
        """Return what was read."""
        return self._refused
