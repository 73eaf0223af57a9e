"""What is known of a pre-warm run while it goes on, row by row, and the report made of it.

Invariant: used by one thread; a report can be taken at any moment; a node's state follows from its
cells unless the node is dead, refused or has failed as a whole. Times are seconds since the start.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import stowray
from stowray.pipeline.errors import NodeError, StowrayError, describe
from stowray.pipeline.prewarm_report import PrewarmReport
from stowray.pipeline.prewarm_rows import (
    BlobSpan,
    Cell,
    Delivery,
    ImageRow,
    NodeRow,
    Remark,
    WaveRow,
    lost_cells,
    node_state,
    origin_and_peer_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stowray.pipeline.lock_file import Drift

# The last word on a node: what becomes of its cells does not change it.
_LAST = ("dead", "refused")


@dataclass(slots=True)
class RunState:
    """All rows of a run; ``command`` is prewarm or status."""

    run: str
    command: str
    minimum_ready: float
    nodes: dict[str, NodeRow] = field(default_factory=dict)
    images: dict[str, ImageRow] = field(default_factory=dict)
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)
    spans: dict[tuple[str, str], BlobSpan] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    deliveries: list[Delivery] = field(default_factory=list)
    waves: dict[int, WaveRow] = field(default_factory=dict)
    drift: tuple[Drift, ...] = ()
    warnings: list[str] = field(default_factory=list)
    manifest_requests: int = 0
    interrupted: bool = False
    changed: bool = True
    started: float = field(default_factory=time.time)
    # The clock of the wall may be set while the run goes on.
    _begun: float = field(default_factory=time.monotonic)
    # What is said of pulls that are not over, and was of those that nothing more was heard of.
    _under_way: dict[str, tuple[str, Sequence[Mapping[str, Any]], float]] = field(
        default_factory=dict
    )
    _over: set[str] = field(default_factory=set)

    @property
    def seconds(self) -> float:
        """How long the run has gone on."""
        return time.monotonic() - self._begun

    def update_node(self, name: str, **changes: Any) -> None:
        """Change a node's row, made if there is none."""
        self.nodes[name] = replace(self.nodes.get(name, NodeRow(name)), **changes)
        self.changed = True

    def fail_node(self, name: str, error: Mapping[str, Any], state: str = "failed") -> None:
        """Note that a node as a whole has failed or is refused, and with it its cells.

        ``error`` is as ``errors.describe`` makes it.
        """
        if self.nodes[name].state in _LAST:
            return
        for cell in self.open_cells(name):
            self.update_cell(name, cell.reference, status="failed", error=dict(error))
        self.update_node(name, state=state, error=dict(error))

    def take_back(self, name: str) -> None:
        """Begin anew with a node that was lost and has come back."""
        row = self.nodes[name]
        self.nodes[name] = NodeRow(name, node_id=row.node_id, wave=row.wave)
        for cell in [cell for cell in self.cells.values() if cell.node == name]:
            self.cells[name, cell.reference] = Cell(name, cell.reference)
        self.deliveries = [entry for entry in self.deliveries if entry.node != name]
        self.changed = True

    def forget_node(self, name: str) -> None:
        """Take a node out of the report, as one that left when all was done."""
        self.changed = True
        self.nodes.pop(name, None)
        for key in [key for key in self.cells if key[0] == name]:
            del self.cells[key]
        self.deliveries = [entry for entry in self.deliveries if entry.node != name]

    def lose_node(self, name: str, reason: str) -> None:
        """Note that a node is dead; what it had does not count any more."""
        if self.nodes[name].state == "dead":
            return
        self.update_node(name, state="dead", error=describe(NodeError(name, reason)))
        own = [cell for cell in self.cells.values() if cell.node == name]
        for cell in lost_cells(own, name, reason):
            self.cells[cell.node, cell.reference] = cell

    def update_image(self, reference: str, **changes: Any) -> None:
        """Change an image's row, made if there is none."""
        row = self.images.get(reference, ImageRow(reference))
        self.images[reference] = replace(row, **changes)
        self.changed = True

    def update_cell(self, node: str, reference: str, **changes: Any) -> None:
        """Change a cell, made if there is none, and the state of its node with it."""
        key = (node, reference)
        row = self.nodes[node]
        if row.state in _LAST:
            if key in self.cells:
                return
            # It was lost before its images were known: nothing comes of this one any more.
            changes |= {"status": "failed", "error": row.error}
        self.cells[key] = replace(self.cells.get(key, Cell(node, reference)), **changes)
        self.changed = True

    def is_open(self, node: str, reference: str) -> bool:
        """Return whether a cell has come to nothing yet."""
        return self.cells[node, reference].status in ("waiting", "working")

    def open_cells(self, node: str) -> list[Cell]:
        """Return the cells of a node that have come to nothing yet."""
        return [
            cell
            for cell in self.cells.values()
            if cell.node == node and self.is_open(node, cell.reference)
        ]

    def settle_node(self, name: str) -> None:
        """Give a node the state that follows from its cells."""
        row = self.nodes[name]
        own = [cell for cell in self.cells.values() if cell.node == name]
        if row.state in _LAST or not own:
            return
        state = node_state(own)
        error = next((cell.error for cell in own if cell.error is not None), None)
        self.update_node(name, state=state, error=error if state == "failed" else None)

    def fail_open(self, error: Mapping[str, Any]) -> None:
        """Let nothing stay open, for the run has ended: what is has failed with ``error``.

        It is as ``errors.describe`` makes it.
        """
        for name in list(self.nodes):
            left = self.open_cells(name)
            for cell in left:
                self.update_cell(name, cell.reference, status="failed", error=dict(error))
            if left:
                self.settle_node(name)
            elif self.nodes[name].state in ("waiting", "working"):
                self.fail_node(name, error)

    def skip_node(self, name: str, error: StowrayError | None) -> None:
        """Note that a node is left out; with an ``error`` it should not have been."""
        self.update_node(name, state="skipped", error=None if error is None else describe(error))
        for cell in self.open_cells(name):
            told = None if error is None else describe(error)
            self.update_cell(name, cell.reference, status="skipped", error=told)

    def note_delivery(self, row: Delivery) -> None:
        """Note what came of a delivery; why one failed stays as it was said first."""
        pair = (row.node, row.reference, row.runtime)
        for place, entry in enumerate(self.deliveries):
            if (entry.node, entry.reference, entry.runtime) == pair:
                if row.error is None:
                    self.deliveries[place] = row
                break
        else:
            self.deliveries.append(row)
        self.changed = True

    def fail_deliveries(self, name: str, runtimes: Sequence[str], error: Mapping[str, Any]) -> None:
        """Note that no runtime gets any more of the images that a node has; those that did, did."""
        for cell in [cell for cell in self.cells.values() if cell.node == name and cell.present]:
            for runtime in runtimes:
                self.note_delivery(Delivery(name, cell.reference, runtime, dict(error)))

    def note_ways(
        self,
        node: str,
        run: str,
        ways: Sequence[Mapping[str, Any]],
        ahead: float,
        *,
        is_over: bool,
    ) -> None:
        """Take over how blobs came in a pull, ``run``, to a node.

        Its clock is ``ahead`` of ours by so much. What is said of a pull that is not over replaces
        what was said before, and stays if nothing more is heard; what is said when it is, first,
        is the last word.
        """
        if run in self._over:
            return
        self.changed = True
        if not is_over:
            self._under_way[run] = (node, ways, ahead)
            return
        self._over.add(run)
        self._under_way.pop(run, None)
        for way in ways:
            self._add_way(self.spans, node, way, ahead)
            for remark in way.get("remarks", ()):
                self.remarks.append(Remark(node=node, digest=str(way["digest"]), **remark))

    def _add_way(
        self,
        spans: dict[tuple[str, str], BlobSpan],
        node: str,
        way: Mapping[str, Any],
        ahead: float,
    ) -> None:
        digest = str(way["digest"])
        span = spans.get((node, digest), BlobSpan(node, digest, int(way["size"])))
        ended = self._since(way["ended"], ahead)
        if way["kind"] == "stage":
            seconds = span.apply_seconds + float(way["seconds"])
            spans[node, digest] = replace(span, staged=ended, apply_seconds=seconds)
            return
        by_source = dict(span.by_source)
        for source, size in way["by_source"].items():
            by_source[source] = by_source.get(source, 0) + int(size)
        spans[node, digest] = replace(
            span,
            started=_first(span.started, self._since(way["started"], ahead)),
            first_byte=_first(span.first_byte, self._since(way["first_byte"], ahead)),
            completed=_first(ended, span.completed),
            by_source=by_source,
            fetch_seconds=span.fetch_seconds + float(way["seconds"]),
        )

    def _spans_so_far(self) -> dict[tuple[str, str], BlobSpan]:
        spans = dict(self.spans)
        for node, ways, ahead in self._under_way.values():
            for way in ways:
                self._add_way(spans, node, way, ahead)
        return spans

    def report(self) -> PrewarmReport:
        """Return the whole truth so far."""
        by_source: dict[str, int] = {}
        spans = self._spans_so_far()
        for span in spans.values():
            for source, size in span.by_source.items():
                by_source[source] = by_source.get(source, 0) + size
        origin_bytes, peer_bytes = origin_and_peer_bytes(by_source)
        started = datetime.fromtimestamp(self.started, UTC)
        return PrewarmReport(
            run=self.run,
            version=stowray.__version__,
            command=self.command,
            started=started.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            seconds=round(self.seconds, 3),
            nodes=tuple(self.nodes.values()),
            images=tuple(self.images.values()),
            cells=tuple(self.cells.values()),
            spans=tuple(spans.values()),
            remarks=tuple(self.remarks),
            origin_bytes=origin_bytes,
            peer_bytes=peer_bytes,
            manifest_requests=self.manifest_requests,
            drift=self.drift,
            deliveries=tuple(self.deliveries),
            waves=tuple(self.waves.values()),
            warnings=tuple(self.warnings),
            minimum_ready=self.minimum_ready,
            interrupted=self.interrupted,
        )

    def _since(self, wall: float, ahead: float) -> float | None:
        """Return a node's time as seconds since the start here, None for one never reached."""
        return round(max(0.0, wall - ahead - self.started), 3) if wall else None


def _first(known: float | None, new: float | None) -> float | None:
    return new if known is None else known
