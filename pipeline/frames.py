"""Length-prefixed msgpack frames over a stream socket: how a worker process and its owner talk.

A frame is a 4-byte big-endian length and that many bytes of msgpack. Only plain data travels, so
nothing that a peer sends can run code.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import msgpack

if TYPE_CHECKING:
    import socket

_LENGTH = struct.Struct(">I")
FRAME_LIMIT = 64 << 20


def send_frame(connection: socket.socket, message: Any) -> None:
    """Send one message; raises OSError when the other side is gone."""
    body = msgpack.packb(message)
    connection.sendall(_LENGTH.pack(len(body)) + body)


def receive_frame(connection: socket.socket) -> Any:
    """Return the next message, or None when the other side has closed the stream."""
    header = _receive(connection, _LENGTH.size)
    if header is None:
        return None
    (length,) = _LENGTH.unpack(header)
    if length > FRAME_LIMIT:
        raise OSError(f"frame of {length} bytes is over the limit of {FRAME_LIMIT}")
    body = _receive(connection, length)
    return None if body is None else msgpack.unpackb(body)


def _receive(connection: socket.socket, size: int) -> bytes | None:
    parts: list[bytes] = []
    while size:
        part = connection.recv(size)
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
