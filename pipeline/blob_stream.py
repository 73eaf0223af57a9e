"""The bytes of one blob as a registry sends them.

Invariant: what is handed out begins at ``offset`` of the blob and goes on without a gap; a body in
another encoding is decoded exactly once, and never mixed with ranges, whose offsets would count the
encoded bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

from stowray.pipeline.answers import parse_content_range, parse_length
from stowray.pipeline.errors import RegistryError, SizeMismatchError, UnavailableError
from stowray.pipeline.redact import host_of

if TYPE_CHECKING:
    import zlib

    from stowray.pipeline.descriptor import Descriptor
    from stowray.pipeline.response import Response


GZIP = b"\x1f\x8b"
# Enough for a gzip header and the first byte of what it holds, as a rule.
_PROBE_SIZE = 4096


class Meter(Protocol):
    """What a host's bytes per second are shared by."""

    piece_size: int

    def pay(self, count: int) -> None:
        """Book ``count`` bytes and wait until they and all that were booked before have had time.

        Raises CancelledError, with the bytes booked.
        """

    def charge(self, count: int) -> None:
        """Book ``count`` bytes without waiting: others will."""


class RegistryBlob:
    """A blob's bytes from ``offset`` on; closed by whoever opened it."""

    def __init__(self, response: Response, offset: int, source: str) -> None:
        self.offset = offset
        self.source = source
        self._response = response
        self._decoder: zlib._Decompress | None = None
        self._kept: list[bytes] = []
        self._meter: Meter | None = None
        self._owed = 0  # bytes that were handed out and not paid for

    def limit(self, meter: Meter) -> None:
        """Hand bytes out no faster than ``meter`` lets them through.

        Each piece is paid for before the next one is read: who is cancelled while it waits loses
        none that has come.
        """
        self._meter = meter

    @property
    def served_by(self) -> str:
        """Return the host that the bytes come from, past all redirects."""
        return host_of(self._response.url)

    @property
    def seconds_waited(self) -> float:
        """Return how long its readers have waited for the host."""
        return self._response.seconds_waited

    def decode_gzip(self) -> None:
        """Undo a ``Content-Encoding: gzip`` that some proxy put round the blob."""
        import zlib

        self._decoder = zlib.decompressobj(31)

    def decode_if_encoded(self, media_type: str) -> None:
        """Undo a ``Content-Encoding: gzip`` if its first bytes bear it out.

        Some claim it of a blob that is gzip itself (a layer), or that is not gzip at all: a body
        that does not begin like a blob of ``media_type`` within an encoding is left as it is.
        """
        import zlib

        head, plain = b"", b""
        probe = zlib.decompressobj(31)
        while len(head) < len(GZIP) or (len(plain) < len(GZIP) and not probe.eof):
            piece = self._response.read_piece(_PROBE_SIZE)
            if not piece:
                break
            self._kept.append(piece)
            head += piece[: len(GZIP)]
            if head[: len(GZIP)] != GZIP[: len(head)]:
                return
            try:
                plain += probe.decompress(piece, _PROBE_SIZE)
            except zlib.error:
                break
        if head[: len(GZIP)] != GZIP:
            return
        if not media_type.endswith("gzip") or plain[: len(GZIP)] == GZIP:
            self.decode_gzip()

    def read(self, size: int = 1 << 18) -> bytes:
        """Return what has arrived, at most ``size`` bytes; none at the end."""
        size = self._pay(size)
        decoder = self._decoder
        piece = self._encoded(size) if decoder is None else self._decoded(decoder, size)
        self._owed += len(piece)
        return piece

    def read_into(self, buffer: memoryview) -> int:
        """Fill the start of ``buffer`` with what has arrived; 0 at the end."""
        if self._decoder is None and not self._kept:
            count = self._response.read_into(buffer[: self._pay(len(buffer))])
            self._owed += count
            return count
        piece = self.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        """Give the connection back when the body was read to its end, else close it."""
        owed, self._owed = self._owed, 0
        try:
            if self._meter is not None and owed:
                self._meter.charge(owed)
        finally:
            self._response.close()

    def _pay(self, size: int) -> int:
        """Wait until what came is paid for; return how many of ``size`` bytes may come next."""
        meter = self._meter
        if meter is None:
            return size
        owed, self._owed = self._owed, 0
        meter.pay(owed)
        return min(size, meter.piece_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _encoded(self, size: int) -> bytes:
        """Return what has arrived, beginning with what was looked at before."""
        if not self._kept:
            return self._response.read_piece(size)
        piece = self._kept.pop(0)
        if len(piece) > size:
            self._kept.insert(0, piece[size:])
        return piece[:size]

    def _decoded(self, decoder: zlib._Decompress, size: int) -> bytes:
        import zlib

        url = self._response.shown_url
        while True:
            rest = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
            if not rest:
                rest = self._encoded(size)
                if not rest:
                    if decoder.eof:
                        return b""
                    raise UnavailableError(url, 0, "CUT", "the encoded body ended early")
            if decoder.eof:
                # One gzip file may be several, one behind the other (RFC 1952, section 2.2).
                decoder = self._decoder = zlib.decompressobj(31)
            try:
                piece = decoder.decompress(rest, size)
            except zlib.error as error:
                raise UnavailableError(url, 0, "ENCODING", "a broken Content-Encoding") from error
            if piece:
                return piece


def is_encoded(response: Response) -> bool:
    """Return whether the body is not the blob itself but an encoding of it."""
    return bool(_codings(response))


def _codings(response: Response) -> list[str]:
    parts = [
        part.strip().lower()
        for value in response.header_values("Content-Encoding")
        for part in value.split(",")
    ]
    return [part for part in parts if part not in ("", "identity")]


def is_usable_range(
    response: Response, descriptor: Descriptor, offset: int, end: int | None = None
) -> bool:
    """Return whether a 206 holds the blob from ``offset`` on, perhaps not to its (or ``end``)."""
    if is_encoded(response):
        return False
    media_type = (response.header("Content-Type") or "").partition(";")[0].strip().lower()
    if media_type == "multipart/byteranges":
        return False
    part = parse_content_range(response.header("Content-Range"))
    if part is None or part.first != offset:
        return False
    if part.last >= (descriptor.size if end is None else end):
        return False
    if part.total not in (None, descriptor.size):
        return False
    length = content_length(response)
    return length in (None, part.last - part.first + 1)


def whole_blob(response: Response, descriptor: Descriptor, source: str) -> RegistryBlob:
    """Return the stream of a 200, checked against the descriptor as far as its headers tell.

    Raises SizeMismatchError for a body of another length, RegistryError for an encoding that was
    not asked for and is not understood.
    """
    stream = RegistryBlob(response, 0, source)
    length = content_length(response)
    if is_encoded(response):
        # A header that lies (a .tar.gz said to be gzip-encoded) is known by the length.
        if length == descriptor.size:
            return stream
        if _codings(response) not in (["gzip"], ["x-gzip"]):
            url = response.shown_url
            value = ", ".join(response.header_values("Content-Encoding"))
            shown = response.secrets.redact(value, 40)
            raise RegistryError(url, response.status, "ENCODING", f"Content-Encoding {shown!r}")
        if length is None:
            stream.decode_if_encoded(descriptor.media_type)
        else:
            stream.decode_gzip()
        return stream
    if length is not None and length != descriptor.size:
        raise SizeMismatchError(str(descriptor.digest), descriptor.size, length)
    return stream


def content_length(response: Response) -> int | None:
    """Return the body's length if it is told; RegistryError when it is told badly."""
    try:
        return parse_length(response.header_values("Content-Length"))
    except ValueError as error:
        url = response.shown_url
        raise RegistryError(url, response.status, "PROTOCOL", str(error)) from error
