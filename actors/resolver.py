"""Resolves references for a whole run or session: each once, whoever asks.

Invariant: all that ask for one reference within its TTL get the same digest; what is handed out
carries its documents along, so that no node has to ask for them again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from stowray.actors.engines import Engines
from stowray.actors.tasks import Tasks
from stowray.actors.wire import options_from_dict
from stowray.pipeline.errors import StowrayError, to_wire
from stowray.pipeline.image import CONFIG_LIMIT, MANIFEST_LIMIT
from stowray.pipeline.progress import Progress
from stowray.pipeline.resolve import document_digests
from stowray.pipeline.source import source_from_dict
from stowray.pipeline.store import Store

if TYPE_CHECKING:
    from stowray.pipeline.image import Image


class ResolverActor:
    """The shell round a :class:`Resolver` over the store of the driver's node."""

    def __init__(self, store: str) -> None:
        self._tasks = Tasks()
        self._store = Store.open(Path(store))
        self._engines = Engines(self._store)

    @ray.method(concurrency_group="work")
    def resolve(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return ``{image, requests, documents, events}`` or ``{error, events}``."""
        engine = self._engines.get(request["settings"])
        source = source_from_dict(request["source"])
        options = options_from_dict(request["options"])
        progress = Progress(node=request["node"])
        report = progress.reporter(source.canonical)
        reply: dict[str, Any]
        try:
            with self._tasks.running(request["run"]) as cancelled:
                image, requests = engine.image_for(source, options, report, cancelled)
            reply = {
                "image": image.to_dict(),
                "requests": requests,
                "documents": self._documents(image),
            }
        except StowrayError as error:
            progress.fail_open(source.canonical, str(error))
            reply = {"error": to_wire(error)}
        reply["events"] = [event.to_dict() for event in progress.events()]
        return reply

    @ray.method(concurrency_group="control")
    def cancel(self, run: str) -> bool:
        """Give one resolution up."""
        return self._tasks.cancel(run)

    @ray.method(concurrency_group="control")
    def pid(self) -> int:
        """Return the number of this process."""
        return os.getpid()

    def _documents(self, image: Image) -> dict[str, bytes]:
        limit = max(MANIFEST_LIMIT, CONFIG_LIMIT)
        return {
            str(digest): self._store.read_blob(digest, limit) for digest in document_digests(image)
        }
