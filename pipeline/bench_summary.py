"""What many runs say together: medians with their spread, and whether two records differ.

Pure arithmetic on :class:`~stowray.pipeline.run_record.RunRecord`. Invariant: a figure is only
given for runs that succeeded, beside the number of those that did not.
"""

from __future__ import annotations

import functools
import math
import statistics
from dataclasses import asdict, field
from typing import TYPE_CHECKING, Any

from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stowray.pipeline.run_record import Run, RunRecord

SIGNIFICANT = 0.05
# Beyond that many runs the exact distribution costs more than it differs from the normal one.
_EXACT = 30
# In this order wherever stages are shown; "process" is the whole command, start-up and all.
STAGES = ("resolve", "fetch", "apply", "total", "process")


@dataclass(frozen=True, slots=True)
class Spread:
    """One measured thing over several runs, in the unit of its values."""

    median: float
    low: float
    high: float
    lower_quartile: float
    upper_quartile: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of at least one value; quartiles as by linear interpolation."""
        ordered = sorted(values)
        first, middle, third = (
            statistics.quantiles(ordered, n=4, method="inclusive")
            if len(ordered) > 1
            else ordered * 3
        )
        return cls(middle, ordered[0], ordered[-1], first, third, tuple(ordered))

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {
            name: [round(one, 6) for one in value] if name == "values" else round(value, 6)
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True, slots=True)
class Summary:
    """The runs of one reference in one mode; sizes in bytes, ``rate`` in bytes per second."""

    reference: str
    mode: str
    runs: int
    failed: int
    seconds: dict[str, Spread] = field(default_factory=dict)
    fetched_bytes: int = 0
    manifest_requests: int = 0
    rate: Spread | None = None
    cpu_seconds: Spread | None = None
    max_rss: int = 0
    error: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as the JSON line of ``bench --json``."""
        return {
            "reference": self.reference,
            "mode": self.mode,
            "runs": self.runs,
            "failed": self.failed,
            "seconds": {name: spread.to_dict() for name, spread in self.seconds.items()},
            "fetched_bytes": self.fetched_bytes,
            "manifest_requests": self.manifest_requests,
            "bytes_per_second": self.rate.to_dict() if self.rate else None,
            "cpu_seconds": self.cpu_seconds.to_dict() if self.cpu_seconds else None,
            "max_rss": self.max_rss,
            **({"error": self.error} if self.error else {}),
        }


