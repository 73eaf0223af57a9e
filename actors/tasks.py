"""Which tasks of an actor were given up: asked from the working thread, told from another one.

Invariant: a cancellation counts also when it comes before the task itself; what is remembered of
ended tasks is bounded.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EARLY_LIMIT = 1024


class Tasks:
    """The running tasks of one actor, by key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, threading.Event] = {}
        # Cancelled before they began, in order of age.
        self._early: OrderedDict[str, None] = OrderedDict()

    @contextmanager
    def running(self, key: str) -> Iterator[Callable[[], bool]]:
        """Note ``key`` as running and yield the callable that tells whether it was given up."""
        cancelled = threading.Event()
        with self._lock:
            if key in self._early:
                del self._early[key]
                cancelled.set()
            self._running[key] = cancelled
        try:
            yield cancelled.is_set
        finally:
            with self._lock:
                if self._running.get(key) is cancelled:
                    del self._running[key]

    def cancel(self, key: str) -> bool:
        """Give ``key`` up, now or when it begins; return whether it runs."""
        with self._lock:
            running = self._running.get(key)
            if running is not None:
                running.set()
                return True
            self._early[key] = None
            while len(self._early) > EARLY_LIMIT:
                self._early.popitem(last=False)
            return False

    def cancel_all(self) -> None:
        """Give up all that runs now."""
        with self._lock:
            for running in self._running.values():
                running.set()

    def count(self) -> int:
        """Return how many tasks run."""
        with self._lock:
            return len(self._running)
