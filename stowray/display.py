"""What a person sees while work goes on: a live view, plain lines, or JSON lines, on stderr.

Invariant: a display only watches; when it breaks, the work goes on. Names from images are escaped
before they reach a terminal.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, TextIO

from stowray.pipeline.errors import escape
from stowray.text import left_text, seconds_text, size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Group, RenderableType
    from rich.live import Live
    from rich.text import Text

    from stowray.pipeline.progress import Event, Key, Progress

_PHASES = {"blob": "fetch", "layer": "unpack"}
_SHORT = 12
# What nobody types stands before most names and says nothing.
_HUB = "docker.io/library/"
_ROWS = 12
# Columns of a terminal: what stands beside the bar, and from where there is room for more.
_BESIDE_BAR, _BAR_LEAST, _BAR_MOST, _MEDIUM, _WIDE = 58, 10, 60, 56, 72
_NAME_LEAST = 12
_PACE_SECONDS, _PACE_LEAST = 5.0, 1.0


def attach(progress: Progress, mode: str, stream: TextIO | None = None) -> Callable[[], None]:
    """Watch ``progress`` in the given mode and return what ends the display.

    ``auto`` is the live view on a terminal (unless ``CI`` or ``TERM=dumb`` says otherwise), plain
    lines elsewhere.
    """
    stream = stream or sys.stderr
    if mode == "auto":
        mode = "tty" if lively(stream) else "plain"
    if mode == "json":
        progress.watch(JsonLines(stream))
    elif mode == "plain":
        progress.watch(PlainLines(stream))
    elif mode == "tty":
        view = LiveView(stream)
        progress.watch(view)
        return view.stop
    return lambda: None


def lively(stream: TextIO) -> bool:
    """Return whether a picture that is drawn anew makes sense on ``stream``."""
    return stream.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"


class JsonLines:
    """One JSON object per changed ID and tick."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, events: Sequence[Event]) -> None:
        """Write the events."""
        self._stream.write("".join(json.dumps(event.to_dict()) + "\n" for event in events))
        self._stream.flush()


