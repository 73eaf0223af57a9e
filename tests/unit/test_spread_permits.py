"""Connections to a registry that the stripes of one process pass on to each other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from stowray.pipeline.clock import SYSTEM_CLOCK
from stowray.pipeline.errors import CancelledError, NodeError
from stowray.pipeline.origin_leases import Later, OriginLeases
from stowray.pipeline.registry_permits import RegistryPermits
from stowray.pipeline.spread_leases import LocalLeases
from stowray.pipeline.spread_permits import TURN_SECONDS, Permit, Permits
from tests.support.spread import wait_until


class Clock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        raise AssertionError(f"nobody sleeps here: {seconds}")


class Owner(LocalLeases):
    """Counts what it is asked, and may be deaf."""

    def __init__(self, clock: Clock, limit: int = 1) -> None:
        self.book = RegistryPermits(clock.monotonic, limit)
        super().__init__(OriginLeases(clock.monotonic), self.book, "n0")
        self.asked: list[str] = []
        self.is_deaf = False

    def permit(self, purpose: str) -> float | Later:
        self.asked.append(purpose)
        if self.is_deaf:
            raise NodeError("owner", "does not answer")
        return super().permit(purpose)


def never() -> bool:
    return False


def test_many_stripes_cost_few_questions() -> None:
    clock = Clock()
    owner = Owner(clock)
    permits = Permits(owner, clock)
    first = permits.get("first", never)
    assert first is not None
    most = [0, 0]
    lock = threading.Lock()

    def use(number: int) -> None:
        permit = permits.get(f"stripe {number}", never)
        assert permit is not None
        with lock:
            most[0] += 1
            most[1] = max(most)
        with lock:
            most[0] -= 1
        permits.give_back(permit)

    with ThreadPoolExecutor(50) as pool:
        futures = [pool.submit(use, number) for number in range(50)]
        wait_until(lambda: len(permits._line) == 50, "all stand in line")
        permits.give_back(first)
        for future in futures:
            future.result(timeout=60)
    assert most[1] == 1, "one connection, one stripe"
    assert owner.book.used == 0
    # Two of them stood in the owner's line; all others got it from one that had done.
    assert len(set(owner.asked) - {"first"}) <= 4


def test_after_its_turn_a_process_gives_the_permit_back() -> None:
    clock = Clock()
    owner = Owner(clock)
    permits = Permits(owner, clock)
    first = permits.get("first", never)
    assert first is not None
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(permits.get, f"stripe {number}", never) for number in range(8)]
        wait_until(lambda: len(permits._line) == 8, "all stand in line")
        clock.now += TURN_SECONDS
        permits.give_back(first)
        held: list[Permit] = []
        while len(held) < 8:
            wait_until(lambda: any(f.done() for f in futures), "the next has it")
            (done,) = [future for future in futures if future.done()]
            futures.remove(done)
            permit = done.result()
            assert permit is not None
            assert permit.purpose != "first"
            held.append(permit)
            clock.now += TURN_SECONDS
            permits.give_back(permit)
    assert len({permit.purpose for permit in held}) == 8
    assert owner.book.used == 0


@pytest.mark.parametrize("how", ["is over", "is cancelled"])
def test_who_leaves_the_line_takes_nothing_along(how: str) -> None:
    clock = Clock()
    owner = Owner(clock)
    permits = Permits(owner, clock)
    first = permits.get("first", never)
    assert first is not None
    over = threading.Event()

    def is_over() -> bool:
        if over.is_set() and how == "is cancelled":
            raise CancelledError("a stripe")
        return over.is_set()

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(permits.get, f"stripe {number}", is_over) for number in range(8)]
        wait_until(lambda: len(permits._line) == 8, "all stand in line")
        over.set()
        for future in futures:
            if how == "is over":
                assert future.result(timeout=60) is None
            else:
                with pytest.raises(CancelledError):
                    future.result(timeout=60)
    permits.give_back(first)
    assert (owner.book.used, permits._line) == (0, [])
    # Nobody who left stands in the owner's line.
    assert not isinstance(owner.permit("another"), Later)


def test_an_owner_that_does_not_answer_is_asked_again() -> None:
    owner = Owner(Clock())
    owner.is_deaf = True
    permits = Permits(owner, SYSTEM_CLOCK)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(permits.get, "stripe", never)
        wait_until(lambda: len(owner.asked) > 0, "it was asked")
        owner.is_deaf = False
        assert future.result(timeout=60) is not None


def test_who_passed_its_permit_on_gets_another_not_the_same_one_again() -> None:
    """Two stripes once shared one: the owner took the second question for a renewal."""
    clock = Clock()
    owner = Owner(clock)
    permits = Permits(owner, clock)
    first = permits.get("a", never)
    assert first is not None
    over = threading.Event()
    with ThreadPoolExecutor(4) as pool:
        for number in range(2):
            pool.submit(permits.get, f"first in line {number}", over.is_set)
        wait_until(lambda: len(permits._line) == 2, "two ask the owner")
        other = pool.submit(permits.get, "b", never)
        wait_until(lambda: len(permits._line) == 3, "b stands behind them")
        permits.give_back(first)
        passed = other.result(timeout=60)
        assert passed is first
        over.set()
        wait_until(lambda: not permits._line, "those before it are gone")
        again = pool.submit(permits.get, "a", never)
        asked = len(owner.asked)
        wait_until(lambda: len(owner.asked) > asked + 1 or again.done(), "a asks, and once more")
        was_given = again.done()
        permits.give_back(passed)
        last = again.result(timeout=60)
    assert not was_given
    assert last is not None
    clock.now += TURN_SECONDS
    permits.give_back(last)
    assert owner.book.used == 0
