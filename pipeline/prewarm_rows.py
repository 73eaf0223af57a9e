"""The rows of a pre-warm report: nodes, images, cells, blobs, and what was noted on the way.

Invariant: plain values that survive ``to_dict``/``from_dict`` unchanged. Times are seconds since
the run began, sizes are bytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from stowray.pipeline import errors
from stowray.pipeline.errors import NodeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# How a source is called that is a node of the run; any other is a registry's host.
PEER: Final = "peer:"
STORE: Final = "store"

# The first two while the run goes on, never in the report of a run that has ended; a dry run's has
# them for what is planned.
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
        return self.error is None and (self.present or self.status == "skipped")


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


def origin_and_peer_bytes(by_source: Mapping[str, int]) -> tuple[int, int]:
    """Return how much of ``by_source`` came from registries and how much from other nodes."""
    peers = sum(size for source, size in by_source.items() if source.startswith(PEER))
    here = by_source.get(STORE, 0)
    return sum(by_source.values()) - peers - here, peers


def node_state(cells: Sequence[Cell]) -> NodeState:
    """Return the state of a node that is alive, from its cells."""
    if any(cell.status == "working" for cell in cells):
        return "working"
    if any(cell.status == "waiting" for cell in cells):
        return "waiting"
    if all(cell.is_fine for cell in cells):
        return "ready" if any(cell.present for cell in cells) else "skipped"
    return "partial" if any(cell.present for cell in cells) else "failed"


def count_ready(nodes: Iterable[NodeRow]) -> tuple[int, int]:
    """Return how many of ``nodes`` are ready, and of how many that could be.

    Who was left out for a reason that is no error is not waited for.
    """
    counted = [node for node in nodes if node.state != "skipped" or node.error]
    return sum(node.state == "ready" for node in counted), len(counted)


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
