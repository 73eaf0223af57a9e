from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowray.pipeline.bench_summary import (
    Spread,
    compare,
    rank_sum_chance,
    summarise,
)
from stowray.pipeline.run_record import Run, RunRecord, Span


def run(reference: str, mode: str, total: float, number: int = 1, fetched: int = 0) -> Run:
    result = {"seconds": {"total": total}, "fetched_bytes": fetched, "manifest_requests": 2}
    blob = Span(reference, "n", "sha256:a", "blob", "done", fetched, 1.0, 3.0)
    process = {"seconds": total + 1, "cpu_seconds": 0.5, "max_rss": 7.0}
    return Run(reference, mode, number, 0.0, total, result, None, process, (blob,))


def record(*runs: Run) -> RunRecord:
    return RunRecord("bench", "0", 0.0, runs=runs)


def test_runs_of_one_reference_and_mode_make_one_summary() -> None:
    failed = Run("b", "cold", 1, 0.0, 0.1, None, {"message": "gone"})
    cold, warm, lost = summarise(
        record(
            run("a", "cold", 3.0, fetched=100),
            run("a", "warm", 0.5),
            run("a", "cold", 1.0, fetched=100),
            run("a", "cold", 2.0, fetched=100),
            failed,
        )
    )
    assert (cold.reference, cold.mode, cold.runs, cold.failed) == ("a", "cold", 3, 0)
    total = cold.seconds["total"]
    assert (total.median, total.low, total.high) == (2.0, 1.0, 3.0)
    assert cold.seconds["process"].median == 3.0
    assert cold.rate is not None
    assert cold.rate.median == 50.0  # 100 bytes from second 1 to second 3
    assert (cold.fetched_bytes, cold.manifest_requests, cold.max_rss) == (100, 2, 7)
    assert (warm.mode, warm.rate) == ("warm", None)
    assert (lost.runs, lost.failed, lost.error) == (0, 1, {"message": "gone"})
    assert lost.seconds == {}


@given(st.lists(st.floats(0, 1e6), min_size=1))
def test_the_parts_of_a_spread_are_in_order(values: list[float]) -> None:
    spread = Spread.of(values)
    parts = [spread.low, spread.lower_quartile, spread.median, spread.upper_quartile, spread.high]
    assert all(a <= b or a == pytest.approx(b) for a, b in itertools.pairwise(parts))
    assert (spread.low, spread.high) == (min(values), max(values))


# Critical values of U at 5 %, two-sided, as statistics books table them.
@pytest.mark.parametrize(
    ("size", "critical"), [(4, 0), (5, 2), (6, 5), (8, 13), (10, 23), (20, 127)]
)
def test_the_exact_chance_agrees_with_the_tables(size: int, critical: int) -> None:
    def groups(u: int) -> tuple[list[int], list[int]]:
        """Two groups of `size` with exactly `u` pairs in which the first one's value is above."""
        full, rest = divmod(u, size)
        second = [10 * place for place in range(size)]
        above = [10 * size + 1] * full + [10 * rest - 5] + [-10] * (size - full - 1)
        return above, second

    assert rank_sum_chance(*groups(critical)) <= 0.05 < rank_sum_chance(*groups(critical + 1))


def test_three_runs_of_each_prove_nothing_and_equal_ones_even_less() -> None:
    assert rank_sum_chance([1, 2, 3], [7, 8, 9]) == pytest.approx(0.1)
    assert rank_sum_chance([1, 1, 1, 1], [1, 1, 1, 1]) == 1.0


def test_many_runs_go_by_the_normal_law() -> None:
    assert rank_sum_chance(range(40), range(40)) > 0.9
    assert rank_sum_chance(range(40), range(30, 70)) < 0.0001


def test_the_same_reference_is_compared_with_itself() -> None:
    first = record(*(run("a", "cold", 2.0 + n / 100) for n in range(5)), run("b", "cold", 9.0))
    second = record(run("c", "cold", 5.0), *(run("a", "cold", 1.0 + n / 100) for n in range(5)))
    (comparison,) = compare(first, second)
    assert (comparison.first.reference, comparison.second.reference) == ("a", "a")
    total = next(change for change in comparison.changes if change.stage == "total")
    assert total.ratio == pytest.approx(1.02 / 2.02)
    assert total.apart


def test_records_of_two_registries_are_compared_mode_by_mode() -> None:
    first = record(run("one/a", "cold", 1.0), run("one/a", "warm", 0.1))
    second = record(run("two/a", "warm", 0.2), run("two/a", "cold", 2.0))
    pairs = [(c.first.mode, c.first.reference, c.second.reference) for c in compare(first, second)]
    assert pairs == [("cold", "one/a", "two/a"), ("warm", "one/a", "two/a")]
    assert compare(first, record()) == []
