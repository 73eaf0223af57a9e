"""What one host gets at once and per second, and for how long it is left alone.

Invariant: a permit is held for one HTTP exchange, from before the request to the end of the body,
and given back on every path; a host that asks for a pause gets it from all threads of the process,
and from all who share its limits: the processes of a node, the nodes of a cluster.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Protocol

from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.errors import CancelledError, UnavailableError
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from stowray.pipeline.node_limits import Kind, Line

DOCUMENT_PERMITS = 4
# A host that others can stand in for is not waited for when it wants a longer pause.
PATIENCE_SECONDS = 0.5
POLL_SECONDS = 0.05
# Between two looks for a permit of others: who has waited for long looks often.
FIRST_LOOK_SECONDS = 0.05
SHORTEST_LOOK_SECONDS = 0.005
# Whether a holder is stopped is asked when it has had the permit for longer than most.
STOPPED_LOOKS = 50
# Sleeps shorter than this are put together: they would be inexact and cost more than they save.
SHORTEST_SLEEP_SECONDS = 0.02
# Where bytes per second are limited: as much is read at once as the whole line brings in so long.
PIECE_SECONDS = 1 / 32
SMALLEST_PIECE = 4096


class SharedLimits(Protocol):
    """Limits that others share: :class:`stowray.pipeline.node_limits.NodeLimits`, or a cluster's.

    Thread-safe; no call waits. What it hands out ends by itself when this process does.
    """

    def permit(self, host: str, kind: Kind, limit: int) -> Callable[[], None] | None:
        """Return what gives a permit for one exchange back, None when there is none now."""

    def free(self, host: str, kind: Kind, limit: int) -> int:
        """Return how many permits nobody has or waits for."""

    def is_stopped(self, host: str, kind: Kind, limit: int) -> bool:
        """Return whether a holder does not use its permit, so that one more may go without."""

    def waiting(self, host: str, kind: Kind) -> AbstractContextManager[None]:
        """Let others know that somebody waits, for as long as the block lasts."""

    def is_waited_for(self, host: str, kind: Kind) -> bool:
        """Return whether somebody waits for a permit."""

    def pause(self, host: str, seconds: float) -> None:
        """Let nobody ask ``host`` for that long."""

    def rest(self, host: str) -> float:
        """Return for how many seconds more ``host`` is to be left alone."""

    def book(self, host: str, line: Line, seconds: float) -> float:
        """Take the next ``seconds`` of a line; return in how many seconds they begin."""

    def close(self) -> None:
        """Give back what is still out."""


@dataclass(slots=True)
class _Host:
    blobs: int = 0
    documents: int = 0
    waiting: int = 0  # for a permit for a blob
    not_before: float = 0.0
    next_request: float = 0.0
    document_gap: float = 0.0
    last_document: float = 0.0
    paid_until: float = 0.0  # when the bytes that came so far were due


class Limiter:
    """Permits per host: ``connections`` for blobs, a few more for small documents.

    Documents have permits of their own, so that a manifest never waits behind layers. Rates are per
    second, of requests and of the bytes of blobs; 0 is no limit. All of it holds for this process
    alone and for those together that have ``shared`` in common.
    """

    def __init__(
        self,
        connections: int,
        clock: Clock = SYSTEM_CLOCK,
        *,
        requests_per_second: float = 0.0,
        bytes_per_second: int = 0,
        shared: Sequence[SharedLimits] = (),
    ) -> None:
        self._connections = max(1, connections)
        self._requests = requests_per_second
        self._bytes = bytes_per_second
        self._shared = tuple(shared)
        self._clock = clock
        self._changed = threading.Condition()
        self._hosts: dict[str, _Host] = {}

    def close(self) -> None:
        """Let go of what is shared."""
        for shared in self._shared:
            shared.close()

    def acquire(
        self,
        host: str,
        *,
        document: bool,
        cancelled: Callable[[], bool] | None = None,
        can_leave: bool = False,
    ) -> Callable[[], None]:
        """Wait for a permit and return what gives it back (once; more calls are harmless).

        With ``can_leave`` the wait ends with UnavailableError when ``host`` asks for a pause after
        it began: there are others to ask.
        """
        if can_leave and self.rest(host) <= 0:
            cancelled = partial(self._leave_in_pause, host, cancelled)
        with self._changed:
            state = self._hosts.setdefault(host, _Host())
            if not document:
                state.waiting += 1
            try:
                self._wait(state, host, document=document, cancelled=cancelled)
            finally:
                if not document:
                    state.waiting -= 1
            self._count_request(state, document=document)
            if document:
                state.documents += 1
            else:
                state.blobs += 1
            gap = state.document_gap if document else 0.0

        def release() -> None:
            with self._changed:
                if document:
                    state.documents -= 1
                else:
                    state.blobs -= 1
                self._changed.notify_all()

        with ExitStack() as stack:
            stack.callback(release)
            for shared in self._shared:
                stack.callback(self._acquire_shared(shared, host, document, gap, cancelled))
            # Everything is there: from now on the caller gives it back.
            return stack.pop_all().close

    def _leave_in_pause(self, host: str, cancelled: Callable[[], bool] | None) -> bool:
        """Return ``cancelled()``; raise when ``host`` wants to be left alone for long."""
        if self.rest(host) > PATIENCE_SECONDS:
            raise UnavailableError(host, 429, "RESTING", "it wants to be left alone for a while")
        return cancelled is not None and cancelled()

    def _acquire_shared(
        self,
        shared: SharedLimits,
        host: str,
        document: bool,
        gap: float,
        cancelled: Callable[[], bool] | None,
    ) -> Callable[[], None]:
        if self._requests > 0:
            seconds = shared.book(host, "requests", 1.0 / self._requests)
            self._sleep(seconds, host, cancelled)
        if gap > 0:
            self._sleep(shared.book(host, "documents", gap), host, cancelled)
        kind: Kind = "documents" if document else "blobs"
        limit = DOCUMENT_PERMITS if document else self._connections
        if shared.rest(host) <= 0 and not shared.is_waited_for(host, kind):
            release = _permit(shared, host, kind, limit)
            if release is not None:
                return release
        pause, looks = FIRST_LOOK_SECONDS, 0
        with shared.waiting(host, kind):
            while True:
                rest = shared.rest(host)
                self._sleep(max(rest, pause), host, cancelled)
                if rest > 0:
                    continue
                release = _permit(shared, host, kind, limit)
                if release is not None:
                    return release
                pause = max(pause / 2, SHORTEST_LOOK_SECONDS)
                looks += 1
                if looks % STOPPED_LOOKS == 0 and shared.is_stopped(host, kind, limit):
                    return _nothing

    def _wait(
        self, state: _Host, host: str, *, document: bool, cancelled: Callable[[], bool] | None
    ) -> None:
        while True:
            if cancelled is not None and cancelled():
                raise CancelledError(f"request to {host}")
            begin = max(state.not_before, state.next_request)
            if document:
                begin = max(begin, state.last_document + state.document_gap)
            rest = begin - self._clock.monotonic()
            free = (
                state.documents < DOCUMENT_PERMITS if document else state.blobs < self._connections
            )
            if free and rest <= 0:
                return
            if rest > 0:
                self._changed.release()
                try:
                    self._clock.sleep(min(rest, POLL_SECONDS))
                finally:
                    self._changed.acquire()
            else:
                self._changed.wait(POLL_SECONDS if cancelled is not None else None)

    def _count_request(self, state: _Host, *, document: bool) -> None:
        now = self._clock.monotonic()
        if self._requests > 0:
            state.next_request = now + 1.0 / self._requests
        if document:
            state.last_document = now

    def spend(self, host: str, count: int, cancelled: Callable[[], bool]) -> None:
        """Book ``count`` bytes more of ``host``; wait until the share of the line is free again."""
        wait = self.charge(host, count)
        if wait > SHORTEST_SLEEP_SECONDS:
            self._sleep(wait, host, cancelled)

    def charge(self, host: str, count: int) -> float:
        """Book ``count`` bytes more of ``host``; return in how many seconds the line is free."""
        if not self._bytes:
            return 0.0
        seconds = count / self._bytes
        with self._changed:
            state = self._hosts.setdefault(host, _Host())
            now = self._clock.monotonic()
            state.paid_until = max(now, state.paid_until) + seconds
            wait = state.paid_until - now
        for shared in self._shared:
            wait = max(wait, shared.book(host, "bytes", seconds) + seconds)
        return wait

    @property
    def piece_size(self) -> int:
        """How many bytes come at once where their rate is limited: small pieces, a steady flow."""
        return max(SMALLEST_PIECE, int(self._bytes * PIECE_SECONDS))

    def pause(self, host: str, seconds: float) -> None:
        """Start no exchange with ``host`` for that long."""
        with self._changed:
            state = self._hosts.setdefault(host, _Host())
            state.not_before = max(state.not_before, self._clock.monotonic() + seconds)
        for shared in self._shared:
            shared.pause(host, seconds)

    def rest(self, host: str) -> float:
        """Return for how many seconds more no exchange with ``host`` will start."""
        with self._changed:
            until = self._hosts.get(host, _Host()).not_before
        own = until - self._clock.monotonic()
        return max(0.0, own, *(shared.rest(host) for shared in self._shared))

    def space_documents(self, host: str, seconds: float) -> None:
        """Let at least that long pass between two requests for documents of ``host``."""
        with self._changed:
            self._hosts.setdefault(host, _Host()).document_gap = seconds

    def held(self, host: str) -> int:
        """Return how many permits are out."""
        with self._changed:
            state = self._hosts.get(host, _Host())
            return state.blobs + state.documents

    def spare(self, host: str) -> int:
        """Return how many permits for blobs nobody holds or waits for."""
        with self._changed:
            state = self._hosts.get(host, _Host())
            if state.not_before > self._clock.monotonic():
                return 0
            spare = max(0, self._connections - state.blobs - state.waiting)
        for shared in self._shared if spare else ():
            spare = 0 if shared.rest(host) > 0 else spare
            spare = min(spare, shared.free(host, "blobs", self._connections))
        return spare

    def _sleep(self, seconds: float, host: str, cancelled: Callable[[], bool] | None) -> None:
        end = self._clock.monotonic() + seconds
        while (rest := end - self._clock.monotonic()) > 0:
            if cancelled is not None and cancelled():
                raise CancelledError(f"request to {host}")
            self._clock.sleep(min(rest, POLL_SECONDS))


class HostMeter:
    """The bytes of one answer, as a part of all that come from its host."""

    def __init__(self, limiter: Limiter, host: str, cancelled: Callable[[], bool]) -> None:
        self._limiter = limiter
        self._host = host
        self._cancelled = cancelled
        self.piece_size = limiter.piece_size

    def pay(self, count: int) -> None:
        """Book bytes and wait until the line is free; raises CancelledError."""
        self._limiter.spend(self._host, count, self._cancelled)

    def charge(self, count: int) -> None:
        """Book bytes without waiting: the next ones will."""
        self._limiter.charge(self._host, count)


def _permit(shared: SharedLimits, host: str, kind: Kind, limit: int) -> Callable[[], None] | None:
    """Return what gives a permit back, None when there is none or nobody may use one now."""
    release = shared.permit(host, kind, limit)
    # Looked at with the permit in hand: who had it before may have been asked for the pause.
    if release is not None and shared.rest(host) > 0:
        release()
        return None
    return release


def _nothing() -> None:
    """Give nothing back."""
