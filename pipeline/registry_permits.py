"""How many connections the nodes of a run have to one registry together.

Invariant: no more permits are out than the limit, but for those that were out before a restart;
a permit ends with its time unless it is renewed, and with its node.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from stowray.pipeline.errors import UsageError
from stowray.pipeline.origin_leases import DEFAULT_TTL_SECONDS, Later

if TYPE_CHECKING:
    from collections.abc import Callable

# Who waits asks again after so long, and so much later for each one that is before it in the line.
_SHORTEST_WAIT: Final = 0.02
_WAIT_PER_PLACE: Final = 0.04
_LONGEST_WAIT: Final = 0.5
# Where permits last long, one more fraction of that does not matter.
_PATIENCE: Final = 0.25


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
        self._moved = monotonic()  # when a permit last was given or given back

    def ask(self, node: str, purpose: str) -> float | Later:
        """Return for how many seconds ``node`` may use one connection for ``purpose``.

        Or when to ask again: soon for who is next in a line that moves. Asking for what one has
        renews it.
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
            return Later(_LONGEST_WAIT)
        place = list(self._line).index(permit) - (self._limit - len(self._until))
        if place >= 0:
            return self._wait(place, now)
        del self._line[permit]
        self._until[permit] = now + self._ttl
        self._moved = now
        return self._ttl

    def give_back(self, node: str, purpose: str) -> None:
        """End a permit, or the wait for one."""
        if self._until.pop((node, purpose), None) is not None:
            self._moved = self._now()
        self._line.pop((node, purpose), None)

    def node_died(self, node: str) -> None:
        """End all permits and waits of ``node``."""
        for table in (self._until, self._line):
            for permit in [permit for permit in table if permit[0] == node]:
                del table[permit]

    def declare(self, node: str, purpose: str) -> float | Later:
        """Enter again a permit of before a restart, also beyond the limit; see :meth:`ask`."""
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

    def _wait(self, place: int, now: float) -> Later:
        """Return when who has ``place`` others before it in the line asks again."""
        turn = _SHORTEST_WAIT + _WAIT_PER_PLACE * place
        return Later(min(max(turn, _PATIENCE * (now - self._moved)), _LONGEST_WAIT))

    def _forget(self, now: float) -> None:
        for table in (self._until, self._line):
            for permit in [permit for permit, until in table.items() if until <= now]:
                del table[permit]
