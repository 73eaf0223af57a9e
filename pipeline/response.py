"""The answer to one request: status, headers, and the body as it arrives.

Invariant: a body is handed out as it was sent, nothing decoded, and one that ends before its
``Content-Length`` or its last chunk is an error, never a short result. Closing gives the connection
back if the body was read to its end, and ends it otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from stowray.pipeline.errors import StowrayError
from stowray.pipeline.exchange_errors import translated, verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.clock import Clock
    from stowray.pipeline.http1 import Answer
    from stowray.pipeline.known_secrets import KnownSecrets
    from stowray.pipeline.watchdog import Watch, Watchdog

Headers = tuple[tuple[str, str], ...]

DRAIN_LIMIT = 64 * 1024


class Response:
    """Status, headers and the body as it arrives; to be closed on every path."""

    def __init__(
        self,
        answer: Answer,
        watch: Watch,
        watchdog: Watchdog,
        clock: Clock,
        url: str,
        give_back: Callable[[], None],
    ) -> None:
        self._answer = answer
        self._watch = watch
        self._watchdog = watchdog
        self._clock = clock
        self._open = True
        self._release: Callable[[], None] | None = None
        self._give_back = give_back
        self.url = url
        self.status = answer.status

    @property
    def shown_url(self) -> str:
        """Return what of the URL may be shown."""
        return self._watch.url

    def on_close(self, release: Callable[[], None]) -> None:
        """Call ``release`` when the exchange is over."""
        self._release = release

    @property
    def seconds_waited(self) -> float:
        """Return how long the readers of the body have waited for it."""
        return self._watch.waited

    @property
    def secrets(self) -> KnownSecrets:
        """Return what makes text of this answer fit to be shown."""
        return self._watch.secrets

    def header(self, name: str) -> str | None:
        """Return the first value of a header."""
        values = self.header_values(name)
        return values[0] if values else None

    def header_values(self, name: str) -> list[str]:
        """Return every value of a header that came several times."""
        return self._answer.values(name)

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
            piece = self._answer.read(size)
        except Exception as error:  # noqa: BLE001 - translated, or raised again when it is a mistake
            raise translated(error, watch) from None
        finally:
            watch.waiting_since = None
        watch.waited += self._clock.monotonic() - begun
        watch.received += len(piece)
        if watch.verdict:
            raise verdict(watch)
        return piece

    def read_into(self, buffer: memoryview) -> int:
        """Fill the start of ``buffer`` with what has arrived; 0 at the end of the body."""
        watch = self._watch
        watch.waiting_since = begun = self._clock.monotonic()
        try:
            count = self._answer.read_into(buffer)
        except Exception as error:  # noqa: BLE001 - translated, or raised again when it is a mistake
            raise translated(error, watch) from None
        finally:
            watch.waiting_since = None
        watch.waited += self._clock.monotonic() - begun
        watch.received += count
        if watch.verdict:
            raise verdict(watch)
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
        self._watchdog.remove(self._watch)
        # A verdict that falls just now must not reach whoever gets the connection next.
        self._watch.attach(None, reused=self._watch.reused)
        self._give_back()
        if self._release is not None:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
