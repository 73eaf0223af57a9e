from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowray.pipeline.host_records import HostRecord
from stowray.pipeline.range_plan import (
    LARGEST_PART,
    MOST_CHECKS,
    SMALLEST_PART,
    Climb,
    Finding,
    Parts,
    part_size,
)

MIB = 1 << 20


@settings(max_examples=60, deadline=None)
@given(
    start=st.integers(0, 50),
    length=st.integers(0, 200),
    size=st.integers(1, 30),
    broken=st.lists(st.integers(0, 40), max_size=30),
)
def test_parts_are_a_partition_whatever_breaks(
    start: int, length: int, size: int, broken: list[int]
) -> None:
    parts = Parts(start, start + length)
    got: list[int] = []
    breaks = iter(broken)
    while (part := parts.take(size, 0, 10_000)) is not None:
        first, end = part
        assert first < end <= start + length
        stop = min(end, first + next(breaks, 1000))
        got += range(first, stop)
        parts.give_back(stop, end)
        assert parts.left == length - len(got)
    assert parts.is_empty
    assert sorted(got) == list(range(start, start + length))


def test_no_part_begins_beyond_the_window_and_none_is_of_what_is_there() -> None:
    parts = Parts(10, 100)
    assert parts.take(10, 0, 11) == (10, 20)
    assert parts.take(10, 0, 11) is None
    assert parts.take(10, 15, 11) == (20, 30)
    parts.give_back(12, 20)
    parts.give_back(20, 25)
    assert parts.take(10, 22, 11) == (22, 25)
    # Somebody else has come further than what was handed out.
    assert parts.take(10, 60, 11) == (60, 70)
    assert not parts.is_empty
    assert parts.take(100, 90, 50) == (90, 100)
    assert parts.take(100, 90, 50) is None
    assert parts.is_empty


def test_what_is_given_back_of_a_long_part_is_handed_out_in_parts() -> None:
    parts = Parts(0, 100)
    assert parts.take(100, 0, 100) == (0, 100)
    parts.give_back(30, 100)
    assert [parts.take(40, 0, 100) for _ in range(3)] == [(30, 70), (70, 100), None]


def test_parts_last_about_a_second_and_get_smaller_at_the_end() -> None:
    assert part_size(5.5 * MIB, 1000 * MIB, 4) == int(5.5 * MIB)
    assert part_size(0, 1000 * MIB, 4) == SMALLEST_PART
    assert part_size(1e9, 1000 * MIB, 4) == LARGEST_PART
    assert part_size(10 * MIB, 8 * MIB, 4) == 2 * MIB
    assert part_size(10 * MIB, 10, 4) == SMALLEST_PART
    assert part_size(10 * MIB, 1000 * MIB, 4, 0.5) == 5 * MIB


class Line:
    """A download as a climb sees it, at a rate that depends on the connections."""

    def __init__(self, climb: Climb, rate_of: dict[int, float], size: float = 10_000 * MIB) -> None:
        self.climb = climb
        self.rate_of = rate_of
        self.size = size
        self.now = 0.0
        self.received = 0.0
        self.most = 1

    def run(self, seconds: float, *, most: int = 100, waiting: float = 1.0) -> None:
        end = self.now + seconds
        while self.now < end:
            active = min(self.climb.wanted, most)
            self.most = max(self.most, active)
            # A binary fraction, so that no rounding moves what is sampled.
            self.now += 1 / 16
            self.received += self.rate_of[active] * MIB / 16
            left = int(self.size - self.received)
            self.climb.look(self.now, int(self.received), active, left, waiting)


def test_a_steady_rate_is_known_in_a_quarter_of_a_second_and_all_connections_that_pay_stay() -> (
    None
):
    line = Line(Climb(8, 0.0), {count: 20 * count for count in (1, 8)})
    line.run(0.15)
    assert line.climb.wanted == 1
    line.run(0.2)
    assert (line.climb.wanted, line.climb.is_over) == (8, False)
    line.run(1)
    assert (line.climb.wanted, line.climb.is_over) == (8, True)
    assert line.climb.finding is not None
    assert line.climb.finding.connections == 8
    assert line.climb.finding.bytes_per_second == pytest.approx(20 * MIB, rel=0.05)


def test_a_rate_that_still_grows_is_not_taken_for_that_of_the_line() -> None:
    """As a connection begins: its rate doubles with each round trip until the line is full."""
    climb = Climb(8, 0.0)
    line = Line(climb, {1: 0.5, 8: 40})
    while line.rate_of[1] < 40:
        line.run(0.1)
        assert climb.wanted == 1
        line.rate_of[1] = min(40, 2 * line.rate_of[1])
    line.run(5)
    assert (climb.wanted, line.most) == (1, 8)
    assert climb.finding is not None
    assert climb.finding.connections == 1
    assert climb.finding.bytes_per_second == pytest.approx(40 * MIB, rel=0.1)


