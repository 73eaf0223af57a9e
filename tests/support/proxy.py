"""A socket proxy that counts, throttles and holds what a registry sends.

Invariant: bytes pass unchanged and in order; `served` never counts a byte before it was sent on.
The proxy knows no HTTP, so repeated headers and odd framing pass as they are.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

BUFFER = 1 << 16


class CountingProxy:
    """Forwards loopback connections to `target` (host:port); `host` is what clients are given."""

    def __init__(
        self, target: str, *, bytes_per_second: float | None = None, per_connection: bool = False
    ) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._rate = bytes_per_second
        self._per_connection = per_connection  # else the rate is shared by all
        self._lock = threading.Condition()
        self._served = 0
        self._limit: int | None = None
        self._next_send: dict[socket.socket | None, float] = {}
        self._closed = False
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.1)
        self._spawn(self._accept)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def served(self) -> int:
        """Bytes sent on to clients so far."""
        with self._lock:
            return self._served

    def reset(self) -> None:
        with self._lock:
            self._served = 0

    def throttle(self, bytes_per_second: float | None) -> None:
        with self._lock:
            self._rate = bytes_per_second

    def hold_after(self, size: int | None) -> None:
        """Send no byte beyond `size` in total (since `reset`) until told otherwise."""
        with self._lock:
            self._limit = size
            self._lock.notify_all()

    def wait_served(self, size: int, seconds: float = 60.0) -> bool:
        """Wait until `size` bytes went through; False when they did not in time."""
        with self._lock:
            return self._lock.wait_for(lambda: self._served >= size, timeout=seconds)

    def cut(self) -> None:
        """Cut every open connection; new ones are served."""
        with self._lock:
            sockets = list(self._sockets)
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self.cut()
        self._listener.close()
        for thread in self._threads:
            thread.join(timeout=10)

    def _spawn(self, function: object, *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            self._spawn(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        client.settimeout(None)
        try:
            upstream = socket.create_connection(self._target, timeout=10)
        except OSError:
            client.close()
            return
        upstream.settimeout(None)
        # As real ones do: else the end of each answer waits for an acknowledgement that is delayed.
        for one in (client, upstream):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._sockets |= {client, upstream}
        try:
            with contextlib.suppress(OSError), selectors.DefaultSelector() as selector:
                selector.register(client, selectors.EVENT_READ)
                selector.register(upstream, selectors.EVENT_READ)
                while not self._closed:
                    for key, _ in selector.select(timeout=0.1):
                        data = key.fileobj.recv(BUFFER)  # type: ignore[union-attr]
                        if not data:
                            return
                        if key.fileobj is client:
                            upstream.sendall(data)
                        else:
                            self._pass_on(client, data)
        finally:
            with self._lock:
                self._sockets -= {client, upstream}
                self._next_send.pop(client, None)
            client.close()
            upstream.close()

    def _pass_on(self, client: socket.socket, data: bytes) -> None:
        view = memoryview(data)
        while view:
            with self._lock:
                self._lock.wait_for(
                    lambda: self._closed or self._limit is None or self._served < self._limit
                )
                if self._closed:
                    return
                room = len(view) if self._limit is None else self._limit - self._served
                part = view[: min(room, len(view))]
                wait = self._reserve(len(part), client)
            if wait > 0:
                time.sleep(wait)
            client.sendall(part)
            with self._lock:
                self._served += len(part)
                self._lock.notify_all()
            view = view[len(part) :]

    def _reserve(self, size: int, client: socket.socket) -> float:
        """Book a slot of the rate; return how long to wait for it."""
        if self._rate is None:
            return 0.0
        now = time.monotonic()
        line = client if self._per_connection else None
        start = max(now, self._next_send.get(line, 0.0))
        self._next_send[line] = start + size / self._rate
        return start - now


@contextlib.contextmanager
def counting_proxy(
    target: str, *, bytes_per_second: float | None = None, per_connection: bool = False
) -> Iterator[CountingProxy]:
    proxy = CountingProxy(target, bytes_per_second=bytes_per_second, per_connection=per_connection)
    try:
        yield proxy
    finally:
        proxy.close()
