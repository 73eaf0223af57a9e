"""How far a pre-warm run is, from its events and its reports: figures only, no drawing.

Invariant: the percentage never falls, weighs download and unpack alike, and is 100 only when
nothing is left to wait for; taking in an event costs the same with one node and with a thousand.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.prewarm_report import PrewarmReport

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stowray.pipeline.prewarm_rows import Cell, NodeRow
    from stowray.pipeline.progress import Event, Key

# Over how long rates are taken, in seconds: long enough to be read, short enough to be true.
RATE_SECONDS: Final = 5.0
_WORK: Final = ("blob", "layer")
_ENDED: Final = ("done", "exists", "failed", "missing", "partial", "skipped")


@dataclass(frozen=True, slots=True)
class Figures:
    """The run as a whole; sizes in bytes, rates in bytes per second, ``eta`` in seconds."""

    fraction: float
    origin_bytes: int
    peer_bytes: int
    origin_rate: float
    peer_rate: float
    eta: float | None
    states: Counter[str]


class PrewarmPicture:
    """The state so far; fed from any thread."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._report = PrewarmReport()
        self._begin()

    def _begin(self) -> None:
        self._seen: dict[Key, tuple[int, int]] = {}
        # Of each node and image: bytes done and to do, as far as events have told.
        self._work: dict[tuple[str, str], list[int]] = {}
        self._reached: dict[tuple[str, str], float] = {}
        self._fraction = 0.0
        self._cells: dict[str, list[Cell]] = {}
        self._sizes: dict[str, int] = {}
        # Of each node: the weight of its cells, and how much of it is done. Those that changed are
        # added up again when somebody asks.
        self._sums: dict[str, tuple[float, float]] = {}
        self._changed: set[str] = set()
        self._samples: deque[tuple[float, int, int, float]] = deque()
        self._flow = _Flow()

    @property
    def report(self) -> PrewarmReport:
        """Return the last report."""
        return self._report

    def cells(self, node: str) -> list[Cell]:
        """Return the cells of one node."""
        return self._cells.get(node, [])

    def see(self, events: Iterable[Event]) -> None:
        """Take in changed events."""
        with self._lock:
            for event in events:
                if event.kind not in _WORK:
                    continue
                current, total = self._seen.get(event.key, (0, 0))
                work = self._work.setdefault((event.node, event.reference), [0, 0])
                work[0] += max(0, event.current - current)
                work[1] += max(0, event.total - total)
                self._seen[event.key] = (max(event.current, current), max(event.total, total))
                self._changed.add(event.node)
                if event.kind == "blob":
                    self._flow.see(event)

    def take(self, report: PrewarmReport) -> None:
        """Take in the report so far."""
        cells = node_cells(report)
        with self._lock:
            if self._report.run and report.run != self._report.run:
                # Another run of the same program: it begins at nothing.
                self._begin()
            self._report = report
            self._cells = cells
            self._sizes = {image.reference: image.size for image in report.images}
            self._changed.update(cells)
            self._sums = {name: sums for name, sums in self._sums.items() if name in cells}

    def cell_fraction(self, cell: Cell) -> float:
        """Return how far one image is on one node, 0 to 1; never less than before."""
        with self._lock:
            return self._cell(cell)

    def node_fraction(self, node: str) -> float:
        """Return how far a node is with all its images, 0 to 1."""
        with self._lock:
            self._add_up()
            weight, reached = self._sums.get(node, (0.0, 0.0))
        return reached / weight if weight else 0.0

    def figures(self) -> Figures:
        """Return the figures of the run as it is now."""
        with self._lock:
            self._add_up()
            report = self._report
            weight = sum(weight for weight, _ in self._sums.values())
            reached = sum(reached for _, reached in self._sums.values())
            ended = bool(report.cells) and all(cell.status in _ENDED for cell in report.cells)
            # 100 % is said when it is true, not when it is nearly so.
            nearly = min(reached / weight, 0.99) if weight else 0.0
            self._fraction = 1.0 if ended else max(self._fraction, nearly)
            origin, peers = report.origin_bytes, report.peer_bytes
            if not ended:
                origin, peers = max(origin, self._flow.origin), max(peers, self._flow.peers)
            origin_rate, peer_rate, eta = self._rates(origin, peers)
            return Figures(
                fraction=self._fraction,
                origin_bytes=origin,
                peer_bytes=peers,
                origin_rate=origin_rate,
                peer_rate=peer_rate,
                eta=0.0 if ended else eta,
                states=Counter(node.state for node in report.nodes),
            )

    def _add_up(self) -> None:
        for node in self._changed:
            weight = reached = 0.0
            for cell in self._cells.get(node, ()):
                # An image whose size is not known yet, or that is empty, still is to be waited for.
                own = float(max(1, self._sizes.get(cell.reference, 0)))
                weight += own
                reached += own * self._cell(cell)
            self._sums[node] = (weight, reached)
        self._changed.clear()

    def _cell(self, cell: Cell) -> float:
        key = (cell.node, cell.reference)
        if cell.status in _ENDED:
            reached = 1.0
        else:
            done, total = self._work.get(key, (0, 0))
            # Each layer counts twice: its bytes come, and its bytes are unpacked.
            total = max(total, 2 * self._sizes.get(cell.reference, 0))
            reached = min(done / total, 0.99) if total else 0.0
        self._reached[key] = reached = max(reached, self._reached.get(key, 0.0))
        return reached

    def _rates(self, origin: int, peers: int) -> tuple[float, float, float | None]:
        now = self._clock.monotonic()
        samples = self._samples
        samples.append((now, origin, peers, self._fraction))
        while len(samples) > 2 and samples[1][0] <= now - RATE_SECONDS:
            samples.popleft()
        then, origin_then, peers_then, fraction = samples[0]
        seconds = now - then
        if seconds <= 0:
            return 0.0, 0.0, None
        pace = (self._fraction - fraction) / seconds
        eta = (1.0 - self._fraction) / pace if pace > 0 else None
        origin_rate = max(0, origin - origin_then) / seconds
        peer_rate = max(0, peers - peers_then) / seconds
        return origin_rate, peer_rate, eta