class PlainLines:
    """A line for each thing that begins or ends, none for every percent: it reads well in a log."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._seen: dict[Key, str] = {}

    def __call__(self, events: Sequence[Event]) -> None:
        """Write a line for each change of status worth one."""
        lines = []
        for event in events:
            if self._seen.get(event.key) == event.status:
                continue
            self._seen[event.key] = event.status
            line = self._line(event)
            if line:
                lines.append(line + "\n")
        if lines:
            self._stream.write("".join(lines))
            self._stream.flush()

    def _line(self, event: Event) -> str:
        where = f"{event.node} " if event.node and event.kind == "job" else ""
        name = escape(event.reference)
        if event.status == "failed":
            # The error itself is told once, by the command.
            return ""
        if event.kind == "resolve" and event.status == "resolved":
            return f"{where}{name}: resolved"
        took = seconds_text(event.completed - event.started) if event.completed else ""
        if event.kind == "blob" and event.status == "done":
            return f"{where}{name}: fetched {_short(event)} {size_text(event.total)} in {took}"
        if event.kind == "blob" and event.status == "retrying":
            return f"{where}{name}: {_short(event)} is tried again from {size_text(event.current)}"
        if event.kind == "layer" and event.status == "applied":
            return f"{where}{name}: unpacked {_short(event)} in {took}"
        if event.kind == "image" and event.status == "done":
            return f"{where}{name}: done"
        return ""


class LiveView:
    """Per image one line for the whole and one for each layer at work; for terminals."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._events: dict[Key, Event] = {}
        self._live: Live | None = None
        self._ended = False
        self._paces: dict[str, Pace] = {}

    def __call__(self, events: Sequence[Event]) -> None:
        """Take over the changed events and draw."""
        for event in events:
            self._events[event.key] = event
        if self._ended:
            return
        if self._live is None:
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream, highlight=False)
            # What is printed meanwhile goes above the picture, but an answer that goes elsewhere
            # than to the terminal is none of the console's.
            self._live = Live(
                console=console,
                auto_refresh=False,
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start()
        self._live.update(self.render(self._live.console.width), refresh=True)

    def stop(self) -> None:
        """Leave the last picture and give the terminal back, for good."""
        self._ended = True
        if self._live is not None:
            self._live.stop()
            self._live = None

    def render(self, width: int = 80) -> Group:
        """Return the picture of the present state for a terminal of ``width`` columns."""
        from rich.console import Group

        references = dict.fromkeys(event.reference for event in self._events.values())
        return Group(*(self._image(reference, width) for reference in references))

    def _image(self, reference: str, width: int) -> Group:
        from rich.console import Group
        from rich.table import Table

        events = [event for event in self._events.values() if event.reference == reference]
        ended = next((e for e in events if e.kind == "image" and e.is_final), None)
        work = [event for event in events if event.kind in _PHASES]
        head = self._head(reference, events, work, ended, width)
        active = [event for event in work if not event.is_final and event.status != "waiting"]
        if not active or ended:
            return Group(head)
        table = Table.grid(padding=(0, 1), expand=False)
        for event in active[:_ROWS]:
            table.add_row(*_row(event, width))
        if len(active) > _ROWS:
            table.add_row("", f"… and {len(active) - _ROWS} more", "", "")
        return Group(head, table)

    def _head(
        self,
        reference: str,
        events: list[Event],
        work: list[Event],
        ended: Event | None,
        width: int,
    ) -> Text:
        from rich.text import Text

        state = _state(events, ended)
        tail = Text(f"  {state}", "red" if state == "failed" else "green" if ended else "cyan")
        current, total = (sum(e.current for e in work), sum(e.total for e in work))
        if ended:
            took = ended.completed - min(e.started for e in events)
            tail.append(f"  {seconds_text(took)}", style="default")
        elif total:
            tail.append(f"  {100 * current // total}%", style="default")
            pace = self._paces.setdefault(reference, Pace())
            pace.note(max(event.time for event in work), current)
            left = pace.seconds_for(total - current)
            if left is not None and width >= _MEDIUM:
                tail.append(f"  about {left_text(left)} left", style="dim default")
        name = escape(reference.removeprefix(_HUB))
        room = max(_NAME_LEAST, width - tail.cell_len)
        if len(name) > room:
            # How far it is says more than the registry's name.
            name = f"…{name[1 - room :]}"
        return Text.assemble((name, "bold"), tail, no_wrap=True, overflow="ellipsis")


class Pace:
    """How fast work went lately, for a guess at how long the rest takes."""

    def __init__(self) -> None:
        self._noted: list[tuple[float, int]] = []

    def note(self, moment: float, done: int) -> None:
        """Take in how much is ``done`` at a ``moment`` (seconds); old notes go."""
        self._noted.append((moment, done))
        while len(self._noted) > 2 and moment - self._noted[1][0] > _PACE_SECONDS:
            del self._noted[0]

    def seconds_for(self, rest: int) -> float | None:
        """Return how long ``rest`` more takes at this pace; None before it is known."""
        (first, before), (last, done) = self._noted[0], self._noted[-1]
        if last - first < _PACE_LEAST or done <= before:
            return None
        return float(max(1, round(rest * (last - first) / (done - before))))


def _state(events: list[Event], ended: Event | None) -> str:
    if ended is not None:
        return ended.status
    if any(event.kind == "resolve" and event.status == "resolved" for event in events):
        return "pulling"
    return "resolving"


def _row(event: Event, width: int) -> tuple[RenderableType, ...]:
    """Return a layer's columns; a narrow terminal has no room for the last ones."""
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    phase = "retry" if event.status == "retrying" else _PHASES[event.kind]
    # Only of the time that it was worked on: it may have waited for a connection.
    seconds = max(event.time - (event.begun or event.started), 0.001)
    done = size_text(event.current)
    columns: list[RenderableType] = [
        Text(f"  {_short(event)}", style="dim"),
        Text(f"{phase:<6}", style="yellow" if phase == "retry" else ""),
        ProgressBar(
            total=event.total or None,
            completed=event.current,
            width=min(_BAR_MOST, max(_BAR_LEAST, width - _BESIDE_BAR)),
        ),
    ]
    if width >= _MEDIUM:
        columns.append(Text(f"{done:>9} / {size_text(event.total)}", style="dim"))
    if width >= _WIDE:
        columns.append(Text(f"{size_text(event.current / seconds)}/s", style="dim"))
    return tuple(columns)


def _short(event: Event) -> str:
    return escape(event.id.partition(":")[2] or event.id)[:_SHORT]
