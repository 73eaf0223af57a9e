"""Connections that can be cancelled while they are made, and that tell their socket.

Invariant: connecting ends within its deadline whatever the number of addresses, an address that
does not answer (a dead IPv6 route) delays the next one by less than two seconds, and no exchange
runs over a socket that its watch does not know.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Any

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from stowray.pipeline.errors import CancelledError, RegistryError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.watchdog import Watch

POLL_SECONDS = 0.05
HEAD_START_SECONDS = 1.5


def pool_classes(
    current: Callable[[], Watch], connect_seconds: float
) -> dict[str, type[HTTPConnectionPool]]:
    """Return pools by scheme whose connections report to the exchange of the calling thread."""

    class WatchedHTTP(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return connect(self._dns_host, self.port, current(), connect_seconds)

        def connect(self) -> None:
            super().connect()
            current().attach(self.sock, reused=False)

        def request(self, *args: Any, **options: Any) -> None:
            if self.sock is not None:
                current().attach(self.sock, reused=True)
            super().request(*args, **options)

    class WatchedHTTPS(HTTPSConnection):
        fresh = False

        def _new_conn(self) -> socket.socket:
            made = connect(self._dns_host, self.port, current(), connect_seconds)
            # Known before the handshake, which a peer can drag out as well.
            current().attach(made, reused=False)
            return made

        def connect(self) -> None:
            super().connect()
            self.fresh = True
            current().attach(self.sock, reused=False)

        def request(self, *args: Any, **options: Any) -> None:
            if self.sock is not None:
                current().attach(self.sock, reused=not self.fresh)
            self.fresh = False
            super().request(*args, **options)

    class WatchedHTTPPool(HTTPConnectionPool):
        ConnectionCls = WatchedHTTP

    class WatchedHTTPSPool(HTTPSConnectionPool):
        ConnectionCls = WatchedHTTPS

        def _validate_conn(self, conn: Any) -> None:
            # The library's own would warn of each connection that is not verified: that is done by
            # the user's word only, who need not be told.
            if conn.is_closed:
                conn.connect()

    return {"http": WatchedHTTPPool, "https": WatchedHTTPSPool}


def connect(host: str, port: int, watch: Watch, seconds: float) -> socket.socket:
    """Return a connected socket, trying each address of ``host`` until ``seconds`` are over."""
    end = time.monotonic() + seconds
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        temporary = isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN
        code = "NAME" if temporary else "UNREACHABLE"
        raise UnavailableError(watch.url, 0, code, f"the name {host} has no address") from error
    if watch.refuses is not None:
        found = [entry for entry in found if not watch.refuses(str(entry[4][0]))]
        if not found:
            detail = f"the name {host} leads to an address that is not public"
            raise RegistryError(watch.url, 0, "REDIRECT", detail)
    reason = "no address"
    for index, (family, kind, protocol, _, address) in enumerate(found):
        last = index == len(found) - 1
        limit = end if last else min(end, time.monotonic() + HEAD_START_SECONDS)
        try:
            made = socket.socket(family, kind, protocol)
        except OSError as error:
            reason = error.strerror or str(error)
            continue
        try:
            reason = _connect(made, address, watch, limit, seconds)
        except BaseException:
            made.close()
            raise
        if not reason:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            watch.peer = str(address[0])
            return made
        made.close()
    code = "TIMEOUT" if reason == os.strerror(errno.ETIMEDOUT) else "UNREACHABLE"
    raise UnavailableError(watch.url, 0, code, f"cannot connect to {host}:{port}: {reason}")


def _connect(made: socket.socket, address: Any, watch: Watch, end: float, seconds: float) -> str:
    """Connect and return ``""``, or return why it cannot be done."""
    made.setblocking(False)
    status = made.connect_ex(address)
    if status == errno.EINPROGRESS:
        poller = select.poll()
        poller.register(made, select.POLLOUT)
        while not poller.poll(POLL_SECONDS * 1000):
            if watch.verdict == "cancelled" or (watch.cancelled is not None and watch.cancelled()):
                raise CancelledError(watch.url)
            if time.monotonic() >= end:
                return os.strerror(errno.ETIMEDOUT)
        status = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if status:
        return os.strerror(status)
    # Bounds the TLS handshake and a proxy's answer; the read timeout follows with the request.
    made.settimeout(seconds)
    return ""
