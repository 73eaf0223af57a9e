"""Asks other nodes of a run for stripes, over plain sockets: from there into the caller's buffer.

Invariant: every wait ends by the time that the caller gives; what a peer sends is believed only as
far as it is well-formed and of the length that was asked for. The token of the run goes to the
addresses of its nodes and nowhere else: no proxy, no redirect.
"""

from __future__ import annotations

import json
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Any, Final, Self

from stowray.pipeline.errors import NodeError
from stowray.pipeline.peer_paths import checkpoints_path, have_path, pieces_path, stripe_path
from stowray.pipeline.pieces import Pieces
from stowray.pipeline.values import dataclass
from stowray.pipeline.witness import Witness

if TYPE_CHECKING:
    from stowray.pipeline.stripes import Stripe

_HEAD_LIMIT: Final = 16 << 10
_DOCUMENT_LIMIT: Final = 64 << 20
_BUSY: Final = 503
_WHOLE: Final = 409
_GIVEN_UP: Final = 410
_END: Final = b"\r\n\r\n"
# A blob has to be read and hashed for it.
_PIECES_SECONDS: Final = 120.0


class BusyError(Exception):
    """The peer has too many requests, or nothing yet: ask again after ``seconds``."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class SilentError(NodeError):
    """The peer did not answer in time: it may be dead, or busy."""


class WholeError(Exception):
    """The peer takes the blob in one piece now, and gives no stripes of it before it is proven."""


@dataclass(frozen=True, slots=True)
class Head:
    """How a peer's answer begins: how far it is, and whether it has proven the blob."""

    have: int
    generation: int
    complete: bool


@dataclass(frozen=True, slots=True)
class Have:
    """How far a peer is, and whom it reads from; see :meth:`SourceChoice.told`.

    ``fate`` is of the generation that was asked for (``fates``). ``given_up``: the blob will not
    come, for its bytes prove wrong wherever the peer gets them from. ``whole``: see ``WholeError``.
    """

    have: int
    upstream: str | None
    generation: int
    complete: bool
    given_up: bool
    whole: bool
    fate: str
    pace: float


