"""The fetchers of pre-warm runs in one fetching actor.

Invariant: all blobs of a run that this process fetches share one fetcher, which so remembers which
sources failed; tokens come with the tasks and are kept in memory only.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from stowray.actors import cluster
from stowray.actors.lease_client import ANSWER_SECONDS, LeaseClient
from stowray.actors.run_limits import RunLimits
from stowray.pipeline.spread import Part
from stowray.pipeline.spread_fetch import SpreadFetcher

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stowray.actors.engines import MemberEngine
    from stowray.pipeline.source import Source

KEPT = 4


class SpreadFetchers:
    """One fetcher per run and part; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fetchers: OrderedDict[tuple[str, int], SpreadFetcher] = OrderedDict()

    def get(self, task: Mapping[str, Any], engine: MemberEngine, source: Source) -> SpreadFetcher:
        """Return the fetcher for the run that a task's ``spread`` belongs to."""
        spread = task["spread"]
        key = (str(spread["stamp"]), id(engine))
        with self._lock:
            fetcher = self._fetchers.get(key)
            if fetcher is None:
                fetcher = self._fetchers[key] = _make(spread, engine, source)
            self._fetchers.move_to_end(key)
            while len(self._fetchers) > KEPT:
                self._fetchers.popitem(last=False)
            return fetcher


def _make(spread: Mapping[str, Any], engine: MemberEngine, source: Source) -> SpreadFetcher:
    leases = lease_client(spread)
    origin, fallback = engine.run_side(source, RunLimits(leases))
    return SpreadFetcher(
        engine.store,
        [origin],
        engine.settings.registry,
        node=str(spread["node"]),
        part=Part.from_dict(spread["part"]),
        token=str(spread["token"]),
        leases=leases,
        fallback=fallback,
        bandwidth=int(spread["bandwidth"]),
    )


def lease_client(spread: Mapping[str, Any]) -> LeaseClient:
    """Return the way from this process to the owner of the leases of a task's ``spread``."""
    owner = spread["leases"]

    def send(request: dict[str, Any]) -> dict[str, Any]:
        call = owner.leases.remote(request)
        reply: dict[str, Any] = cluster.wait(call, "the run's leases", seconds=ANSWER_SECONDS)
        return reply

    return LeaseClient(
        send,
        run=str(spread["run"]),
        node=str(spread["node"]),
        address=str(spread["address"]),
        connections=int(spread["connections"]),
    )
