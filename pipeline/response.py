"""The answer to one request: status, headers, and the body as it arrives.

Invariant: a body is handed out as it was sent, nothing decoded, and one that ends before its
``Content-Length`` or its last chunk is an error, never a short result. Closing gives the connection
back if the body was read to its end, and ends it otherwise.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Self

from stowray.pipeline.errors import StowrayError, UnavailableError
from stowray.pipeline.exchange_errors import translated, verdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from urllib3 import BaseHTTPResponse

    from stowray.pipeline.clock import Clock
    from stowray.pipeline.known_secrets import KnownSecrets
    from stowray.pipeline.watchdog import Watch, Watchdog

Headers = tuple[tuple[str, str], ...]

DRAIN_LIMIT = 64 * 1024


class Response:
    """Status, headers and the body as it arrives; to be closed on every path."""

    def __init__(
        self, raw: BaseHTTPResponse, watch: Watch, watchdog: Watchdog, clock: Clock, url: str
    ) -> None:
        self._raw = raw
        self._watch = watch
        self._watchdog = watchdog
        self._clock = clock
        self._open = True
        self._release: Callable[[], None] | None = None
        self._direct = _direct_body(raw)
        self.url = url
        self.status = int(raw.status)

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
        return [str(value) for value in self._raw.headers.getlist(name)]

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
            piece = self._raw.read1(size, decode_content=False) or b""
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
        """Fill the start of ``buffer`` with what has arrived; 0 at the end of the body.

        Bytes go from the socket straight into the buffer, as far as that can be done; the first
        and the last piece pass through the library, which keeps its own accounts of a body's end.
        """
        direct = self._direct
        if direct is None or direct.left <= len(buffer):
            piece = self.read_piece(len(buffer))
            buffer[: len(piece)] = piece
            if direct is not None:
                direct.left -= len(piece)
                direct.buffered -= len(piece)
            return len(piece)
        if direct.buffered > 0:
            # http.client may have read the beginning of the body together with the headers. A
            # short read means that its buffer is empty now.
            piece = self.read_piece(len(buffer))
            buffer[: len(piece)] = piece
            direct.left -= len(piece)
            short = len(piece) < len(buffer)
            direct.buffered = 0 if short else direct.buffered - len(piece)
            return len(piece)
        watch = self._watch
        watch.waiting_since = begun = self._clock.monotonic()
        try:
            count = direct.read_into(buffer)
        except Exception as error:  # noqa: BLE001 - translated, or raised again when it is a mistake
            raise translated(error, watch) from None
        finally:
            watch.waiting_since = None
        watch.waited += self._clock.monotonic() - begun
        watch.received += count
        if watch.verdict:
            raise verdict(watch)
        if count == 0:
            raise UnavailableError(self.shown_url, 0, "CUT", "the body ended early")
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
        # After the end of the body the connection is in its pool already and this closes nothing.
        self._raw.close()
        self._raw.release_conn()
        if self._release is not None:
            self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _DirectBody:
    """Reads a body of known length from the socket, past the library's buffers."""

    def __init__(self, raw: Any, answer: Any, stream: Any, left: int) -> None:
        self.left = left
        self.buffered = io.DEFAULT_BUFFER_SIZE
        self._raw = raw
        self._answer = answer
        self._stream = stream

    def read_into(self, buffer: memoryview) -> int:
        # Never the last byte: with that one the library has to see the body end.
        count = int(self._stream.readinto(buffer[: self.left - 1]) or 0)
        self.left -= count
        self._answer.length -= count
        self._raw.length_remaining -= count
        return count


def _direct_body(raw: Any) -> _DirectBody | None:
    # Not everything that urllib3 may hand out has these parts; without them bodies are read the
    # common way.
    answer = getattr(raw, "_fp", None)
    stream = getattr(getattr(answer, "fp", None), "raw", None)
    length = getattr(answer, "length", None)
    if getattr(answer, "chunked", True) or not isinstance(length, int):
        return None
    if not hasattr(stream, "readinto") or raw.length_remaining != length:
        return None
    return _DirectBody(raw, answer, stream, length)
