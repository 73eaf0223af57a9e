"""Calls through a session's door, without Ray.

Invariant: nothing is sent before it is known that the other end is the session's host, of this
user; a session that is silent for ``SILENT_SECONDS`` is given up; whatever ends a call here ends it
there.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Any

from stowray.actors.door import peer_user, socket_name
from stowray.actors.link import CANCEL_SECONDS
from stowray.pipeline.errors import CancelledError, NodeError, StowrayError, from_wire
from stowray.pipeline.frames import receive_frame, send_frame

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONNECT_SECONDS = 10.0
SILENT_SECONDS = 25.0
LOOK_SECONDS = 0.1
_ENDED = "the session ended: what was fetched is kept, run the command again"


class DoorLink:
    """The crew of the session whose door is at ``path``; see :class:`stowray.actors.link.Link`."""

    is_session = True

    def __init__(self, path: Path) -> None:
        self._path = path

    def resolve(self, request: dict[str, Any], cancelled: Callable[[], bool]) -> dict[str, Any]:
        """See :meth:`Link.resolve`."""
        return self._call("resolve", request, cancelled, _ignore)

    def pull(
        self,
        request: dict[str, Any],
        cancelled: Callable[[], bool],
        take: Callable[[bytes], None],
    ) -> dict[str, Any]:
        """See :meth:`Link.pull`."""
        return self._call("pull", request, cancelled, take)

    def _call(
        self,
        call: str,
        request: dict[str, Any],
        cancelled: Callable[[], bool],
        take: Callable[[bytes], None],
    ) -> dict[str, Any]:
        with self._connect() as connection:
            answers = _Answers(connection, call, cancelled, take)
            try:
                send_frame(connection, [call, request])
                return answers.reply()
            except OSError as error:
                raise NodeError("session", _ENDED) from error
            except StowrayError:
                raise
            except BaseException:
                # Ctrl-C among them: nothing may work on after this call has ended.
                answers.settle()
                raise

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(CONNECT_SECONDS)
            with socket_name(self._path) as name:
                connection.connect(name)
            if peer_user(connection) != os.geteuid():
                raise NodeError("session", f"{self._path} belongs to another user")
        except OSError as error:
            connection.close()
            raise NodeError(
                "session", f"does not answer ({error}): `stowray session start` begins another"
            ) from error
        except BaseException:
            connection.close()
            raise
        connection.settimeout(SILENT_SECONDS)
        return connection


class _Answers:
    """What comes back on one connection."""

    def __init__(
        self,
        connection: socket.socket,
        call: str,
        cancelled: Callable[[], bool],
        take: Callable[[bytes], None],
    ) -> None:
        self._connection = connection
        self._call = call
        self._cancelled = cancelled
        self._take = take
        self._given_up_at = 0.0

    def reply(self) -> dict[str, Any]:
        """Wait for the reply, passing on events and a cancellation."""
        heard = time.monotonic()
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        while True:
            if self._given_up_at == 0.0 and self._cancelled():
                self._give_up()
            ready = poll.poll(LOOK_SECONDS * 1000)
            now = time.monotonic()
            if self._given_up_at and now - self._given_up_at > CANCEL_SECONDS:
                raise CancelledError(self._call)
            if not ready:
                if now - heard > SILENT_SECONDS:
                    raise NodeError("session", f"has been silent for {SILENT_SECONDS:g} s")
                continue
            heard = now
            message = receive_frame(self._connection)
            if message is None:
                raise NodeError("session", _ENDED)
            if message[0] == "events":
                self._take(message[1])
            elif message[0] == "reply":
                reply: dict[str, Any] = message[1]
                return reply
            elif message[0] == "error":
                raise from_wire(*message[1])

    def settle(self) -> None:
        """Ask for the call's end and wait for it a few seconds; raises nothing."""
        self._take, self._cancelled = _ignore, _never
        with contextlib.suppress(StowrayError, OSError):
            self._give_up()
            self.reply()

    def _give_up(self) -> None:
        self._given_up_at = time.monotonic()
        send_frame(self._connection, ["cancel"])


def _ignore(_frame: bytes) -> None:
    """Take no events."""


def _never() -> bool:
    return False
