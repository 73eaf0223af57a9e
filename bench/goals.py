"""What is aimed at, and what a record says of it.

Invariant: ratios are of medians, and over images their geometric mean, so that no image counts for
more than another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.picture import Group, bars

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bench.runner import Summary

Results = dict[str, dict[str, "Summary"]]


@dataclass(frozen=True)
class Ratio:
    """`contender` shall take at most `most` times as long as `peer`."""

    contender: str
    peer: str
    most: float


@dataclass(frozen=True)
class Seconds:
    """`contender` shall take at most `most` seconds, more than `beyond` if that is named."""

    contender: str
    most: float
    beyond: str = ""


RATIOS = (
    Ratio("stowray", "podman", 0.19),
    Ratio("stowray", "skopeo+umoci", 0.25),
    Ratio("stowray", "ctr", 0.28),
    Ratio("stowray", "ctr2", 0.50),
    Ratio("stowray", "floor", 1.35),
    Ratio("stowray-inside", "ctr2", 0.45),
    Ratio("stowray-inside", "floor", 1.2),
    Ratio("stowray-fetch", "skopeo", 0.6),
)
SECONDS = (
    Seconds("stowray-ray", 0.6, beyond="stowray"),
    Seconds("stowray-again", 0.45),
    Seconds("stowray-missing", 0.3),
    Seconds("stowray-digest", 0.3),
    Seconds("stowray-help", 0.12),
)


def ratios(results: Results, goal: Ratio) -> dict[str, float]:
    """The ratio on each image on which both ran."""
    return {
        image: found[goal.contender].median / found[goal.peer].median
        for image, found in results.items()
        if goal.contender in found and goal.peer in found
    }


def seconds(results: Results, goal: Seconds) -> dict[str, float]:
    found = {}
    for image, summaries in results.items():
        if goal.contender in summaries and (not goal.beyond or goal.beyond in summaries):
            base = summaries[goal.beyond].median if goal.beyond else 0.0
            found[image] = summaries[goal.contender].median - base
    return found


def geometric_mean(values: Mapping[str, float]) -> float:
    return math.exp(sum(map(math.log, values.values())) / len(values))


def table(results: Results) -> list[str]:
    """A line for each goal of which something was measured."""
    lines = []
    for goal in RATIOS:
        found = ratios(results, goal)
        if found:
            mean = geometric_mean(found)
            detail = "  ".join(f"{image} {value:.2f}" for image, value in found.items())
            verdict = "reached" if mean <= goal.most else "missed"
            what = f"{goal.contender} / {goal.peer}"
            lines.append(f"{what:32} {mean:5.2f}  goal {goal.most:<5g}{verdict:8} {detail}")
    for limit in SECONDS:
        spent = seconds(results, limit)
        if spent:
            worst = max(spent.values())
            detail = "  ".join(f"{image} {value:.2f}" for image, value in spent.items())
            verdict = "reached" if worst <= limit.most else "missed"
            what = f"{limit.contender} - {limit.beyond}" if limit.beyond else limit.contender
            lines.append(f"{what:30} {worst:5.2f} s  goal {limit.most:<5g}{verdict:8} {detail}")
    return lines


def picture(results: Results, subtitle: str) -> str:
    groups = []
    for goal in RATIOS:
        found = ratios(results, goal)
        if found:
            shown = [("geometric mean", geometric_mean(found)), *found.items()]
            groups.append(Group(f"{goal.contender} / {goal.peer}", shown, goal.most))
    return bars("Time as a fraction of the peer's, shorter is better", subtitle, groups)
