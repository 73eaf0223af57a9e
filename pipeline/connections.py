"""Connections that can be cancelled while they are made, and that tell their socket.

Invariant: connecting ends within its deadline whatever the number of addresses, an address that
does not answer (a dead IPv6 route) delays the next one by less than two seconds, and no exchange
runs over a socket that its watch does not know. A connection is kept for the next exchange only
with the same peer, proxy and trust, and only when the answer before is over.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from stowray.pipeline.errors import CancelledError, RegistryError, UnavailableError

if TYPE_CHECKING:
    import ssl

    from stowray.pipeline.endpoint import Connection
    from stowray.pipeline.http1 import Wire
    from stowray.pipeline.watchdog import Watch

POLL_SECONDS = 0.05
HEAD_START_SECONDS = 1.5
IDLE_CONNECTIONS = 16


class Peer(NamedTuple):
    """Whom a connection leads to, through which proxy (``""`` for none), and by what trust."""

    scheme: str
    host: str
    port: int
    proxy: str
    connection: Connection


class IdleConnections:
    """Connections whose last answer is over; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[Peer, list[Wire]] = {}
        self._closed = False

    def take(self, peer: Peer) -> Wire | None:
        """Return the connection that was used last, if one is there that its peer did not close."""
        while True:
            with self._lock:
                idle = self._idle.get(peer)
                wire = idle.pop() if idle else None
            if wire is None or not _is_readable(wire.socket):
                return wire
            # Closed by the peer, or it sent what nobody asked for.
            wire.socket.close()

    def keep(self, peer: Peer, wire: Wire) -> None:
        """Take a connection back; one too many is closed."""
        with self._lock:
            idle = self._idle.setdefault(peer, [])
            if not self._closed and len(idle) < IDLE_CONNECTIONS:
                idle.append(wire)
                return
        wire.socket.close()

    def close(self) -> None:
        """Close all that are here; those that come later are closed at once."""
        with self._lock:
            self._closed = True
            idle = [wire for wires in self._idle.values() for wire in wires]
            self._idle.clear()
        for wire in idle:
            wire.socket.close()


def _is_readable(connection: socket.socket) -> bool:
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    return bool(poller.poll(0))


def start_tls(
    connection: socket.socket, context: ssl.SSLContext, host: str, watch: Watch
) -> socket.socket:
    """Return the connection with TLS upon it, its peer verified as ``context`` says."""
    secured = context.wrap_socket(
        connection, server_hostname=host.rstrip("."), do_handshake_on_connect=False
    )
    # Known before the handshake, which a peer can drag out as well. The plain one is empty now.
    watch.attach(secured, reused=False)
    try:
        secured.do_handshake()
    except BaseException:
        secured.close()
        raise
    return secured


def connect(host: str, port: int, watch: Watch, seconds: float) -> socket.socket:
    """Return a connected socket, trying each address of ``host`` until ``seconds`` are over."""
    end = time.monotonic() + seconds
    try:
        # For a string the codec of international names is imported, which ASCII ones do not need.
        name = host.encode("ascii") if host.isascii() else host
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
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
