"""A read-only OCI registry over a store: a mirror for other runtimes, and what peers pull from.

Invariant: nothing in the store is ever changed by a request (but that a damaged blob is put aside);
what is given out under a name was vouched for (``serve_catalogue``); a server that was stopped has
no thread, connection or open file left.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hmac
import os
import socket
import threading
from typing import TYPE_CHECKING, Self

from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.errors import DeadlineError, NodeError, UsageError
from stowray.pipeline.serve_limits import Served, ServeLimits

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.store import Store

__all__ = [
    "BlobServer",
    "ServeLimits",
    "Served",
    "bearer",
    "is_loopback_host",
    "listener_name",
    "open_listener",
    "parse_listen",
]

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 5001
_START_SECONDS = 30.0
_STOP_SECONDS = 30.0
_BACKLOG = 128


class BlobServer:
    """Serves one store from a thread of its own; a context manager.

    ``authorize`` is asked with each request's Authorization header (None without one). With
    ``allowed`` the server is one of a run: exactly the digests that it approves are served, under
    any repository's name, and a request for one that has not begun is held until it does.
    ``metrics`` gives the text that is answered at ``/metrics``.
    """

    def __init__(
        self,
        store: Store,
        *,
        host: str = DEFAULT_HOST,
        port: int = 0,
        authorize: Callable[[str | None], bool] | None = None,
        allowed: Callable[[Digest], bool] | None = None,
        clock: Clock = SYSTEM_CLOCK,
        limits: ServeLimits | None = None,
        report: Callable[[Served], None] | None = None,
        metrics: Callable[[], str] | None = None,
    ) -> None:
        """Prepare to listen at ``host`` (a name or address) and ``port`` (0 is any free one)."""
        self._store = store
        self._host = host
        self._port = port
        self._authorize = authorize
        self._allowed = allowed
        self._clock = clock
        self._limits = limits or ServeLimits()
        self._report = report
        self._metrics = metrics
        self._address = ""
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._stop: Callable[[], None] | None = None

    @property
    def address(self) -> str:
        """``HOST:PORT`` as it is listened at; an IPv6 address in brackets. Empty before a start."""
        return self._address

    @property
    def url(self) -> str:
        """The address as a URL."""
        return f"http://{self._address}"

    def start(self) -> str:
        """Listen, and return the address when requests are answered."""
        if self._thread is not None:
            raise NodeError(self._address, "the blob server runs already")
        listener = open_listener(self._host, self._port)
        self._address = listener_name(listener)
        self._ended.clear()
        ready = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(listener, ready), name="serve", daemon=True
        )
        self._thread.start()
        if not ready.wait(_START_SECONDS):
            raise DeadlineError("starting the blob server", _START_SECONDS)
        if self._ended.is_set():
            self._thread.join()
            self._thread = None
            raise NodeError(self._address, "the blob server did not start")
        return self._address

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the server ends, at most ``seconds``; return whether it has."""
        return self._ended.wait(seconds)

    def interrupt(self) -> None:
        """Ask the server to end, without waiting; for signal handlers."""
        if self._stop is not None:
            self._stop()

    def stop(self) -> None:
        """Hang up on everybody and end the thread; idempotent."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self.interrupt()
        thread.join(_STOP_SECONDS)
        if thread.is_alive():
            raise DeadlineError("stopping the blob server", _STOP_SECONDS)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *details: object) -> None:
        self.stop()

    def _run(self, listener: socket.socket, ready: threading.Event) -> None:
        """Be the server's thread: its own event loop, from the first request to the last."""
        import asyncio

        from stowray.pipeline.serve_listener import Listening

        async def main() -> None:
            loop = asyncio.get_running_loop()
            stopping = asyncio.Event()

            def stop() -> None:
                # After the end there is no loop to tell, and nothing to stop.
                if not self._ended.is_set():
                    loop.call_soon_threadsafe(stopping.set)

            self._stop = stop
            listening = Listening(
                self._store,
                authorize=self._authorize,
                allowed=self._allowed,
                clock=self._clock,
                limits=self._limits,
                report=self._report,
                metrics=self._metrics,
            )
            await listening.begin(listener)
            ready.set()
            try:
                await stopping.wait()
            finally:
                await listening.end()

        try:
            asyncio.run(main())
        finally:
            listener.close()
            self._ended.set()
            ready.set()


def bearer(token: str) -> Callable[[str | None], bool]:
    """Return an ``authorize`` that wants ``token``, as Bearer or as the password of Basic."""
    wanted = token.encode()

    def authorize(header: str | None) -> bool:
        scheme, _, value = (header or "").partition(" ")
        given = value.strip().encode()
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != "bearer":
            return False
        # In constant time: how long the comparison takes must not tell how much was right.
        return hmac.compare_digest(given, wanted)

    return authorize


def parse_listen(
    text: str, option: str = "--listen", usual_port: int = DEFAULT_PORT
) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``, ``[IPV6]:PORT``, ``HOST`` or ``:PORT``.

    What is left out is loopback and the usual port: nothing is open to the network unasked.
    """
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise UsageError(option, f"{text!r} is not [IPV6]:PORT")
        port = rest[1:]
    elif text.count(":") > 1:
        host, port = text, ""
    else:
        host, _, port = text.partition(":")
        if host.isascii() and host.isdecimal() and not port:
            host, port = "", host
    if not port:
        return host or DEFAULT_HOST, usual_port
    if not (port.isascii() and port.isdecimal() and len(port) < 6 and int(port) < 65536):
        raise UsageError(option, f"{port[:20]!r} is not a port (0 to 65535)")
    return host or DEFAULT_HOST, int(port)


def is_loopback_host(host: str) -> bool:
    """Tell whether only this machine reaches ``host``, a numeric address."""
    import ipaddress

    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def open_listener(host: str, port: int) -> socket.socket:
    """Return a listening socket at the first address that ``host`` has.

    Raises UsageError when there is none, or another program has the port.
    """
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(where, f"cannot be listened at: {error.strerror or error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # `::` means what it says on every machine, whatever net.ipv6.bindv6only is.
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno or 0)
        if error.errno == errno.EADDRINUSE:
            reason = "another program listens there: choose another port"
        elif error.errno == errno.EACCES:
            reason = "only root may use ports below 1024: choose another port"
        raise UsageError(where, f"cannot be listened at: {reason}") from error
    return listener


def listener_name(listener: socket.socket) -> str:
    """Return ``HOST:PORT`` of a listening socket; an IPv6 address in brackets."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
