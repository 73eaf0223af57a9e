"""The fetchers of pre-warm runs in one fetching actor.

Invariant: whatever ways its images are reached by, all that this process fetches of a run shares
one bandwidth, one line for permits and one memory of who lied, as long as the run is among the last
few; tokens come with the tasks and are kept in memory only.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stowray.actors import cluster
from stowray.actors.lease_client import ANSWER_SECONDS, LeaseClient
from stowray.actors.run_limits import RunLimits
from stowray.pipeline.clock import SYSTEM_CLOCK
from stowray.pipeline.spread import Part
from stowray.pipeline.spread_fetch import SpreadFetcher
from stowray.pipeline.spread_shared import Shared

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stowray.actors.engines import MemberEngine
    from stowray.pipeline.clock import Clock
    from stowray.pipeline.source import Source

# As many as images come at once to a node; a fetcher is made again at little cost.
KEPT = 4
# What a run has in common outlives its fetchers.
KEPT_RUNS = 4


@dataclass(frozen=True, slots=True)
class _Run:
    """What all fetchers of a run have in common here."""

    shared: Shared
    limits: RunLimits


@dataclass(frozen=True, slots=True)
class _Kept:
    """A fetcher and its engine, kept with it: the number of one that has gone may be used again."""

    engine: MemberEngine
    fetcher: SpreadFetcher


class SpreadFetchers:
    """One fetcher per part and engine, over what their run has in common; thread-safe."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._fetchers: OrderedDict[tuple[str, int], _Kept] = OrderedDict()
        self._runs: OrderedDict[tuple[str, str], _Run] = OrderedDict()

    def get(self, task: Mapping[str, Any], engine: MemberEngine, source: Source) -> SpreadFetcher:
        """Return the fetcher for the run that a task's ``spread`` belongs to."""
        spread = task["spread"]
        key = (str(spread["stamp"]), id(engine))
        with self._lock:
            run = self._run(spread)
            kept = self._fetchers.get(key)
            if kept is None:
                kept = self._fetchers[key] = _Kept(engine, _make(spread, run, engine, source))
            self._fetchers.move_to_end(key)
            while len(self._fetchers) > KEPT:
                self._fetchers.popitem(last=False)
            return kept.fetcher

    def _run(self, spread: Mapping[str, Any]) -> _Run:
        """Return what a run has in common, also of parts that are dealt to the node anew."""
        # The owner of the leases is told the address: it stays true as long as this is used.
        key = (str(spread["run"]), str(spread["address"]))
        run = self._runs.get(key)
        if run is None:
            leases = lease_client(spread)
            shared = Shared(
                node=str(spread["node"]),
                token=str(spread["token"]),
                leases=leases,
                bandwidth=int(spread["bandwidth"]),
                clock=self._clock,
            )
            run = self._runs[key] = _Run(shared, RunLimits(leases))
        self._runs.move_to_end(key)
        while len(self._runs) > KEPT_RUNS:
            self._runs.popitem(last=False)
        return run


def _make(
    spread: Mapping[str, Any], run: _Run, engine: MemberEngine, source: Source
) -> SpreadFetcher:
    origin, fallback = engine.run_side(source, run.limits)
    return SpreadFetcher(
        engine.store,
        [origin],
        engine.settings.registry,
        part=Part.from_dict(spread["part"]),
        shared=run.shared,
        fallback=fallback,
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
