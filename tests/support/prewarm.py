"""Reports of pre-warm runs as tests need them, and a run that follows a script."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from stowray.pipeline.prewarm_report import PrewarmReport
from stowray.pipeline.prewarm_rows import BlobSpan, Cell, ImageRow, NodeRow

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stowray.pipeline.dry_run import DryRun
    from stowray.pipeline.errors import StowrayError
    from stowray.pipeline.progress import Progress

MIB = 1 << 20


def make_report(
    nodes: Sequence[str],
    images: Sequence[str],
    *,
    status: str = "done",
    size: int = 10 * MIB,
    **more: object,
) -> PrewarmReport:
    """Return a report in which every image has ``status`` on every node."""
    present = status in ("done", "exists")
    state = {"done": "ready", "exists": "ready", "failed": "failed"}.get(status, status)
    report = PrewarmReport(
        run="0123",
        version="9.9.9",
        started="2026-01-02T03:04:05Z",
        seconds=12.5,
        nodes=tuple(
            NodeRow(name, node_id=f"{number:056x}", state=state)  # type: ignore[arg-type]
            for number, name in enumerate(nodes)
        ),
        images=tuple(
            ImageRow(name, f"sha256:{'1' * 64}", {"linux/amd64": f"sha256:{'2' * 64}"}, size)
            for name in images
        ),
        cells=tuple(
            Cell(node, image, status, present=present, seconds=1.5)  # type: ignore[arg-type]
            for node in nodes
            for image in images
        ),
    )
    return replace(report, **more)  # type: ignore[arg-type]


def make_spans(nodes: Sequence[str], blobs: int = 3) -> tuple[BlobSpan, ...]:
    """Return blobs that the first node has from a registry and the others from it."""
    return tuple(
        BlobSpan(
            node,
            f"sha256:{blob:064x}",
            size=MIB,
            started=0.5 * blob,
            first_byte=0.5 * blob + 0.25,
            completed=blob + 1.0,
            staged=blob + 1.5,
            by_source={"registry.example": MIB} if number == 0 else {f"peer:{nodes[0]}": MIB},
            fetch_seconds=1.0,
            apply_seconds=0.5,
        )
        for number, node in enumerate(nodes)
        for blob in range(blobs)
    )


@dataclass
class ScriptedRun:
    """Does what ``steps`` say, one report after the other, then returns the last or raises.

    ``gate`` holds the last step back, so that a test may look at the run in its middle.
    """

    steps: Sequence[PrewarmReport]
    progress: Progress
    error: StowrayError | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    closed: int = 0
    repaired: list[bool] = field(default_factory=list)
    dry_run: DryRun | None = None

    def __post_init__(self) -> None:
        self.on_change: Callable[[PrewarmReport], None] = lambda _report: None

    def plan(self, _cancelled: Callable[[], bool]) -> DryRun:
        """Return what the test gave."""
        assert self.dry_run is not None
        return self.dry_run

    def run(self, cancelled: Callable[[], bool]) -> PrewarmReport:
        """Go through the steps."""
        for report in self.steps:
            self.on_change(report)
        while not self.gate.wait(0.01):
            if cancelled():
                return replace(self.steps[-1], interrupted=True)
        if self.error is not None:
            raise self.error
        return self.steps[-1]

    def status(self, repair: bool, _cancelled: Callable[[], bool]) -> PrewarmReport:
        """Return the last step as what `status` found."""
        self.repaired.append(repair)
        return replace(self.steps[-1], command="status")

    def close(self) -> None:
        """Count how often it is called."""
        self.closed += 1
