from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from stowray.pipeline.clock import SYSTEM_CLOCK
from stowray.pipeline.errors import CancelledError, NotFoundError
from stowray.pipeline.flight import SingleFlight


class ManualClock:
    def __init__(self) -> None:
        self.now = 100.0

    def clock(self):
        return replace(SYSTEM_CLOCK, monotonic=lambda: self.now)


def test_kept_until_the_ttl_has_passed_on_the_monotonic_clock() -> None:
    manual = ManualClock()
    flights: SingleFlight[int] = SingleFlight(5.0, manual.clock())
    calls: list[int] = []

    def work(_abandoned) -> int:
        calls.append(1)
        return len(calls)

    assert flights.do("a", work) == 1
    manual.now += 4.999
    assert flights.do("a", work) == 1
    manual.now += 0.001
    assert flights.do("a", work) == 2
    assert flights.do("b", work) == 3
    flights.forget("a")
    assert flights.do("a", work) == 4


def test_an_error_reaches_all_waiters_and_is_not_kept() -> None:
    flights: SingleFlight[int] = SingleFlight(5.0)
    gate = threading.Event()
    calls: list[int] = []

    def fails(_abandoned) -> int:
        calls.append(1)
        gate.wait(10)
        raise NotFoundError("tag", "registry")

    caught: list[BaseException] = []

    def ask() -> None:
        try:
            flights.do("a", fails)
        except NotFoundError as error:
            caught.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    while flights._flights["a"].waiters < 8:
        threading.Event().wait(0.001)
    gate.set()
    for thread in threads:
        thread.join()
    assert len(caught) == 8
    assert len(calls) == 1
    assert flights.do("a", lambda _abandoned: 7) == 7


def test_a_leaving_waiter_leaves_the_others_alone_and_the_last_one_stops_the_work() -> None:
    flights: SingleFlight[str] = SingleFlight(5.0)
    entered, gate = threading.Event(), threading.Event()
    seen: list[bool] = []

    def work(abandoned) -> str:
        entered.set()
        gate.wait(10)
        seen.append(abandoned())
        return "answer"

    answers: list[str] = []
    stays = threading.Thread(target=lambda: answers.append(flights.do("a", work)))
    stays.start()
    entered.wait(10)
    with pytest.raises(CancelledError):
        flights.do("a", work, cancelled=lambda: True)
    gate.set()
    stays.join()
    assert answers == ["answer"]
    assert seen == [False]


def test_work_learns_that_nobody_waits_and_its_cancellation_is_not_kept() -> None:
    flights: SingleFlight[str] = SingleFlight(5.0)
    told = threading.Event()

    def work(abandoned) -> str:
        while not abandoned():
            threading.Event().wait(0.001)
        told.set()
        raise CancelledError("work")

    with pytest.raises(CancelledError):
        flights.do("a", work, cancelled=lambda: True)
    assert told.wait(10)
    assert flights.do("a", lambda _abandoned: "fresh") == "fresh"
