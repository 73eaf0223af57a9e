"""An HTTP proxy before a real registry that throttles and notes which bytes of a blob went out.

Invariant: what the registry says passes unchanged, repeated headers as repeated ones; a byte is
noted when it has been handed to the client's connection, never before, so `sent` is what the origin
gave, whatever became of it at the other end.

    with docker_registry.running(folder) as registry, origin(registry.host) as source:
        source.throttle(10 << 20)
        ...
        assert not source.sent_twice()
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PIECE = 1 << 16
# Kernel buffers hide for a while that a client has gone: keep them small.
SEND_BUFFER = 1 << 17
ANSWER_SECONDS = 60.0
_BLOB = re.compile(r"^/v2/.+/blobs/(sha(?:256|512):[0-9a-f]+)(?:\?|$)")
_RANGE = re.compile(r"^bytes (\d+)-(\d+)/")
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "upgrade", "proxy-connection"}

Span = tuple[int, int]


@dataclass
class Sent:
    """One answer with bytes of a blob: those from `start` up to `end` have gone out so far."""

    digest: str
    client: str
    start: int
    end: int
    began: float
    ended: float = 0.0


@dataclass(frozen=True)
class Asked:
    """One request."""

    method: str
    path: str
    client: str
    range: str
    status: int


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: a client that goes away is part of the tests."""


