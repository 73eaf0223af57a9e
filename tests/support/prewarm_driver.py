"""A program that pre-warms, for tests that look at a driver from outside.

    python -m tests.support.prewarm_driver JSON

The argument has ``do`` (run, plan, status, repair), ``references``, and may have ``settings``
(options by name), ``plan`` (overrides by key), ``lock``, ``watch``, ``nodes`` (of an embedded Ray).
Each change of the report is a line ``{"nodes": {name: state}, "present": [[node, reference]]}`` if
``changes`` is asked for; the last line is the report, the plan's results, or ``{"error": …}`` with
the ``report`` as far as it got.
SIGTERM and SIGINT cancel. Exits as the command would.
"""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/

from __future__ import annotations

import json
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def main(text: str) -> int:
    from stowray.actors.prewarm import PrewarmRun
    from stowray.pipeline.errors import StowrayError, describe
    from stowray.pipeline.prewarm_plan_file import load_plan
    from stowray.pipeline.progress import Progress
    from stowray.pipeline.settings import load_settings

    wanted: dict[str, Any] = json.loads(text)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    settings = load_settings(overrides=wanted.get("settings", {}))
    plan = load_plan(None, references=wanted["references"], overrides=wanted.get("plan"))
    progress = Progress(node=settings.node_name)
    run = PrewarmRun(
        plan,
        settings,
        progress=progress,
        lock=Path(wanted["lock"]) if wanted.get("lock") else None,
        watch=bool(wanted.get("watch")),
        embedded_nodes=int(wanted.get("nodes", 1)),
    )
    reached: list[dict[str, Any]] = [{}]

    def note(report: Any) -> None:
        reached[0] = report.to_dict()
        if wanted.get("changes"):
            _show(report)

    run.on_change = note
    try:
        if wanted["do"] == "plan":
            made = run.plan(stop.is_set)
            print(json.dumps({"results": made.results(), "totals": made.to_dict()}), flush=True)
            return made.exit_code
        if wanted["do"] == "run":
            report = run.run(stop.is_set)
        else:
            report = run.status(wanted["do"] == "repair", stop.is_set)
        events = [event.to_dict() for event in progress.events()]
        print(json.dumps(report.to_dict() | {"events": events}), flush=True)
        return report.exit_code
    except StowrayError as error:
        print(json.dumps({"error": describe(error), "report": reached[0]}), flush=True)
        return error.exit_code
    finally:
        run.close()
        progress.close()


def _show(report: Any) -> None:
    line = {
        "nodes": {node.name: node.state for node in report.nodes},
        "present": [[cell.node, cell.reference] for cell in report.cells if cell.present],
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