@dataclass(frozen=True, slots=True)
class Change:
    """One stage in two records; ``ratio`` is second by first, ``chance`` how likely by luck alone.

    ``chance`` is the two-sided p of the rank-sum test (Mann and Whitney 1947): it needs no normal
    distribution, which times of pulls do not have, and three runs of each can never prove a thing.
    """

    stage: str
    first: Spread
    second: Spread

    @property
    def ratio(self) -> float | None:
        """Return how many times as long the second took; None where the first took no time."""
        return self.second.median / self.first.median if self.first.median else None

    @property
    def chance(self) -> float:
        """Return the probability of a difference as large between runs of the same thing."""
        return rank_sum_chance(self.first.values, self.second.values)

    @property
    def apart(self) -> bool:
        """Return whether the difference is hardly by chance."""
        return self.chance < SIGNIFICANT

    def to_dict(self) -> dict[str, Any]:
        """Return the change for JSON."""
        ratio = self.ratio
        return {
            "stage": self.stage,
            "first": self.first.to_dict(),
            "second": self.second.to_dict(),
            "ratio": None if ratio is None else round(ratio, 4),
            "chance": round(self.chance, 4),
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two summaries of the same mode, stage by stage."""

    first: Summary
    second: Summary
    changes: tuple[Change, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as a JSON line."""
        return {
            "mode": self.first.mode,
            "first": self.first.reference,
            "second": self.second.reference,
            "stages": [change.to_dict() for change in self.changes],
        }


def summarise(record: RunRecord) -> list[Summary]:
    """Return a summary per reference and mode, in order of first appearance."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in record.runs:
        groups.setdefault((run.reference, run.mode), []).append(run)
    return [_summary(reference, mode, runs) for (reference, mode), runs in groups.items()]


def _summary(reference: str, mode: str, runs: Sequence[Run]) -> Summary:
    good = [run for run in runs if run.result is not None]
    errors = [run.error for run in runs if run.result is None]
    seconds: dict[str, Spread] = {}
    for stage in STAGES:
        values = [value for run in good if (value := stage_of(run, stage)) is not None]
        if values:
            seconds[stage] = Spread.of(values)
    results = [run.result for run in good if run.result is not None]
    processes = [run.process for run in good if run.process is not None]
    rates = [rate for run in good if (rate := fetch_rate(run)) is not None]
    return Summary(
        reference=reference,
        mode=mode,
        runs=len(good),
        failed=len(errors),
        seconds=seconds,
        fetched_bytes=int(_median(result["fetched_bytes"] for result in results)),
        manifest_requests=int(_median(result["manifest_requests"] for result in results)),
        rate=Spread.of(rates) if rates else None,
        cpu_seconds=_spread_of(processes, "cpu_seconds"),
        max_rss=int(max((process.get("max_rss", 0) for process in processes), default=0)),
        error=errors[0] if errors else None,
    )


def _spread_of(processes: Sequence[dict[str, float]], name: str) -> Spread | None:
    values = [process[name] for process in processes if name in process]
    return Spread.of(values) if values else None


def stage_of(run: Run, stage: str) -> float | None:
    """Return how long a stage of a run that succeeded took; None where it was not measured."""
    if stage == "process":
        return run.process.get("seconds") if run.process else None
    value: float | None = (run.result or {})["seconds"].get(stage)
    return value


def fetch_rate(run: Run) -> float | None:
    """Return the bytes per second while blobs were fetched; None when none were."""
    blobs = [span for span in run.spans if span.kind == "blob" and span.status == "done"]
    fetched = (run.result or {}).get("fetched_bytes", 0)
    if not blobs or not fetched:
        return None
    seconds = max(span.end for span in blobs) - min(span.started for span in blobs)
    return float(fetched / seconds) if seconds > 0 else None


def _median(values: Iterable[float]) -> float:
    return statistics.median_low(found) if (found := list(values)) else 0


def compare(first: RunRecord, second: RunRecord) -> list[Comparison]:
    """Return what can be compared of two records.

    The same reference and mode are compared; where the records have no reference in common (two
    registries, a mirror and its origin), the references of each mode in their order.
    """
    ones = [summary for summary in summarise(first) if summary.runs]
    others = [summary for summary in summarise(second) if summary.runs]
    common = {one.reference for one in ones} & {other.reference for other in others}
    pairs = []
    for mode in dict.fromkeys(one.mode for one in ones):
        left = [one for one in ones if one.mode == mode]
        right = [other for other in others if other.mode == mode]
        if common:
            pairs += [(a, b) for a in left for b in right if a.reference == b.reference]
        else:
            pairs += list(zip(left, right, strict=False))
    return [compared(a, b) for a, b in pairs]


def compared(first: Summary, second: Summary) -> Comparison:
    """Return two summaries stage by stage."""
    changes = tuple(
        Change(stage, first.seconds[stage], second.seconds[stage])
        for stage in STAGES
        if stage in first.seconds and stage in second.seconds
    )
    return Comparison(first, second, changes)


def rank_sum_chance(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the two-sided p of the rank-sum test: exact for few values, else by the normal law."""
    most = len(first) * len(second)
    above = sum((a > b) + 0.5 * (a == b) for a in first for b in second)
    least = min(above, most - above)
    if max(len(first), len(second)) <= _EXACT:
        ways = [_ways(u, len(first), len(second)) for u in range(math.floor(least) + 1)]
        return min(1.0, 2 * sum(ways) / math.comb(len(first) + len(second), len(first)))
    deviation = math.sqrt(most * (len(first) + len(second) + 1) / 12)
    return min(1.0, math.erfc((most / 2 - least - 0.5) / deviation / math.sqrt(2)))


@functools.cache
def _ways(u: int, first: int, second: int) -> int:
    """Return how many orders of two groups have ``u`` pairs with the first one's value above."""
    if u < 0:
        return 0
    if first == 0 or second == 0:
        return int(u == 0)
    return _ways(u - second, first - 1, second) + _ways(u, first, second - 1)
