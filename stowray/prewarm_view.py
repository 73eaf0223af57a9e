"""How a pre-warm run is shown on stderr while it goes on: live, as plain lines, or as JSON lines.

Invariant: at most ten frames a second and never more than a tenth of the time for drawing; a
display only watches, when it breaks the run goes on.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from typing import TYPE_CHECKING, Final, TextIO

from stowray.display import JsonLines, lively
from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.errors import escape
from stowray.prewarm_picture import PrewarmPicture, most_telling
from stowray.prewarm_text import cell_word, clip, count_text, image_names, states_text
from stowray.text import seconds_text, size_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live
    from rich.text import Text

    from stowray.pipeline.prewarm_report import PrewarmReport
    from stowray.pipeline.prewarm_rows import Cell, NodeRow
    from stowray.pipeline.progress import Event, Progress
    from stowray.prewarm_picture import Figures

FRAME_SECONDS: Final = 0.1
DRAWING_SHARE: Final = 10.0
# Beyond so many nodes a log gets figures now and then, not a line for each.
PLAIN_NODES: Final = 32
PLAIN_SECONDS: Final = 10.0
ROWS_LIMIT: Final = 24
_COLOURS: Final = {
    "ready": "green",
    "pulled": "green",
    "present": "green",
    "partial": "yellow",
    "missing": "yellow",
    "failed": "red",
    "dead": "red",
    "refused": "red",
    "not begun": "red",
    "working": "cyan",
}


class Display:
    """What watches a run; ``report`` is handed to the run as its ``on_change``."""

    def __init__(
        self,
        progress: Progress,
        mode: str,
        stream: TextIO,
        *,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if mode == "auto":
            mode = "tty" if lively(stream) else "plain"
        self._view: LiveView | PlainView | None = None
        if mode == "json":
            progress.watch(JsonLines(stream))
        elif mode == "plain":
            self._view = PlainView(stream, clock)
        elif mode == "tty":
            self._view = LiveView(stream, clock)
        if self._view is not None:
            progress.watch(self._view.events)

    def report(self, report: PrewarmReport) -> None:
        """Show the state so far."""
        if self._view is not None:
            self._view.report(report)

    def close(self) -> None:
        """Leave the last picture and give the terminal back."""
        if self._view is not None:
            self._view.stop()


class PlainView:
    """Lines for a log: an image that is ready or failed, a wave that is over, figures."""

    def __init__(self, stream: TextIO, clock: Clock = SYSTEM_CLOCK) -> None:
        self._stream = stream
        self._clock = clock
        self._lock = threading.Lock()
        self._picture = PrewarmPicture(clock)
        self._told: dict[tuple[str, str], str] = {}
        self._waves: set[int] = set()
        self._figures_at = clock.monotonic()

    def events(self, events: Sequence[Event]) -> None:
        """Take in events."""
        self._picture.see(events)

    def report(self, report: PrewarmReport) -> None:
        """Write what is new."""
        with self._lock:
            if report.run != self._picture.report.run:
                self._told.clear()
                self._waves.clear()
            self._picture.take(report)
            lines = self._cells(report) if len(report.nodes) <= PLAIN_NODES else []
            lines += self._nodes(report)
            for wave in report.waves:
                if wave.completed is not None and wave.number not in self._waves:
                    self._waves.add(wave.number)
                    outcome = "passed" if wave.passed else "not passed"
                    ready = f"{wave.ready} of {len(wave.nodes)} nodes ready"
                    lines.append(f"wave {wave.number + 1}: {ready}, {outcome}")
            now = self._clock.monotonic()
            figures = self._picture.figures()
            if report.nodes and now - self._figures_at >= PLAIN_SECONDS:
                self._figures_at = now
                lines.append(_headline(report, figures))
            self._stream.write("".join(f"{line}\n" for line in lines))
            self._stream.flush()

    def stop(self) -> None:
        """End the display; nothing is left to write."""

    def _cells(self, report: PrewarmReport) -> list[str]:
        lines = []
        for cell in report.cells:
            word = cell_word(cell)
            if word in ("waiting", "working"):
                continue
            if self._told.get((cell.node, cell.reference)) != word:
                self._told[cell.node, cell.reference] = word
                took = f" in {seconds_text(cell.seconds)}" if cell.status == "done" else ""
                lines.append(f"{escape(cell.node)}: {escape(cell.reference)} {word}{took}")
        return lines

    def _nodes(self, report: PrewarmReport) -> list[str]:
        lines = []
        for node in report.nodes:
            if node.error is None or self._told.get((node.name, "")) == node.state:
                continue
            self._told[node.name, ""] = node.state
            lines.append(f"{escape(node.name)}: {node.state}: {escape(node.error['message'])}")
        return lines


class LiveView:
    """Nodes × images on a terminal, with figures above; with many nodes the telling ones only."""

    def __init__(self, stream: TextIO, clock: Clock = SYSTEM_CLOCK) -> None:
        self._stream = stream
        self._clock = clock
        self._lock = threading.Lock()
        self._picture = PrewarmPicture(clock)
        self._live: Live | None = None
        self._drawn = float("-inf")
        self._interval = FRAME_SECONDS
        self._stopped = False

    def events(self, events: Sequence[Event]) -> None:
        """Take in events and draw when it is time."""
        self._picture.see(events)
        self._draw()

    def report(self, report: PrewarmReport) -> None:
        """Take in the state so far and draw when it is time."""
        self._picture.take(report)
        self._draw()

    def stop(self) -> None:
        """Draw the last picture and give the terminal back."""
        self._draw(last=True)
        with self._lock:
            self._stopped = True
            if self._live is not None:
                self._live.stop()
                self._live = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw for the present size of the terminal."""
        yield from picture_lines(self._picture, options.max_width, console.size.height)

    def _draw(self, *, last: bool = False) -> None:
        with self._lock:
            began = self._clock.monotonic()
            if self._stopped or (not last and began - self._drawn < self._interval):
                return
            if self._live is None:
                from rich.console import Console
                from rich.live import Live

                console = Console(file=self._stream, highlight=False, soft_wrap=False)
                # An answer that goes elsewhere than to the terminal is none of the console's.
                self._live = Live(
                    self,
                    console=console,
                    auto_refresh=False,
                    redirect_stdout=sys.stdout.isatty(),
                    redirect_stderr=sys.stderr.isatty(),
                )
                self._live.start()
            self._live.refresh()
            self._drawn = self._clock.monotonic()
            # Many nodes take long to draw: then frames are rarer.
            self._interval = max(FRAME_SECONDS, (self._drawn - began) * DRAWING_SHARE)


