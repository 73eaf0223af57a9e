"""The door of a session: a Unix socket on which its host takes calls for the crew.

Who pulls through it needs neither Ray nor its second of start. Invariant: only processes of the
session's own user are let in; what travels are msgpack frames of plain data; a caller that goes
away, or asks to, has its call cancelled; one that waits hears something every second.

One call per connection. The caller sends ``[call, request]``, then perhaps ``["cancel"]``; it gets
any number of ``["events", frame]`` and ``["pulse"]``, and in the end ``["reply", reply]`` or
``["error", wire error]``.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING, Any

from stowray.pipeline.errors import StowrayError, to_wire
from stowray.pipeline.files import translated
from stowray.pipeline.frames import receive_frame, send_frame

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stowray.actors.link import Link

PULSE_SECONDS = 1.0
# A caller that does not read is given up: its socket's buffer holds more than it needs to see.
SEND_SECONDS = 30.0
BACKLOG = 128
# unix(7), SO_PEERCRED: struct ucred.
_CREDENTIALS = struct.Struct("3i")


class Door:
    """Serves ``link`` at ``path`` until it is closed."""

    def __init__(self, path: Path, link: Link) -> None:
        self._path = path
        self._link = link
        self._closed = threading.Event()
        with translated(path, "make the session's socket"):
            self._listener = _listen(path)
        threading.Thread(target=self._accept, name="door", daemon=True).start()

    def close(self) -> None:
        """Let nobody in any more; calls under way end with the process."""
        self._closed.set()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        # Frees the thread that waits in accept().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                # Out of descriptors: those who wait in the queue are let in when some are free.
                self._closed.wait(PULSE_SECONDS)
                continue
            if peer_user(connection) != os.geteuid():
                connection.close()
                continue
            connection.settimeout(SEND_SECONDS)
            threading.Thread(
                target=self._serve, args=(connection,), name="caller", daemon=True
            ).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                message = receive_frame(connection)
                if message is None:
                    return
                call, request = message
                caller = _Caller(connection)
                with caller:
                    caller.send(self._answer(call, request, caller))
            except (OSError, ValueError, TypeError):
                # Gone, or not one of ours.
                return

    def _answer(self, call: str, request: dict[str, Any], caller: _Caller) -> list[Any]:
        try:
            if call == "resolve":
                return ["reply", self._link.resolve(request, caller.is_gone)]
            if call == "pull":
                return ["reply", self._link.pull(request, caller.is_gone, caller.tell)]
        except StowrayError as error:
            return ["error", to_wire(error)]
        raise ValueError(call)


class _Caller:
    """The other end of one connection while its call is under way."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._gone = threading.Event()
        self._sending = threading.Lock()
        self._thread = threading.Thread(target=self._listen, name="caller's word", daemon=True)
        self._wake, self._woken = os.pipe()

    def __enter__(self) -> _Caller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._woken, b".")
        self._thread.join()
        os.close(self._wake)
        os.close(self._woken)

    def is_gone(self) -> bool:
        """Return whether nobody waits for the call's result."""
        return self._gone.is_set()

    def tell(self, frame: bytes) -> None:
        """Pass a frame of events on."""
        with contextlib.suppress(OSError):
            self.send(["events", frame])

    def send(self, message: list[Any]) -> None:
        """Send one message; a caller that cannot be reached is gone."""
        try:
            with self._sending:
                send_frame(self._connection, message)
        except OSError:
            self._gone.set()
            raise

    def _listen(self) -> None:
        """Give signs of life; take the one word that a caller may still say."""
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self.is_gone():
            ready = [descriptor for descriptor, _ in poll.poll(PULSE_SECONDS * 1000)]
            if self._wake in ready:
                return
            if ready:
                # Either it asks for an end or it has hung up.
                self._gone.set()
            with contextlib.suppress(OSError):
                self.send(["pulse"])


def peer_user(connection: socket.socket) -> int:
    """Return the user ID of the process at the other end of a Unix socket."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    user: int = _CREDENTIALS.unpack(found)[1]
    return user


@contextlib.contextmanager
def socket_name(path: Path) -> Iterator[str]:
    """Give a name for ``path`` that fits into a socket address, which has 107 bytes of room."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def _listen(path: Path) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with socket_name(path) as name:
            listener.bind(name)
        path.chmod(0o600)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
