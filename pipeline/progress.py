"""One monotonic picture of all work under way, and at most one frame per watcher each 100 ms.

Invariant: an ID is one thing on one node; its ``current`` never falls and it ends in a final
status; a watcher that attaches late is first given the present state, and a slow or failing watcher
never holds up the work.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TICK_SECONDS = 0.1
FINAL = frozenset({"resolved", "done", "exists", "applied", "committed", "failed"})

Key = tuple[str, str, str, str]


class Report(Protocol):
    """What a worker calls to tell how far it is; sizes in bytes."""

    def __call__(
        self, kind: str, id: str, status: str, current: int = 0, total: int = 0, error: str = ""
    ) -> None:
        """Tell the present status of ``id``."""


@dataclass(frozen=True, slots=True)
class Event:
    """The present state of one ID; times are wall-clock seconds, 0.0 while not reached.

    ``begun`` is when it no longer waited its turn and ``retries`` how often it was asked for again;
    both are for reports and not part of an event line.
    """

    time: float
    reference: str
    node: str
    id: str
    kind: str
    status: str
    current: int = 0
    total: int = 0
    started: float = 0.0
    completed: float = 0.0
    error: str = ""
    begun: float = 0.0
    retries: int = 0

    @property
    def key(self) -> Key:
        """Return what the event is about: node, reference, kind and ID."""
        return self.node, self.reference, self.kind, self.id

    @property
    def is_final(self) -> bool:
        """Return whether nothing more will be said of this ID."""
        return self.status in FINAL

    def to_dict(self) -> dict[str, str | int | float | None]:
        """Return the event as the JSON object of an event line."""
        return {
            "time": round(self.time, 3),
            "reference": self.reference,
            "node": self.node,
            "id": self.id,
            "kind": self.kind,
            "status": self.status,
            "current": self.current,
            "total": self.total,
            "started": round(self.started, 3) or None,
            "completed": round(self.completed, 3) or None,
            "error": self.error or None,
        }

    def to_wire(self) -> dict[str, str | int | float | None]:
        """Return all of the event as plain data, for another process."""
        return {**self.to_dict(), "begun": round(self.begun, 3) or None, "retries": self.retries}

    @classmethod
    def from_dict(cls, data: dict[str, str | int | float | None]) -> Event:
        """Return the event that :meth:`to_wire` or :meth:`to_dict` described."""
        return cls(**{name: value for name, value in data.items() if value is not None})  # type: ignore[arg-type]


class Progress:
    """Collects reports from any thread and hands changed events to watchers on a ticker thread."""

    def __init__(self, *, node: str = "", clock: Clock = SYSTEM_CLOCK) -> None:
        self._node = node
        self._clock = clock
        self._lock = threading.Lock()
        self._events: dict[Key, Event] = {}
        self._changed: dict[Key, None] = {}
        self._watchers: list[Callable[[Sequence[Event]], None]] = []
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._ticker: threading.Thread | None = None
        self._flushing = threading.Lock()

    def reporter(self, reference: str) -> Report:
        """Return the callable with which the work for ``reference`` reports."""

        def report(
            kind: str, id: str, status: str, current: int = 0, total: int = 0, error: str = ""
        ) -> None:
            self.record(reference, kind, id, status, current, total, error)

        return report

    def record(
        self,
        reference: str,
        kind: str,
        id: str,
        status: str,
        current: int = 0,
        total: int = 0,
        error: str = "",
    ) -> None:
        """Note the present status of one ID."""
        self._record(self._node, reference, kind, id, status, current, total, error)

    def _record(
        self,
        node: str,
        reference: str,
        kind: str,
        id: str,
        status: str,
        current: int,
        total: int,
        error: str,
    ) -> None:
        now = self._clock.wall()
        key = (node, reference, kind, id)
        with self._lock:
            known = self._events.get(key)
            if known is None:
                known = Event(now, reference, node, id, kind, status, started=now)
            elif known.is_final and status != "failed":
                # Shared work may be reported by several pulls of one reference; the first final
                # word stands.
                return
            final = status in FINAL
            total = max(total, known.total)
            current = max(current, known.current)
            if status in ("done", "exists", "applied", "committed"):
                current = max(current, total)
            event = replace(
                known,
                time=now,
                status=status,
                current=current,
                total=total,
                completed=now if final else 0.0,
                error=error,
                begun=known.begun or (0.0 if status == "waiting" else now),
                # One that is given up while it waits for its turn is not asked for again.
                retries=known.retries
                + (known.status == "retrying" and status not in ("retrying", "failed")),
            )
            self._events[key] = event
            self._changed[key] = None
            watched = bool(self._watchers)
        if watched and not self._wake.is_set():
            self._wake.set()

    def merge(self, event: Event) -> None:
        """Take over an event that another process or node made."""
        key = event.key
        with self._lock:
            known = self._events.get(key)
            if known is not None:
                if known.is_final and not event.is_final:
                    return
                event = replace(
                    event,
                    current=max(event.current, known.current),
                    total=max(event.total, known.total),
                    begun=event.begun or known.begun,
                    retries=max(event.retries, known.retries),
                )
            self._events[key] = event
            self._changed[key] = None
        self._wake.set()

    def fail_open(self, reference: str, error: str) -> None:
        """End every ID of ``reference`` that has no final status yet as failed."""
        with self._lock:
            left = [
                event
                for event in self._events.values()
                if event.reference == reference and not event.is_final
            ]
        for event in left:
            self._record(event.node, reference, event.kind, event.id, "failed", 0, 0, error)

    def events(self) -> list[Event]:
        """Return the present state of every ID, in order of first appearance."""
        with self._lock:
            return list(self._events.values())

    def watch(self, watcher: Callable[[Sequence[Event]], None]) -> None:
        """Call ``watcher`` with the present state now, and with what changed, every 100 ms at most.

        A watcher that raises is dropped: a broken display fails nothing.
        """
        with self._flushing:
            present = self.events()
            with self._lock:
                self._watchers.append(watcher)
                if self._ticker is None:
                    self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
                    self._ticker.start()
            if present:
                self._call(watcher, present)

    def close(self) -> None:
        """Send what is still unsent and end the ticker."""
        with self._lock:
            ticker = self._ticker
        self._stop.set()
        self._wake.set()
        if ticker is not None and ticker is not threading.current_thread():
            ticker.join()
        self.flush()

    def flush(self) -> None:
        """Hand all changes to the watchers now."""
        with self._flushing:
            with self._lock:
                changed = [self._events[key] for key in self._changed]
                self._changed.clear()
                watchers = list(self._watchers)
            if changed:
                for watcher in watchers:
                    self._call(watcher, changed)

    def _call(self, watcher: Callable[[Sequence[Event]], None], events: Sequence[Event]) -> None:
        try:
            watcher(events)
        except Exception:  # noqa: BLE001 - a watcher is foreign code and must not fail the work
            with self._lock:
                if watcher in self._watchers:
                    self._watchers.remove(watcher)

    def _tick(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            self.flush()
            if self._stop.is_set():
                return
            # At most one frame per interval; what happens meanwhile goes into the next one.
            self._stop.wait(TICK_SECONDS)
