"""An HTTP proxy that tunnels every name to one place: public names without a network.

with FakeRegistry(authority=authority, certificate_names=["registry.example"]) as registry:
    with Tunnel(registry) as tunnel:
        environment = {"HTTPS_PROXY": tunnel.url}
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from tests.support.registry import FakeRegistry


class Tunnel:
    """Answers ``CONNECT`` and passes bytes on to the registry; ``requests`` is what was asked."""

    def __init__(self, registry: FakeRegistry, password: str = "proxysecret") -> None:
        self.requests: list[str] = []
        self.answer = b""  # instead of a tunnel
        self._password = password
        self._target = registry
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def host(self) -> str:
        host, port = self._listener.getsockname()[:2]
        return f"{host}:{port}"

    @property
    def url(self) -> str:
        return f"http://user:{self._password}@{self.host}"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, connection)

    def _serve(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError):
            asked = b""
            while b"\r\n\r\n" not in asked:
                piece = near.recv(4096)
                if not piece:
                    return
                asked += piece
            self.requests.append(asked.decode("latin-1"))
            if self.answer:
                near.sendall(self.answer)
                return
            host, _, port = self._target.host.rpartition(":")
            with socket.create_connection((host.strip("[]"), int(port))) as far:
                near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                self._splice(near, far)

    def _splice(self, near: socket.socket, far: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(near, selectors.EVENT_READ, far)
            selector.register(far, selectors.EVENT_READ, near)
            while not self._closing.is_set():
                for key, _ in selector.select(0.05):
                    source: socket.socket = key.fileobj  # type: ignore[assignment]
                    data = source.recv(65536)
                    if not data:
                        return
                    key.data.sendall(data)
