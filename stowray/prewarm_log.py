"""A pre-warm run as log lines (``--log-json``): what became of images on nodes, and the end.

Invariant: what is over is said once, at info, or at warning when it failed; texts are escaped by
the log and were redacted where they were made. Blobs and layers are for ``-v``.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING

from stowray.log import LogLines
from stowray.prewarm_text import cell_word, failures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stowray.log import Log
    from stowray.pipeline.prewarm_report import PrewarmReport
    from stowray.pipeline.progress import Event


class PrewarmLog:
    """What watches a run for its log; ``report`` gets the state so far."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._run = ""
        self._told: dict[tuple[str, str], str] = {}
        self._lines = LogLines(log) if log.says("debug") else None

    def events(self, events: Sequence[Event]) -> None:
        """Take in events; said with ``-v`` only."""
        if self._lines is not None:
            self._lines(events)

    def report(self, report: PrewarmReport) -> None:
        """Say what is new."""
        with self._lock:
            if report.run != self._run:
                self._run = report.run
                self._told.clear()
                self._log("info", "run.begun", f"run {report.run} has begun", run=report.run)
            for cell in report.cells:
                word = cell_word(cell)
                if word in ("waiting", "working") or not self._is_new(
                    (cell.node, cell.reference), word
                ):
                    continue
                self._log(
                    "info" if cell.error is None else "warning",
                    f"image.{word.replace(' ', '_')}",
                    f"{cell.node}: {cell.reference} {word}",
                    reference=cell.reference,
                    node=cell.node,
                    digest=cell.digest or None,
                    seconds=round(cell.seconds, 3) or None,
                    **_error(cell.error),
                )
            for node in report.nodes:
                if node.error is not None and self._is_new((node.name, ""), node.state):
                    told = f"{node.name}: {node.state}"
                    self._log(
                        "warning", f"node.{node.state}", told, node=node.name, **_error(node.error)
                    )
            for wave in report.waves:
                if wave.completed is not None and self._is_new(("", str(wave.number)), "over"):
                    self._log(
                        "info" if wave.passed else "warning",
                        "wave.passed" if wave.passed else "wave.not_passed",
                        f"wave {wave.number + 1}: {wave.ready} of {len(wave.nodes)} nodes ready",
                        wave=wave.number + 1,
                        nodes=len(wave.nodes),
                        ready=wave.ready,
                    )

    def _is_new(self, key: tuple[str, str], word: str) -> bool:
        if self._told.get(key) == word:
            return False
        self._told[key] = word
        return True


def log_end(log: Log, report: PrewarmReport) -> None:
    """Say how a run has ended, its warnings, and each failure once."""
    for text in (*report.warnings, *(str(drift) for drift in report.drift)):
        log("warning", "warning", text, run=report.run)
    code = report.exit_code
    states = Counter(node.state for node in report.nodes)
    log(
        "info" if code == 0 else "warning",
        "run.done" if code == 0 else "run.interrupted" if report.interrupted else "run.failed",
        f"run {report.run} has ended with exit status {code}",
        run=report.run,
        exit_code=code,
        seconds=report.seconds,
        nodes=dict(sorted(states.items())),
        images=len(report.images),
        origin_bytes=report.origin_bytes,
        peer_bytes=report.peer_bytes,
        manifest_requests=report.manifest_requests,
    )
    for line in failures(report):
        log("error", "failed", line, run=report.run, exit_code=code)


def _error(error: dict[str, object] | None) -> dict[str, object]:
    if error is None:
        return {}
    return {"type": error.get("type"), "error": error.get("message")}
