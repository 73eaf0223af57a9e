"""The whole truth of a pre-warm run as data: what each node has, from where, and what failed.

Invariant: a report is complete at any moment of the run (live views get the state so far), survives
``to_dict``/``from_dict`` unchanged, and its exit status, its result lines and its list of ready
nodes all follow from the same cells. Times are seconds since the run began, sizes are bytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from stowray.pipeline import errors
from stowray.pipeline.errors import InvalidReferenceError, NodeError, StowrayError, UsageError
from stowray.pipeline.lock_file import Drift
from stowray.pipeline.source import parse_source

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

FORMAT: Final = 1
# How a source is called that is a node of the run; any other is a registry's host.
PEER: Final = "peer:"
STORE: Final = "store"

# The first two while the run goes on, never in the report of a run that has ended.
NodeState = Literal[
    "waiting", "working", "ready", "partial", "failed", "dead", "refused", "skipped"
]
# "done": pulled in this run; "exists": all of it was there; "partial" and "missing" are what
# `status` finds; "skipped": not wanted there (no such platform), or never begun (then with error).
CellStatus = Literal[
    "waiting", "working", "done", "exists", "failed", "partial", "missing", "skipped"
]
NODE_STATES: Final = (
    "waiting",
    "working",
    "ready",
    "partial",
    "failed",
    "dead",
    "refused",
    "skipped",
)
CELL_STATUSES: Final = (
    "waiting",
    "working",
    "done",
    "exists",
    "failed",
    "partial",
    "missing",
    "skipped",
)


class _Row:
    """What all rows share: plain values in and out."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the row that :meth:`to_dict` described; later versions' keys are passed over."""
        known = {entry.name for entry in fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: value for name, value in data.items() if name in known})


@dataclass(frozen=True, slots=True)
class NodeRow(_Row):
    """A node of the run.

    ``store`` is the store's path there, ``wave`` counts from 0, ``shares_with`` names the node that
    writes the store which this one reads too. ``error`` tells why it is failed, dead or refused, as
    :func:`~stowray.pipeline.errors.describe` does.
    """

    name: str
    node_id: str = ""
    address: str = ""
    store: str = ""
    platform: str = ""
    state: NodeState = "waiting"
    error: dict[str, Any] | None = None
    wave: int = 0
    shares_with: str = ""
    disk_free: int = 0
    disk_needed: int = 0


@dataclass(frozen=True, slots=True)
class ImageRow(_Row):
    """A reference: what it pointed to, and the manifest of each platform by its text.

    ``size`` counts each blob of all these platforms once. ``error`` tells why it was not resolved.
    """

    reference: str
    resolved: str = ""
    digests: dict[str, str] = field(default_factory=dict)
    size: int = 0
    error: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Cell(_Row):
    """One image on one node.

    ``present`` is True only when digest and snapshot were checked on disk. ``result`` is the object
    of a pull's result line.
    """

    node: str
    reference: str
    status: CellStatus = "waiting"
    digest: str = ""
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    present: bool = False
    seconds: float = 0.0

    @property
    def is_fine(self) -> bool:
        """Return whether nothing is missing: it is there, or was not wanted there."""
        return self.present or (self.status == "skipped" and self.error is None)


@dataclass(frozen=True, slots=True)
class BlobSpan(_Row):
    """One blob on one node: when it was asked for, had its first byte, was complete, was unpacked.

    A time that was not reached is None. ``by_source`` has registry hosts and ``peer:<node>``.
    """

    node: str
    digest: str
    size: int = 0
    started: float | None = None
    first_byte: float | None = None
    completed: float | None = None
    staged: float | None = None
    by_source: dict[str, int] = field(default_factory=dict)
    fetch_seconds: float = 0.0
    apply_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Remark(_Row):
    """Something worth knowing that failed nothing: a source that was slow, dead or lied."""

    node: str
    source: str
    kind: str
    digest: str = ""
    position: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Delivery(_Row):
    """An image handed to a runtime on a node; ``error`` None: it took it."""

    node: str
    reference: str
    runtime: str
    error: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class WaveRow(_Row):
    """A wave: the nodes that belong to it and how many were verified ready at its end."""

    number: int
    nodes: tuple[str, ...] = ()
    ready: int = 0
    started: float | None = None
    completed: float | None = None
    passed: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WaveRow:
        """Return the row that :meth:`to_dict` described."""
        return super(WaveRow, cls).from_dict({**data, "nodes": tuple(data.get("nodes", ()))})


@dataclass(frozen=True, slots=True)
class PrewarmReport:
    """All of a run; ``started`` is UTC as in RFC 3339, ``command`` is prewarm or status.

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

        0: every image is on every node; 130: interrupted; that of the error when everything failed
        with one status; else 1.
        """
        if self.interrupted:
            return errors.CancelledError.exit_code
        fine, codes = self._outcome()
        if not codes:
            return 0
        return codes.pop() if len(codes) == 1 and not fine else 1

    @property
    def enough(self) -> bool:
        """Whether at least the fraction of nodes is ready that the plan asked for."""
        from stowray.pipeline.prewarm_plan import FailurePolicy

        # Who was left out for a reason that is no error is not waited for.
        counted = [node for node in self.nodes if node.state != "skipped" or node.error]
        ready = sum(node.state == "ready" for node in counted)
        return FailurePolicy(minimum_ready=self.minimum_ready).is_enough(ready, len(counted))

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
        lines += [
            {"reference": None, "node": node.name, "error": node.error}
            for node in self.nodes
            if node.error is not None and node.name not in seen
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
        fine = any(cell.is_fine for cell in self.cells)
        codes = {_code(cell) for cell in self.cells if not cell.is_fine}
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


def origin_and_peer_bytes(by_source: Mapping[str, int]) -> tuple[int, int]:
    """Return how much of ``by_source`` came from registries and how much from other nodes."""
    peers = sum(size for source, size in by_source.items() if source.startswith(PEER))
    here = by_source.get(STORE, 0)
    return sum(by_source.values()) - peers - here, peers


def exit_code_of(error: Mapping[str, Any] | None) -> int:
    """Return the exit status of an ``error`` object; 1 for a class that is not known here."""
    if error is None:
        return 0
    kind = getattr(errors, str(error.get("type")), None)
    if isinstance(kind, type) and issubclass(kind, StowrayError):
        return kind.exit_code
    return StowrayError.exit_code


def node_state(cells: Sequence[Cell]) -> NodeState:
    """Return the state of a node that is alive, from its cells."""
    if any(cell.status == "working" for cell in cells):
        return "working"
    if any(cell.status == "waiting" for cell in cells):
        return "waiting"
    if all(cell.is_fine for cell in cells):
        return "ready" if any(cell.present for cell in cells) else "skipped"
    return "partial" if any(cell.present for cell in cells) else "failed"


def lost_cells(cells: Iterable[Cell], node: str, reason: str) -> list[Cell]:
    """Return ``cells`` with those of ``node``, which is dead, marked as lost.

    Also the complete ones: nobody knows what is left of its disk.
    """
    error = errors.describe(NodeError(node, reason))
    return [
        Cell(cell.node, cell.reference, "failed", cell.digest, error=error, seconds=cell.seconds)
        if cell.node == node
        else cell
        for cell in cells
    ]


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
