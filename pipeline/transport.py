"""One HTTP exchange: connect, send, read, give the connection back.

Invariant: an exchange that ended, in whatever way, holds no connection: it is back in its pool
(drained) or closed. Certificates are verified, unless a file of the user's own says not to for that
one host; bodies arrive as they were sent (nothing is decoded), redirects and retries are left to
the caller, and a body that ends before its ``Content-Length`` is an error, never a short result. No
foreign exception passes.
"""

from __future__ import annotations

import logging
import threading
from functools import partial
from typing import TYPE_CHECKING

from stowray.pipeline.addresses import is_refused_peer
from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.endpoint import Connection
from stowray.pipeline.errors import UsageError
from stowray.pipeline.exchange_errors import is_stale, translated, verdict
from stowray.pipeline.known_secrets import KnownSecrets
from stowray.pipeline.proxies import Proxies
from stowray.pipeline.redact import host_of, public_url, url_secrets
from stowray.pipeline.response import Response
from stowray.pipeline.watchdog import Watch, Watchdog

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterable

    from urllib3 import PoolManager

IDLE_CONNECTIONS = 16
USER_AGENT = "stowray"
PLAIN_CONNECTION = Connection()
LIBRARY_LOGGER = "urllib3.connectionpool"


class _QuietQueries(logging.Filter):
    """Takes queries, which may be signed, and logins out of what the library logs of us."""

    def __init__(self, current: threading.local, secrets: KnownSecrets) -> None:
        super().__init__()
        self._current = current
        self._secrets = secrets

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record's arguments; nothing of other users of the library is touched."""
        if getattr(self._current, "watch", None) is not None and isinstance(record.args, tuple):
            record.args = tuple(
                self._secrets.url(argument) if isinstance(argument, str) else argument
                for argument in record.args
            )
        return True


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
        self._managers: dict[tuple[str, Connection], PoolManager] = {}
        self._contexts: dict[Connection, ssl.SSLContext] = {}
        self._current = threading.local()
        self._peers: dict[str, str] = {}  # at which address a registry was reached
        self._quiet = _QuietQueries(self._current, self.secrets)

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
        from urllib3 import HTTPHeaderDict, Timeout

        sent = HTTPHeaderDict()
        sent.add("User-Agent", USER_AGENT)
        sent.add("Accept-Encoding", "identity")
        headers = tuple(headers)
        for name, value in headers:
            sent.add(name, value)
        # Whoever gets it may quote it in what it answers.
        self.secrets.learn_request(url, headers, body)
        shown = self.secrets.url(url) if is_foreign else public_url(url)
        manager = self._manager(url, connection)
        connect_seconds = connection.connect_seconds or self._connect_seconds
        timeout = Timeout(connect=connect_seconds, read=self._stall_seconds)
        while True:
            now = self.clock.monotonic()
            limit = patience_seconds or connect_seconds + self._stall_seconds
            watch = Watch(shown, cancelled, now, now + limit, self.secrets)
            if sent_by and not self._proxies.choose(url):
                watch.refuses = partial(is_refused_peer, registry_peer=self._peers.get(sent_by, ""))
            self._current.watch = watch
            self.watchdog.add(watch)
            try:
                raw = manager.urlopen(
                    method,
                    url,
                    headers=sent,
                    body=body,
                    timeout=timeout,
                    redirect=False,
                    retries=False,
                    preload_content=False,
                    decode_content=False,
                )
            except Exception as error:  # noqa: BLE001 - translated, or raised again when it is a mistake
                self.watchdog.remove(watch)
                if watch.reused and not watch.verdict and is_stale(error):
                    continue
                # Not with its cause, which may quote the whole of a signed URL.
                raise translated(error, watch) from None
            except BaseException:
                self.watchdog.remove(watch)
                raise
            finally:
                self._current.watch = None
            watch.in_body = True
            if watch.peer and not sent_by:
                self._peers[host_of(url)] = watch.peer
            response = Response(raw, watch, self.watchdog, self.clock, url)
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
        with self._lock:
            managers = list(self._managers.values())
            self._managers.clear()
        for manager in managers:
            manager.clear()
        logging.getLogger(LIBRARY_LOGGER).removeFilter(self._quiet)

    def _manager(self, url: str, connection: Connection) -> PoolManager:
        # Pools are never shared by connections of different trust.
        proxy = connection.proxy or self._proxies.choose(url)
        if connection.proxy:
            self.secrets.learn(*url_secrets(proxy))
        key = (proxy, connection)
        with self._lock:
            manager = self._managers.get(key)
            if manager is None:
                seconds = connection.connect_seconds or self._connect_seconds
                manager = self._managers[key] = self._new_manager(proxy, seconds)
            if url.startswith("https:"):
                context = self._contexts.get(connection)
                if context is None:
                    context = self._contexts[connection] = self._tls(connection)
                manager.connection_pool_kw["ssl_context"] = context
            return manager

    def _new_manager(self, proxy: str, connect_seconds: float) -> PoolManager:
        from urllib3 import PoolManager, ProxyManager, make_headers

        logging.getLogger(LIBRARY_LOGGER).addFilter(self._quiet)

        from stowray.pipeline.connections import pool_classes

        if proxy:
            from urllib3.util import parse_url

            auth = parse_url(proxy).auth
            manager: PoolManager = ProxyManager(
                proxy,
                num_pools=64,
                maxsize=IDLE_CONNECTIONS,
                proxy_headers=make_headers(proxy_basic_auth=auth) if auth else None,
            )
        else:
            manager = PoolManager(num_pools=64, maxsize=IDLE_CONNECTIONS)
        classes = pool_classes(lambda: self._current.watch, connect_seconds)
        manager.pool_classes_by_scheme = classes
        return manager

    def _tls(self, connection: Connection) -> ssl.SSLContext:
        import ssl

        context = ssl.create_default_context()
        named = [("registry.ca_file", self._ca_file)] if self._ca_file else []
        for subject, file in [*named, *((file, file) for file in connection.ca_files)]:
            try:
                context.load_verify_locations(cafile=file)
            except (OSError, ValueError) as error:
                raise UsageError(subject, f"cannot load {file}") from error
        # OpenSSL keeps one pair per kind of key, the last: the first of the file shall be it.
        for certificate, key in reversed(connection.client_pairs):
            try:
                # Without a password of ours OpenSSL would ask on the terminal for one.
                context.load_cert_chain(certificate, key or None, password=str)
            except (OSError, ValueError) as error:
                raise UsageError(
                    certificate, "not a client's certificate with its key, unencrypted"
                ) from error
        if connection.skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context
