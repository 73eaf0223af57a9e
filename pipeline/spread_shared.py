"""What all stripes of one node share in a run: whom they trust, what they expect, what they may.

Invariant: all images of the run share it, so that a limit is the node's and not an image's, and who
lied about one blob is asked for no other. A slot is held only while bytes flow, so that stripes
which wait for each other's nodes never keep those from going on that others wait for.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from copy import copy
from typing import TYPE_CHECKING, Final, Self

from stowray.pipeline.clock import SYSTEM_CLOCK
from stowray.pipeline.errors import DeadlineError, NodeError
from stowray.pipeline.peer_client import PeerClient
from stowray.pipeline.source_actions import Patience
from stowray.pipeline.source_standing import Pace, Standing
from stowray.pipeline.spread_permits import Permits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from stowray.pipeline.clock import Clock
    from stowray.pipeline.source_choice import SourceChoice
    from stowray.pipeline.spread_leases import Leases

DEFAULT_STREAMS: Final = 32
# Shorter sleeps would be inexact and cost more than they save.
_SHORTEST_SLEEP: Final = 0.02
# What the owner of the leases may fail with without anything being lost.
OWNER_ERRORS: Final = (NodeError, DeadlineError)


class Pulse:
    """The pace of one node: what its streams get, looked at once in a while by any of them."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock = clock
        self._seconds = seconds
        self._pace = Pace()
        self._lock = threading.Lock()
        self._streams: dict[SourceChoice, int] = {}
        self._beat_at = clock.monotonic() + seconds

    @property
    def expected(self) -> float:
        """The rate that a stream may expect, in bytes per second."""
        return self._pace.expected

    def add(self, choice: SourceChoice) -> None:
        """Count a stream from now on."""
        with self._lock:
            self._streams[choice] = choice.taken

    def remove(self, choice: SourceChoice) -> None:
        """Count it no longer; harmless when it is not counted."""
        with self._lock:
            self._streams.pop(choice, None)

    def beat(self) -> None:
        """Look at all streams if it is time to."""
        now = self._clock.monotonic()
        if now < self._beat_at:
            return
        with self._lock:
            seconds = now - self._beat_at + self._seconds
            if now < self._beat_at:
                return
            self._beat_at = now + self._seconds
            self._pace.observe(self._rates(seconds))

    def _rates(self, seconds: float) -> Iterator[float]:
        for choice, before in list(self._streams.items()):
            taken = choice.taken
            self._streams[choice] = taken
            if choice.source and not choice.is_starved:
                yield (taken - before) / seconds


class Throttle:
    """Lets no more than so many bytes per second pass, for all streams together; 0: no limit."""

    def __init__(self, bytes_per_second: int, clock: Clock) -> None:
        self._rate = bytes_per_second
        self._clock = clock
        self._lock = threading.Lock()
        self._paid_until = 0.0

    def spend(self, count: int, is_over: Callable[[], bool]) -> None:
        """Wait as long as ``count`` bytes last, or until it ``is_over``."""
        if not self._rate:
            return
        now = self._clock.monotonic()
        with self._lock:
            self._paid_until = until = max(self._paid_until, now) + count / self._rate
        while (left := until - self._clock.monotonic()) > _SHORTEST_SLEEP and not is_over():
            self._clock.sleep(min(left, 0.1))


class Shared:
    """See the module; one per run, node and process, and one view of it per part.

    ``token`` is what peers of the run want to see. ``streams`` bounds how many stripes bring bytes
    from peers at once: those that wait for bytes do not count. ``bandwidth`` is in bytes per second
    for all of them together, 0: no limit.
    """

    def __init__(
        self,
        *,
        node: str,
        token: str,
        leases: Leases,
        bandwidth: int = 0,
        streams: int = DEFAULT_STREAMS,
        patience: Patience | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        patience = patience or Patience()
        self.node = node
        self.leases = leases
        self.permits = Permits(leases, clock)
        self.client = PeerClient(
            token,
            connect_seconds=patience.silence + patience.answer,
            answer_seconds=patience.answer,
        )
        self.patience = patience
        self.clock = clock
        self.standing = Standing(patience.avoid)
        self.pulse = Pulse(clock, patience.silence)
        self.throttle = Throttle(bandwidth, clock)
        self.slots = threading.BoundedSemaphore(max(1, streams))
        self._addresses: dict[str, str] = {}

    def at(self, addresses: Mapping[str, str]) -> Self:
        """Return the same as a part sees it whose sources are at these ``addresses``.

        A part that was dealt anew has other sources, perhaps elsewhere; what the node has seen of
        its peers, and what it may, are of the run.
        """
        view = copy(self)
        view._addresses = dict(addresses)
        return view

    def address(self, node: str) -> str:
        """Return where ``node`` serves; empty when nobody knows."""
        address = self._addresses.get(node, "")
        if not address and node:
            with suppress(*OWNER_ERRORS):
                address = self.leases.address(node)
            if address:
                self._addresses[node] = address
        return address
