"""The engine on Ray: same plan, same results, same events as in-process, another crew.

Invariant: whatever ends a pull ends its work on the actors too, within seconds; a Ray that the
engine started ends with it, one that it found goes on; which one: ``connect``.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from stowray.actors.connect import connect
from stowray.actors.follow import Follower
from stowray.actors.headwatch import HeadWatch
from stowray.actors.processes import Process
from stowray.actors.wire import (
    documents_of,
    options_to_dict,
    origin_environment,
    settings_to_dict,
)
from stowray.pipeline.engine import LocalEngine, PullOptions, never
from stowray.pipeline.errors import CancelledError, NodeError, from_wire
from stowray.pipeline.image import Image
from stowray.pipeline.progress import Event
from stowray.pipeline.quota import Quota
from stowray.pipeline.reference import Reference, wire_host
from stowray.pipeline.resolve import Request
from stowray.pipeline.result import PullResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.actors.embedded import RayAddress
    from stowray.pipeline.progress import Progress
    from stowray.pipeline.settings import Settings
    from stowray.pipeline.source import Source
    from stowray.pipeline.store import Store

TRIES = 3
RESTART_SECONDS = 1.0
# Members have three seconds to stop and are ended then; Ctrl-C has five.
CANCEL_SECONDS = 4.5


def _say_nothing(*_what: object, **_more: object) -> None:
    """Report to nobody."""


@dataclass(frozen=True, slots=True)
class Link:
    """A connection to a Ray and the actors that serve this engine."""

    ray: RayAddress
    resolver: Any
    progress: Any
    node: Any
    head: HeadWatch
    is_session: bool


class RayEngine(LocalEngine):
    """Pulls with a crew of actors on this node; connects when the first pull asks for it.

    What needs no crew (resolving for a plan, describing what is here) is done in this process.
    """

    name = "ray"

    def __init__(
        self, settings: Settings, *, progress: Progress, store: Store | None = None
    ) -> None:
        super().__init__(settings, progress=progress, store=store)
        self._stack = ExitStack()
        self._link: Link | None = None
        self._connecting = threading.Lock()

    @property
    def link(self) -> Link:
        """Return the connection and the actors behind this engine, connecting if need be."""
        return self._connected()

    def connect(self) -> None:
        """Connect now instead of with the first pull."""
        self._connected()

    def close(self) -> None:
        """End the crew unless it is a session's, and the Ray if the engine started it."""
        with self._connecting:
            self._link = None
            stack, self._stack = self._stack, ExitStack()
        stack.close()
        super().close()

    def pull(
        self, source: Source, options: PullOptions, cancelled: Callable[[], bool] = never
    ) -> PullResult:
        """Bring ``source`` into the store; see :meth:`LocalEngine.pull`.

        Where Ray was not asked for, what is complete already is answered without it.
        """
        if self.settings.engine == "auto" and self._is_here(source, options):
            return replace(super().pull(source, options, cancelled), engine=LocalEngine.name)
        with self._reported(source):
            entered = time.perf_counter()
            self.begin()
            self._connected()
            begun = time.perf_counter()
            report = self.progress.reporter(source.canonical)
            report("resolve", source.canonical, "resolving")
            reply = self._resolve_remotely(source, options, cancelled)
            report("resolve", source.canonical, "resolved")
            seconds = time.perf_counter() - begun
            image, documents = Image.from_dict(reply["image"]), reply["documents"]
            result = self._pull_remotely(source, image, documents, options, cancelled)
        return replace(
            result,
            manifest_requests=reply["requests"],
            seconds=result.seconds | {"resolve": seconds, "total": time.perf_counter() - entered},
        )

    def pull_image(
        self,
        source: Source,
        image: Image,
        options: PullOptions,
        cancelled: Callable[[], bool] = never,
    ) -> PullResult:
        """Pull an image that was resolved before; see :meth:`LocalEngine.pull_image`."""
        documents = documents_of(self.store, image)
        with self._reported(source):
            return self._pull_remotely(source, image, documents, options, cancelled)

    def _is_here(self, source: Source, options: PullOptions) -> bool:
        """Return whether the store alone answers for ``source``, complete and without a network."""
        request = Request(
            reference=source,
            platform=self.platform(options),
            strict=self.settings.resolve.strict_platform,
            policy=options.policy,
            report=_say_nothing,
            cancelled=never,
        )
        resolver = self._get_resolver(source)
        if not resolver.is_known(request):
            return False
        return self._plan(resolver.image(request), options).is_complete

    def _resolve_remotely(
        self, source: Source, options: PullOptions, cancelled: Callable[[], bool]
    ) -> dict[str, Any]:
        run = secrets.token_hex(8)
        request = {
            "run": run,
            "store": str(self.store.path),
            "node": self.settings.node_name,
            "source": source.to_dict(),
            "options": options_to_dict(options),
            "settings": settings_to_dict(self.settings),
            "environment": origin_environment(os.environ),
        }
        link = self._connected()
        resolve = link.resolver.resolve
        reply = self._ask(link, link.resolver, resolve, request, "resolver", cancelled)
        quota = None if reply["quota"] is None else Quota(**reply["quota"])
        if quota is not None and quota.is_low and isinstance(source, Reference):
            # The resolver of a session has perhaps told somebody else already, and tells once.
            self._warn(f"{wire_host(source.registry)}: {quota}")
        return reply

    def _pull_remotely(
        self,
        source: Source,
        image: Image,
        documents: dict[str, bytes],
        options: PullOptions,
        cancelled: Callable[[], bool],
    ) -> PullResult:
        link = self._connected()
        run = secrets.token_hex(8)
        request = {
            "run": run,
            "store": str(self.store.path),
            "source": source.to_dict(),
            "image": image.to_dict(),
            "documents": documents,
            "options": options_to_dict(options),
            "settings": settings_to_dict(self.settings),
            "environment": origin_environment(os.environ),
            "progress": link.progress,
            "nodes": 1,
            # Only a session's actors outlive a driver, and they live on the driver's host.
            "driver": Process.own().to_dict() if link.is_session else None,
            "spread": None,
        }
        follower = Follower(link.progress, run, self.progress)
        try:
            reply = self._ask(
                link,
                link.node,
                link.node.pull,
                request,
                f"node {self.settings.node_name}",
                cancelled,
            )
        finally:
            follower.close()
        return PullResult.from_dict(reply["result"])

    def _ask(
        self,
        link: Link,
        actor: Any,
        method: Any,
        request: dict[str, Any],
        where: str,
        cancelled: Callable[[], bool],
    ) -> dict[str, Any]:
        """Call ``method`` and merge its events; raises what its reply says.

        A call that was lost with its actor is made again: all calls are idempotent, and Ray
        restarts the actor.
        """
        from stowray.actors import cluster

        wait = _Wait(actor, request["run"], link.head, cancelled)
        tries = 0
        while True:
            tries += 1
            call = method.remote(request)
            try:
                reply: dict[str, Any] = cluster.wait(call, where, look=wait.look)
            except NodeError:
                if tries >= TRIES or wait.is_given_up or link.head.is_silent:
                    raise
                # Ray takes a moment to start the actor again.
                time.sleep(RESTART_SECONDS)
                continue
            except BaseException:
                # Ctrl-C among them: nothing may work on after this call has ended.
                wait.give_up()
                cluster.settle(call, CANCEL_SECONDS)
                raise
            for event in reply["events"]:
                self.progress.merge(Event.from_dict(event))
            for text in reply["warnings"]:
                self._warn(text)
            if "error" in reply:
                raise from_wire(*reply["error"])
            return reply

    def _connected(self) -> Link:
        with self._connecting:
            if self._link is None:
                try:
                    self._link = self._connect()
                except BaseException:
                    self._stack.close()
                    raise
            return self._link

    def _connect(self) -> Link:
        ray, is_session = connect(self.settings, self._stack, leaves=lambda: self.is_last)
        return self._crew_of_session(ray) if is_session else self._crew_of_run(ray)

    def _crew_of_session(self, ray: RayAddress) -> Link:
        from stowray.actors import cluster

        return Link(
            ray=ray,
            resolver=cluster.find_actor("resolver"),
            progress=cluster.find_actor("progress"),
            node=cluster.find_actor("node"),
            head=HeadWatch(ray.address),
            is_session=True,
        )

    def _crew_of_run(self, ray: RayAddress) -> Link:
        from stowray.actors import cluster

        if not ray.is_own:
            self._require_like(ray)
        place = cluster.Placement(ray.node_id, restarts=2)
        node = cluster.start_node(
            place, self.settings.node_name, self.settings.worker_count(), stays=False
        )
        resolver = cluster.start_resolver(place)
        progress = cluster.start_progress(cluster.Placement(ray.node_id))
        if not ray.is_own:
            # An embedded Ray ends with all that is in it; elsewhere our actors go with us.
            for actor in (node, resolver, progress):
                self._stack.callback(cluster.end, actor)
        return Link(ray, resolver, progress, node, HeadWatch(ray.address), is_session=False)

    def _require_like(self, ray: RayAddress) -> None:
        from stowray.actors import foreign

        foreign.require_like(foreign.probe_nodes([ray.node_id], ["this node"]))


class _Wait:
    """What is looked at while a call is under way: the head, and whether it is still wanted."""

    def __init__(
        self, actor: Any, run: str, head: HeadWatch, cancelled: Callable[[], bool]
    ) -> None:
        self._actor = actor
        self._run = run
        self._head = head
        self._cancelled = cancelled
        self._given_up_at = 0.0

    @property
    def is_given_up(self) -> bool:
        """Return whether the actor was told to stop."""
        return self._given_up_at > 0.0

    def look(self) -> None:
        """Pass a cancellation on; raise when nothing comes of it, or when the head is dead."""
        self._head.look()
        if self._cancelled():
            self.give_up()
        if self.is_given_up and time.monotonic() - self._given_up_at > CANCEL_SECONDS:
            raise CancelledError("pull")

    def give_up(self) -> None:
        """Tell the actor once that the result is not wanted any more."""
        if not self.is_given_up:
            self._given_up_at = time.monotonic()
            self._actor.cancel.remote(self._run)
