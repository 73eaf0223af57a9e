"""Stages layers and commits them, in a process of its own: tar application is Python work.

Invariant: every task is idempotent and leaves nothing visible unless it ends well, so that a task
lost with this process is simply done again by another one.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import ray

from stowray.actors.lifeline import outlive_not
from stowray.actors.processes import Process
from stowray.actors.reporting import task_report
from stowray.actors.tasks import Tasks
from stowray.pipeline.errors import StorageError
from stowray.pipeline.files import raise_descriptor_limit
from stowray.pipeline.layer_tasks import LayerTasks

SWITCH_SECONDS = 0.0005


class UnpackActor:
    """The shell round :class:`LayerTasks`."""

    def __init__(self) -> None:
        self._tasks = Tasks()
        self._layers = LayerTasks()
        raise_descriptor_limit()
        # As in a local worker the inflating threads get the interpreter lock back quickly. The
        # umask stays: Ray's own log files, perhaps of somebody's cluster, are made with it.
        sys.setswitchinterval(SWITCH_SECONDS)

    @ray.method(concurrency_group="work")
    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """Carry out a stage, or commits; returns outcome and final events."""
        with (
            self._tasks.running(task["key"]) as cancelled,
            task_report(task["owner"], task["run"], task["node"], task["reference"]) as told,
        ):
            layer, is_stage = task["arguments"].get("digest"), task["kind"] == "stage"

            def on_progress(current: int, total: int) -> None:
                if is_stage:
                    told.report("layer", layer, "applying", current, total)

            try:
                outcome = self._layers.run(task["kind"], task["arguments"], on_progress, cancelled)
            except OSError as error:
                raise StorageError(str(error.filename or ""), str(error)) from error
            except MemoryError as error:
                raise StorageError("memory", "not enough memory") from error
        return {"outcome": outcome, "events": told.final_events()}

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
