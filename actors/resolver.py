"""Resolves references for a whole run or session: each once, whoever asks.

Invariant: all that ask for one reference within its TTL get the same digest; what is handed out
carries its documents along, so that no node has to ask for them again. Who may read what from the
origin is decided here too, on one thread.
"""

from __future__ import annotations

import os
import time
from typing import Any

import ray

from stowray.actors import cluster
from stowray.actors.engines import Engines
from stowray.actors.lease_book import LeaseBooks
from stowray.actors.lifeline import Lifeline, leave_now
from stowray.actors.tasks import Tasks
from stowray.actors.wire import documents_of, options_from_dict
from stowray.pipeline.errors import StowrayError, to_wire
from stowray.pipeline.progress import Progress
from stowray.pipeline.source import source_from_dict


class ResolverActor:
    """The shell round a :class:`Resolver` on the driver's node."""

    def __init__(self) -> None:
        self._tasks = Tasks()
        self._engines = Engines()
        self._books = LeaseBooks(restarted=cluster.was_restarted())
        self._lifeline: Lifeline | None = None

    @ray.method(concurrency_group="work")
    def resolve(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return ``{image, requests, documents, quota}`` or ``{error}``; events, warnings."""
        engine = self._engines.get(request)
        source = source_from_dict(request["source"])
        options = options_from_dict(request["options"])
        progress = Progress(node=request["node"])
        report = progress.reporter(source.canonical)
        reply: dict[str, Any]
        begun = time.monotonic()
        try:
            with self._tasks.running(request["run"]) as cancelled:
                image, requests = engine.image_for(source, options, report, cancelled)
            quota = engine.quota(source)
            reply = {
                "quota": None if quota is None else quota.to_dict(),
                "image": image.to_dict(),
                "requests": requests,
                "documents": documents_of(engine.store, image),
            }
        except StowrayError as error:
            progress.fail_open(source.canonical, str(error))
            reply = {"error": to_wire(error)}
        reply["events"] = [event.to_wire() for event in progress.events()]
        reply["warnings"] = engine.warnings_since(begun)
        return reply

    @ray.method(concurrency_group="work")
    def look(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return ``{descriptor}`` that a reference names now, or ``{error}``; fetches no more."""
        engine = self._engines.get(request)
        try:
            with self._tasks.running(request["run"]) as cancelled:
                descriptor = engine.resolve(
                    source_from_dict(request["source"]),
                    options_from_dict(request["options"]),
                    cancelled,
                )
        except StowrayError as error:
            return {"error": to_wire(error)}
        return {"descriptor": descriptor.to_dict()}

    @ray.method(concurrency_group="leases")
    def leases(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a node's question about the origin; see :meth:`LeaseBooks.answer`."""
        return self._books.answer(request)

    @ray.method(concurrency_group="leases")
    def tell(self, run: str, connections: int, addresses: dict[str, str]) -> str:
        """Take note of where a run's nodes serve; see :meth:`LeaseBooks.tell`."""
        return self._books.tell(run, connections, addresses)

    @ray.method(concurrency_group="leases")
    def node_died(self, run: str, node: str) -> None:
        """End what a dead node held; see :meth:`LeaseBooks.node_died`."""
        self._books.node_died(run, node)

    @ray.method(concurrency_group="life")
    def beat(self, seconds: float) -> str:
        """Stay for so many seconds from now on; without a driver who says so no longer.

        Returns the epoch of the leases.
        """
        if self._lifeline is None:
            self._lifeline = Lifeline(leave_now, seconds=seconds)
        self._lifeline.hold(seconds)
        return self._books.epoch

    @ray.method(concurrency_group="control")
    def cancel(self, run: str) -> bool:
        """Give one resolution up."""
        return self._tasks.cancel(run)

    @ray.method(concurrency_group="control")
    def pid(self) -> int:
        """Return the number of this process."""
        return os.getpid()
