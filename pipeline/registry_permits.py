"""How many connections the nodes of a run have to one registry together.

Invariant: no more permits are out than the limit, but for those that were out before a restart;
a permit ends with its time unless it is renewed, and with its node.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from stowray.pipeline.errors import UsageError
from stowray.pipeline.origin_leases import DEFAULT_TTL_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable


class RegistryPermits:
    """How many connections a whole cluster has to one registry at a time; called by one thread.

    A permit ends like a lease: given back, not renewed, or with its node. Those who wait are served
    in the order in which they first asked, and lose their place when they do not ask again.
    """

    def __init__(
        self,
        monotonic: Callable[[], float],
        limit: int,
        *,
        ttl_seconds: float = DEFAULT_TTL_SECONDS,
        restarted: bool = False,
    ) -> None:
        if limit < 1:
            raise UsageError("origin_connections", "must be at least 1")
        self._now = monotonic
        self._limit = limit
        self._ttl = ttl_seconds
        self._until: dict[tuple[str, str], float] = {}
        self._line: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._pause_until = 0.0
        self._quiet_until = monotonic() + ttl_seconds if restarted else 0.0

    def ask(self, node: str, purpose: str) -> float:
        """Return for how many seconds ``node`` may use one connection for ``purpose``.

        0: not now, ask again. Asking for what one has renews it.
        """
        now = self._now()
        permit = (node, purpose)
        self._forget(now)
        if permit in self._until:
            self._until[permit] = now + self._ttl
            return self._ttl
        # A place in the line is kept, not moved back, by asking again.
        self._line[permit] = now + self._ttl
        if now < max(self._pause_until, self._quiet_until):
            return 0.0
        free = self._limit - len(self._until)
        for place, waiting in enumerate(self._line):
            if place >= free:
                return 0.0
            if waiting == permit:
                break
        del self._line[permit]
        self._until[permit] = now + self._ttl
        return self._ttl

    def give_back(self, node: str, purpose: str) -> None:
        """End a permit, or the wait for one."""
        self._until.pop((node, purpose), None)
        self._line.pop((node, purpose), None)

    def node_died(self, node: str) -> None:
        """End all permits and waits of ``node``."""
        for table in (self._until, self._line):
            for permit in [permit for permit in table if permit[0] == node]:
                del table[permit]

    def declare(self, node: str, purpose: str) -> float:
        """Enter again a permit of before a restart, also beyond the limit; return its seconds."""
        if self._now() >= self._quiet_until:
            return self.ask(node, purpose)
        self._until[node, purpose] = self._now() + self._ttl
        return self._ttl

    def pause(self, seconds: float) -> None:
        """Give no new permits for ``seconds``: the registry said that this is too much (429)."""
        self._pause_until = max(self._pause_until, self._now() + seconds)

    @property
    def used(self) -> int:
        """How many permits are out."""
        self._forget(self._now())
        return len(self._until)

    def _forget(self, now: float) -> None:
        for table in (self._until, self._line):
            for permit in [permit for permit, until in table.items() if until <= now]:
                del table[permit]
