"""Pictures of measurements as SVG, drawn by hand so that they need nothing.

Invariant: the same record gives the same picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#edae49", "#6a4c93", "#2e4057", "#8d99ae", "#bc6c25")
STYLE = (
    "<style>text{font:12px system-ui,sans-serif;fill:#222}.t{font-size:15px;font-weight:600}"
    ".s{fill:#666}line{stroke:#ccc}</style>"
)


@dataclass(frozen=True)
class Group:
    """Bars of one comparison; `goal` is where they should end."""

    title: str
    bars: Sequence[tuple[str, float]]
    goal: float | None = None


@dataclass(frozen=True)
class Curve:
    """A line through `(x, y)`, and how far the runs behind each point lie apart."""

    label: str
    points: Sequence[tuple[float, float]]


def bars(title: str, subtitle: str, groups: Sequence[Group]) -> str:
    """Horizontal bars, group by group, on one scale; the goal is a mark across its group."""
    left, width, row = 130, 560, 18
    top = max((value for group in groups for _, value in group.bars), default=1.0)
    top = max([top, *(group.goal for group in groups if group.goal)]) * 1.12
    parts: list[str] = []
    y = 62
    for number, group in enumerate(groups):
        goal = f" (goal ≤ {group.goal:g})" if group.goal else ""
        parts.append(f'<text x="12" y="{y}" font-weight="600">{escape(group.title)}{goal}</text>')
        y += 8
        begun = y
        for label, value in group.bars:
            length = width * value / top
            colour = COLOURS[number % len(COLOURS)]
            parts.append(
                f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(label)}</text>'
                f'<rect x="{left}" y="{y + 2}" width="{length:.1f}" height="{row - 4}" '
                f'fill="{colour}"/>'
                f'<text x="{left + length + 6:.1f}" y="{y + 13}">{value:.2f}</text>'
            )
            y += row
        if group.goal:
            x = left + width * group.goal / top
            parts.append(
                f'<path d="M{x:.1f} {begun}V{y}" stroke="#222" stroke-dasharray="4 3" fill="none"/>'
            )
        y += 26
    return _document(left + width + 70, y, title, subtitle, parts)


def curves(title: str, subtitle: str, x_label: str, y_label: str, lines: Sequence[Curve]) -> str:
    """Lines over a logarithmic x axis; y begins at 0."""
    left, top, width, height = 70, 60, 520, 260
    xs = [x for line in lines for x, _ in line.points]
    low, high = min(xs), max(xs)
    span = math.log(high / low) or 1.0
    most = max(y for line in lines for _, y in line.points) * 1.1 or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return left + width * math.log(x / low) / span, top + height * (1 - y / most)

    parts: list[str] = []
    for step in range(5):
        value = most * step / 4
        _, y = place(low, value)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for x in sorted(set(xs)):
        at, _ = place(x, 0)
        label = f"{x / 1000:g}k" if x >= 1000 else f"{x:g}"
        parts.append(
            f'<text x="{at:.1f}" y="{top + height + 18}" text-anchor="middle">{label}</text>'
        )
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        placed = [place(x, y) for x, y in line.points]
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed]
        parts.append(
            f'<rect x="{left + width + 14}" y="{top + 20 * number}" width="12" height="12" '
            f'fill="{colour}"/><text x="{left + width + 32}" y="{top + 10 + 20 * number}">'
            f"{escape(line.label)}</text>"
        )
    parts.append(
        f'<text x="{left + width / 2}" y="{top + height + 38}" text-anchor="middle">'
        f'{escape(x_label)}</text><text x="{left}" y="{top - 8}" class="s">{escape(y_label)}</text>'
    )
    return _document(left + width + 170, top + height + 52, title, subtitle, parts)


def _document(width: float, height: float, title: str, subtitle: str, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">{STYLE}'
        f'<rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="12" y="22" class="t">{escape(title)}</text>'
        f'<text x="12" y="40" class="s">{escape(subtitle)}</text>' + "".join(parts) + "</svg>\n"
    )
