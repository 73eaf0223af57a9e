"""A benchmark's figures as a page: every run a dot, the middle half a bar, the median a line.

What is to be compared stands on one scale, with a table that says what may be chance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stowray.bench_text import change_words, machine_text, machines_text
from stowray.html_page import page, table, text, ticks
from stowray.pipeline.bench_summary import compare, compared, summarise
from stowray.text import seconds_text, size_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stowray.pipeline.bench_summary import Comparison, Spread, Summary
    from stowray.pipeline.run_record import RunRecord

_WIDTH, _LEFT, _RIGHT, _ROW = 760, 130, 20, 26
# Told apart by shape as well as by colour.
_COLOURS = {
    "cold": "var(--blue)",
    "warm": "var(--orange)",
    "pull": "var(--purple)",
    "first": "var(--blue)",
    "second": "var(--orange)",
}


def bench_page(record: RunRecord) -> str:
    """Return the page of a record."""
    summaries = summarise(record)
    references = list(dict.fromkeys(summary.reference for summary in summaries))
    modes = list(dict.fromkeys(summary.mode for summary in summaries))
    body = [
        "<h1>Stowray bench</h1>",
        f'<p class="dim">{text(machine_text(record.machine))}, stowray {text(record.version)}</p>',
        f"<p>{_keys(modes)}</p>",
    ]
    highest = _highest(summaries)
    for reference in references:
        own = [summary for summary in summaries if summary.reference == reference]
        rows = [
            (f"{stage} · {summary.mode}", summary.mode, spread)
            for stage in dict.fromkeys(stage for summary in own for stage in summary.seconds)
            for summary in own
            if (spread := summary.seconds.get(stage)) is not None and spread.high
        ]
        body.append(f"<section><h2>{text(reference)}</h2>{_plot(rows, highest)}")
        body += [_table(summary) for summary in own]
        body.append("</section>")
    for mode in modes:
        good = [summary for summary in summaries if summary.mode == mode and summary.runs]
        for other in good[1:]:
            comparison = compared(good[0], other)
            body.append(f"<section><h2>{text(_title(comparison))}</h2>{_changes(comparison)}")
            body.append("</section>")
    return page("Stowray bench", "".join(body))


def comparison_page(first: RunRecord, second: RunRecord) -> str:
    """Return the page of two records side by side; empty text where nothing can be compared."""
    comparisons = compare(first, second)
    if not comparisons:
        return ""
    body = [
        "<h1>Stowray bench: two records</h1>",
        f'<p class="dim">{text(machines_text(first.machine, second.machine))}</p>',
        f'<p class="dim">first: {text(machine_text(first.machine))}</p>',
        f'<p class="dim">second: {text(machine_text(second.machine))}</p>',
        f"<p>{_keys(['first', 'second'])}</p>",
    ]
    highest = _highest([side for one in comparisons for side in (one.first, one.second)])
    for comparison in comparisons:
        rows = [
            (f"{change.stage} · {name}", name, spread)
            for change in comparison.changes
            for name, spread in (("first", change.first), ("second", change.second))
            if change.first.high or change.second.high
        ]
        body.append(
            f"<section><h2>{text(_title(comparison))}</h2>{_plot(rows, highest)}"
            f"{_changes(comparison)}</section>"
        )
    return page("Stowray bench: two records", "".join(body))


def _title(comparison: Comparison) -> str:
    first, second = comparison.first, comparison.second
    if first.reference == second.reference:
        return f"{first.reference}, {first.mode}"
    return f"{second.reference} to {first.reference}, {first.mode}"


def _keys(names: Sequence[str]) -> str:
    keys = "".join(
        f'<span class="key"><i style="background:{_colour(name)}"></i>{text(name)}</span>'
        for name in names
    )
    return f"{keys} A dot is a run, the bar the middle half of them, the line the median."


def _highest(summaries: Sequence[Summary]) -> float:
    return max((s.high for summary in summaries for s in summary.seconds.values()), default=0.0)


def _changes(comparison: Comparison) -> str:
    rows: list[list[object]] = [
        [
            change.stage,
            seconds_text(change.first.median),
            seconds_text(change.second.median),
            change_words(change),
            f"{change.chance:.2g}",
        ]
        for change in comparison.changes
        if change.first.high or change.second.high
    ]
    head = ["stage", "first", "second", "change", "p by chance"]
    return table("Medians, second to first", head, rows)


def _colour(name: str) -> str:
    return _COLOURS.get(name, "var(--grey)")


def _plot(rows: Sequence[tuple[str, str, Spread]], highest: float) -> str:
    """Draw rows of ``(label, what colour and shape tell apart, spread)`` up to ``highest``."""
    if not rows:
        return "<p>No run succeeded.</p>"
    marks = ticks(highest)
    scale = (_WIDTH - _LEFT - _RIGHT) / marks[-1]
    height = len(rows) * _ROW + 30
    parts = [
        (
            f'<div class="scroll"><svg class="small" viewBox="0 0 {_WIDTH} {height}" role="img" '
            'aria-label="Seconds per stage and run; the table below has the figures">'
        )
    ]
    for mark in marks:
        x = _LEFT + mark * scale
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 22}"/>'
            f'<text class="dim" x="{x:.1f}" y="{height - 6}" text-anchor="middle">{mark:g} s</text>'
        )
    for index, (name, mode, spread) in enumerate(rows):
        parts.append(_row(name, mode, spread, index * _ROW + _ROW / 2, scale))
    return "".join([*parts, "</svg></div>"])


def _row(name: str, mode: str, spread: Spread, y: float, scale: float) -> str:
    def x(value: float) -> float:
        return _LEFT + value * scale

    colour = _colour(mode)
    left, right = x(spread.lower_quartile), x(spread.upper_quartile)
    parts = [
        f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text(name)}</text>',
        (
            f'<rect x="{left:.1f}" y="{y - 7:.1f}" width="{max(right - left, 1):.1f}" height="14" '
            f'fill="{colour}" opacity="0.25"/>'
        ),
        (
            f'<line x1="{x(spread.median):.1f}" x2="{x(spread.median):.1f}" y1="{y - 9:.1f}" '
            f'y2="{y + 9:.1f}" stroke="{colour}" stroke-width="2.5"/>'
        ),
    ]
    for value in spread.values:
        if mode in ("warm", "second"):
            parts.append(
                f'<path d="M{x(value):.1f} {y - 4:.1f}l4 4l-4 4l-4-4z" fill="{colour}" '
                f'opacity="0.8"><title>{seconds_text(value)}</title></path>'
            )
        else:
            parts.append(
                f'<circle cx="{x(value):.1f}" cy="{y:.1f}" r="3.5" fill="{colour}" '
                f'opacity="0.8"><title>{seconds_text(value)}</title></circle>'
            )
    return "".join(parts)


def _table(summary: Summary) -> str:
    rows: list[list[object]] = [
        [stage, *map(seconds_text, (spread.median, spread.low, spread.high))]
        for stage, spread in summary.seconds.items()
        # What found nothing to do took no time.
        if spread.high
    ]
    rate = f" at {size_text(summary.rate.median)}/s" if summary.rate else ""
    failed = f", {summary.failed} failed" if summary.failed else ""
    caption = (
        f"{summary.mode}: {summary.runs} runs{failed}, {size_text(summary.fetched_bytes)} "
        f"fetched{rate}, {summary.manifest_requests} manifest requests"
    )
    return table(caption, ["stage", "median", "lowest", "highest"], rows) + "<br>"
