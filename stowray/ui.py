"""``--ui``: the live page of a run, served over HTTP for as long as the run goes on.

Invariant: the run never waits for a browser: it leaves word and goes on, a thread of this module's
own draws and sends; what a browser does not take in time is dropped, and it comes back for it.
Nothing is told without the token, which is part of the address and compared in constant time.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import threading
from typing import TYPE_CHECKING, Final, Self

from stowray.pipeline.errors import NodeError, UsageError
from stowray.pipeline.serve import (
    is_loopback_host,
    listener_name,
    open_listener,
    parse_listen,
)
from stowray.ui_model import LivePage

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable, Sequence

    from stowray.pipeline.prewarm_report import PrewarmReport
    from stowray.pipeline.progress import Event
    from stowray.ui_server import UiLimits

OPTION: Final = "--ui"
_START_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 10.0


class LiveUi:
    """The page and its server; a context manager. ``see`` and ``take`` are called by the run."""

    def __init__(
        self, listen: str, *, limits: UiLimits | None = None, page: LivePage | None = None
    ) -> None:
        """Take the address ``listen``; UsageError when that cannot be had."""
        from stowray.ui_server import UiLimits

        host, port = parse_listen(listen, OPTION, 0)
        self._limits = limits or UiLimits()
        self._listener: socket.socket = open_listener(host, port)
        self._address = listener_name(self._listener)
        own = self._address.rpartition(":")[0].strip("[]")
        self.is_loopback = is_loopback_host(own)
        if ipaddress.ip_address(own.partition("%")[0]).is_unspecified:
            self._listener.close()
            raise UsageError(
                OPTION,
                f"{listen!r} is every address of this machine: name the one to listen at, or take "
                "127.0.0.1 and a tunnel (ssh -L)",
            )
        self._token = secrets.token_urlsafe(24)
        self._page = page or LivePage()
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._finish: Callable[[str], None] | None = None

    @property
    def url(self) -> str:
        """The address of the page, token included: who has it can watch."""
        return f"http://{self._address}/{self._token}/"

    def see(self, events: Sequence[Event]) -> None:
        """Take in changed events."""
        self._page.see(events)

    def take(self, report: PrewarmReport) -> None:
        """Take in the report so far."""
        self._page.take(report)

    def start(self) -> None:
        """Answer requests from now on."""
        self._thread = threading.Thread(target=self._run, name="ui", daemon=True)
        self._thread.start()
        if not self._ready.wait(_START_SECONDS) or self._loop is None:
            raise NodeError(self._address, "the live page did not start")

    def close(self, error: str = "") -> None:
        """Show the last state, give browsers a moment to take it, and end; idempotent.

        ``error`` says why the run has no report.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            self._listener.close()
            return
        loop, finish = self._loop, self._finish
        if loop is not None and finish is not None and thread.is_alive():
            loop.call_soon_threadsafe(finish, error)
        # A daemon: what hangs in it does not keep the command from ending.
        thread.join(_STOP_SECONDS)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def _is_token(self, given: str) -> bool:
        # In constant time: how long the comparison takes must not tell how much was right.
        return hmac.compare_digest(given.encode(errors="replace"), self._token.encode())

    def _run(self) -> None:
        import asyncio

        from stowray.ui_server import UiServer

        async def main() -> None:
            server = UiServer(self._page, self._is_token, self._limits)
            await server.begin(self._listener)
            self._loop, self._finish = asyncio.get_running_loop(), server.finish
            self._ready.set()
            await server.serve()

        try:
            asyncio.run(main())
        finally:
            self._listener.close()
            self._ready.set()
