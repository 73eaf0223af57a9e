"""One HTTP exchange: connect, send, read, give the connection back.

Invariant: an exchange that ended, in whatever way, holds no connection: it is back in its pool
(drained) or closed. Certificates are verified, unless a file of the user's own says not to for that
one host; bodies arrive as they were sent (nothing is decoded), redirects and retries are left to
the caller, and a body that ends before its ``Content-Length`` is an error, never a short result. No
foreign exception passes.
"""

from __future__ import annotations

import threading
from base64 import b64encode
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, unquote, urlsplit

from stowray.pipeline.addresses import DEFAULT_PORTS, is_refused_peer, origin_of
from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.connections import IdleConnections, Peer, connect, start_tls
from stowray.pipeline.endpoint import Connection
from stowray.pipeline.errors import RegistryError, UnavailableError, UsageError
from stowray.pipeline.exchange_errors import is_stale, translated, verdict
from stowray.pipeline.http1 import Wire
from stowray.pipeline.known_secrets import KnownSecrets
from stowray.pipeline.proxies import Proxies
from stowray.pipeline.redact import host_of, public_url, url_secrets
from stowray.pipeline.response import Response
from stowray.pipeline.retry import is_transient
from stowray.pipeline.watchdog import Watch, Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from socket import socket
    from ssl import SSLContext, SSLSocket

    from stowray.pipeline.http1 import Answer

USER_AGENT = "stowray"
# Signs that stand for themselves in a URL (RFC 3986), and the % of what is escaped already.
_UNESCAPED = "!$%&'()*+,/:;=?@-._~[]"
PLAIN_CONNECTION = Connection()