class PeerStream:
    """The bytes of a stripe as a peer sends them; to be closed on every path.

    Raises NodeError when the peer refuses or breaks off, BusyError when it is to be asked later,
    WholeError when it is not to be asked for stripes any more.
    """

    def __init__(self, connection: socket.socket, address: str, length: int) -> None:
        self._connection = connection
        self._address = address
        self._left = length
        self._received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; idempotent."""
        self._connection.close()

    def begin(self, seconds: float) -> Head | None:
        """Return the head of the answer; None when it has not come within ``seconds``."""
        status_headers = self._head(seconds)
        if status_headers is None:
            return None
        status, headers = status_headers
        if status == _BUSY:
            raise BusyError(_number(headers.get("retry-after", "1"), self._address))
        if status == _WHOLE:
            raise WholeError
        if status == _GIVEN_UP:
            raise NodeError(self._address, "has given the blob up")
        if status != 200:
            raise NodeError(self._address, f"answered {status}")
        if headers.get("content-length", "") != str(self._left):
            raise NodeError(self._address, "sends another length than was asked for")
        return Head(
            _number(headers.get("stowray-have", ""), self._address),
            _number(headers.get("stowray-generation", ""), self._address),
            headers.get("stowray-complete") == "1",
        )

    def is_ready(self, seconds: float) -> bool:
        """Wait for bytes, at most so long; they are not read yet."""
        if self._received:
            return True
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def document(self, seconds: float) -> Any:
        """Return the JSON document that answers a question, within ``seconds``."""
        until = time.monotonic() + seconds
        head = self._head(seconds)
        if head is None:
            raise SilentError(self._address, f"does not answer within {seconds:g} s")
        status, headers = head
        if status != 200:
            raise NodeError(self._address, f"answered {status}")
        self._left = _number(headers.get("content-length", ""), self._address)
        if self._left > _DOCUMENT_LIMIT:
            raise NodeError(self._address, "answers more than any document has")
        body = memoryview(bytearray(self._left))
        at = 0
        while at < len(body):
            count = self.read_into(body[at:], max(0.001, until - time.monotonic()))
            if count is None:
                raise SilentError(self._address, f"no whole answer within {seconds:g} s")
            at += count
        try:
            return json.loads(bytes(body))
        except ValueError as error:
            raise NodeError(self._address, "answers no JSON") from error

    def read_into(self, buffer: memoryview, seconds: float) -> int | None:
        """Fill the start of ``buffer``; 0 at the end, None when nothing came in ``seconds``."""
        room = min(len(buffer), self._left)
        if room == 0:
            return 0
        if self._received:
            count = min(room, len(self._received))
            buffer[:count] = self._received[:count]
            self._received = self._received[count:]
        else:
            received = self._receive(buffer[:room], seconds)
            if received is None:
                return None
            count = received
        self._left -= count
        return count

    def _head(self, seconds: float) -> tuple[int, dict[str, str]] | None:
        until = time.monotonic() + seconds
        buffer = memoryview(bytearray(4096))
        while _END not in self._received:
            if len(self._received) > _HEAD_LIMIT:
                raise NodeError(self._address, "answers with an endless head")
            count = self._receive(buffer, max(0.001, until - time.monotonic()))
            if count is None:
                return None
            self._received += bytes(buffer[:count])
        head, _, self._received = self._received.partition(_END)
        lines = head.decode("latin-1").split("\r\n")
        version, _, rest = lines[0].partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdecimal():
            raise NodeError(self._address, "does not speak HTTP")
        headers = {}
        for line in lines[1:]:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        return int(rest[:3]), headers

    def _receive(self, buffer: memoryview, seconds: float) -> int | None:
        try:
            self._connection.settimeout(seconds)
            count = self._connection.recv_into(buffer)
        except TimeoutError:
            return None
        except OSError as error:
            raise _broken(self._address, error) from error
        if count == 0:
            raise NodeError(self._address, "broke off")
        return count


class PeerClient:
    """Opens connections to the nodes of one run; thread-safe.

    ``connect_seconds`` is how long a node may take to accept one, ``answer_seconds`` how long for a
    question.
    """

    def __init__(self, token: str, *, connect_seconds: float, answer_seconds: float) -> None:
        self._token = token
        self._connect_seconds = connect_seconds
        self._answer_seconds = answer_seconds

    def open_stripe(self, address: str, digest: str, stripe: Stripe, position: int) -> PeerStream:
        """Ask ``address`` for a stripe from ``position`` on; ``begin`` waits for the head."""
        length = stripe.length - position
        return self._ask(address, stripe_path(digest, stripe, position), length)

    def have(self, address: str, digest: str, stripe: Stripe, generation: int = 0) -> Have:
        """Ask how far a node is with a stripe, and what became of a generation."""
        with self._ask(address, have_path(digest, stripe, generation), 0) as stream:
            told = stream.document(self._answer_seconds)
        try:
            upstream = told["upstream"]
            return Have(
                int(told["have"]),
                None if upstream is None else str(upstream),
                int(told["generation"]),
                bool(told["complete"]),
                bool(told["given_up"]),
                bool(told["whole"]),
                str(told["fate"]),
                float(told["pace"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise NodeError(address, "does not tell how far it is") from error

    def checkpoints(self, address: str, digest: str) -> Witness:
        """Ask what a node hashed of an arriving blob."""
        with self._ask(address, checkpoints_path(digest), 0) as stream:
            told = stream.document(self._answer_seconds)
        try:
            return Witness.from_dict(told)
        except ValueError as error:
            raise NodeError(address, str(error)) from error

    def pieces(self, address: str, digest: str) -> Pieces:
        """Ask for the digests of a blob's pieces, as a node reads them now."""
        with self._ask(address, pieces_path(digest), 0) as stream:
            told = stream.document(_PIECES_SECONDS)
        try:
            return Pieces.from_dict(told)
        except ValueError as error:
            raise NodeError(address, str(error)) from error

    def _ask(self, address: str, path: str, length: int) -> PeerStream:
        host, _, port = address.rpartition(":")
        try:
            connection = socket.create_connection(
                (host.strip("[]"), int(port)), self._connect_seconds
            )
        except (OSError, ValueError) as error:
            raise _broken(address, error) from error
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(
                f"GET {path} HTTP/1.1\r\nHost: {address}\r\n"
                f"Authorization: Bearer {self._token}\r\nConnection: close\r\n\r\n".encode()
            )
        except OSError as error:
            connection.close()
            raise _broken(address, error) from error
        return PeerStream(connection, address, length)


def _broken(address: str, error: OSError | ValueError) -> NodeError:
    if isinstance(error, TimeoutError):
        return SilentError(address, "does not answer")
    number = error.errno if isinstance(error, OSError) else None
    return NodeError(address, os.strerror(number) if number else str(error))


def _number(text: str, address: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise NodeError(address, "answers without a number where one belongs")
    return int(text)
