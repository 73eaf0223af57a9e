from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from stowray.pipeline.clock import Clock
from stowray.pipeline.errors import CancelledError, RegistryError, UnavailableError
from stowray.pipeline.retry import (
    POLL_SECONDS,
    RETRY_AFTER_LIMIT,
    Retries,
    RetryPolicy,
    is_transient,
    retry_after,
    wait,
)
from tests.support.vectors import table

TABLES = table("auth_transport")
NOW = 1893456000.0  # 2030-01-01T00:00:00Z
DOWN = UnavailableError("http://h/x", 503, "", "")


@dataclass
class FakeTime:
    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    @property
    def clock(self) -> Clock:
        return Clock(monotonic=lambda: self.now, wall=lambda: self.now, sleep=self.sleep)


def retries(time: FakeTime, **policy: Any) -> Retries:
    return Retries("x", RetryPolicy(**policy), time.clock, lambda low, high: high)


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row["header"] or "empty") for row in TABLES["retry_after"]],
)
def test_retry_after(row: dict[str, Any]) -> None:
    assert retry_after(row["header"], NOW) == row["seconds"]


def test_no_retry_after() -> None:
    assert retry_after(None, NOW) is None


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=str(row["status"])) for row in TABLES["transient"]]
)
def test_transient(row: dict[str, Any]) -> None:
    assert is_transient(row["status"]) == row["retry"]


def test_waits_double_up_to_the_longest() -> None:
    time = FakeTime()
    attempts = retries(time, attempts=9, base_seconds=1.0, longest_seconds=4.0)
    seen = []
    for _ in range(5):
        before = time.now
        attempts.pause(DOWN)
        seen.append(round(time.now - before, 6))
    assert seen == [1.0, 2.0, 4.0, 4.0, 4.0]


def test_jitter_is_drawn_below_the_limit() -> None:
    drawn: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        drawn.append((low, high))
        return low

    time = FakeTime()
    attempts = Retries("x", RetryPolicy(base_seconds=1.0), time.clock, uniform)
    attempts.pause(DOWN)
    attempts.pause(DOWN)
    assert drawn == [(0.0, 1.0), (0.0, 2.0)]
    assert time.now == pytest.approx(0.0)


def test_the_last_attempt_raises_its_own_error() -> None:
    attempts = retries(FakeTime(), attempts=3)
    attempts.pause(UnavailableError("u", 500, "", "first"))
    attempts.pause(UnavailableError("u", 500, "", "second"))
    with pytest.raises(UnavailableError, match="third"):
        attempts.pause(UnavailableError("u", 500, "", "third"))
    assert attempts.count == 3


def test_what_is_not_retryable_is_raised_at_once() -> None:
    time = FakeTime()
    with pytest.raises(RegistryError):
        retries(time).pause(RegistryError("u", 400, "", ""))
    assert not time.slept


def test_progress_starts_the_count_anew() -> None:
    attempts = retries(FakeTime(), attempts=2, least_progress=100)
    for _ in range(50):
        attempts.progressed(100)
        attempts.pause(DOWN)
    attempts.progressed(99)
    with pytest.raises(UnavailableError):
        attempts.pause(DOWN)


def test_the_first_failure_after_progress_is_hardly_waited_for() -> None:
    time = FakeTime()
    attempts = retries(time, base_seconds=1.0, least_progress=100)
    seen = []
    for size in (0, 100, 0, 0, 100):
        attempts.progressed(size)
        before = time.now
        attempts.pause(DOWN)
        seen.append(round(time.now - before, 6))
    assert seen == [1.0, 0.1, 2.0, 4.0, 0.1]


def test_small_steps_of_progress_add_up() -> None:
    attempts = retries(FakeTime(), attempts=4, least_progress=100)
    for _ in range(50):
        attempts.progressed(40)
        attempts.pause(DOWN)
    with pytest.raises(UnavailableError):
        for _ in range(5):
            attempts.progressed(10)
            attempts.pause(DOWN)


def test_progress_begins_another_deadline() -> None:
    time = FakeTime()
    attempts = retries(time, attempts=100, least_progress=100, deadline_seconds=10.0)
    for _ in range(10):
        attempts.pause(DOWN)
        time.now += 9.0
        attempts.progressed(100)


def test_a_heavy_failure_counts_for_several() -> None:
    attempts = retries(FakeTime(), attempts=4)
    attempts.pause(DOWN, weight=2)
    with pytest.raises(UnavailableError):
        attempts.pause(DOWN, weight=2)


def test_the_deadline_ends_attempts_without_progress() -> None:
    time = FakeTime()
    attempts = retries(time, attempts=100, deadline_seconds=10.0)
    attempts.pause(DOWN)
    time.now += 10.0
    with pytest.raises(UnavailableError):
        attempts.pause(DOWN)


def test_a_wait_is_left_soon_after_it_is_cancelled() -> None:
    time = FakeTime()
    with pytest.raises(CancelledError):
        wait(RETRY_AFTER_LIMIT, time.clock, lambda: time.now >= 1.0)
    assert time.now <= 1.0 + POLL_SECONDS
    assert max(time.slept) <= POLL_SECONDS