def picture_lines(picture: PrewarmPicture, width: int, height: int) -> list[Text]:
    """Return the lines of one frame, none wider than ``width``."""
    from rich.text import Text

    report = picture.report
    figures = picture.figures()
    if not report.nodes:
        return [Text("looking for nodes", "bold")]
    lines = [_bar(figures, report, width), *(Text(text) for text in _heads(report, figures, width))]
    nodes = list(report.nodes)
    room = max(3, min(ROWS_LIMIT, height - len(lines) - 3))
    if len(nodes) > room:
        nodes = most_telling(nodes, {node.name: picture.node_fraction(node.name) for node in nodes})
    shown, rest = nodes[:room], nodes[room:]
    lines += _matrix(picture, shown, width)
    if rest:
        lines.append(Text(f"… and {states_text(Counter(node.state for node in rest))}", "dim"))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap = True
    return lines


def _bar(figures: Figures, report: PrewarmReport, width: int) -> Text:
    from rich.text import Text

    length = max(10, min(40, width - 60))
    full = round(figures.fraction * length)
    text = Text()
    text.append("━" * full, "cyan" if figures.fraction < 1 else "green")
    text.append("─" * (length - full), "dim")
    return text.append(f" {_headline(report, figures)}", "bold")


def _headline(report: PrewarmReport, figures: Figures) -> str:
    parts = [f"{int(figures.fraction * 100)}%"]
    nodes = count_text(len(report.nodes), "node")
    images = count_text(len(report.images), "image")
    parts.append(f"{images} on {nodes}" if report.images else f"starting on {nodes}")
    if figures.eta and figures.fraction >= 0.01:  # before that a guess would be off by far
        parts.append(f"{seconds_text(figures.eta)} to go")
    return " · ".join(parts)


def _heads(report: PrewarmReport, figures: Figures, width: int) -> list[str]:
    origin = f"origin {size_text(figures.origin_bytes)}, {size_text(figures.origin_rate)}/s"
    peers = f"peers {size_text(figures.peer_bytes)}, {size_text(figures.peer_rate)}/s"
    states = states_text(figures.states)
    begun = [wave for wave in report.waves if wave.started is not None]
    if len(report.waves) > 1:
        states += f" · wave {max(1, len(begun))} of {len(report.waves)}"
    if width >= 120:
        return [f"{origin} · {peers} · {states}"]
    return [f"{origin} · {peers}", states]


def _matrix(picture: PrewarmPicture, nodes: Sequence[NodeRow], width: int) -> list[Text]:
    from rich.text import Text

    references = [image.reference for image in picture.report.images]
    names = image_names(references)
    first = max([4, *(len(escape(node.name)) for node in nodes)])
    first = min(first, max(12, width // 3))
    column = max([8, *(len(name) for name in names)])
    column = min(column, max(8, (width - first - 11) // max(1, len(names)) - 2))
    fits = first + 10 + len(names) * (column + 2) <= width
    head = [clip(name, column) for name in names] if fits else ["images"]
    titles = [f"{'node':<{first}}", f"{'state':<8}", *(f"{name:<{column}}" for name in head)]
    lines = [Text("  ".join(titles), "dim")]
    for node in nodes:
        own = {cell.reference: cell for cell in picture.cells(node.name)}
        line = Text(f"{clip(escape(node.name), first):<{first}}  ")
        line.append(f"{node.state:<8}", _COLOURS.get(node.state, ""))
        if fits:
            words = [_word(picture, own.get(reference)) for reference in references]
        else:
            present = sum(cell.present for cell in own.values())
            percent = int(picture.node_fraction(node.name) * 100)
            words = [f"{present} of {len(own)}, {percent}%"]
        for word in words:
            line.append(f"  {word:<{column}}", _COLOURS.get(word, ""))
        lines.append(line)
    return lines


def _word(picture: PrewarmPicture, cell: Cell | None) -> str:
    if cell is not None and cell.status == "working":
        return f"{int(picture.cell_fraction(cell) * 100)}%"
    return cell_word(cell)
