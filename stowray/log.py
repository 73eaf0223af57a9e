"""What is said on stderr besides progress: sentences for people, or JSON lines (``--log-json``).

A JSON line is ``{"time", "level", "event", "message", …}``: RFC 3339 time in UTC, a level of
error, warning, info or debug, and an ``event`` that programs can rely on. ``-q`` leaves errors,
``-v`` adds debug. Invariant: one line is one event; texts are escaped, and redacted where they
were made.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, TextIO

from stowray.pipeline.errors import escape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stowray.pipeline.progress import Event, Key

LEVELS = ("debug", "info", "warning", "error")
_STARTS = frozenset({"resolving", "waiting", "downloading", "applying"})


class Log:
    """Says things; ``lowest`` is the lowest level that is said."""

    def __init__(
        self, *, as_json: bool, lowest: str = "info", stream: TextIO | None = None
    ) -> None:
        self.as_json = as_json
        self._lowest = LEVELS.index(lowest)
        self._stream = stream

    def says(self, level: str) -> bool:
        """Return whether lines of this level are written."""
        return LEVELS.index(level) >= self._lowest

    def __call__(self, level: str, event: str, message: str, **fields: object) -> None:
        """Write one line, if the level is high enough."""
        if not self.says(level):
            return
        text = escape(message)
        if self.as_json:
            line = {"time": _now(), "level": level, "event": event, "message": text, **fields}
            text = json.dumps({name: value for name, value in line.items() if value is not None})
        else:
            text = f"stowray: {text}"
        print(text, file=self._stream or sys.stderr, flush=True)


class LogLines:
    """Progress as log lines: what ends at info, what begins at debug."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._seen: dict[Key, tuple[str, int]] = {}

    def __call__(self, events: Sequence[Event]) -> None:
        """Log each change of status."""
        for event in events:
            status, retries = self._seen.get(event.key, ("", 0))
            self._seen[event.key] = event.status, event.retries
            if event.retries > retries and status != "retrying":
                # Begun and over between two looks.
                self._line(event, "retrying")
            if event.status != status:
                self._line(event, event.status)

    def _line(self, event: Event, status: str) -> None:
        level = "debug" if status in _STARTS else "info"
        if status in ("retrying", "failed"):
            level = "warning"
        ended = event.completed and status == event.status
        self._log(
            level,
            f"{event.kind}.{status}",
            f"{event.reference}: {event.kind} {status}",
            reference=event.reference,
            node=event.node or None,
            id=event.id,
            bytes=event.current or None,
            seconds=round(event.completed - event.started, 3) if ended else None,
            retries=event.retries or None,
            error=event.error or None,
        )


def _now() -> str:
    now = time.time()
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now * 1000) % 1000:03d}Z"