class Origin:
    """The proxy; `host` is what references start with, `target` the registry's HOST:PORT."""

    def __init__(
        self, target: str, *, listener: socket.socket | None = None, host: str = ""
    ) -> None:
        self.target = target
        self.sent: list[Sent] = []
        self.asked: list[Asked] = []
        self._lock = threading.Condition()
        self._rate: float | None = None
        self._per_connection: float | None = None
        self._burst = 0.0
        self._next: dict[int, float] = {}
        self._limit: int | None = None
        self._total = 0
        self._down = False
        self._closed = False
        self._connections: set[socket.socket] = set()
        self._server = _Server(("127.0.0.1", 0), self._handler(), bind_and_activate=False)
        if listener is None:
            self._server.server_bind()
        else:
            self._server.socket.close()
            self._server.socket = listener
            self._server.server_address = listener.getsockname()
        self._server.server_activate()
        address, port = self._server.socket.getsockname()[:2]
        self.host = host or f"{address}:{port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self._thread.start()

    # -- what a test asks -------------------------------------------------------------------------

    @property
    def blob_bytes(self) -> int:
        """Bytes of blobs sent so far (since `reset`)."""
        with self._lock:
            return sum(one.end - one.start for one in self.sent)

    @property
    def first_byte(self) -> float:
        """When the first byte of a blob was sent (`time.monotonic`)."""
        with self._lock:
            return min((one.began for one in self.sent if one.end > one.start), default=0.0)

    def requests(self, what: str) -> list[Asked]:
        """Requests whose path has `what` in it."""
        with self._lock:
            return [one for one in self.asked if what in one.path]

    def spans(self, digest: str) -> list[Span]:
        """What was sent of one blob, one span per answer, in order of their starts."""
        with self._lock:
            return sorted(
                (one.start, one.end)
                for one in self.sent
                if one.digest == digest and one.end > one.start
            )

    def sent_twice(self, tolerated: Callable[[Sent], bool] | None = None) -> dict[str, list[Span]]:
        """Spans that were sent more than once, by digest; answers that are `tolerated` aside."""
        with self._lock:
            counted = [
                one
                for one in self.sent
                if one.end > one.start and not (tolerated and tolerated(one))
            ]
        found: dict[str, list[Span]] = {}
        for digest in sorted({one.digest for one in counted}):
            repeats = overlaps([(one.start, one.end) for one in counted if one.digest == digest])
            if repeats:
                found[digest] = repeats
        return found

    def wait_sent(self, size: int, seconds: float = 120.0) -> bool:
        """Wait until `size` bytes of blobs have gone out; False when they did not in time."""
        with self._lock:
            return self._lock.wait_for(lambda: self._total >= size, timeout=seconds)

    # -- what a test does -------------------------------------------------------------------------

    def throttle(
        self, bytes_per_second: float | None = None, *, per_connection: float | None = None
    ) -> None:
        """Let all blob bodies together, and each one alone, be no faster than this."""
        with self._lock:
            self._rate, self._per_connection = bytes_per_second, per_connection
            self._next.clear()

    def hold_after(self, size: int | None) -> None:
        """Send no blob byte beyond `size` in all (since `reset`) until told otherwise."""
        with self._lock:
            self._limit = size
            self._lock.notify_all()

    def reset(self) -> None:
        """Forget what was sent and asked."""
        with self._lock:
            self.sent, self.asked, self._total = [], [], 0

    def go_down(self) -> None:
        """Refuse everything from now on and cut what is open, as a dead registry does."""
        with self._lock:
            self._down = True
            self._lock.notify_all()
        self.cut()

    def come_back(self) -> None:
        with self._lock:
            self._down = False

    def cut(self) -> None:
        """Cut every open connection."""
        with self._lock:
            connections = list(self._connections)
        for one in connections:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self.cut()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    # -- the proxy --------------------------------------------------------------------------------

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        origin = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            upstream: http.client.HTTPConnection | None = None

            def setup(self) -> None:
                self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
                super().setup()
                with origin._lock:
                    origin._connections.add(self.request)

            def finish(self) -> None:
                with origin._lock:
                    origin._connections.discard(self.request)
                    origin._next.pop(id(self.request), None)
                if self.upstream is not None:
                    self.upstream.close()
                with contextlib.suppress(OSError):
                    super().finish()

            def do_GET(self) -> None:
                try:
                    origin._serve(self)
                except (OSError, http.client.HTTPException):
                    self.close_connection = True

            do_HEAD = do_GET  # noqa: N815 - the name that the base class looks for

            def log_message(self, *_: object) -> None:
                """Keep quiet."""

        return Handler

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        client = str(handler.client_address[0])
        with self._lock:
            if self._down or self._closed:
                handler.close_connection = True
                return
        upstream = getattr(handler, "upstream", None)
        if upstream is None:
            host, _, port = self.target.rpartition(":")
            upstream = http.client.HTTPConnection(host, int(port), timeout=ANSWER_SECONDS)
            handler.upstream = upstream  # type: ignore[attr-defined]
        upstream.putrequest(
            handler.command, handler.path, skip_host=True, skip_accept_encoding=True
        )
        for name, value in handler.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                upstream.putheader(name, value)
        upstream.endheaders()
        answer = upstream.getresponse()
        blob = _BLOB.match(handler.path)
        with self._lock:
            self.asked.append(
                Asked(
                    handler.command,
                    handler.path,
                    client,
                    handler.headers.get("Range", ""),
                    answer.status,
                )
            )
        handler.send_response_only(answer.status, answer.reason)
        for name, value in answer.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                handler.send_header(name, value)
        if answer.headers.get("Content-Length") is None and handler.command != "HEAD":
            handler.send_header("Connection", "close")
            handler.close_connection = True
        handler.end_headers()
        if handler.command == "HEAD":
            answer.read()
        elif blob and answer.status in (200, 206):
            within = _RANGE.match(answer.headers.get("Content-Range", ""))
            start = int(within[1]) if within else 0
            self._send_blob(handler, answer, Sent(blob[1], client, start, start, 0.0))
        else:
            while piece := answer.read(PIECE):
                handler.wfile.write(piece)

    def _send_blob(
        self, handler: BaseHTTPRequestHandler, answer: http.client.HTTPResponse, sent: Sent
    ) -> None:
        with self._lock:
            self.sent.append(sent)
        line = id(handler.request)
        whole = False
        try:
            while True:
                piece = answer.read(PIECE)
                if not piece:
                    whole = True
                    return
                view = memoryview(piece)
                while view:
                    size = self._admit(len(view), line)
                    handler.request.sendall(view[:size])
                    with self._lock:
                        now = time.monotonic()
                        sent.began = sent.began or now
                        sent.end += size
                        sent.ended = now
                        self._total += size
                        self._lock.notify_all()
                    view = view[size:]
        finally:
            if not whole:
                # The rest of the registry's answer is nobody's.
                handler.close_connection = True
                answer.close()

    def _admit(self, wanted: int, line: int) -> int:
        """Return how many of `wanted` bytes may be sent now, having waited for it."""
        with self._lock:
            self._lock.wait_for(
                lambda: (
                    self._closed or self._down or self._limit is None or self._total < self._limit
                )
            )
            if self._closed or self._down:
                raise OSError("the origin is closed")
            size = wanted if self._limit is None else min(wanted, self._limit - self._total)
            now = time.monotonic()
            wait = 0.0
            for key, rate in ((0, self._rate), (line, self._per_connection)):
                if rate:
                    start = max(now, self._next.get(key, 0.0))
                    self._next[key] = start + size / rate
                    wait = max(wait, start - now)
        if wait > 0:
            time.sleep(wait)
        return size


def overlaps(spans: list[Span]) -> list[Span]:
    """Return the spans that lie in more than one of `spans`, joined."""
    edges = sorted([(start, 1) for start, end in spans] + [(end, -1) for start, end in spans])
    found: list[Span] = []
    depth = begin = 0
    for at, step in edges:
        if depth < 2 <= depth + step:
            begin = at
        elif depth + step < 2 <= depth and at > begin:
            if found and found[-1][1] == begin:
                begin = found.pop()[0]
            found.append((begin, at))
        depth += step
    return found


@contextlib.contextmanager
def origin(
    target: str,
    *,
    bytes_per_second: float | None = None,
    per_connection: float | None = None,
    listener: socket.socket | None = None,
) -> Iterator[Origin]:
    """Run a proxy before the registry at `target`."""
    proxy = Origin(target, listener=listener)
    proxy.throttle(bytes_per_second, per_connection=per_connection)
    try:
        yield proxy
    finally:
        proxy.close()
