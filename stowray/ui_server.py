"""Answers of the live page: the document, its script, and what changes as server-sent events.

Invariant: at most two messages a second go to a browser, each of bounded size; one that takes none
for a while is hung up on, and what waits for it is names, not text. No answer may be kept, framed,
sniffed or told to others by a Referer.
https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from stowray.pipeline.serve_listener import Busy, Connection
from stowray.ui_page import POLICY, SCRIPT

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from stowray.ui_model import LivePage

# Drawing may take a tenth of the time.
DRAWING_SHARE: Final = 10.0
HEADERS: Final = {
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_NO_TOKEN: Final = "Open the address that the command told, with the token in it.\n"
_RETRY_MILLISECONDS: Final = 2000


@dataclass(frozen=True, slots=True)
class UiLimits:
    """Bounds of one server; seconds and counts."""

    connections: int = 64
    streams: int = 16
    frame_seconds: float = 0.5
    heartbeat_seconds: float = 15.0
    stall_seconds: float = 30.0
    header_seconds: float = 20.0
    farewell_seconds: float = 2.0


class UiServer:
    """One listening socket and its browsers, in the running event loop."""

    def __init__(self, page: LivePage, is_token: Callable[[str], bool], limits: UiLimits) -> None:
        self._page = page
        self._is_token = is_token
        self._limits = limits
        self._changed = asyncio.Event()
        self._finished = asyncio.Event()
        self._streams = 0

        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            protocol = request.protocol
            if isinstance(protocol, Connection):
                protocol.begun = True
            return await self._answer(request)

        # A browser that goes away cancels what is done for it.
        self._server = web.Server(answer, handler_cancellation=True)
        silent = logging.Logger("stowray.ui")
        silent.addHandler(logging.NullHandler())
        self._options: dict[str, Any] = {
            "access_log": None,
            "logger": silent,
            "lingering_time": 0.0,
        }
        self._listener: asyncio.Server | None = None

    async def begin(self, listener: socket.socket) -> None:
        """Take connections of an already listening socket."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._connect, sock=listener)

    async def serve(self) -> None:
        """Draw for those who watch until :meth:`finish`, then let them take the last state."""
        drawing = asyncio.ensure_future(self._draw())
        await self._finished.wait()
        drawing.cancel()
        if self._listener is not None:
            self._listener.close()
        deadline = time.monotonic() + self._limits.farewell_seconds
        while self._streams and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        transports = [entry.transport for entry in self._server.connections if entry.transport]
        await self._server.shutdown(0.1)
        while any(entry.get_write_buffer_size() for entry in transports):
            if time.monotonic() >= deadline:
                break
            await asyncio.sleep(0.01)
        for transport in transports:
            transport.abort()
        await asyncio.sleep(0)

    def finish(self, error: str) -> None:
        """Show the last state and end; to be called in the loop."""
        try:
            self._page.end(error)
            self._tell()
        finally:
            self._finished.set()

    def _connect(self) -> asyncio.BaseProtocol:
        if len(self._server.connections) >= self._limits.connections:
            return Busy()
        loop = asyncio.get_running_loop()
        return Connection(self._server, self._limits.header_seconds, loop, self._options)

    async def _draw(self) -> None:
        while True:
            began = time.monotonic()
            if self._streams:
                self._page.draw()
                self._tell()
            else:
                self._page.gather()
            took = time.monotonic() - began
            await asyncio.sleep(max(self._limits.frame_seconds, took * DRAWING_SHARE))

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        _, _, rest = request.path.partition("/")
        token, slash, name = rest.partition("/")
        if not self._is_token(token):
            return _words(403, _NO_TOKEN)
        if request.method not in ("GET", "HEAD"):
            return _words(405, "This page is only read.\n", Allow="GET, HEAD")
        if not slash:
            return _words(308, "", Location=f"/{token}/")
        if name == "":
            if not self._page.over:
                self._page.draw()
            return web.Response(text=self._page.html(), content_type="text/html", headers=HEADERS)
        if name == "live.js":
            return web.Response(text=SCRIPT, content_type="text/javascript", headers=HEADERS)
        if name == "events":
            return await self._stream(request)
        return _words(404, "There is no such page.\n")

    async def _stream(self, request: web.BaseRequest) -> web.StreamResponse:
        if self._streams >= self._limits.streams:
            return _words(503, "Too many browsers watch already.\n", **{"Retry-After": "5"})
        since = _number(request.headers.get("Last-Event-ID") or request.query.get("since"))
        headers = {**HEADERS, "X-Accel-Buffering": "no"}
        response = web.StreamResponse(headers=headers)
        response.content_type, response.charset = "text/event-stream", "utf-8"
        self._streams += 1
        reader = self._page.parts.reader(since)
        try:
            with suppress(ConnectionError):
                await response.prepare(request)
                if request.method == "GET":
                    await self._send(response, f"retry: {_RETRY_MILLISECONDS}\n\n")
                    await self._follow(response, reader.take)
        except TimeoutError:
            # It takes nothing: what waits for it must not wait for ever.
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._page.parts.leave(reader)
            self._streams -= 1
        return response

    async def _follow(self, response: web.StreamResponse, take: Callable[[], Any]) -> None:
        while True:
            changed = self._changed
            batch = take()
            # Before this look nothing else can have been drawn: all runs in one loop.
            over = self._page.over
            if batch is not None or over:
                version = self._page.parts.version if batch is None else batch.version
                parts = {} if batch is None else batch.parts
                last = over and version == self._page.parts.version
                data = json.dumps({"version": version, "parts": parts, "over": last})
                await self._send(response, f"id: {version}\ndata: {data}\n\n")
                if last:
                    return
                if not over:
                    await asyncio.sleep(self._limits.frame_seconds)
                continue
            try:
                await asyncio.wait_for(changed.wait(), self._limits.heartbeat_seconds)
            except TimeoutError:
                await self._send(response, ":\n\n")

    async def _send(self, response: web.StreamResponse, text: str) -> None:
        await asyncio.wait_for(response.write(text.encode()), self._limits.stall_seconds)


def _words(status: int, text: str, **headers: str) -> web.Response:
    return web.Response(status=status, text=text, headers={**HEADERS, **headers})


def _number(text: str | None) -> int:
    """Return a version that a browser gives, 0 for anything else."""
    given = text or ""
    return int(given) if given.isascii() and given.isdecimal() and len(given) < 16 else 0
