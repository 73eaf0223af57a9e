"""A pre-warm run under way: its nodes found, looked at, and brought to have its images.

Invariant: bytes flow only after every node of a batch has its address known and its part accepted;
a wave begins only when enough nodes of those before it were found complete on disk; who does not
answer in time is left behind, and taken in later if it comes. All of it runs on one event loop.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stowray.actors import cluster, foreign
from stowray.actors.node_names import chosen_name, unique_names
from stowray.actors.prewarm_images import RunImage
from stowray.actors.prewarm_node import BEGIN_SECONDS, RunNode
from stowray.actors.prewarm_parts import Parts
from stowray.pipeline.cluster_plan import ClusterPlan
from stowray.pipeline.errors import NodeError, StowrayError, UsageError, describe
from stowray.pipeline.prewarm_plan import NodeFacts, expand_waves
from stowray.pipeline.prewarm_report import WaveRow

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from stowray.actors.prewarm_images import RunImages
    from stowray.actors.prewarm_node import RunContext
    from stowray.pipeline.prewarm_plan import ImageWish
    from stowray.pipeline.prewarm_survey import NodeSurvey

# When half of the nodes have answered, the others get so much more time before the run begins
# without them; at the least, and as a multiple of what that half took.
STRAGGLER_SECONDS = 10.0
STRAGGLER_FACTOR = 1.5
# So many ready nodes serve those that join a cluster that is being watched.
HELPERS = 4
_HEAD = "node:__internal_head__"


class ClusterRun:
    """All nodes of a run by Ray's ID; ``driver_node`` is the one that this process runs on."""

    def __init__(self, context: RunContext, images: RunImages, *, driver_node: str) -> None:
        self.nodes: dict[str, RunNode] = {}
        self.names: dict[str, str] = {}
        self.surveys: dict[str, NodeSurvey] = {}
        self._context = context
        self._images = images
        self._driver_node = driver_node
        self._parts = Parts(fan_out=context.plan.limits.fan_out)
        self._late: dict[asyncio.Task[Any], RunNode] = {}
        self._stores: dict[str, asyncio.Lock] = {}
        self._wave = 0

    # -- nodes ------------------------------------------------------------------------------------

    async def gather(self, described: Iterable[Mapping[str, Any]]) -> list[RunNode]:
        """Name the nodes, select those that the plan wants, and have each begin.

        Returns those that did in good time, in the order of their names; the others have failed or
        are late. Raises UsageError when the plan selects none.
        """
        chosen = await self._select(list(described))
        begun = time.monotonic()
        tasks: dict[asyncio.Task[Any], RunNode] = {
            asyncio.ensure_future(self._begin(node)): node for node in chosen
        }
        await self._most(tasks, begun)
        for task, node in tasks.items():
            if not task.done():
                self._late[task] = node
        ready = [node for task, node in tasks.items() if task.done() and task.result()]
        await self._tell_addresses(ready)
        return ready

    async def _select(self, described: list[Mapping[str, Any]]) -> list[RunNode]:
        context = self._context
        selection = context.plan.nodes
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
        # Documents are kept in the store of the node that this is.
        self._images.node = self.names.get(self._driver_node, "")
        facts = [_facts(self.names[str(entry["NodeID"])], entry) for entry in described]
        found: list[RunNode] = []
        for entry, report, fact in zip(described, reports, facts, strict=True):
            if not selection.takes(fact):
                continue
            context.state.forget_node(fact.name)
            context.state.update_node(fact.name, node_id=fact.node_id, wave=self._wave)
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
                unpackers=_unpackers(context.settings.unpack.workers, fact.resources),
            )
            found.append(node)
        for pattern in selection.unmatched(facts):
            context.state.warnings.append(f"no node is called {pattern}")
        if not found and not context.state.nodes:
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

    async def _begin(self, node: RunNode) -> bool:
        try:
            await node.begin()
        except StowrayError as error:
            if not node.is_dead:
                self._context.state.fail_node(node.name, describe(error))
            node.finished.set()
            return False
        return True

    async def _most(self, tasks: Mapping[asyncio.Task[Any], RunNode], begun: float) -> None:
        """Wait for all, but for stragglers not much longer than for the first half."""
        pending = set(tasks)
        until = begun + BEGIN_SECONDS
        while pending and time.monotonic() < until:
            _, pending = await asyncio.wait(
                pending,
                timeout=max(0.0, until - time.monotonic()),
                return_when=asyncio.FIRST_COMPLETED,
            )
            if 2 * len(pending) <= len(tasks) and until == begun + BEGIN_SECONDS:
                took = time.monotonic() - begun
                until = min(until, begun + took + max(STRAGGLER_SECONDS, STRAGGLER_FACTOR * took))

    async def _tell_addresses(self, nodes: Sequence[RunNode]) -> None:
        """Let the owner of the leases know where nodes serve; they tell it themselves as well."""
        context = self._context
        context.resolver.tell.remote(
            context.run,
            context.plan.limits.origin_connections,
            {node.name: node.address for node in nodes},
        )

    # -- images -----------------------------------------------------------------------------------

    async def look(self, nodes: Sequence[RunNode]) -> list[RunNode]:
        """Resolve what these nodes are to have, ask what they have, and refuse those without room.

        Returns those that take part.
        """
        await self.assign(nodes)
        await asyncio.gather(*(self._survey(node) for node in nodes))
        plan = self.cluster_plan()
        state = self._context.state
        takes_part = []
        by_name = {entry.name: entry for entry in plan.nodes}
        for node in nodes:
            entry = by_name[node.name]
            state.update_node(
                node.name,
                disk_free=entry.disk_free,
                disk_needed=entry.disk_needed,
                shares_with=entry.shares_with,
            )
            node.shares_with = entry.shares_with
            if node.is_dead or node.survey.error is not None:
                continue
            if entry.error is not None:
                state.fail_node(node.name, entry.error, "refused")
                node.finished.set()
                await node.end(0.0)
                continue
            takes_part.append(node)
        self._parts.add_blobs(
            {
                layer.digest: layer.size
                for image in self._images.all()
                for layer in image.planned.layers
            }
        )
        return takes_part

    async def assign(self, nodes: Sequence[RunNode]) -> None:
        """Give each node its images and the report its cells."""
        wishes = self._context.plan.images
        await asyncio.gather(
            *(
                self._images.get(wish, platform)
                for platform in {node.platform for node in nodes}
                for wish in wishes
            )
        )
        for node in nodes:
            node.images = []
            for wish in wishes:
                await self._assign(node, wish)
        self._note_images()

    async def _assign(self, node: RunNode, wish: ImageWish) -> None:
        state = self._context.state
        reference = wish.reference.canonical
        image = await self._images.get(wish, node.platform)
        if isinstance(image, RunImage):
            node.images.append(image)
            state.update_cell(node.name, reference, digest=image.planned.digest)
        elif image is None:
            state.update_cell(node.name, reference, status="skipped")
        else:
            state.update_cell(node.name, reference, status="failed", error=describe(image))
            state.update_image(reference, error=describe(image))

    def _note_images(self) -> None:
        state = self._context.state
        state.manifest_requests = self._images.requests
        blobs: dict[str, dict[str, int]] = {}
        for wish in self._context.plan.images:
            state.update_image(wish.reference.canonical)
        for image in self._images.all():
            planned = image.planned
            blobs.setdefault(planned.reference, {}).update(planned.blobs)
            row = state.images[planned.reference]
            state.update_image(
                planned.reference,
                resolved=planned.resolved,
                digests=row.digests | {planned.platform: planned.digest},
                size=sum(blobs[planned.reference].values()),
            )

    async def _survey(self, node: RunNode) -> None:
        try:
            survey = await node.look()
        except StowrayError as error:
            if not node.is_dead:
                self._context.state.fail_node(node.name, describe(error))
            node.finished.set()
            survey = node.survey = replace(node.survey, error=describe(error))
        self.surveys[node.name] = survey

    def cluster_plan(self) -> ClusterPlan:
        """Return what is to be done, from all surveys so far."""
        return ClusterPlan.of(
            [self.surveys[name] for name in self._context.state.nodes if name in self.surveys],
            [image.planned for image in self._images.all()],
            self._context.plan.limits,
            self._images.quota,
            waves=self._context.plan.waves,
        )

    # -- work -------------------------------------------------------------------------------------

    async def warm_in_waves(self, nodes: Sequence[RunNode]) -> None:
        """Warm all nodes, wave after wave as long as enough of them become ready.

        Waves and fractions count all nodes that were selected, also those that have failed before.
        """
        state, failure = self._context.state, self._context.plan.failure
        able = {node.name: node for node in nodes}
        names = list(state.nodes)
        waves = [
            [names[place] for place in wave]
            for wave in expand_waves(self._context.plan.waves, len(names))
        ]
        for number, wave in enumerate(waves):
            for name in wave:
                state.update_node(name, wave=number)
        so_far: list[str] = []
        for number, wave in enumerate(waves):
            is_last = number + 1 == len(waves)
            self._wave = number
            state.waves[number] = WaveRow(number, tuple(wave), started=round(state.seconds, 3))
            await self.warm([able[name] for name in wave if name in able], with_late=is_last)
            so_far += wave
            ready = sum(state.nodes[name].state == "ready" for name in so_far)
            passed = failure.is_enough(ready, len(so_far))
            state.waves[number] = replace(
                state.waves[number],
                ready=sum(state.nodes[name].state == "ready" for name in wave),
                completed=round(state.seconds, 3),
                passed=passed,
            )
            state.changed = True
            if not passed and not is_last:
                reason = f"not begun: only {ready} of the {len(so_far)} nodes before it are ready"
                for name in names[len(so_far) :]:
                    if state.nodes[name].state == "waiting":
                        state.skip_node(name, NodeError(name, reason))
                return

    async def warm(self, nodes: Sequence[RunNode], *, with_late: bool = False) -> None:
        """Bring these nodes to have their images, as many at a time as the plan allows."""
        waiting = deque(node for node in nodes if not node.shares_with)
        at_once = self._context.plan.limits.nodes_at_once or (1 << 30)
        working: dict[asyncio.Task[Any], RunNode | None] = {
            asyncio.ensure_future(self._follow_writer(node)): None
            for node in nodes
            if node.shares_with
        }
        late = self._late if with_late else {}
        while waiting or working or late:
            busy = [node for node in working.values() if node is not None]
            room = at_once - len(busy)
            if waiting and room > 0:
                batch = [waiting.popleft() for _ in range(min(room, len(waiting)))]
                for node in await self._admit(batch, [node.name for node in busy]):
                    working[asyncio.ensure_future(node.work())] = node
                continue
            done, _ = await asyncio.wait({*working, *late}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task in working:
                    del working[task]
                    task.result()
                    continue
                node = late.pop(task)
                if task.result():
                    await self._tell_addresses([node])
                    waiting.extend(await self.look([node]))

    async def _admit(self, batch: Sequence[RunNode], working: Sequence[str]) -> list[RunNode]:
        """Give nodes their parts; return those that accepted."""
        holders = [
            node.holder_state()
            for node in self.nodes.values()
            if node.is_serving and self._context.state.nodes[node.name].state == "ready"
        ]
        batch = [node for node in batch if not node.is_dead]
        mine = {node.name for node in batch}
        parts = self._parts.deal(
            [node.spread_state() for node in batch],
            [holder for holder in holders if holder.name not in mine],
            working,
        )
        accepted = await asyncio.gather(*(self._accept(node, parts[node.name]) for node in batch))
        return [node for node, is_in in zip(batch, accepted, strict=True) if is_in]

    async def _accept(self, node: RunNode, part: Any) -> bool:
        try:
            await node.accept(part, self._parts.digests)
        except StowrayError as error:
            if not node.is_dead:
                self._context.state.fail_node(node.name, describe(error))
            node.finished.set()
            return False
        return True

    async def _follow_writer(self, node: RunNode) -> None:
        """Look at a store that another node fills, once that one has; fill it if it did not."""
        writer = next(other for other in self.nodes.values() if other.name == node.shares_with)
        await writer.finished.wait()
        async with self._stores.setdefault(node.nonce, asyncio.Lock()):
            await self._survey(node)
            if node.lacks:
                for accepted in await self._admit([node], []):
                    await accepted.work()
                return
        if await self._accept(node, self._parts.deal([node.spread_state()], [], [])[node.name]):
            await node.work()

    # -- watching ---------------------------------------------------------------------------------

    def note_living(self, alive: Mapping[str, Any], *, is_over: bool = False) -> None:
        """Take note of who is gone; ``is_over``: the run is, and nodes may leave as they like."""
        context = self._context
        for node_id, node in list(self.nodes.items()):
            if node_id in alive or node.is_dead:
                continue
            node.die("the node has left the cluster or is dead")
            context.resolver.node_died.remote(context.run, node.name)
            if is_over:
                context.state.warnings.append(f"{node.name} has left the cluster")
                context.state.forget_node(node.name)
                del self.nodes[node_id]
            else:
                context.state.lose_node(node.name, "the node has left the cluster or is dead")

    async def rest(self) -> None:
        """End all actors on the nodes: an autoscaler must be able to take an idle one away."""
        await asyncio.gather(*(node.end() for node in self.nodes.values()))

    async def join(self, described: Sequence[Mapping[str, Any]]) -> None:
        """Warm nodes that have come to a cluster that was warm, from some that are."""
        nodes = await self.gather(described)
        ready = [
            node
            for node in self.nodes.values()
            if self._context.state.nodes[node.name].state == "ready"
        ][:HELPERS]
        await asyncio.gather(*(self._help(node) for node in ready))
        await self.warm(await self.look(nodes), with_late=True)
        await self.rest()

    async def _help(self, node: RunNode) -> None:
        try:
            await node.begin()
            await node.look()
            if node.lacks:
                # It was ready and is not any more: what it has it gives, no more is asked of it.
                node.is_serving = False
                return
            await node.accept(self._parts.empty(node.name), self._parts.digests)
        except StowrayError:
            # Others help, and the origin does.
            node.is_serving = False

    async def close(self, seconds: float) -> None:
        """End everything on all nodes."""
        for task in self._late:
            task.cancel()
        for node in self.nodes.values():
            node.cancel()
        await asyncio.gather(*(node.end(seconds) for node in self.nodes.values()))


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
