"""The nodes of a pre-warm run: named, selected, and begun.

Invariant: no two nodes that live have one name, and one that comes again has its old one; who does
not answer in time is left behind, late but not forgotten.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING, Any

from stowray.actors import cluster, foreign
from stowray.actors.node_names import chosen_name, unique_names
from stowray.actors.prewarm_node import BEGIN_SECONDS, RunNode
from stowray.pipeline.errors import NodeError, StowrayError, UsageError, describe
from stowray.pipeline.prewarm_plan import NodeFacts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stowray.actors.prewarm_context import RunContext

# When half of the nodes have answered, the others get so much more time before the run begins
# without them; at the least, and as a multiple of what that half took.
STRAGGLER_SECONDS = 10.0
STRAGGLER_FACTOR = 1.5
# What one that came back has for beginning anew: nobody waits longer for it.
RETURN_SECONDS = 45.0
_HEAD = "node:__internal_head__"


class Muster:
    """All nodes of a run by Ray's ID; ``driver_node`` is the one that this process runs on."""

    def __init__(self, context: RunContext, driver_node: str) -> None:
        self.nodes: dict[str, RunNode] = {}
        self.names: dict[str, str] = {}
        self._context = context
        self._driver_node = driver_node

    @property
    def driver_name(self) -> str:
        """Return the name of the node that this process runs on; empty when it was not seen."""
        return self.names.get(self._driver_node, "")

    async def gather(
        self, described: Iterable[Mapping[str, Any]], wave: int, *, for_all: bool = False
    ) -> tuple[list[RunNode], dict[asyncio.Task[bool], RunNode]]:
        """Name the nodes, select those that the plan wants, and have each begin.

        Returns those that did in good time, in the order of their names, and those that are late
        with what tells whether they have begun after all; ``for_all`` waits until there are none,
        which the deadline of each node's beginning bounds. Raises UsageError when the plan selects
        none of the nodes that are there first.
        """
        chosen = await self._select(list(described), wave)
        begun = time.monotonic()
        tasks = {asyncio.ensure_future(self.begin(node)): node for node in chosen}
        try:
            if for_all:
                await asyncio.gather(*tasks)
            else:
                await _most(tasks, begun)
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            raise
        late = {task: node for task, node in tasks.items() if not task.done()}
        return [node for task, node in tasks.items() if task.done() and task.result()], late

    async def begin(self, node: RunNode) -> bool:
        """Have a node begin; return whether it has, and note it as failed if not."""
        try:
            await node.begin()
        except StowrayError as error:
            node.fail(error)
            return False
        return True

    async def begin_again(self, node: RunNode) -> bool:
        """Have a node that has come back begin as if nothing were known of it."""
        await node.end(0.0)
        renewed = self.nodes[node.node_id] = node.renewed()
        self._context.state.take_back(node.name)
        try:
            async with asyncio.timeout(RETURN_SECONDS):
                return await self.begin(renewed)
        except TimeoutError:
            self._context.state.lose_node(node.name, "it came back and does not begin")
            renewed.die("it came back and does not begin")
            return False

    async def _select(self, described: list[Mapping[str, Any]], wave: int) -> list[RunNode]:
        context = self._context
        selection = context.plan.nodes
        # Later ones are of nodes that join, which say nothing of those that were there before.
        is_first = not self.names
        reports = await asyncio.gather(*(self._probe(entry) for entry in described))
        wished = [
            (report.node_id, self._wished_name(entry, report))
            for entry, report in zip(described, reports, strict=True)
        ]
        # One that left and comes again under its name, with another ID, has its store again.
        taken = {
            node_id: name
            for node_id, name in self.names.items()
            if node_id in self.nodes and not self.nodes[node_id].is_dead
        }
        self.names |= unique_names(wished, taken)
        facts = [_facts(self.names[str(entry["NodeID"])], entry) for entry in described]
        found: list[RunNode] = []
        for entry, report, fact in zip(described, reports, facts, strict=True):
            if not selection.takes(fact):
                continue
            context.state.forget_node(fact.name)
            context.state.update_node(fact.name, node_id=fact.node_id, wave=wave)
            complaint = foreign.complaint(report)
            if complaint:
                reason = foreign.mismatch([f"{fact.name} {complaint}"])
                context.state.fail_node(fact.name, describe(NodeError(fact.name, reason)))
                continue
            node = RunNode(
                context,
                name=fact.name,
                node_id=fact.node_id,
                host=str(entry["NodeManagerAddress"]),
                raylet=f"{entry['NodeManagerAddress']}:{entry['NodeManagerPort']}",
                unpackers=_unpackers(context.settings.unpack.workers, fact.resources),
            )
            found.append(node)
        if is_first:
            context.state.warnings += [
                f"no node is called {pattern}" for pattern in selection.unmatched(facts)
            ]
        if is_first and not found and not context.state.nodes:
            names = ", ".join(fact.name for fact in facts)
            raise UsageError("nodes", f"the plan selects none of the cluster's nodes ({names})")
        found.sort(key=lambda node: _natural(node.name))
        self.nodes |= {node.node_id: node for node in found}
        context.nodes = max(1, len(self.nodes))
        # In the report they stand in the order in which they begin.
        rows = context.state.nodes
        for name in sorted({fact.name for fact in facts} & rows.keys(), key=_natural):
            rows[name] = rows.pop(name)
        return found

    async def _probe(self, entry: Mapping[str, Any]) -> foreign.NodeReport:
        node_id, address = str(entry["NodeID"]), str(entry["NodeManagerAddress"])
        call = foreign.ask(node_id)
        try:
            found = await cluster.ask(call, f"node {address}", foreign.PROBE_SECONDS)
        except StowrayError as error:
            return foreign.NodeReport(node_id, address, error=str(error))
        return foreign.NodeReport(node_id, address, **found)

    def _wished_name(self, entry: Mapping[str, Any], report: foreign.NodeReport) -> str:
        own = self._context.settings.node if report.node_id == self._driver_node else ""
        return chosen_name(own or report.node, entry, report.host)


async def _most(tasks: Iterable[asyncio.Task[bool]], begun: float) -> None:
    """Wait for all, but for stragglers not much longer than for the first half."""
    pending = set(tasks)
    total = len(pending)
    until = begun + BEGIN_SECONDS
    while pending and time.monotonic() < until:
        _, pending = await asyncio.wait(
            pending,
            timeout=max(0.0, until - time.monotonic()),
            return_when=asyncio.FIRST_COMPLETED,
        )
        if 2 * len(pending) <= total and until == begun + BEGIN_SECONDS:
            took = time.monotonic() - begun
            until = min(until, begun + took + max(STRAGGLER_SECONDS, STRAGGLER_FACTOR * took))


def _facts(name: str, entry: Mapping[str, Any]) -> NodeFacts:
    resources = {str(key): float(value) for key, value in entry["Resources"].items()}
    return NodeFacts(
        name=name,
        node_id=str(entry["NodeID"]),
        address=str(entry["NodeManagerAddress"]),
        labels={str(key): str(value) for key, value in (entry.get("Labels") or {}).items()},
        resources=resources,
        is_head=_HEAD in resources,
    )


def _unpackers(configured: int, resources: Mapping[str, float]) -> int:
    """Return how many layers a node stages at once: by its processors as Ray counts them."""
    return configured or max(1, min(8, int(resources.get("CPU", 1.0))))


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key by which ``n10`` comes after ``n9``."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]
