"""Fetches blobs into a store of its node; one process, many threads, bytes to disk only.

Invariant: a task lost with this process leaves a resumable ingest behind; whoever repeats it goes
on at the same byte.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import ray

from stowray.actors.engines import Engines
from stowray.actors.lifeline import outlive_not
from stowray.actors.processes import Process
from stowray.actors.reporting import FirstByte, task_report
from stowray.actors.spread_fetchers import SpreadFetchers
from stowray.actors.tasks import Tasks
from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.files import raise_descriptor_limit
from stowray.pipeline.source import source_from_dict

if TYPE_CHECKING:
    from stowray.pipeline.fetch import Fetcher
    from stowray.pipeline.spread_fetch import SpreadFetcher


class FetchActor:
    """The shell round a :class:`Fetcher`."""

    def __init__(self) -> None:
        self._tasks = Tasks()
        self._engines = Engines()
        self._spreads = SpreadFetchers()
        raise_descriptor_limit()

    @ray.method(concurrency_group="work")
    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Fetch one blob; returns the outcome, the final events, and what registries warned of."""
        begun = time.monotonic()
        source = source_from_dict(task["source"])
        with (
            self._tasks.running(task["key"]) as cancelled,
            task_report(task["owner"], task["run"], task["node"], task["reference"]) as told,
        ):
            engine = self._engines.get(task)
            fetcher: Fetcher | SpreadFetcher = engine.fetcher(source)
            if task["spread"] is not None:
                fetcher = self._spreads.get(task, engine, source)
            watch = FirstByte(told.report)
            fetched = fetcher.fetch(
                source,
                Descriptor.from_dict(task["descriptor"]),
                report=watch,
                cancelled=cancelled,
            )
        return {
            "outcome": {
                "source": fetched.source,
                "fetched_bytes": fetched.fetched_bytes,
                "seconds": fetched.seconds,
            },
            "way": {
                "started": watch.started,
                "first_byte": watch.first_byte,
                "by_source": dict(fetched.by_source),
                "remarks": [asdict(remark) for remark in fetched.remarks],
            },
            "events": told.final_events(),
            "warnings": engine.warnings_since(begun),
        }

    @ray.method(concurrency_group="control")
    def cancel(self, key: str) -> bool:
        """Give one task up; it ends soon with CancelledError."""
        return self._tasks.cancel(key)

    @ray.method(concurrency_group="control")
    def pid(self) -> int:
        """Return the number of this process."""
        return os.getpid()

    @ray.method(concurrency_group="life")
    def live(self, owner: dict[str, Any]) -> None:
        """End with the process ``owner``; the end of this call tells it that this one has ended."""
        outlive_not(Process.from_dict(owner))