def test_an_unsteady_rate_is_measured_over_a_second() -> None:
    climb = Climb(4, 0.0)
    line = Line(climb, {4: 200})
    rates = itertools.cycle([10, 40])
    line.rate_of[1] = 10
    # The first look is where the first sample begins.
    line.run(1 / 16)
    while line.now < 1.3:
        line.rate_of[1] = next(rates)
        line.run(1 / 8)
        assert climb.wanted == 1
    while climb.wanted == 1:
        line.rate_of[1] = next(rates)
        line.run(1 / 8)
        assert line.now < 2
    line.run(5)
    assert climb.wanted == 4


def test_connections_that_begin_slowly_are_waited_for() -> None:
    climb = Climb(8, 0.0)
    line = Line(climb, {1: 20, 8: 20})
    line.run(0.4)
    assert climb.wanted == 8
    while line.rate_of[8] < 160:
        line.run(0.2)
        line.rate_of[8] *= 1.5
    line.rate_of[8] = 160
    line.run(5)
    assert (climb.wanted, climb.is_over) == (8, True)


def test_connections_that_come_one_by_one_are_judged_when_all_are_there() -> None:
    climb = Climb(8, 0.0)
    line = Line(climb, {count: 20 * count for count in range(1, 9)})
    for count in range(1, 9):
        line.run(0.25, most=count)
    line.run(2)
    assert (climb.wanted, climb.is_over) == (8, True)


def test_a_line_that_is_full_goes_back_to_one() -> None:
    line = Line(Climb(8, 0.0), {1: 20, 8: 21})
    line.run(10)
    assert (line.climb.wanted, line.most) == (1, 8)
    assert line.climb.finding == Finding(1, line.climb.finding.bytes_per_second)  # type: ignore[union-attr]
    # Not 0, which would say that the host sends no parts.
    assert line.climb.finding.bytes_per_second == pytest.approx(20 * MIB, rel=0.1)  # type: ignore[union-attr]


def test_no_more_stay_than_bring_something() -> None:
    line = Line(Climb(8, 0.0), {1: 20, 3: 44, 8: 44})
    line.run(10)
    assert (line.climb.wanted, line.most) == (3, 8)


def test_a_limit_that_is_no_power_of_two() -> None:
    line = Line(Climb(3, 0.0), {1: 20, 3: 60})
    line.run(10)
    assert line.climb.wanted == 3


def test_nothing_is_tried_when_it_is_not_the_network_that_is_slow() -> None:
    line = Line(Climb(4, 0.0), {1: 20})
    line.run(10, waiting=0.3)
    assert (line.climb.wanted, line.climb.is_over, line.climb.finding) == (1, True, None)


def test_a_first_moment_in_which_others_were_slow_does_not_decide() -> None:
    line = Line(Climb(4, 0.0), {1: 20, 4: 80})
    line.run(0.6, waiting=0.3)
    assert (line.climb.wanted, line.climb.is_over) == (1, False)
    line.run(5)
    assert line.climb.wanted == 4


def test_nothing_is_tried_for_the_last_seconds() -> None:
    line = Line(Climb(4, 0.0), {1: 20}, size=20 * 2 * MIB)
    line.run(1.5)
    assert (line.climb.wanted, line.climb.finding) == (1, None)


def test_a_host_that_gives_no_second_connection_proves_nothing() -> None:
    line = Line(Climb(4, 0.0), {1: 20})
    line.run(10, most=1)
    assert (line.climb.wanted, line.climb.finding) == (1, None)


def test_connections_that_could_not_be_had_are_not_said_to_bring_nothing() -> None:
    """Two of eight, because others hold the rest: both pay, and of eight nothing is known."""
    line = Line(Climb(8, 0.0), {1: 20, 2: 40})
    line.run(10, most=2)
    assert (line.climb.wanted, line.climb.finding) == (2, None)


def known(connections: int, rate: float) -> HostRecord:
    return HostRecord(connections, int(rate * MIB), 0.0)


def test_what_was_learned_is_used_when_the_first_moment_agrees() -> None:
    line = Line(Climb(4, 0.0, known(8, 5)), {1: 5, 4: 20})
    assert (line.climb.wanted, line.climb.rate) == (1, 5 * MIB)
    line.run(2 / 16)
    assert (line.climb.wanted, line.climb.rate, line.climb.is_over) == (4, 5 * MIB, True)
    line.run(20)
    assert (line.climb.wanted, line.climb.finding) == (4, None)


