"""One node of a pre-warm run, as the driver drives it.

Invariant: no call to a node is waited for longer than its deadline or the node's life; an actor
that dies is started anew and goes on where it was, a bounded number of times, and never once the
node was ended; a cell is fine only when the node has looked on its disk after the work.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from stowray.actors import cluster
from stowray.actors.prewarm_awaited import Awaited, in_time
from stowray.actors.prewarm_link import ENDED, NodeLink
from stowray.pipeline.errors import NodeError, StowrayError, describe, from_wire
from stowray.pipeline.platform import Platform
from stowray.pipeline.prewarm_rows import Delivery
from stowray.pipeline.prewarm_survey import NodeSurvey
from stowray.pipeline.progress import Event
from stowray.pipeline.spread import NodeState, Part

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from stowray.actors.prewarm_context import RunContext
    from stowray.actors.prewarm_images import RunImage

Value = TypeVar("Value")

# An actor's first answer: its process has to start, import Ray and us, and open the store.
BEGIN_SECONDS = 90.0
ACCEPT_SECONDS = 30.0
LOOK_SECONDS = 300.0
END_SECONDS = 1.0
RETRY_SECONDS = 1.0
# In the plan's order on every node: so whoever waits for a peer's blob waits for one that the peer
# will come to.
IMAGES_AT_ONCE = 4


class RunNode:
    """A node by its ``name`` and Ray's ``node_id``; ``host`` is the address that it serves at.

    ``raylet`` is where its raylet listens, ``HOST:PORT``.
    """

    def __init__(
        self,
        context: RunContext,
        *,
        name: str,
        node_id: str,
        host: str,
        raylet: str,
        unpackers: int,
    ) -> None:
        self.name = name
        self.node_id = node_id
        self.link = NodeLink(name, node_id, raylet, on_lost=self._lost, on_news=self._note_news)
        self.address = ""
        self.platform = Platform.host()
        self.nonce = ""
        self.shares_with = ""
        self.images: list[RunImage] = []
        self.survey = NodeSurvey(name)
        self.finished = asyncio.Event()
        self.is_serving = False
        self._context = context
        self._host = host
        self._raylet = raylet
        self._unpackers = unpackers
        self._network = ""
        self._ahead = 0.0
        self._part = Part(name)
        self._digests: list[str] = []
        self._life = 0
        self._reviving = asyncio.Lock()
        self._reviving_task: asyncio.Task[None] | None = None
        self._is_ended = False
        self._awaited = Awaited(self.link)
        # Pulls of which nobody has heard how they ended.
        self._unheard: set[str] = set()

    # -- life -------------------------------------------------------------------------------------

    @property
    def is_dead(self) -> bool:
        """Return whether the node is gone."""
        return self.link.is_dead

    def fail(self, error: StowrayError) -> None:
        """Note that nothing more comes of the node.

        A dead one has been told as that, and of one that was ended it has been said why.
        """
        if not self.is_dead and not self._is_ended:
            self._context.state.fail_node(self.name, describe(error))
        self.finished.set()

    def die(self, reason: str) -> None:
        """Note that the node is gone: nothing is waited for any more."""
        self.link.die(reason)
        self.is_serving = False
        self.finished.set()

    def renewed(self) -> RunNode:
        """Return the same node as one of which nothing is known yet: it has come back."""
        return RunNode(
            self._context,
            name=self.name,
            node_id=self.node_id,
            host=self._host,
            raylet=self._raylet,
            unpackers=self._unpackers,
        )

    async def begin(self) -> None:
        """Start the actor and have it open and serve its store; raises what kept it from that.

        One that was ended begins again: it is only idle until others need it.
        """
        self._is_ended = False
        await self._try_to_begin()

    async def _try_to_begin(self) -> None:
        for tried in range(1, self._context.plan.failure.tries + 1):
            try:
                await self._begin()
            except StowrayError as error:
                if tried == self._context.plan.failure.tries or not cluster.is_lost(error):
                    raise
            else:
                return

    async def _begin(self) -> None:
        context = self._context
        if self._is_ended:
            # Whoever ended the actor made it look lost, and nobody would end another one.
            raise NodeError(self.name, ENDED)
        self.link.start(self._unpackers)
        # Where its peers know it, if it served before.
        port = int(self.address.rpartition(":")[2] or 0)
        request = context.begin_request(self.name, self._host, port)
        about = await self.link.ask("begin_run", request, seconds=BEGIN_SECONDS)
        self.link.has_begun()
        self._ahead = about["wall"] - time.time()
        self.address = about["address"]
        self.nonce = about["nonce"]
        self._network = about["network"]
        wished = context.settings.resolve.platform
        self.platform = Platform.parse(wished or about["platform"]).normalized()
        self.is_serving = True
        context.state.update_node(
            self.name,
            node_id=self.node_id,
            address=self.address,
            store=about["store"],
            platform=str(self.platform),
        )

    async def _again(self, work: Callable[[], Awaitable[Value]]) -> Value:
        """Do ``work``, and again with a new actor when it was lost with its actor."""
        tries = self._context.plan.failure.tries
        for tried in range(1, tries + 1):
            life = await self._present_life()
            try:
                return await work()
            except StowrayError as error:
                if tried == tries or not cluster.is_lost(error) or self.is_dead:
                    raise
            await self._revive(life)
        raise NodeError(self.name, cluster.LOST)

    async def _present_life(self) -> int:
        """Return the actor's life; one that is being started anew is waited for, not ended."""
        async with self._reviving:
            return self._life

    async def _revive(self, life: int) -> None:
        """Start the actor anew, unless somebody else has since ``life``, and give it its part."""
        # All of the node's images need it: it does not end with the time of the one that asked.
        await asyncio.shield(asyncio.ensure_future(self._start_anew(life)))

    async def _start_anew(self, life: int) -> None:
        async with self._reviving:
            if self._life != life:
                return
            self._life += 1
            self.is_serving = False
            await self._try_to_begin()
            await self._accept()

    def _lost(self) -> None:
        """Start the actor anew, though it was asked for nothing: others count on what it has."""
        if self.is_serving and self._life < self._context.plan.failure.tries:
            self._reviving_task = asyncio.ensure_future(self._serve_again(self._life))

    async def _serve_again(self, life: int) -> None:
        try:
            await self._revive(life)
        except StowrayError:
            # Others go on without it; whoever asks it for something is told.
            self.is_serving = False

    def declare(self) -> None:
        """Have the node tell the owner of the leases, started anew, what it has."""
        self.link.tell("declare", self._context.lease_terms())

    def cancel(self) -> None:
        """Have the node give up what it does, without waiting for it, and begin nothing more."""
        self._is_ended = True
        self._awaited.give_up()

    async def end(self, seconds: float = END_SECONDS) -> None:
        """End the actor and all that it started; without :meth:`begin` there is no other."""
        self._is_ended = True
        self.is_serving = False
        await self.hear(seconds)
        await self.link.end(seconds)

    async def hear(self, seconds: float) -> None:
        """Ask what came in pulls that were given up; they get ``seconds`` to end."""
        unheard, self._unheard = list(self._unheard), set()
        if not unheard or not seconds or self.is_dead:
            return
        with contextlib.suppress(StowrayError):
            came = await self.link.ask("came", unheard, seconds / 2, seconds=seconds)
            for run, ways in came.items():
                self._context.state.note_ways(self.name, run, ways, self._ahead, is_over=True)

    def _note_news(self, news: dict[str, Any]) -> None:
        for run, ways in news.items():
            self._context.state.note_ways(self.name, run, ways, self._ahead, is_over=False)

    # -- what is there ----------------------------------------------------------------------------

    async def look(self) -> NodeSurvey:
        """Ask what the node has of its images."""
        about = [image.about for image in self.images]
        found = await self._again(lambda: self.link.ask("survey", about, seconds=LOOK_SECONDS))
        self.survey = NodeSurvey.from_dict(found | {"platform": str(self.platform)})
        return self.survey

    async def presence(self) -> list[dict[str, Any]]:
        """Return what is on disk of each image, in their order."""
        about = [image.about for image in self.images]
        found: list[dict[str, Any]] = await self._again(
            lambda: self.link.ask("presence", about, seconds=LOOK_SECONDS)
        )
        return found

    @property
    def lacks(self) -> bool:
        """Return whether the last survey found something missing."""
        return any(not self._has(image) for image in self.images)

    def spread_state(self) -> NodeState:
        """Return what the planner of the trees needs to know of the node."""
        wanted = {digest for image in self.images for digest in _layer_digests(image)}
        present = self.survey.present
        return NodeState(
            self.name, frozenset(wanted - present), present & wanted, address=self.address
        )

    def holder_state(self) -> NodeState:
        """Return the same of a node that has all of its images by now."""
        wanted = frozenset(digest for image in self.images for digest in _layer_digests(image))
        return NodeState(self.name, present=wanted, address=self.address)

    # -- work -------------------------------------------------------------------------------------

    async def accept(self, part: Part, digests: Sequence[str]) -> None:
        """Give the node its part and let it serve these digests."""
        self._part, self._digests = part, list(digests)
        await self._again(self._accept)

    async def _accept(self) -> None:
        await self.link.ask(
            "accept", self._part.to_dict(), self._digests, self.lacks, seconds=ACCEPT_SECONDS
        )

    async def work(self) -> None:
        """Bring all images, deliver them, and give the node's row its state; raises nothing."""
        limit = asyncio.Semaphore(IMAGES_AT_ONCE)
        try:
            await asyncio.gather(*(self._bring(image, limit) for image in self.images))
            await self._deliver()
        finally:
            self.finished.set()
        self._context.state.settle_node(self.name)

    def _in_time(self, image: RunImage) -> AbstractAsyncContextManager[None]:
        what = f"{image.reference.familiar} on {self.name}"
        return in_time(what, self._context.plan.failure.node_timeout_seconds)

    async def _bring(self, image: RunImage, limit: asyncio.Semaphore) -> None:
        async with limit:
            state, reference = self._context.state, image.planned.reference
            # The end of a run gives up what is under way, which makes room for what was not begun.
            if self._is_ended or not state.is_open(self.name, reference):
                return
            state.update_cell(self.name, reference, status="working")
            state.update_node(self.name, state="working")
            begun = time.monotonic()
            try:
                async with self._in_time(image):
                    result = await self._pull_until_here(image)
            except StowrayError as error:
                # When the run was ended, why stands there already.
                if not self.is_dead and state.is_open(self.name, reference):
                    state.update_cell(
                        self.name,
                        reference,
                        status="failed",
                        error=describe(error),
                        seconds=round(time.monotonic() - begun, 3),
                    )
                return
            state.update_cell(
                self.name,
                reference,
                status="exists" if self._has(image) else "done",
                result=result,
                present=True,
                error=None,
                seconds=round(time.monotonic() - begun, 3),
            )

    async def _pull_until_here(self, image: RunImage) -> dict[str, Any]:
        tries = self._context.plan.failure.tries
        tried = 0
        while True:
            tried += 1
            life = await self._present_life()
            try:
                return await self._pull(image)
            except StowrayError as error:
                if tried >= tries or not error.retryable or self.is_dead or self._is_ended:
                    raise
                if not cluster.is_lost(error):
                    await asyncio.sleep(RETRY_SECONDS * tried)
                    continue
            await self._revive(life)

    async def _pull(self, image: RunImage) -> dict[str, Any]:
        """Bring one image and return its result; raises unless it was found on disk after that."""
        context = self._context
        run = context.next_pull(self.name)
        request = await context.pull_request(self.name, run, image, sync=bool(self._network))
        if self._is_ended:
            raise NodeError(self.name, ENDED)
        self._unheard.add(run)
        with self._awaited.waiting(run):
            reply = await self.link.ask("pull", request)
        self._unheard.discard(run)
        for event in reply["events"]:
            context.progress.merge(Event.from_dict(event))
        context.state.note_ways(self.name, run, reply["ways"], self._ahead, is_over=True)
        if "error" in reply:
            raise from_wire(*reply["error"])
        if not reply["presence"]["present"]:
            raise NodeError(self.name, f"{image.reference.familiar} is not on its disk after all")
        result: dict[str, Any] = reply["result"]
        return result

    async def _deliver(self) -> None:
        runtimes = self._context.plan.deliver
        state = self._context.state
        for image in self.images:
            reference = image.planned.reference
            present = state.cells[self.name, reference].present
            if not runtimes or not present or self._is_ended:
                continue
            run = self._context.next_pull(self.name)
            request = {"run": run, "image": image.image.to_dict(), "runtimes": list(runtimes)}
            try:
                async with self._in_time(image):
                    with self._awaited.waiting(run):
                        errors = await self._again(partial(self.link.ask, "deliver", request))
            except StowrayError as error:
                errors = dict.fromkeys(runtimes, describe(error))
            for runtime in runtimes:
                state.note_delivery(Delivery(self.name, reference, runtime, errors[runtime]))

    def _has(self, image: RunImage) -> bool:
        """Return whether the last survey found all of an image."""
        planned = image.planned
        chains = [layer.chain_id for layer in planned.layers]
        return self.survey.present >= planned.blobs.keys() and (
            not chains or chains[-1] in self.survey.chains
        )


def _layer_digests(image: RunImage) -> list[str]:
    return [layer.digest for layer in image.planned.layers]
