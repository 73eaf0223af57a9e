"""The connections of the blob server: how many, how long, how large their heads.

Invariant: a connection that sends no request, or takes no answer, ends by a deadline; one above
the limit is told so and hung up on. aiohttp's own log is not written: its lines quote what clients
sent.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

from aiohttp import web

from stowray.pipeline.serve_http import Answers

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from stowray.pipeline.clock import Clock
    from stowray.pipeline.digest import Digest
    from stowray.pipeline.serve_limits import Served, ServeLimits
    from stowray.pipeline.store import Store

_FAREWELL_SECONDS = 0.5
_BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n"
    b"Connection: close\r\n\r\n"
)


class Listening:
    """One listening socket and all that came of it, in the running event loop."""

    def __init__(
        self,
        store: Store,
        *,
        authorize: Callable[[str | None], bool] | None,
        allowed: Callable[[Digest], bool] | None,
        clock: Clock,
        limits: ServeLimits,
        report: Callable[[Served], None] | None,
        metrics: Callable[[], str] | None = None,
    ) -> None:
        """Prepare answers from ``store``; see ``BlobServer``."""
        self._limits = limits
        self._lookups = ThreadPoolExecutor(limits.lookups, thread_name_prefix="serve-lookup")
        self._followers = ThreadPoolExecutor(limits.followers, thread_name_prefix="serve-follow")
        answers = self._answers = Answers(
            store,
            authorize=authorize,
            allowed=allowed,
            clock=clock,
            limits=limits,
            report=report,
            metrics=metrics,
            lookups=self._lookups,
            followers=self._followers,
        )

        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            protocol = request.protocol
            if isinstance(protocol, Connection):
                protocol.begun = True
            return await answers(request)

        # A client that hangs up cancels what is done for it.
        self._server = web.Server(answer, handler_cancellation=True)
        silent = logging.Logger("stowray.serve")
        silent.addHandler(logging.NullHandler())
        self._options: dict[str, Any] = {
            "access_log": None,
            "logger": silent,
            "keepalive_timeout": limits.keepalive_seconds,
            "max_line_size": limits.header_bytes,
            "max_field_size": limits.header_bytes,
            "max_headers": limits.headers,
            "lingering_time": 0.0,
        }
        self._listener: asyncio.Server | None = None

    async def begin(self, listener: socket.socket) -> None:
        """Take connections of an already listening socket."""
        loop = asyncio.get_running_loop()
        # A whole run may call at once, and who finds no room here is told nothing for seconds.
        self._listener = await loop.create_server(
            self._connect, sock=listener, backlog=self._limits.connections
        )

    async def end(self) -> None:
        """Hang up, and wait until no thread works for this server any more."""
        if self._listener is not None:
            self._listener.close()
        await self._server.shutdown(_FAREWELL_SECONDS)
        # Followers see within milliseconds that they are cancelled; then the loop must still run.
        await asyncio.to_thread(self._followers.shutdown)
        await asyncio.to_thread(self._lookups.shutdown)
        self._answers.close()
        await asyncio.sleep(0)

    def _connect(self) -> asyncio.BaseProtocol:
        if len(self._server.connections) >= self._limits.connections:
            return Busy()
        loop = asyncio.get_running_loop()
        return Connection(self._server, self._limits.header_seconds, loop, self._options)


class Connection(web.RequestHandler):
    """A connection that must send a whole request head in time; later ones have the keep-alive."""

    __slots__ = ("_deadline", "_seconds", "begun")

    def __init__(
        self,
        server: web.Server,
        seconds: float,
        loop: asyncio.AbstractEventLoop,
        options: dict[str, Any],
    ) -> None:
        """Give the first head ``seconds``; ``begun`` is to be set when it has come."""
        super().__init__(server, loop=loop, **options)
        self.begun = False
        self._seconds = seconds
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin the deadline of the first head."""
        super().connection_made(transport)
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(self._seconds, self._end_silence)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget the deadline."""
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def _end_silence(self) -> None:
        if not self.begun:
            self.force_close()


class Busy(asyncio.Protocol):
    """Says that there are too many connections."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say so and hang up."""
        transport = cast("asyncio.Transport", transport)
        transport.write(_BUSY)
        transport.close()