def test_a_limit_that_is_gone_is_seen_before_others_join() -> None:
    line = Line(Climb(8, 0.0, known(8, 20)), {1: 400, 8: 230})
    line.run(5)
    # One trial at most: it may have been a limit that is higher now.
    assert (line.climb.wanted, line.climb.is_over) == (1, True)
    assert line.climb.finding == Finding(1, 400 * MIB)


def test_where_little_is_left_a_limit_that_is_gone_costs_no_trial() -> None:
    line = Line(Climb(8, 0.0, known(8, 20)), {1: 400, 8: 230}, size=256 * MIB)
    line.run(10 / 16)
    assert line.most == 1
    assert line.climb.finding == Finding(1, 400 * MIB)


def test_connections_that_bring_no_more_than_one_did_are_given_up() -> None:
    """The line has become narrow: eight of them are as slow together as one."""
    line = Line(Climb(8, 0.0, known(8, 20)), {1: 15, 8: 15})
    line.run(5)
    assert (line.climb.wanted, line.most) == (1, 8)
    assert line.climb.finding == Finding(1, 15 * MIB)


def test_a_host_that_became_faster_under_several_is_measured_and_keeps_what_pays() -> None:
    line = Line(Climb(8, 0.0, known(8, 20)), {1: 20, 8: 160})
    line.run(2)
    line.rate_of = {1: 100, 8: 800}
    line.run(5)
    assert line.climb.finding is not None
    assert (line.climb.wanted, line.climb.finding.connections) == (8, 8)
    # From a moment in which it had just become faster.
    assert 60 * MIB < line.climb.finding.bytes_per_second <= 100 * MIB


@pytest.mark.parametrize("connections", [1, 3])
def test_fewer_on_record_than_pay_are_tried_again(connections: int) -> None:
    """Whatever it was then: each connection has its own limit now."""
    rates = {count: 20.0 * count for count in range(1, 9)}
    line = Line(Climb(8, 0.0, known(connections, 20)), rates)
    line.run(5)
    assert line.climb.wanted == 8
    assert line.climb.finding == Finding(8, 20 * MIB)


def test_one_that_became_slow_is_measured_again() -> None:
    line = Line(Climb(8, 0.0, known(1, 400)), {1: 20, 8: 160}, size=120 * MIB)
    line.run(2)
    assert line.most == 8
    line = Line(Climb(8, 0.0, known(1, 20)), {1: 20, 8: 160}, size=120 * MIB)
    line.run(2)
    assert line.most == 1


@pytest.mark.parametrize("record", [None, known(8, 20), known(1, 20)])
def test_a_burst_at_the_start_is_not_taken_for_the_rate(record: HostRecord | None) -> None:
    """An allowance of a second at once, then nothing until it is used up."""
    rates = {count: 20.0 * count for count in range(2, 9)}
    line = Line(Climb(8, 0.0, record), {1: 200, **rates}, size=256 * MIB)
    line.run(2 / 16)
    line.rate_of[1] = 0
    line.run(5 / 16)
    assert line.climb.wanted == 8
    line.run(1.5)
    assert (line.climb.wanted > 1, line.climb.is_over) == (True, True)
    assert line.climb.finding is not None
    assert line.climb.finding.connections > 1


def test_a_connection_that_stands_still_later_is_seen_by_what_it_brought_last() -> None:
    """Parts of less than an allowance came at once, the rest in one answer does not."""
    rates = {count: 20.0 * count for count in range(2, 9)}
    line = Line(Climb(8, 0.0, known(8, 20)), {1: 200, **rates}, size=256 * MIB)
    line.run(12 / 16)
    assert line.climb.is_over
    line.rate_of[1] = 0
    line.run(14 / 16)
    assert line.most == 8


@settings(max_examples=60, deadline=None)
@given(
    rates=st.lists(st.sampled_from([0, 1, 20, 90, 400]), min_size=8, max_size=8),
    changes=st.lists(st.sampled_from([0.01, 0.3, 1.0, 5.0]), max_size=20),
    record=st.sampled_from([None, known(8, 20), known(1, 20), known(3, 100), known(8, 0)]),
)
def test_a_line_that_changes_all_the_time_does_not_keep_it_busy(
    rates: list[int], changes: list[float], record: HostRecord | None
) -> None:
    climb = Climb(8, 0.0, record)
    line = Line(climb, {count: float(rate) for count, rate in enumerate(rates, start=1)})
    wanted: list[int] = []
    for change in [*changes, 1.0]:
        line.rate_of = {count: rate * change for count, rate in enumerate(rates, start=1)}
        for _ in range(20):
            line.run(1 / 16)
            assert 1 <= climb.wanted <= 8
            wanted.append(climb.wanted)
    turns = sum(one != other for one, other in itertools.pairwise(wanted))
    assert turns <= 2 * (MOST_CHECKS + 2)
