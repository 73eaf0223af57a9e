"""Events as msgpack frames, and how they are sent on without holding the work up.

Invariant: one frame is under way per sender; a slow receiver makes frames rarer and larger, never
the work slower, and a lost one ends the sending only.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import msgpack

from stowray.pipeline.progress import Event

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stowray.pipeline.progress import Progress

FRAME_SECONDS = 0.1
# Frames of many nodes must not add up to more than one actor takes (about 2500 calls a second).
SECONDS_PER_NODE = 0.001


def pack(events: Sequence[Event]) -> bytes:
    """Return ``events`` as one frame."""
    packed: bytes = msgpack.packb([event.to_wire() for event in events])
    return packed


def unpack(frame: bytes) -> list[Event]:
    """Return the events of a frame that :func:`pack` made."""
    return [Event.from_dict(data) for data in msgpack.unpackb(frame)]


def merging(progress: Progress) -> Callable[[bytes], None]:
    """Return what merges the events of a frame into ``progress``."""

    def take(frame: bytes) -> None:
        for event in unpack(frame):
            progress.merge(event)

    return take


class Forwarder:
    """Sends changed events on, one frame at a time, from a thread of its own.

    ``send`` hands a frame over and returns when it has arrived, False when the receiver is lost:
    then nothing more is sent. A slow receiver makes frames rarer and larger, never the work slower.
    """

    def __init__(self, send: Callable[[bytes], bool], *, nodes: int = 1) -> None:
        self._send = send
        self._interval = max(FRAME_SECONDS, nodes * SECONDS_PER_NODE)
        self._pending: dict[tuple[str, str, str, str], Event] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._forward, name="forward", daemon=True)
        self._thread.start()

    def __call__(self, events: Sequence[Event]) -> None:
        """Take note of ``events``; the watcher of a :class:`Progress`."""
        with self._changed:
            for event in events:
                self._pending[event.node, event.reference, event.kind, event.id] = event
            self._changed.notify()

    def close(self, seconds: float = 1.0) -> None:
        """Send what is left, waiting for it at most ``seconds``."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)

    def _forward(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closed)
                events, self._pending = list(self._pending.values()), {}
                closed = self._closed
            sent = time.monotonic()
            if events and not self._send(pack(events)):
                return
            if closed and not events:
                return
            pause = self._interval - (time.monotonic() - sent)
            with self._changed:
                if pause > 0 and not self._closed:
                    self._changed.wait_for(lambda: self._closed, pause)
