"""One HTTP exchange: connect, send, read, give the connection back.

Invariant: an exchange that ended, in whatever way, holds no connection: it is back in its pool
(drained) or closed. Certificates are verified, unless a file of the user's own says not to for that
one host; bodies arrive as they were sent (nothing is decoded), redirects and retries are left to
the caller, and a body that ends before its ``Content-Length`` is an error, never a short result. No
foreign exception passes.
"""

from __future__ import annotations

import io
import logging
import threading
from functools import partial
from http.client import HTTPException, IncompleteRead
from typing import TYPE_CHECKING, Any, Self

from stowray.pipeline.addresses import is_refused_peer
from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.endpoint import Connection
from stowray.pipeline.errors import (
    CancelledError,
    RegistryError,
    StowrayError,
    UnavailableError,
    UsageError,
)
from stowray.pipeline.proxies import Proxies
from stowray.pipeline.redact import host_of, public_url, redact_text
from stowray.pipeline.watchdog import Watch, Watchdog

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterable

    from urllib3 import BaseHTTPResponse, PoolManager

Headers = tuple[tuple[str, str], ...]

DRAIN_LIMIT = 64 * 1024
IDLE_CONNECTIONS = 16
USER_AGENT = "stowray"
PLAIN_CONNECTION = Connection()
LIBRARY_LOGGER = "urllib3.connectionpool"

_VERDICTS = {
    "silent": ("TIMEOUT", "no answer in time"),
    "slow": ("SLOW", "the body comes too slowly"),
    "closed": ("CLOSED", "the transport was closed"),
}


class Response:
    """Status, headers and the body as it arrives; to be closed on every path."""

    def __init__(self, raw: BaseHTTPResponse, watch: Watch, transport: Transport, url: str) -> None:
        self._raw = raw
        self._watch = watch
        self._transport = transport
        self._clock = transport.clock
        self._open = True
        self._release: Callable[[], None] | None = None
        self._direct = _direct_body(raw)
        self.url = url
        self.status = int(raw.status)

    def on_close(self, release: Callable[[], None]) -> None:
        """Call ``release`` when the exchange is over."""
        self._release = release

    def header(self, name: str) -> str | None:
        """Return the first value of a header."""
        values = self.header_values(name)
        return values[0] if values else None

    def header_values(self, name: str) -> list[str]:
        """Return every value of a header that came several times."""
        return [str(value) for value in self._raw.headers.getlist(name)]

    def read(self, limit: int) -> bytes:
        """Return the rest of the body, or ``limit`` + 1 bytes of one that is longer."""
        pieces: list[bytes] = []
        left = limit + 1
        while left > 0:
            piece = self.read_piece(min(left, 1 << 18))
            if not piece:
                break
            pieces.append(piece)
            left -= len(piece)
        return b"".join(pieces)

    def read_piece(self, size: int) -> bytes:
        """Return what has arrived, at most ``size`` bytes; ``b""`` at the end of the body."""
        watch = self._watch
        watch.waiting_since = begun = self._clock.monotonic()
        try:
            piece = self._raw.read1(size, decode_content=False) or b""
        except Exception as error:
            raise self._transport.translated(error, watch) from error
        finally:
            watch.waiting_since = None
        watch.waited += self._clock.monotonic() - begun
        watch.received += len(piece)
        if watch.verdict:
            raise self._transport.verdict(watch)
        return piece

    def read_into(self, buffer: memoryview) -> int:
        """Fill the start of ``buffer`` with what has arrived; 0 at the end of the body.

        Bytes go from the socket straight into the buffer, as far as that can be done; the first
        and the last piece pass through the library, which keeps its own accounts of a body's end.
        """
        direct = self._direct
        if direct is None or direct.left <= len(buffer):
            piece = self.read_piece(len(buffer))
            buffer[: len(piece)] = piece
            if direct is not None:
                direct.left -= len(piece)
                direct.buffered -= len(piece)
            return len(piece)
        if direct.buffered > 0:
            # http.client may have read the beginning of the body together with the headers. A
            # short read means that its buffer is empty now.
            piece = self.read_piece(len(buffer))
            buffer[: len(piece)] = piece
            direct.left -= len(piece)
            short = len(piece) < len(buffer)
            direct.buffered = 0 if short else direct.buffered - len(piece)
            return len(piece)
        watch = self._watch
        watch.waiting_since = begun = self._clock.monotonic()
        try:
            count = direct.read_into(buffer)
        except Exception as error:
            raise self._transport.translated(error, watch) from error
        finally:
            watch.waiting_since = None
        watch.waited += self._clock.monotonic() - begun
        watch.received += count
        if watch.verdict:
            raise self._transport.verdict(watch)
        if count == 0:
            raise UnavailableError(public_url(self.url), 0, "CUT", "the body ended early")
        return count

    def finish(self) -> None:
        """Read a small rest so that the connection can serve again, and close."""
        if not self._open:
            return
        try:
            if len(self.read(DRAIN_LIMIT)) > DRAIN_LIMIT:
                self.close()
        except StowrayError:
            self.close()
        finally:
            self._end()

    def close(self) -> None:
        """Close the connection unless the body was read to its end; harmless when repeated."""
        self._end()

    def _end(self) -> None:
        if not self._open:
            return
        self._open = False
        self._transport.watchdog.remove(self._watch)
        # After the end of the body the connection is in its pool already and this closes nothing.
        self._raw.close()
        self._raw.release_conn()
        if self._release is not None:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _DirectBody:
    """Reads a body of known length from the socket, past the library's buffers."""

    def __init__(self, raw: Any, answer: Any, stream: Any, left: int) -> None:
        self.left = left
        self.buffered = io.DEFAULT_BUFFER_SIZE
        self._raw = raw
        self._answer = answer
        self._stream = stream

    def read_into(self, buffer: memoryview) -> int:
        # Never the last byte: with that one the library has to see the body end.
        count = int(self._stream.readinto(buffer[: self.left - 1]) or 0)
        self.left -= count
        self._answer.length -= count
        self._raw.length_remaining -= count
        return count