class _Flow:
    """Bytes on their way, told apart before the nodes report their sources.

    Each byte comes from the origin once. So of a blob that no node had, what the furthest node has
    by now came from there, and all else from nodes. The report's figures take over at the end.
    """

    def __init__(self) -> None:
        self.origin = 0
        self.peers = 0
        self._furthest: dict[str, int] = {}
        self._here: dict[tuple[str, str], int] = {}

    def see(self, event: Event) -> None:
        """Take in one event of a blob."""
        place = (event.node, event.id)
        before = self._here.get(place)
        if event.status == "exists":
            if before is None:
                self._here[place] = event.current
                # Somebody has all of it: nothing of it comes from the origin any more.
                self._furthest[event.id] = max(event.current, self._furthest.get(event.id, 0))
            return
        came = event.current - (before or 0)
        if came <= 0:
            self._here.setdefault(place, 0)
            return
        self._here[place] = event.current
        further = max(0, event.current - self._furthest.get(event.id, 0))
        self._furthest[event.id] = self._furthest.get(event.id, 0) + further
        self.origin += min(further, came)
        self.peers += came - min(further, came)


def node_cells(report: PrewarmReport) -> dict[str, list[Cell]]:
    """Return the cells of each node."""
    cells: dict[str, list[Cell]] = {node.name: [] for node in report.nodes}
    for cell in report.cells:
        cells.setdefault(cell.node, []).append(cell)
    return cells


# What a person wants to see first: what went wrong, then what is at work.
_ORDER: Final = {
    name: number
    for number, name in enumerate(
        ("failed", "dead", "refused", "partial", "working", "waiting", "ready", "skipped")
    )
}


def most_telling(nodes: Iterable[NodeRow], fractions: dict[str, float]) -> list[NodeRow]:
    """Return ``nodes`` in the order of interest: troubles, then those that are furthest behind."""
    return sorted(nodes, key=lambda node: (_ORDER[node.state], fractions.get(node.name, 0.0)))
