"""The blobs of a pre-warm run over time, node by node, as inline SVG and as tables.

Each bar can be reached with the keyboard and says what it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from stowray.html_page import table, text, ticks
from stowray.pipeline.prewarm_rows import origin_and_peer_bytes
from stowray.text import seconds_text, size_text

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from stowray.pipeline.prewarm_report import PrewarmReport
    from stowray.pipeline.prewarm_rows import BlobSpan

_WIDTH, _LEFT, _RIGHT, _ROW = 1000, 165, 25, 18
# So many nodes get a picture of their blobs, the slowest first; all are in the overview.
DETAILED: Final = 24
OVERVIEW: Final = 200
_ROWS: Final = 200
STYLE: Final = """
.fill-wait { fill: var(--grey); opacity: .35; } .fill-origin { fill: var(--purple); }
.fill-peer { fill: var(--blue); } .fill-unpack { fill: var(--orange); }
.fill-coming { fill: var(--green); } .key .fill-coming { background: var(--green); }
.key .fill-wait { background: var(--grey); opacity: .35; }
.key .fill-origin { background: var(--purple); } .key .fill-peer { background: var(--blue); }
.key .fill-unpack { background: var(--orange); }
"""
_KEY: Final = (
    ("fill-wait", "waiting for the first byte"),
    ("fill-origin", "bytes from the registry"),
    ("fill-peer", "bytes from nodes"),
    ("fill-unpack", "unpacking, until it is done"),
)
_COMING: Final = ("fill-coming", "bytes, from where is not told yet")


class Going:
    """What goes on: the moment, in seconds since the run began, and the blobs under way."""

    def __init__(self, now: float, blobs: Collection[tuple[str, str]]) -> None:
        self.now = now
        self._blobs = blobs

    def end(self, span: BlobSpan) -> float:
        """Return until when a blob was worked on, which is now for one under way."""
        times = (span.started, span.first_byte, span.completed, span.staged)
        last = max((moment for moment in times if moment is not None), default=0.0)
        return max(last, self.now) if self.has(span) else last

    def has(self, span: BlobSpan) -> bool:
        """Return whether a blob is under way."""
        return (span.node, span.digest) in self._blobs


_OVER: Final = Going(0.0, ())


def timelines(
    report: PrewarmReport,
    *,
    going: Going = _OVER,
    detailed: int = DETAILED,
    overview: int = OVERVIEW,
    blobs: int = _ROWS,
) -> str:
    """Return the pictures and tables of all nodes; empty when nothing was fetched.

    ``detailed`` nodes, the slowest, have pictures of their own of up to ``blobs`` blobs, and
    ``overview`` are in the picture of all.
    """
    by_node: dict[str, list[BlobSpan]] = {}
    for span in report.spans:
        if span.started is not None:
            by_node.setdefault(span.node, []).append(span)
    if not by_node:
        return ""
    ends = {node: max(going.end(span) for span in spans) for node, spans in by_node.items()}
    nodes = sorted(by_node, key=lambda node: (-ends[node], node))
    longest = ends[nodes[0]]
    keyed = _KEY if going is _OVER else (*_KEY, _COMING)
    keys = "".join(f'<span class="key"><i class="{name}"></i>{said}</span>' for name, said in keyed)
    parts = [f"<p>{keys}</p>"]
    if len(nodes) > 1:
        parts.append(_overview(nodes[:overview], by_node, longest, going))
        if len(nodes) > overview:
            parts.append(f"<p>{len(nodes) - overview} faster nodes are not drawn.</p>")
    for number, node in enumerate(nodes[:detailed]):
        spans = sorted(by_node[node], key=lambda span: (span.started or 0.0, span.digest))
        opened = " open" if number == 0 else ""
        after = "ready after" if going is _OVER else "so far"
        shown = spans if going is _OVER else spans[-blobs:]
        parts.append(
            f'<details{opened} data-of="{text(node)}"><summary><strong>{text(node)}</strong> · '
            f"{len(spans)} blobs, {after} {seconds_text(ends[node])}</summary>"
            f"{_picture(node, shown[:blobs], longest, going)}{_table(node, shown)}</details>"
        )
    if len(nodes) > detailed:
        parts.append(
            f"<p>The blobs of {len(nodes) - detailed} faster nodes are in the JSON report.</p>"
        )
    return "".join(parts)


def _overview(
    nodes: Sequence[str], by_node: dict[str, list[BlobSpan]], longest: float, going: Going
) -> str:
    rows = []
    for node in nodes:
        spans = by_node[node]
        began = min(span.started or 0.0 for span in spans)
        first = min((s.first_byte for s in spans if s.first_byte is not None), default=None)
        fetched = max((s.completed for s in spans if s.completed is not None), default=None)
        if any(span.completed is None and going.has(span) for span in spans):
            fetched = None
        done = max(going.end(span) for span in spans)
        given: dict[str, int] = {}
        for span in spans:
            for source, size in span.by_source.items():
                given[source] = given.get(source, 0) + size
        rows.append(
            (node, _bars(began, first, fetched, done, given), _said(node, spans, given, going))
        )
    return _svg(f"{len(nodes)} nodes over time", rows, longest)


def _picture(node: str, spans: Sequence[BlobSpan], longest: float, going: Going) -> str:
    rows = []
    for span in spans:
        bars = _bars(
            span.started or 0.0, span.first_byte, span.completed, going.end(span), span.by_source
        )
        rows.append((span.digest.partition(":")[2][:12], bars, _about(span)))
    return _svg(f"Blobs of {node} over time", rows, longest)


_Bars = list[tuple[str, float, float]]


def _bars(
    began: float,
    first: float | None,
    fetched: float | None,
    done: float,
    given: dict[str, int],
) -> _Bars:
    """Return classes and spans of time: waiting, bytes by source in proportion, unpacking."""
    bars: _Bars = [("fill-wait", began, done if first is None else first)]
    if first is None:
        return bars
    until = done if fetched is None else fetched
    origin, peers = origin_and_peer_bytes(given)
    if not given:
        return [*bars, ("fill-coming", first, until), ("fill-unpack", until, done)]
    middle = first + (until - first) * (origin / (origin + peers) if origin + peers else 0.0)
    bars += [("fill-origin", first, middle), ("fill-peer", middle, until)]
    return [*bars, ("fill-unpack", until, done)]


def _svg(label: str, rows: Sequence[tuple[str, _Bars, str]], longest: float) -> str:
    marks = ticks(longest)
    scale = (_WIDTH - _LEFT - _RIGHT) / marks[-1]
    height = len(rows) * _ROW + 30
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="group" aria-label="{text(label)}">',
    ]
    for mark in marks:
        x = _LEFT + mark * scale
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 20}"/>'
            f'<text class="dim" x="{x:.1f}" y="{height - 5}" text-anchor="middle">{mark:g} s</text>'
        )
    for index, (name, bars, said) in enumerate(rows):
        y = index * _ROW + 4
        short = name if len(name) <= 22 else f"{name[:10]}…{name[-11:]}"
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + 13}" text-anchor="end">{text(short)}</text>'
            f'<g tabindex="0" role="img" aria-label="{text(said)}"><title>{text(said)}</title>'
        )
        for fill, start, end in bars:
            if end > start:
                parts.append(
                    f'<rect class="{fill}" x="{_LEFT + start * scale:.1f}" y="{y + 2}" '
                    f'width="{max(0.5, (end - start) * scale):.1f}" height="{_ROW - 4}"/>'
                )
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def _said(node: str, spans: Sequence[BlobSpan], given: dict[str, int], going: Going) -> str:
    origin, peers = origin_and_peer_bytes(given)
    end = seconds_text(max(going.end(span) for span in spans))
    return (
        f"{node}: {len(spans)} blobs, {size_text(origin)} from registries, {size_text(peers)} from "
        f"nodes, {'ready after' if going is _OVER else 'so far'} {end}"
    )


def _about(span: BlobSpan) -> str:
    parts = [span.digest[:19], size_text(span.size)]
    for name, moment in _moments(span):
        if moment is not None:
            parts.append(f"{name} {moment:.2f} s")
    parts += [f"{size_text(size)} from {source}" for source, size in span.by_source.items()]
    return ", ".join(parts)


def _moments(span: BlobSpan) -> tuple[tuple[str, float | None], ...]:
    return (
        ("begun", span.started),
        ("first byte", span.first_byte),
        ("complete", span.completed),
        ("unpacked", span.staged),
    )


def _table(node: str, spans: Sequence[BlobSpan]) -> str:
    rows: list[list[object]] = []
    for span in spans:
        times = ["" if moment is None else f"{moment:.3f}" for _, moment in _moments(span)]
        sources = ", ".join(f"{name} {size_text(size)}" for name, size in span.by_source.items())
        rows.append([span.digest[:19], size_text(span.size), *times, sources or "store"])
    head = ["blob", "size", "begun (s)", "first byte (s)", "complete (s)", "unpacked (s)", "from"]
    return table(f"Blobs of {node}", head, rows)
