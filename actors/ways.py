"""How the blobs of a pull in a pre-warm run came to its node, while they come and at the end.

Invariant: the last word on a task is that of its result, whatever is heard late; of a task that was
lost with its process what it said last counts. Thread-safe; what is kept is plain data.
"""

from __future__ import annotations

import threading
from typing import Any


class Ways:
    """The ways of one pull, by task: ``{kind, key, digest, size, seconds, ended, …}`` each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._so_far: dict[str, dict[str, Any]] = {}
        self._final: dict[str, dict[str, Any]] = {}

    def note(self, way: dict[str, Any]) -> None:
        """Take over how a task's blob has come so far."""
        with self._lock:
            self._so_far[way["key"]] = way

    def end(self, key: str, way: dict[str, Any]) -> None:
        """Take over the last word on a task."""
        with self._lock:
            self._final[key] = way

    def all(self) -> list[dict[str, Any]]:
        """Return one entry for each task."""
        with self._lock:
            return list({**self._so_far, **self._final}.values())
