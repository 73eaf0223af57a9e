"""A run record as a page: who did what when, as bars over time and as a table.

Each bar can be reached with the keyboard and says what it is; the tables say the same without the
picture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stowray.bench_text import machine_text
from stowray.html_page import page, table, text, ticks
from stowray.text import seconds_text, size_text
from stowray.trace_rows import NAMES, ordered, title_of, track_of

if TYPE_CHECKING:
    from stowray.pipeline.run_record import Run, RunRecord, Span

_WIDTH, _LEFT, _RIGHT, _ROW, _GRAPH = 1000, 165, 25, 18, 60
_COLOURS = {
    "resolve": "var(--purple)",
    "manifest": "var(--purple)",
    "blob": "var(--blue)",
    "layer": "var(--orange)",
    "commit": "var(--green)",
}
# A picture of more rows than that is no picture; the table has them all.
_ROWS = 400


def trace_page(record: RunRecord) -> str:
    """Return the page of a record."""
    title = f"Stowray {record.kind}"
    keys = "".join(
        f'<span class="key"><i style="background:{colour}"></i>{NAMES[kind]}</span>'
        for kind, colour in _COLOURS.items()
        if kind != "manifest"
    )
    keys += (
        '<span class="key"><i style="background:var(--grey);opacity:.35"></i>waiting</span>'
        '<span class="key"><i style="background:var(--red)"></i>failed</span>'
    )
    body = [
        f"<h1>{text(title)}</h1>",
        f'<p class="dim">{text(machine_text(record.machine))}, stowray {text(record.version)}</p>',
        f"<p>{keys}</p>",
    ]
    for number, run in enumerate(record.runs):
        body.append(
            f"<details{' open' if number < 2 else ''}><summary>{text(title_of(run))} · "
            f"<strong>{text(run.reference)}</strong> · {seconds_text(run.seconds)}"
            f"{' · failed' if run.error else ''}</summary>{_run(run)}</details>"
        )
    return page(title, "".join(body))


def _run(run: Run) -> str:
    spans = ordered(run)
    parts = [f"<p>{text(_sentence(run))}</p>"]
    if spans:
        drawn = [span for span in spans if span.status != "exists"]
        if drawn:
            parts.append(_picture(run, drawn[:_ROWS]))
        if len(drawn) < len(spans):
            parts.append(f"<p>{len(spans) - len(drawn)} blobs and layers were here already.</p>")
        if len(drawn) > _ROWS:
            parts.append(f"<p>{len(drawn) - _ROWS} more rows are in the table only.</p>")
        parts.append(f"<details><summary>All figures</summary>{_table(spans)}</details>")
    else:
        parts.append("<p>Nothing was left to do.</p>")
    return "".join(parts)


def _sentence(run: Run) -> str:
    if run.error is not None:
        return str(run.error.get("message", "failed"))
    result = run.result or {}
    seconds = result.get("seconds", {})
    stages = ", ".join(f"{name} {seconds_text(value)}" for name, value in seconds.items())
    return f"{size_text(result.get('fetched_bytes', 0))} fetched; {stages}"


def _picture(run: Run, spans: list[Span]) -> str:
    begin = min(span.started for span in spans)
    marks = ticks(max(span.end for span in spans) - begin)
    scale = (_WIDTH - _LEFT - _RIGHT) / marks[-1]
    graph = _graph(spans, begin, scale)
    top = _GRAPH + 10 if graph else 4
    height = top + len(spans) * _ROW + 26
    parts = [
        (
            f'<div class="scroll"><svg viewBox="0 0 {_WIDTH} {height}" role="group" '
            f'aria-label="Timeline of {text(run.reference)}, {len(spans)} bars">'
        )
    ]
    for mark in marks:
        x = _LEFT + mark * scale
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 20}"/>'
            f'<text class="dim" x="{x:.1f}" y="{height - 5}" text-anchor="middle">{mark:g} s</text>'
        )
    parts.append(graph)
    for index, span in enumerate(spans):
        parts.append(_bar(span, begin, scale, top + index * _ROW))
    return "".join([*parts, "</svg></div>"])


def _graph(spans: list[Span], begin: float, scale: float) -> str:
    """Return the line of all bytes received over time."""
    steps = sorted(
        (moment, index, current)
        for index, span in enumerate(spans)
        if span.kind == "blob" and span.status != "exists"
        for moment, current, _ in span.samples
    )
    if not steps:
        return ""
    at: dict[int, int] = {}
    points = [(max(begin, min(span.started for span in spans if span.kind == "blob")), 0)]
    for moment, index, current in steps:
        at[index] = current
        points.append((moment, sum(at.values())))
    most = max(1, max(value for _, value in points))
    line = " ".join(
        f"{_LEFT + (moment - begin) * scale:.1f},{_GRAPH - value / most * (_GRAPH - 14):.1f}"
        for moment, value in points
    )
    return (
        f'<text x="{_LEFT - 8}" y="{_GRAPH - 22}" text-anchor="end">received</text>'
        f'<text class="dim" x="{_LEFT - 8}" y="{_GRAPH - 6}" text-anchor="end">'
        f"{size_text(most)}</text>"
        f'<polyline points="{line}" fill="none" stroke="var(--blue)" stroke-width="2"/>'
    )


def _bar(span: Span, begin: float, scale: float, y: float) -> str:
    def x(moment: float) -> float:
        return _LEFT + (moment - begin) * scale

    colour = "var(--red)" if span.status == "failed" else _COLOURS.get(span.kind, "var(--grey)")
    said = text(_about(span, begin))
    start, active, end = x(span.started), x(span.active), x(span.end)
    waiting = ""
    if active > start:
        waiting = (
            f'<rect x="{start:.1f}" y="{y + 5:.1f}" width="{active - start:.1f}" '
            f'height="{_ROW - 10}" fill="var(--grey)" opacity="0.35"/>'
        )
    return (
        f'<text x="{_LEFT - 8}" y="{y + 13:.1f}" text-anchor="end">{text(track_of(span))}</text>'
        f'<g tabindex="0" role="img" aria-label="{said}"><title>{said}</title>{waiting}'
        f'<rect x="{active:.1f}" y="{y + 2:.1f}" width="{max(end - active, 1.5):.1f}" '
        f'height="{_ROW - 4}" rx="2" fill="{colour}"/></g>'
    )


def _about(span: Span, begin: float) -> str:
    parts = [track_of(span), span.status]
    if span.total:
        parts.append(size_text(span.total))
    parts.append(f"from {span.started - begin:.2f} s to {span.end - begin:.2f} s")
    if span.active > span.started:
        parts.append(f"at work from {span.active - begin:.2f} s")
    if span.retries:
        parts.append(f"asked for again: {span.retries}")
    return ", ".join([*parts, *([span.error] if span.error else [])])


def _table(spans: list[Span]) -> str:
    begin = min(span.started for span in spans)
    rows: list[list[object]] = [
        [
            track_of(span),
            span.status,
            size_text(span.total) if span.total else "",
            f"{span.started - begin:.3f}",
            f"{span.active - begin:.3f}",
            f"{span.end - begin:.3f}",
            span.retries or "",
            span.node,
        ]
        for span in spans
    ]
    head = ["what", "status", "size", "queued (s)", "begun (s)", "ended (s)", "retries", "node"]
    return table("Every blob, layer and commit", head, rows)
