"""The owner of a run's leases as a fetching actor sees it: questions to the ResolverActor.

Invariant: an owner that was started anew is told of every lease and permit that is held here, and
of what was read of leases before, before it is asked anything else; a question that is not answered
is an error of the asker's, who goes on with what it has (``spread_leases``).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from stowray.pipeline.origin_leases import Granted, Later
from stowray.pipeline.spread_leases import from_wire, permit_from_wire

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from stowray.pipeline.spread_leases import Answer

ANSWER_SECONDS = 10.0


class LeaseClient:
    """Implements ``Leases`` for one node of a run; thread-safe.

    ``send`` carries a question to ``LeaseBooks.answer`` and returns what that returned.
    """

    def __init__(
        self,
        send: Callable[[dict[str, Any]], dict[str, Any]],
        *,
        run: str,
        node: str,
        address: str,
        connections: int,
    ) -> None:
        self._send = send
        self._about = {"run": run, "node": node, "address": address, "connections": connections}
        self._lock = threading.Lock()
        self._epoch = ""
        self._held: dict[str, tuple[int, int, int]] = {}
        # What was read of leases that this client had; by key the size and ranges, in order.
        self._read: dict[str, tuple[int, list[tuple[int, int]]]] = {}
        self._permits: set[str] = set()

    def ask(
        self,
        key: str,
        size: int,
        start: int,
        end: int | None = None,
        *,
        failed: Collection[str] = (),
        slow: Collection[str] = (),
    ) -> Answer:
        """See ``Leases.ask``."""
        answer = from_wire(self._ask("ask", key, size, start, end, list(failed), list(slow)))
        if isinstance(answer, Granted):
            with self._lock:
                self._held[key] = (size, answer.start, answer.end)
        return answer

    def progress(self, key: str, position: int) -> float:
        """See ``Leases.progress``."""
        with self._lock:
            if key in self._held:
                size, start, end = self._held[key]
                if position > start:
                    self._note_read(key, size, start, min(position, end))
                    self._held[key] = (size, position, end)
        seconds = float(self._ask("progress", key, position))
        if not seconds:
            self._forget(key)
        return seconds

    def release(self, key: str) -> None:
        """See ``Leases.release``."""
        self._forget(key)
        self._ask("release", key)

    def has(self, key: str, size: int, start: int = 0, end: int | None = None) -> None:
        """See ``Leases.has``."""
        if start == 0 and end in (None, size):
            self._forget(key)
        with self._lock:
            self._note_read(key, size, start, size if end is None else end)
        self._ask("has", key, size, start, end)

    def lost(self, key: str) -> None:
        """See ``Leases.lost``."""
        self._forget(key)
        with self._lock:
            self._read.pop(key, None)
        self._ask("lost", key)

    def declare(self, key: str, size: int, start: int, end: int) -> float:
        """See ``Leases.declare``."""
        return float(self._ask("declare", key, size, start, end))

    def permit(self, purpose: str) -> float | Later:
        """See ``Leases.permit``."""
        answer = permit_from_wire(float(self._ask("permit", purpose)))
        with self._lock:
            if isinstance(answer, Later):
                self._permits.discard(purpose)
            else:
                self._permits.add(purpose)
        return answer

    def give_back(self, purpose: str) -> None:
        """See ``Leases.give_back``."""
        with self._lock:
            self._permits.discard(purpose)
        self._ask("give_back", purpose)

    def pause(self, seconds: float) -> None:
        """See ``Leases.pause``."""
        self._ask("pause", seconds)

    def pause_host(self, host: str, seconds: float) -> None:
        """Let no node of the run ask ``host`` for that long."""
        self._ask("pause_host", host, seconds)

    def rest(self, host: str) -> float:
        """Return for how many seconds more all nodes leave ``host`` alone."""
        return float(self._ask("rest", host))

    def book(self, host: str, line: str, seconds: float) -> float:
        """Take the next ``seconds`` of a line of the run; return in how many they begin."""
        return float(self._ask("book", host, line, seconds))

    def address(self, node: str) -> str:
        """See ``Leases.address``."""
        # Not kept: a node whose actor was started anew may serve elsewhere.
        return str(self._ask("address", node))

    def _note_read(self, key: str, size: int, start: int, end: int) -> None:
        _, ranges = self._read.setdefault(key, (size, []))
        if ranges and ranges[-1][0] <= start <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
        else:
            ranges.append((start, end))

    def _forget(self, key: str) -> None:
        with self._lock:
            self._held.pop(key, None)

    def _ask(self, question: str, *about: Any) -> Any:
        request = {**self._about, "question": question, "about": list(about)}
        reply = self._send(request)
        if reply["epoch"] != self._epoch and self._is_new(reply["epoch"]):
            # What it said, it said without knowing what is held here.
            reply = self._send(request)
        return reply["answer"]

    def _is_new(self, epoch: str) -> bool:
        """Tell an owner that was started anew what is held; False for the first one ever."""
        with self._lock:
            before, self._epoch = self._epoch, epoch
            held, permits = dict(self._held), set(self._permits)
            read = {key: (size, list(ranges)) for key, (size, ranges) in self._read.items()}
        if not before or before == epoch:
            return False
        for key, (size, ranges) in read.items():
            for start, end in ranges:
                self._tell("has", key, size, start, end)
        for key, (size, start, end) in held.items():
            if start < end:
                self._tell("declare", key, size, start, end)
        for purpose in permits:
            self._tell("declare_permit", purpose)
        return True

    def _tell(self, question: str, *about: Any) -> None:
        self._send({**self._about, "question": question, "about": list(about)})