def _direct_body(raw: Any) -> _DirectBody | None:
    # Not everything that urllib3 may hand out has these parts; without them bodies are read the
    # common way.
    answer = getattr(raw, "_fp", None)
    stream = getattr(getattr(answer, "fp", None), "raw", None)
    length = getattr(answer, "length", None)
    if getattr(answer, "chunked", True) or not isinstance(length, int):
        return None
    if not hasattr(stream, "readinto") or raw.length_remaining != length:
        return None
    return _DirectBody(raw, answer, stream, length)


class _QuietQueries(logging.Filter):
    """Takes the queries out of what the library logs of our exchanges: they may be signed."""

    def __init__(self, current: threading.local) -> None:
        super().__init__()
        self._current = current

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record's arguments; nothing of other users of the library is touched."""
        if getattr(self._current, "watch", None) is not None and isinstance(record.args, tuple):
            record.args = tuple(
                argument.partition("?")[0] if isinstance(argument, str) else argument
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
        self._lock = threading.Lock()
        self._managers: dict[tuple[str, Connection], PoolManager] = {}
        self._contexts: dict[Connection, ssl.SSLContext] = {}
        self._current = threading.local()
        self._peers: dict[str, str] = {}  # at which address a registry was reached
        self._quiet = _QuietQueries(self._current)

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
    ) -> Response:
        """Send one request and return its answer, whatever its status.

        A kept-alive connection that the server had closed meanwhile is replaced without a word (RFC
        9112, section 9.3.1). Raises CancelledError, UnavailableError, or RegistryError for what
        another try would not mend. ``patience_seconds`` replaces the usual wait for an answer;
        ``sent_by`` is the registry whose redirect or challenge names ``url``.
        """
        from urllib3 import HTTPHeaderDict, Timeout

        sent = HTTPHeaderDict()
        sent.add("User-Agent", USER_AGENT)
        sent.add("Accept-Encoding", "identity")
        for name, value in headers:
            sent.add(name, value)
        manager = self._manager(url, connection)
        connect_seconds = connection.connect_seconds or self._connect_seconds
        timeout = Timeout(connect=connect_seconds, read=self._stall_seconds)
        while True:
            now = self.clock.monotonic()
            limit = patience_seconds or connect_seconds + self._stall_seconds
            watch = Watch(public_url(url), cancelled, now, now + limit)
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
            except Exception as error:
                self.watchdog.remove(watch)
                if watch.reused and not watch.verdict and _is_stale(error):
                    continue
                raise self.translated(error, watch) from error
            except BaseException:
                self.watchdog.remove(watch)
                raise
            finally:
                self._current.watch = None
            watch.in_body = True
            if watch.peer and not sent_by:
                self._peers[host_of(url)] = watch.peer
            response = Response(raw, watch, self, url)
            if watch.verdict:
                response.close()
                raise self.verdict(watch)
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

    def verdict(self, watch: Watch) -> StowrayError:
        """Return the error for an exchange that the watchdog ended."""
        if watch.verdict == "cancelled":
            return CancelledError(watch.url)
        return UnavailableError(watch.url, 0, *_VERDICTS[watch.verdict])

    def translated(self, error: Exception, watch: Watch) -> StowrayError:
        """Return the error of ours that says what a library's error means."""
        if watch.verdict:
            return self.verdict(watch)
        if isinstance(error, StowrayError):
            return error
        from urllib3 import exceptions

        if not isinstance(error, exceptions.HTTPError | HTTPException | OSError | ValueError):
            # Nothing that a peer can cause: a mistake of ours must not look like a bad network.
            raise error
        return _translated(error, watch.url)

    def _manager(self, url: str, connection: Connection) -> PoolManager:
        # Pools are never shared by connections of different trust.
        proxy = connection.proxy or self._proxies.choose(url)
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