class Transport:
    """Connections to all hosts, shared by all threads of the process."""

    def __init__(
        self,
        *,
        ca_file: str = "",
        connect_seconds: float = 10.0,
        stall_seconds: float = 30.0,
        minimum_rate: int = 1024,
        proxies: Proxies | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.clock = clock
        self.watchdog = Watchdog(clock, minimum_rate, stall_seconds)
        self._ca_file = ca_file
        self._connect_seconds = connect_seconds
        self._stall_seconds = stall_seconds
        self._proxies = proxies or Proxies()
        self.secrets = KnownSecrets(self._proxies.secrets)
        self._lock = threading.Lock()
        self._idle = IdleConnections()
        self._contexts: dict[Connection, SSLContext] = {}
        self._peers: dict[str, str] = {}  # at which address a registry was reached

    def exchange(
        self,
        method: str,
        url: str,
        headers: Iterable[tuple[str, str]] = (),
        *,
        body: bytes | None = None,
        cancelled: Callable[[], bool] | None = None,
        patience_seconds: float | None = None,
        connection: Connection = PLAIN_CONNECTION,
        sent_by: str = "",
        is_foreign: bool = False,
    ) -> Response:
        """Send one request and return its answer, whatever its status.

        A kept-alive connection that the server had closed meanwhile is replaced without a word (RFC
        9112, section 9.3.1). Raises CancelledError, UnavailableError, or RegistryError for what
        another try would not mend. ``patience_seconds`` replaces the usual wait for an answer;
        ``sent_by`` is the registry whose redirect or challenge names ``url``; ``is_foreign`` tells
        that somebody else than us wrote it, so that it is shown with care.
        """
        headers = tuple(headers)
        # Whoever gets it may quote it in what it answers.
        self.secrets.learn_request(url, headers, body)
        shown = self.secrets.url(url) if is_foreign else public_url(url)
        connect_seconds = connection.connect_seconds or self._connect_seconds
        while True:
            now = self.clock.monotonic()
            limit = patience_seconds or connect_seconds + self._stall_seconds
            watch = Watch(shown, cancelled, now, now + limit, self.secrets)
            self.watchdog.add(watch)
            try:
                peer = self._peer(url, connection)
                if sent_by and not peer.proxy:
                    known = self._peers.get(sent_by, "")
                    watch.refuses = partial(is_refused_peer, registry_peer=known)
                wire = self._connected(peer, watch, connect_seconds)
                answer = self._ask(wire, peer, method, url, headers, body)
            except Exception as error:  # noqa: BLE001 - translated, or raised again when it is a mistake
                self.watchdog.remove(watch)
                _drop(watch)
                if watch.reused and not watch.verdict and is_stale(error):
                    continue
                # Not with its cause, which may quote the whole of a signed URL.
                raise translated(error, watch) from None
            except BaseException:
                self.watchdog.remove(watch)
                _drop(watch)
                raise
            watch.in_body = True
            if watch.peer and not sent_by:
                self._peers[host_of(url)] = watch.peer
            give_back = partial(self._give_back, peer, wire, answer)
            response = Response(answer, watch, self.watchdog, self.clock, url, give_back)
            if watch.verdict:
                response.close()
                raise verdict(watch)
            return response

    @property
    def patience_seconds(self) -> float:
        """Return how long an answer is waited for."""
        return self._connect_seconds + self._stall_seconds

    def close(self) -> None:
        """Close all connections and end all exchanges."""
        self.watchdog.close()
        self._idle.close()

    # -- connections ------------------------------------------------------------------------------

    def _peer(self, url: str, connection: Connection) -> Peer:
        # Connections are never shared by what has different trust.
        proxy = connection.proxy or self._proxies.choose(url)
        if connection.proxy:
            self.secrets.learn(*url_secrets(proxy))
        scheme, host, port = origin_of(url)
        if scheme not in DEFAULT_PORTS or not host:
            raise ValueError("not an http(s) URL")
        return Peer(scheme, host, port, proxy, connection)

    def _connected(self, peer: Peer, watch: Watch, seconds: float) -> Wire:
        """Return a connection that ``watch`` knows: one that was kept, or a new one."""
        wire = self._idle.take(peer)
        if wire is not None:
            watch.attach(wire.socket, reused=True)
            return wire
        # Before anything is connected: files of the user's may not be what they should.
        context = self._context(peer.connection) if peer.scheme == "https" else None
        if peer.proxy:
            made = self._through_proxy(peer, context, watch, seconds)
        else:
            made = connect(peer.host, peer.port, watch, seconds)
            watch.attach(made, reused=False)
            if context is not None:
                made = start_tls(made, context, peer.host, watch)
        made.settimeout(self._stall_seconds)
        return Wire(made)

    def _through_proxy(
        self, peer: Peer, context: SSLContext | None, watch: Watch, seconds: float
    ) -> socket:
        """Return a connection by way of the proxy on which the origin can be spoken to."""
        scheme, host, port = origin_of(peer.proxy)
        made = connect(host, port, watch, seconds)
        watch.attach(made, reused=False)
        if scheme == "https":
            made = start_tls(made, self._context(PLAIN_CONNECTION), host, watch)
        if context is None:
            return made
        there = _authority(peer.host, peer.port)
        wire = Wire(made)
        wire.send("CONNECT", there, (("Host", there), *proxy_login(peer.proxy)), b"")
        answer = wire.answer("CONNECT")
        if answer.status >= 300 or not wire.is_drained:
            detail = f"the proxy refuses to connect: {answer.status}"
            # A proxy's own word on logins and rules does not change; that a host is away may.
            is_final = 400 <= answer.status < 500 and not is_transient(answer.status)
            kind = RegistryError if is_final else UnavailableError
            raise kind(watch.url, 0, "PROXY", detail)
        if scheme == "http":
            return start_tls(made, context, peer.host, watch)
        # TLS within TLS, which the standard library's sockets do not do.
        from urllib3.util.ssltransport import SSLTransport

        within: Any = SSLTransport(cast("SSLSocket", made), context, peer.host)
        return cast("socket", within)

    def _ask(
        self,
        wire: Wire,
        peer: Peer,
        method: str,
        url: str,
        headers: tuple[tuple[str, str], ...],
        body: bytes | None,
    ) -> Answer:
        """Send a request and read the head of its answer."""
        is_default = peer.port == DEFAULT_PORTS[peer.scheme]
        host = _authority(peer.host, None if is_default else peer.port)
        target = request_target(url)
        fields = [("Host", host), ("User-Agent", USER_AGENT), ("Accept-Encoding", "identity")]
        if peer.proxy and peer.scheme == "http":
            target = f"http://{host}{target}"
            fields += proxy_login(peer.proxy)
        fields += headers
        if body is not None:
            fields.append(("Content-Length", str(len(body))))
        with suppress(BrokenPipeError):
            # A server that takes no more may have said why.
            wire.send(method, target, fields, body or b"")
        return wire.answer(method)

    def _give_back(self, peer: Peer, wire: Wire, answer: Answer) -> None:
        if answer.is_reusable:
            self._idle.keep(peer, wire)
        else:
            wire.socket.close()

    def _context(self, connection: Connection) -> SSLContext:
        with self._lock:
            context = self._contexts.get(connection)
            if context is None:
                context = self._contexts[connection] = self._tls(connection)
            return context

    def _tls(self, connection: Connection) -> SSLContext:
        # Not needed for a registry on loopback, and slow to import.
        import ssl

        from stowray.pipeline.access import as_files

        context = ssl.create_default_context()
        context.set_alpn_protocols(["http/1.1"])
        named = [("registry.ca_file", self._ca_file)] if self._ca_file else []
        for subject, file in [*named, *((file, file) for file in connection.ca_files)]:
            try:
                with as_files(file) as (name,):
                    context.load_verify_locations(cafile=name)
            except (OSError, ValueError) as error:
                raise UsageError(subject, f"cannot load {file}") from error
        # OpenSSL keeps one pair per kind of key, the last: the first of the file shall be it.
        for certificate, key in reversed(connection.client_pairs):
            try:
                with as_files(certificate, key) as (name, key_name):
                    # Without a password of ours OpenSSL would ask on the terminal for one.
                    context.load_cert_chain(name, key_name or None, password=str)
            except (OSError, ValueError) as error:
                raise UsageError(
                    certificate, "not a client's certificate with its key, unencrypted"
                ) from error
        if connection.skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def _drop(watch: Watch) -> None:
    """Close the connection of an exchange that failed."""
    connection = watch.connection
    if connection is not None:
        watch.attach(None, reused=watch.reused)
        connection.close()


def _authority(host: str, port: int | None) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if port is None else f"{name}:{port}"


def request_target(url: str) -> str:
    """Return path and query of ``url`` as they are sent; what may not stand there is escaped."""
    split = urlsplit(url)
    target = f"{split.path or '/'}?{split.query}" if split.query else split.path or "/"
    return quote(target, safe=_UNESCAPED)


def proxy_login(proxy: str) -> list[tuple[str, str]]:
    """Return the header with the login that a proxy's URL holds, if it holds one."""
    split = urlsplit(proxy)
    if split.username is None:
        return []
    login = f"{unquote(split.username)}:{unquote(split.password or '')}"
    return [("Proxy-Authorization", f"Basic {b64encode(login.encode()).decode()}")]
