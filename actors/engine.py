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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stowray.actors import frames
from stowray.actors.connect import connect, session_for
from stowray.actors.door_link import DoorLink
from stowray.actors.headwatch import HeadWatch
from stowray.actors.link import RayLink
from stowray.actors.processes import Process
from stowray.actors.wire import (
    documents_of,
    options_to_dict,
    origin_environment,
    settings_to_dict,
)
from stowray.pipeline.engine import LocalEngine, PullOptions, never
from stowray.pipeline.errors import from_wire
from stowray.pipeline.image import Image
from stowray.pipeline.progress import Event
from stowray.pipeline.quota import Quota
from stowray.pipeline.reference import Reference, wire_host
from stowray.pipeline.resolve import Request
from stowray.pipeline.result import PullResult

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.actors.embedded import RayAddress
    from stowray.actors.link import Link
    from stowray.pipeline.progress import Progress
    from stowray.pipeline.settings import Settings
    from stowray.pipeline.source import Source
    from stowray.pipeline.store import Store


def _say_nothing(*_what: object, **_more: object) -> None:
    """Report to nobody."""


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
        resolver = self.origins.resolver(source)
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
        reply = self._taken_over(self._connected().resolve(request, cancelled))
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
            # Not all of it is known there: a session was perhaps started under another name.
            "settings": settings_to_dict(self.settings) | {"node": self.settings.node_name},
            "environment": origin_environment(os.environ),
            "nodes": 1,
            # Only a session's actors outlive a driver, and they live on the driver's host.
            "driver": Process.own().to_dict() if link.is_session else None,
            "spread": None,
        }
        reply = self._taken_over(link.pull(request, cancelled, frames.merging(self.progress)))
        return PullResult.from_dict(reply["result"])

    def _taken_over(self, reply: dict[str, Any]) -> dict[str, Any]:
        """Take over what happened; raises what the reply says."""
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
        session = session_for(self.settings)
        if session is not None:
            return DoorLink(Path(session.door))
        ray, _ = connect(self.settings, self._stack, leaves=lambda: self.is_last)
        return self._crew_of_run(ray)

    def _crew_of_run(self, ray: RayAddress) -> RayLink:
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
        where = f"node {self.settings.node_name}"
        return RayLink(
            ray, resolver, progress, node, HeadWatch(ray.address), where, is_session=False
        )

    def _require_like(self, ray: RayAddress) -> None:
        from stowray.actors import foreign

        foreign.require_like(foreign.probe_nodes([ray.node_id], ["this node"]))