def _is_stale(error: Exception) -> bool:
    """Return whether the server closed a kept-alive connection before it saw the request."""
    from urllib3.exceptions import ProtocolError

    cause = error.args[1] if isinstance(error, ProtocolError) and len(error.args) > 1 else error
    # http.client.RemoteDisconnected is a ConnectionResetError.
    return isinstance(cause, ConnectionResetError | BrokenPipeError)


def _translated(error: Exception, url: str) -> StowrayError:
    import ssl

    from urllib3 import exceptions

    detail = redact_text(str(error.args[-1] if error.args else error))
    inner = error.args[-1] if error.args else None
    for cause in (error, inner, error.__cause__, error.__context__):
        if isinstance(cause, ssl.SSLCertVerificationError):
            reason = redact_text(cause.verify_message or str(cause))
            return RegistryError(url, 0, "TLS", f"the certificate is not trusted: {reason}")
    if isinstance(error, exceptions.ProxyError):
        return UnavailableError(url, 0, "PROXY", detail)
    if isinstance(error, exceptions.TimeoutError | TimeoutError):
        return UnavailableError(url, 0, "TIMEOUT", f"no answer from {host_of(url)} in time")
    if isinstance(error, exceptions.SSLError | ssl.SSLError):
        return UnavailableError(url, 0, "TLS", detail)
    if isinstance(error, IncompleteRead) or isinstance(inner, IncompleteRead):
        return UnavailableError(url, 0, "CUT", "the body ended early")
    if isinstance(error, exceptions.ProtocolError):
        code = "CUT"
        if isinstance(inner, HTTPException) and not isinstance(inner, ConnectionError):
            # Bytes that are not HTTP, too many headers, a broken chunk.
            code = "PROTOCOL"
        return UnavailableError(url, 0, code, detail)
    if isinstance(error, exceptions.LocationValueError | ValueError):
        return RegistryError(url, 0, "URL", detail)
    if isinstance(error, exceptions.HTTPError | OSError | HTTPException):
        return UnavailableError(url, 0, "CUT", detail)
    return RegistryError(url, 0, "", detail)
