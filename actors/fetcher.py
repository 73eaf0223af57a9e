"""Fetches blobs into a store of its node; one process, many threads, bytes to disk only.

Invariant: a task lost with this process leaves a resumable ingest behind; whoever repeats it goes
on at the same byte.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import ray

from stowray.actors.engines import Engines
from stowray.actors.lifeline import outlive_not
from stowray.actors.processes import Process
from stowray.actors.reporting import FirstByte, task_report
from stowray.actors.spread_fetchers import SpreadFetchers
from stowray.actors.tasks import Tasks
from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.errors import StowrayError, to_wire
from stowray.pipeline.files import raise_descriptor_limit
from stowray.pipeline.source import source_from_dict

if TYPE_CHECKING:
    from stowray.pipeline.fetch import Fetched, Fetcher
    from stowray.pipeline.spread_fetch import SpreadFetcher


@dataclass(slots=True)
class _Way:
    """How one blob comes, also if it does not in the end; times are wall-clock seconds."""

    key: str
    descriptor: Descriptor
    by_source: dict[str, int] = field(default_factory=dict)
    watch: FirstByte | None = None

    def so_far(self, fetched: Fetched | None = None) -> dict[str, Any]:
        """Return it as plain data; ``ended`` is 0.0 unless the blob was ``fetched``."""
        now = time.time()
        started = self.watch.started if self.watch else now
        return {
            "kind": "fetch",
            "key": self.key,
            "digest": str(self.descriptor.digest),
            "size": self.descriptor.size,
            "seconds": fetched.seconds if fetched else now - started,
            "started": started,
            "first_byte": self.watch.first_byte if self.watch else 0.0,
            "ended": now if fetched else 0.0,
            "by_source": dict(self.by_source),
            "remarks": [asdict(remark) for remark in fetched.remarks] if fetched else [],
        }


class FetchActor:
    """The shell round a :class:`Fetcher`."""

    def __init__(self) -> None:
        self._tasks = Tasks()
        self._engines = Engines()
        self._spreads = SpreadFetchers()
        raise_descriptor_limit()

    @ray.method(concurrency_group="work")
    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Fetch one blob; returns the outcome, the final events, and what registries warned of.

        Of one that failed an ``error`` instead of the outcome, and what had come of it.
        """
        begun = time.monotonic()
        source = source_from_dict(task["source"])
        way = _Way(task["key"], Descriptor.from_dict(task["descriptor"]))
        reply: dict[str, Any]
        with (
            self._tasks.running(task["key"]) as cancelled,
            task_report(
                task["owner"],
                task["run"],
                task["node"],
                task["reference"],
                None if task["spread"] is None else way.so_far,
            ) as told,
        ):
            engine = self._engines.get(task)
            fetcher: Fetcher | SpreadFetcher = engine.fetcher(source)
            if task["spread"] is not None:
                fetcher = self._spreads.get(task, engine, source)
            watch = way.watch = FirstByte(told.report)
            try:
                fetched = fetcher.fetch(
                    source,
                    way.descriptor,
                    report=watch,
                    cancelled=cancelled,
                    by_source=way.by_source,
                )
            except StowrayError as error:
                reply = {"error": to_wire(error), "way": way.so_far()}
            else:
                outcome = {
                    "source": fetched.source,
                    "fetched_bytes": fetched.fetched_bytes,
                    "seconds": fetched.seconds,
                }
                reply = {"outcome": outcome, "way": way.so_far(fetched)}
        return {
            **reply,
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
