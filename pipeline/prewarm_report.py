"""The whole truth of a pre-warm run as data: what each node has, from where, and what failed.

Invariant: a report is complete at any moment of the run (live views get the state so far), survives
``to_dict``/``from_dict`` unchanged, and its exit status, its result lines and its list of ready
nodes all follow from the same cells. Times are seconds since the run began, sizes are bytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from stowray.pipeline import errors
from stowray.pipeline.errors import InvalidReferenceError, StowrayError, UsageError
from stowray.pipeline.lock_file import Drift
from stowray.pipeline.prewarm_rows import (
    BlobSpan,
    Cell,
    Delivery,
    ImageRow,
    NodeRow,
    Remark,
    WaveRow,
    count_ready,
)
from stowray.pipeline.source import parse_source

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class PrewarmReport:
    """All of a run; ``started`` is UTC as in RFC 3339, ``command`` is prewarm, status or plan.

    ``minimum_ready`` is the plan's fraction: below it the run as a whole counts as failed
    (``enough``). ``warnings`` are sentences for people.
    """

    run: str = ""
    version: str = ""
    command: str = "prewarm"
    started: str = ""
    seconds: float = 0.0
    nodes: tuple[NodeRow, ...] = ()
    images: tuple[ImageRow, ...] = ()
    cells: tuple[Cell, ...] = ()
    spans: tuple[BlobSpan, ...] = ()
    remarks: tuple[Remark, ...] = ()
    origin_bytes: int = 0
    peer_bytes: int = 0
    manifest_requests: int = 0
    drift: tuple[Drift, ...] = ()
    deliveries: tuple[Delivery, ...] = ()
    waves: tuple[WaveRow, ...] = ()
    warnings: tuple[str, ...] = ()
    minimum_ready: float = 1.0
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """The command's exit status.

        0: every image is on every node (of a dry run: nothing keeps it from there), or
        ``is_tolerated``; 130: interrupted; that of the error when everything failed with one
        status; else 1.
        """
        if self.interrupted:
            return errors.CancelledError.exit_code
        if self.is_tolerated:
            return 0
        fine, codes = self._outcome()
        if not codes:
            return 0
        return codes.pop() if len(codes) == 1 and not fine else 1

    @property
    def enough(self) -> bool:
        """Whether at least the fraction of nodes is ready that the plan asked for."""
        from stowray.pipeline.prewarm_plan import FailurePolicy

        policy = FailurePolicy(minimum_ready=self.minimum_ready)
        return policy.is_enough(*count_ready(self.nodes))

    @property
    def is_tolerated(self) -> bool:
        """Whether a pre-warm run is fine although nodes failed: the plan asked for fewer than all.

        At least one node must be ready, and nothing may have failed on those that are.
        """
        if self.command != "prewarm" or self.minimum_ready >= 1.0 or not self.enough:
            return False
        ready = {node.name for node in self.nodes if node.state == "ready"}
        return bool(ready) and not any(
            entry.error is not None for entry in self.deliveries if entry.node in ready
        )

    def ready_nodes(self, reference: str) -> tuple[NodeRow, ...]:
        """Return the nodes that have ``reference``, checked on disk; any spelling of it will do."""
        wanted = _canonical(reference)
        ready = {
            cell.node
            for cell in self.cells
            if cell.present and _canonical(cell.reference) == wanted
        }
        return tuple(node for node in self.nodes if node.name in ready)

    def cell(self, node: str, reference: str) -> Cell | None:
        """Return one cell of the matrix."""
        return next((c for c in self.cells if c.node == node and c.reference == reference), None)

    def by_source(self) -> dict[str, int]:
        """Return the bytes that each source gave, the largest first."""
        given: dict[str, int] = {}
        for span in self.spans:
            for source, size in span.by_source.items():
                given[source] = given.get(source, 0) + size
        return dict(sorted(given.items(), key=lambda entry: (-entry[1], entry[0])))

    def results(self) -> list[dict[str, Any]]:
        """Return the result lines: an object for each reference and node, in the plan's order.

        What failed has ``reference``, ``node`` and ``error``; what `status` looked at ``present``.
        """
        lines = [
            {"reference": image.reference, "node": None, "error": image.error}
            for image in self.images
            if image.error is not None and not self._cells_of(image.reference)
        ]
        lines += [self._result(cell) for cell in self._ordered()]
        seen = {cell.node for cell in self.cells}
        # Of a node that failed before its images were known, nothing but that can be said.
        references: list[str | None] = [image.reference for image in self.images]
        lines += [
            {"reference": reference, "node": node.name, "error": node.error}
            for node in self.nodes
            if node.error is not None and node.name not in seen
            for reference in references or [None]
        ]
        return lines

    def receipt(self, node: str) -> dict[str, Any]:
        """Return what one node got, by itself: for an audit, or for the node to keep."""
        row = next((row for row in self.nodes if row.name == node), None)
        if row is None:
            raise UsageError(node, "no such node in this report")
        return {
            "format": FORMAT,
            "run": self.run,
            "version": self.version,
            "started": self.started,
            "node": row.to_dict(),
            "images": [self._result(cell) for cell in self._ordered() if cell.node == node],
            "blobs": [span.to_dict() for span in self.spans if span.node == node],
            "remarks": [remark.to_dict() for remark in self.remarks if remark.node == node],
            "deliveries": [entry.to_dict() for entry in self.deliveries if entry.node == node],
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values (JSON, MessagePack), with what follows from them."""
        plain: dict[str, Any] = {"format": FORMAT}
        for entry in fields(self):
            value = getattr(self, entry.name)
            kind = _ROWS.get(entry.name)
            plain[entry.name] = [asdict(row) for row in value] if kind else value
        plain["warnings"] = list(self.warnings)
        plain["exit_code"] = self.exit_code
        plain["enough"] = self.enough
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PrewarmReport:
        """Return the report that :meth:`to_dict` described; UsageError when it is none of ours."""
        if data.get("format") != FORMAT:
            raise UsageError(
                "report", f"format is {data.get('format')!r}, and only {FORMAT} is known here"
            )
        values: dict[str, Any] = {}
        try:
            for entry in fields(cls):
                if entry.name not in data:
                    continue
                value = data[entry.name]
                kind = _ROWS.get(entry.name)
                values[entry.name] = tuple(_make(kind, row) for row in value) if kind else value
            values["warnings"] = tuple(values.get("warnings", ()))
            return cls(**values)
        except (TypeError, AttributeError, KeyError) as error:
            raise UsageError("report", f"not a report of a pre-warm run: {error}") from error

    def _outcome(self) -> tuple[bool, set[int]]:
        """Return whether anything is fine, and the exit statuses of what is not."""
        failed = [cell for cell in self.cells if not self._is_fine(cell)]
        fine = len(failed) < len(self.cells)
        codes = {_code(cell) for cell in failed}
        seen_nodes = {cell.node for cell in self.cells}
        codes |= {
            exit_code_of(node.error)
            for node in self.nodes
            if node.error is not None and node.name not in seen_nodes
        }
        codes |= {
            exit_code_of(image.error)
            for image in self.images
            if image.error is not None and not self._cells_of(image.reference)
        }
        codes |= {exit_code_of(entry.error) for entry in self.deliveries if entry.error is not None}
        return fine, codes

    def _is_fine(self, cell: Cell) -> bool:
        # A dry run brings nothing: there it is enough that nothing has failed.
        return cell.is_fine or (self.command == "plan" and cell.error is None)

    def _cells_of(self, reference: str) -> list[Cell]:
        return [cell for cell in self.cells if cell.reference == reference]

    def _ordered(self) -> list[Cell]:
        images = {image.reference: number for number, image in enumerate(self.images)}
        nodes = {node.name: number for number, node in enumerate(self.nodes)}
        return sorted(
            self.cells,
            key=lambda cell: (
                images.get(cell.reference, len(images)),
                nodes.get(cell.node, len(nodes)),
            ),
        )

    def _result(self, cell: Cell) -> dict[str, Any]:
        if cell.error is not None:
            return {"reference": cell.reference, "node": cell.node, "error": cell.error}
        about = {"status": cell.status, "present": cell.present}
        if cell.result is not None:
            return {**cell.result, "reference": cell.reference, "node": cell.node, **about}
        image = next((row for row in self.images if row.reference == cell.reference), None)
        return {
            "reference": cell.reference,
            "node": cell.node,
            "digest": cell.digest,
            "resolved": image.resolved if image else "",
            **about,
        }


_ROWS: Final[dict[str, type[Any]]] = {
    "nodes": NodeRow,
    "images": ImageRow,
    "cells": Cell,
    "spans": BlobSpan,
    "remarks": Remark,
    "drift": Drift,
    "deliveries": Delivery,
    "waves": WaveRow,
}


def exit_code_of(error: Mapping[str, Any] | None) -> int:
    """Return the exit status of an ``error`` object; 1 for a class that is not known here."""
    if error is None:
        return 0
    kind = getattr(errors, str(error.get("type")), None)
    if isinstance(kind, type) and issubclass(kind, StowrayError):
        return kind.exit_code
    return StowrayError.exit_code


def _make(kind: type[Any], row: Mapping[str, Any]) -> Any:
    return Drift(**row) if kind is Drift else kind.from_dict(row)


def _code(cell: Cell) -> int:
    if cell.error is not None:
        return exit_code_of(cell.error)
    # What is not there, and nobody says why: nothing was found, or the work did not get to it.
    if cell.status in ("missing", "partial"):
        return errors.NotFoundError.exit_code
    return StowrayError.exit_code


def _canonical(reference: str) -> str:
    try:
        return parse_source(reference).canonical
    except InvalidReferenceError:
        return reference
