"""A benchmark's figures as text of at most 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stowray.pipeline.errors import escape
from stowray.text import seconds_text, size_text

if TYPE_CHECKING:
    from stowray.pipeline.bench_summary import Change, Comparison, Summary


def summary_text(summary: Summary) -> str:
    """Return the table of one reference and mode."""
    runs = f"{summary.runs} run{'s' if summary.runs != 1 else ''}"
    failed = f", {summary.failed} failed" if summary.failed else ""
    lines = [f"{escape(summary.reference)}  {summary.mode}, {runs}{failed}"]
    if summary.seconds:
        lines.append(f"  {'stage':<10}{'median':>10}{'lowest':>10}{'highest':>10}")
    for stage, spread in summary.seconds.items():
        if not spread.high:
            continue
        figures = "".join(
            f"{seconds_text(value):>10}" for value in (spread.median, spread.low, spread.high)
        )
        lines.append(f"  {stage:<10}{figures}")
    if summary.runs:
        lines.append(f"  {_cost_text(summary)}")
    return "\n".join(lines)


def _cost_text(summary: Summary) -> str:
    parts = [f"{size_text(summary.fetched_bytes)} fetched"]
    if summary.rate is not None:
        parts[0] += f" at {size_text(summary.rate.median)}/s"
    if summary.cpu_seconds is not None:
        parts.append(f"CPU {seconds_text(summary.cpu_seconds.median)}")
        parts.append(f"memory {size_text(summary.max_rss)}")
    return " · ".join(parts)


def comparison_text(comparison: Comparison) -> str:
    """Return the table of two summaries side by side."""
    first, second = comparison.first, comparison.second
    if first.reference == second.reference:
        lines = [f"{escape(first.reference)}  {first.mode}, second to first"]
    else:
        lines = [f"{escape(second.reference)}  {first.mode}", f"  to {escape(first.reference)}"]
    lines.append(f"  {'medians':<10}{'first':>10}{'second':>10}   change")
    lines += [
        _change_text(change)
        for change in comparison.changes
        if change.first.high or change.second.high
    ]
    return "\n".join(lines)


def change_words(change: Change) -> str:
    """Return by how much the second differs, and whether that may be chance."""
    ratio = change.ratio
    if ratio is None:
        return ""
    if not change.apart:
        return f"{ratio - 1:+.0%}  may be chance"
    return f"{ratio - 1:+.0%}  {'slower' if ratio > 1 else 'faster'}"


def _change_text(change: Change) -> str:
    first, second = seconds_text(change.first.median), seconds_text(change.second.median)
    return f"  {change.stage:<10}{first:>10}{second:>10}   {change_words(change)}".rstrip()


def machine_text(machine: dict[str, Any]) -> str:
    """Return a line about the machine of a record."""
    memory = machine.get("memory")
    size = size_text(memory) if isinstance(memory, int) else "unknown"
    return (
        f"{_shown(machine, 'time')}, {_shown(machine, 'processors')} processors "
        f"({_shown(machine, 'architecture')}), {size} of memory, kernel "
        f"{_shown(machine, 'kernel')}, load {_shown(machine, 'load')}"
    )


def machines_text(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Return a line that warns where two records come from different machines."""
    names = ("processors", "memory", "architecture", "kernel", "python")
    other = [name for name in names if first.get(name) != second.get(name)]
    if not other:
        return f"both on {first.get('processors')} processors, kernel {_shown(first, 'kernel')}"
    differences = ", ".join(f"{n} {_shown(first, n)} and {_shown(second, n)}" for n in other)
    return f"measured on machines that differ: {differences}"


def _shown(values: dict[str, Any], name: str) -> str:
    return escape(str(values.get(name, "unknown")))
