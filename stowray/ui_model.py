"""A pre-warm run as the parts of its live page.

Invariant: the run's own threads only leave word, and wait for nothing but that; all counting and
drawing is done by the one thread that asks for it, drawing only when somebody looks, and what is
drawn is bounded however many nodes there are: rows, lines of trouble, a timeline that is renewed
the more rarely the larger it is.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from stowray.html_matrix import matrix_row, matrix_table
from stowray.html_page import text
from stowray.html_report import report_body, trouble
from stowray.html_timeline import Going, timelines
from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.prewarm_report import PrewarmReport
from stowray.prewarm_picture import PrewarmPicture, most_telling
from stowray.prewarm_text import count_text, states_text
from stowray.text import left_text, seconds_text, size_text
from stowray.ui_page import live_page
from stowray.ui_parts import Parts
from stowray.ui_spans import LiveSpans

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stowray.pipeline.prewarm_rows import Cell, NodeRow
    from stowray.pipeline.progress import Event
    from stowray.prewarm_picture import Figures

ROWS_LIMIT: Final = 1000
TROUBLE_LIMIT: Final = 50
# Beyond so many nodes percentages go in steps, and fewer nodes have their blobs drawn.
MANY_NODES: Final = 32
_STEP: Final = 5
_OVERVIEW: Final = 60
_BLOBS: Final = 40
TIMELINE_SECONDS: Final = 2.0
TIMELINE_BYTES_PER_SECOND: Final = 16 * 1024


class LivePage:
    """The page; ``see`` and ``take`` may be called from any thread, the rest from one."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self.parts = Parts()
        self.over = False
        self._clock = clock
        self._lock = threading.Lock()
        self._inbox: list[tuple[float, Sequence[Event]]] = []
        self._latest = PrewarmReport()
        self._latest_at = clock.monotonic()
        self._picture = PrewarmPicture(clock)
        self._spans = LiveSpans()
        self._began = clock.monotonic()
        self._rows: list[tuple[object, ...]] = []
        self._references: list[str] = []
        self._timeline_due = float("-inf")

    # -- the run's threads ------------------------------------------------------------------------

    def see(self, events: Sequence[Event]) -> None:
        """Take in changed events."""
        with self._lock:
            self._inbox.append((self._clock.monotonic(), events))

    def take(self, report: PrewarmReport) -> None:
        """Keep the report so far for when somebody looks."""
        with self._lock:
            self._latest = report
            self._latest_at = self._clock.monotonic()

    # -- the thread that draws --------------------------------------------------------------------

    def gather(self) -> PrewarmReport:
        """Take in what the run has left since the last time, and return the last report.

        To be called now and then also while nobody looks: what is left takes memory.
        """
        with self._lock:
            report, at = self._latest, self._latest_at
            inbox, self._inbox = self._inbox, []
        if report is not self._picture.report:
            if self._picture.report.run and report.run != self._picture.report.run:
                self._spans.clear()
            self._began = at - report.seconds
            self._picture.take(report)
        for moment, events in inbox:
            self._picture.see(events)
            self._spans.see(events, moment)
        return report

    def draw(self) -> None:
        """Bring the parts up to date."""
        report = self.gather()
        figures = self._picture.figures()
        self._draw_head(report, figures)
        self._draw_matrix(report)
        self._draw_timeline(report)
        self.parts.put("trouble", trouble(report, TROUBLE_LIMIT))

    def end(self, error: str = "") -> None:
        """Draw the last state; ``error`` says why there is no report."""
        self.draw()
        self.over = True
        if error:
            self.parts.put("verdict", f'<p class="verdict bad">{text(error)}</p>')
        else:
            self.parts.put("final", report_body(self._latest))
        self.parts.put("heard", "The run has failed." if error else "The run has ended.")

    def html(self) -> str:
        """Return the whole document as it is now."""
        names = (
            "title",
            "about",
            "verdict",
            "bar",
            "figures",
            "heard",
            "matrix",
            "trouble",
            "time",
        )
        parts = {name: self.parts.get(name) for name in (*names, "final")}
        rows = [
            self.parts.get(f"row-{slot}").replace("<tr>", f'<tr data-row="{slot}">', 1)
            for slot in range(len(self._rows))
        ]
        return live_page(parts, rows, self.parts.version, over=self.over)

    def _draw_head(self, report: PrewarmReport, figures: Figures) -> None:
        put = self.parts.put
        percent = int(figures.fraction * 100)
        put("title", f"{percent}% · Pre-warm")
        put(
            "bar",
            f'<progress max="100" value="{percent}" aria-label="The run as a whole">'
            f"{percent}%</progress>",
        )
        heard = percent - percent % _STEP
        put("heard", f"{heard} percent")
        if report.run:
            about = f"run {report.run}, begun {report.started}, stowray {report.version}"
            put("about", f'<p class="dim">{text(about)}</p>')
        put("figures", f"<p><strong>{percent}%</strong> · {text(self._words(report, figures))}</p>")

    def _words(self, report: PrewarmReport, figures: Figures) -> str:
        if not report.nodes:
            return "looking for nodes"
        nodes, images = len(report.nodes), len(report.images)
        words = [f"{count_text(images, 'image')} on {count_text(nodes, 'node')}"]
        words.append(states_text(figures.states))
        origin, peers = size_text(figures.origin_bytes), size_text(figures.peer_bytes)
        words.append(f"origin {origin}, {size_text(figures.origin_rate)}/s")
        words.append(f"nodes {peers}, {size_text(figures.peer_rate)}/s")
        if len(report.waves) > 1:
            begun = sum(wave.started is not None for wave in report.waves)
            words.append(f"wave {max(1, begun)} of {len(report.waves)}")
        words.append(seconds_text(int(self._now() * 2) / 2))
        if figures.eta and figures.fraction >= 0.01:
            words.append(f"about {left_text(figures.eta)} to go")
        return " · ".join(words)

    def _draw_matrix(self, report: PrewarmReport) -> None:
        nodes: Sequence[NodeRow] = report.nodes
        left = max(0, len(nodes) - ROWS_LIMIT)
        if left:
            # By state only: an order by percentages would move every row at every look.
            nodes = most_telling(nodes, {})[:ROWS_LIMIT]
        references = [image.reference for image in report.images]
        if references != self._references or bool(nodes) != bool(self._rows):
            self._references = references
            self._rows = [() for _ in self._rows]
        table = matrix_table(references, "", body_id="rows") if nodes else ""
        more = f"<p>{left} more nodes are further on or done.</p>" if left else ""
        self.parts.put("matrix", table + more)
        step = 1 if len(report.nodes) <= MANY_NODES else _STEP
        while len(self._rows) > len(nodes):
            self._rows.pop()
            self.parts.put(f"row-{len(self._rows)}", "")
        self._rows += [()] * (len(nodes) - len(self._rows))
        for slot, node in enumerate(nodes):
            cells = self._picture.cells(node.name)
            percents = self._percents(cells, step)
            look = (node, tuple(cells), tuple(percents.items()))
            if self._rows[slot] != look:
                self._rows[slot] = look
                self.parts.put(f"row-{slot}", matrix_row(node, cells, references, percents))

    def _percents(self, cells: Sequence[Cell], step: int) -> dict[str, int]:
        percents = {}
        for cell in cells:
            if cell.status == "working":
                percent = int(self._picture.cell_fraction(cell) * 100)
                percents[cell.reference] = percent - percent % step
        return percents

    def _draw_timeline(self, report: PrewarmReport) -> None:
        now = self._clock.monotonic()
        if now < self._timeline_due:
            return
        spans, places = self._spans.merged(report, self._began)
        drawn = timelines(
            replace(report, spans=spans),
            going=Going(self._now(), places),
            detailed=4 if len(report.nodes) <= MANY_NODES else 1,
            overview=_OVERVIEW,
            blobs=_BLOBS,
        )
        self.parts.put("time", drawn)
        if not drawn:
            return
        pause = max(TIMELINE_SECONDS, len(drawn) / TIMELINE_BYTES_PER_SECOND)
        self._timeline_due = now + pause

    def _now(self) -> float:
        """Return the seconds since the run began."""
        return max(0.0, self._clock.monotonic() - self._began)
