"""A pre-warm run under way: its nodes found, looked at, and brought to have its images.

Invariant: bytes flow only after every node of a batch has its address known and its part accepted;
a wave begins only when enough nodes of those before it were found complete on disk; who does not
answer in time is left behind, and taken in later if it comes. All of it runs on one event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stowray.actors import cluster
from stowray.actors.prewarm_images import RunImage
from stowray.actors.prewarm_muster import Muster
from stowray.actors.prewarm_parts import Parts
from stowray.actors.prewarm_silent import SilentNodes
from stowray.pipeline.cluster_plan import ClusterPlan
from stowray.pipeline.errors import NodeError, StowrayError, describe
from stowray.pipeline.prewarm_plan import expand_waves
from stowray.pipeline.prewarm_rows import WaveRow, count_ready

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping, Sequence

    from stowray.actors.prewarm_context import RunContext
    from stowray.actors.prewarm_images import RunImages
    from stowray.actors.prewarm_node import RunNode
    from stowray.pipeline.prewarm_plan import ImageWish
    from stowray.pipeline.prewarm_survey import NodeSurvey

# So many ready nodes serve those that join a cluster that is being watched.
HELPERS = 4


class ClusterRun:
    """All nodes of a run by Ray's ID; ``driver_node`` is the one that this process runs on."""

    def __init__(self, context: RunContext, images: RunImages, *, driver_node: str) -> None:
        self.surveys: dict[str, NodeSurvey] = {}
        self._context = context
        self._images = images
        self._muster = Muster(context, driver_node)
        self._parts = Parts(fan_out=context.plan.limits.fan_out)
        self._late: dict[asyncio.Task[bool], RunNode] = {}
        self._stores: dict[str, asyncio.Lock] = {}
        self._wave = 0
        # Those whose actors were ended because all was done: in a run that goes on, before a join.
        self._rested: set[RunNode] = set()
        self._news = asyncio.Event()
        self._silent = SilentNodes(context.plan.failure.tries, on_return=self._news.set)

    # -- nodes ------------------------------------------------------------------------------------

    @property
    def nodes(self) -> dict[str, RunNode]:
        """Return the nodes that were selected, by Ray's ID."""
        return self._muster.nodes

    @property
    def names(self) -> dict[str, str]:
        """Return the names of all nodes that were ever seen, by Ray's ID."""
        return self._muster.names

    async def gather(
        self, described: Iterable[Mapping[str, Any]], *, for_all: bool = False
    ) -> list[RunNode]:
        """Name the nodes, select those that the plan wants, and have each begin.

        Returns those that did in good time, in the order of their names; the others have failed or
        are late, with ``for_all`` none is. Raises UsageError when the plan selects none of
        those that are there first.
        """
        ready, late = await self._muster.gather(described, self._wave, for_all=for_all)
        self._late |= late
        # Documents are kept in the store of the node that this is.
        self._images.node = self._muster.driver_name
        self._tell_addresses(ready)
        return ready

    def _tell_addresses(self, nodes: Sequence[RunNode]) -> None:
        """Let the owner of the leases know where nodes serve; they tell it themselves as well."""
        context = self._context
        cluster.forget(
            context.resolver.tell.remote(
                context.run,
                context.plan.limits.origin_connections,
                {node.name: node.address for node in nodes},
            )
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
        for wish in wishes:
            # In the plan's order, whichever is resolved or fails first.
            self._context.state.update_image(wish.reference.canonical)
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
            node.fail(error)
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
            if not is_last and not failure.is_enough(*self._count_ready(so_far)):
                # Who is late may be just what is missing, and would be told nothing otherwise.
                await self.warm([], late=set(so_far))
            ready, counted = self._count_ready(so_far)
            passed = failure.is_enough(ready, counted)
            state.waves[number] = replace(
                state.waves[number],
                ready=self._count_ready(wave)[0],
                completed=round(state.seconds, 3),
                passed=passed,
            )
            state.changed = True
            if not passed and not is_last:
                reason = f"not begun: only {ready} of the {counted} nodes before it are ready"
                for name in names[len(so_far) :]:
                    if state.nodes[name].state == "waiting":
                        state.skip_node(name, NodeError(name, reason))
                return

    def _count_ready(self, names: Iterable[str]) -> tuple[int, int]:
        return count_ready(self._context.state.nodes[name] for name in names)

    async def warm(
        self, nodes: Sequence[RunNode], *, with_late: bool = False, late: Container[str] = ()
    ) -> None:
        """Bring these nodes to have their images, as many at a time as the plan allows.

        With them those of these names that are ``late``, or ``with_late`` all who are and who come
        back; how long they may take is bounded by the deadline of their beginning.
        """
        waiting = deque(node for node in nodes if not node.shares_with)
        at_once = self._context.plan.limits.nodes_at_once or (1 << 30)
        working: dict[asyncio.Task[Any], RunNode | None] = {
            asyncio.ensure_future(self._follow_writer(node)): None
            for node in nodes
            if node.shares_with
        }
        while True:
            if with_late:
                self._take_back()
            coming = [task for task, node in self._late.items() if with_late or node.name in late]
            if not (waiting or working or coming):
                return
            busy = [node for node in working.values() if node is not None]
            room = at_once - len(busy)
            if waiting and room > 0:
                batch = [waiting.popleft() for _ in range(min(room, len(waiting)))]
                for node in await self._admit(batch, [node.name for node in busy]):
                    working[asyncio.ensure_future(node.work())] = node
                continue
            self._news.clear()
            news = asyncio.ensure_future(self._news.wait())
            try:
                done, _ = await asyncio.wait(
                    {*working, *coming, news}, return_when=asyncio.FIRST_COMPLETED
                )
            finally:
                news.cancel()
            for task in done - {news}:
                if task in working:
                    del working[task]
                    task.result()
                    continue
                node = self._late.pop(task)
                if task.result():
                    # It may have begun anew since it was late first.
                    node = self.nodes[node.node_id]
                    self._tell_addresses([node])
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
            node.fail(error)
            return False
        return True

    async def _follow_writer(self, node: RunNode) -> None:
        """Look at a store that another node fills, once that one has; fill it if it did not."""
        writers = [other for other in self.nodes.values() if other.name == node.shares_with]
        # None when it has left a cluster that is watched.
        for writer in writers:
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
        """Take note of who is gone; ``is_over``: the run is, and nodes may leave as they like.

        So may those that were ready when it was, while others that have joined are warmed.
        """
        context = self._context
        for node_id, node in list(self.nodes.items()):
            if node_id in alive or node.is_dead:
                continue
            is_idle = node in self._rested and context.state.nodes[node.name].state == "ready"
            self._lose(node, "the node has left the cluster or is dead")
            if is_over or is_idle:
                context.state.warnings.append(f"{node.name} has left the cluster")
                context.state.forget_node(node.name)
                self._rested.discard(node)
                del self.nodes[node_id]
        self._silent.look(alive)

    def _lose(self, node: RunNode, reason: str) -> None:
        node.die(reason)
        cluster.forget(self._context.resolver.node_died.remote(self._context.run, node.name))
        self._context.state.lose_node(node.name, reason)

    def note_silent(self, node: RunNode, seconds: float) -> None:
        """Take note of a node that does not answer: it is given up, and looked for."""
        self._lose(node, f"no answer for {seconds:.0f} s: it hangs, or its network is cut")
        self._silent.look_for(node)

    def _take_back(self) -> None:
        for node in self._silent.take_returned():
            self._late[asyncio.ensure_future(self._muster.begin_again(node))] = node

    def returned(self) -> set[str]:
        """Return the IDs of nodes that came back when the run was over, each once."""
        return {node.node_id for node in self._silent.take_returned()}

    def note_restart(self) -> None:
        """Tell an owner of the leases that was started anew what it cannot know."""
        serving = [node for node in self.nodes.values() if node.is_serving]
        self._tell_addresses(serving)
        for node in serving:
            node.declare()

    async def hear(self, seconds: float) -> None:
        """Give up all pulls, and hear what has come in them."""
        for node in self.nodes.values():
            node.cancel()
        await asyncio.gather(*(node.hear(seconds) for node in self.nodes.values()))

    def leave(self) -> None:
        """Have all actors end themselves: the head, which would do it, is dead."""
        for node in self.nodes.values():
            node.link.leave()

    async def rest(self) -> None:
        """End all actors on the nodes: an autoscaler must be able to take an idle one away."""
        self._rested = set(self.nodes.values())
        await asyncio.gather(*(node.end() for node in self.nodes.values()))

    async def join(self, described: Sequence[Mapping[str, Any]]) -> None:
        """Warm nodes that have come to a cluster that was warm, from some that are."""
        nodes = await self.gather(described)
        for reference in self._images.forget_failures():
            self._context.state.update_image(reference, error=None)
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
        self._silent.close()
        for task in self._late:
            task.cancel()
        for node in self.nodes.values():
            node.cancel()
        await asyncio.gather(*(node.end(seconds) for node in self.nodes.values()))
