from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from stowray.pipeline.errors import UsageError
from stowray.pipeline.origin_leases import (
    Elsewhere,
    Granted,
    Later,
    OriginLeases,
)
from stowray.pipeline.registry_permits import RegistryPermits

NODES = ("a", "b", "c")
SIZE = 100
TTL = 10.0


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def book(time: Time) -> OriginLeases:
    return OriginLeases(time, ttl_seconds=TTL)


def test_the_first_reads_and_others_are_told_who(book: OriginLeases) -> None:
    assert book.ask("a", "k", SIZE, 0) == Granted(0, SIZE, TTL)
    assert book.ask("b", "k", SIZE, 20) == Elsewhere(("a",), SIZE, True, TTL)
    assert book.holder("k", 50) == "a"
    assert book.holder("other", 0) == ""


def test_progress_renews_and_makes_the_reader_an_owner(book: OriginLeases, time: Time) -> None:
    book.ask("a", "k", SIZE, 0)
    time.now += 9
    assert book.progress("a", "k", 40) == TTL
    time.now += 9
    assert book.ask("b", "k", SIZE, 10) == Elsewhere(("a",), 40, False, TTL)
    assert book.ask("b", "k", SIZE, 40) == Elsewhere(("a",), SIZE, True, 1.0)
    assert book.progress("a", "k", SIZE) == 0.0
    assert book.holder("k", 99) == ""
    assert book.granted_bytes == SIZE


def test_an_unrenewed_lease_passes_on(book: OriginLeases, time: Time) -> None:
    book.ask("a", "k", SIZE, 0)
    book.progress("a", "k", 30)
    time.now += TTL
    assert book.ask("b", "k", SIZE, 30) == Granted(30, SIZE, TTL)
    assert book.progress("a", "k", 50) == 0.0
    assert book.holder("k", 40) == "b"


def test_a_late_holder_goes_on_when_nobody_asked(book: OriginLeases, time: Time) -> None:
    book.ask("a", "k", SIZE, 0)
    time.now += 3 * TTL
    assert book.progress("a", "k", 30) == TTL
    assert book.holder("k", 30) == "a"


def test_what_only_a_dead_node_had_is_read_again(book: OriginLeases) -> None:
    book.ask("a", "k", SIZE, 0)
    book.progress("a", "k", 60)
    book.has("b", "k", SIZE, 0, 20)
    book.node_died("a")
    assert book.ask("c", "k", SIZE, 0) == Elsewhere(("b",), 20, False, TTL)
    assert book.ask("c", "k", SIZE, 20) == Granted(20, SIZE, TTL)


def test_a_lease_stops_where_others_can_help(book: OriginLeases) -> None:
    book.has("a", "k", SIZE, 50, 60)
    assert book.ask("b", "k", SIZE, 0) == Granted(0, 50, TTL)
    assert book.ask("b", "k", SIZE, 50) == Elsewhere(("a",), 60, False, TTL)
    assert book.ask("b", "k", SIZE, 60, 70) == Granted(60, 70, TTL)


def test_who_cannot_reach_the_owner_reads_again(book: OriginLeases) -> None:
    book.has("a", "k", SIZE)
    assert book.ask("b", "k", SIZE, 0, failed=("a",)) == Granted(0, SIZE, TTL)
    # What is still being read is waited for, whoever cannot be reached.
    assert isinstance(book.ask("c", "k", SIZE, 0, failed=("a", "b")), Elsewhere)


def test_wrong_bytes_are_free_again(book: OriginLeases) -> None:
    book.has("a", "k", SIZE)
    book.lost("a", "k")
    book.lost("a", "never heard of")
    assert book.ask("b", "k", SIZE, 0) == Granted(0, SIZE, TTL)


def test_released_bytes_are_free(book: OriginLeases) -> None:
    book.ask("a", "k", SIZE, 0)
    book.progress("a", "k", 10)
    book.release("a", "k")
    book.release("a", "never heard of")
    assert book.ask("b", "k", SIZE, 10) == Granted(10, SIZE, TTL)
    assert book.ask("b", "k", SIZE, 0) == Elsewhere(("a",), 10, False, TTL)


def test_the_rest_of_a_slow_holder_passes_on_when_it_says_how_far_it_is(
    book: OriginLeases, time: Time
) -> None:
    book.ask("a", "k", SIZE, 0)
    book.progress("a", "k", 20)
    # The asker lags behind: it can have the next bytes from the holder, and inherits the rest.
    assert book.ask("b", "k", SIZE, 10, slow=("a",)) == Elsewhere(("a",), 20, False, TTL)
    assert book.holder("k", 20) == "a"
    assert book.progress("a", "k", 30) == 0.0
    assert book.holder("k", 29) == ""
    assert book.holder("k", 30) == "b"
    assert book.ask("b", "k", SIZE, 30) == Granted(30, SIZE, TTL)
    # Once only: the slow one does not get it back for a complaint of its own.
    book.ask("a", "k", SIZE, 30, slow=("b",))
    assert book.progress("b", "k", 40) == TTL
    assert book.granted_bytes == SIZE


def test_an_heir_does_not_wait_for_the_slow_holder(book: OriginLeases) -> None:
    book.ask("a", "k", SIZE, 0)
    book.progress("a", "k", 20)
    book.ask("b", "k", SIZE, 10, slow=("a",))
    book.progress("a", "k", 30)
    assert book.ask("c", "k", SIZE, 10, slow=("a",)) == Elsewhere(("a",), 30, False, TTL)
    assert book.ask("b", "k", SIZE, 10, slow=("a",)) == Granted(10, SIZE, TTL)
    assert book.granted_bytes == SIZE + 20


def test_a_dead_heir_inherits_nothing(book: OriginLeases) -> None:
    book.ask("a", "k", SIZE, 0)
    book.ask("b", "k", SIZE, 0, slow=("a",))
    book.node_died("b")
    assert book.progress("a", "k", 30) == TTL
    assert book.holder("k", 30) == "a"


def test_after_a_restart_leases_are_declared_before_any_is_granted(time: Time) -> None:
    book = OriginLeases(time, ttl_seconds=TTL, restarted=True)
    assert book.ask("b", "k", SIZE, 60) == Later(TTL)
    assert book.declare("a", "k", SIZE, 30, SIZE) == TTL
    assert book.declare("b", "k", SIZE, 50, SIZE) == 0.0
    book.has("a", "k", SIZE, 0, 30)
    assert book.ask("b", "k", SIZE, 60) == Elsewhere(("a",), SIZE, True, TTL)
    assert book.ask("b", "k", SIZE, 0) == Elsewhere(("a",), 30, False, TTL)
    assert book.progress("a", "k", 50) == TTL
    time.now += TTL
    assert book.declare("c", "k", SIZE, 50, SIZE) == 0.0
    assert book.ask("b", "k", SIZE, 50) == Granted(50, SIZE, TTL)


@pytest.mark.parametrize(
    ("size", "start", "end"),
    [
        pytest.param(SIZE, SIZE, None, id="nothing left"),
        pytest.param(SIZE, 5, 5, id="empty"),
        pytest.param(SIZE, -1, 5, id="negative"),
        pytest.param(SIZE + 1, 0, 5, id="another size"),
    ],
)
def test_nonsense_is_refused(book: OriginLeases, size: int, start: int, end: int | None) -> None:
    book.ask("a", "k", SIZE, 0)
    with pytest.raises(UsageError):
        book.ask("b", "k", size, start, end)


class Readers(RuleBasedStateMachine):
    """Nodes that read, stall, die and return; what they believe is compared with the book."""

    def __init__(self) -> None:
        super().__init__()
        self.time = Time()
        self.book = OriginLeases(self.time, ttl_seconds=TTL)
        self.lease: dict[str, tuple[int, int, float]] = {}
        self.have: dict[str, int] = dict.fromkeys(NODES, 0)

    @rule(node=st.sampled_from(NODES), slow=st.sets(st.sampled_from(NODES)))
    def ask(self, node: str, slow: set[str]) -> None:
        position = self.have[node]
        if position == SIZE:
            return
        answer = self.book.ask(node, "k", SIZE, position, slow=slow - {node})
        if isinstance(answer, Granted):
            assert answer.start == position < answer.end
            self.lease[node] = (answer.start, answer.end, self.time.now + answer.seconds)
        else:
            assert isinstance(answer, Elsewhere)
            assert node not in answer.nodes
            if not answer.reading:
                # Whoever is named has the bytes: it had them before it died at the latest.
                assert all(self.have[owner] >= answer.end for owner in answer.nodes)
                self.have[node] = answer.end

    @rule(node=st.sampled_from(NODES), count=st.integers(1, 40))
    def read(self, node: str, count: int) -> None:
        if node not in self.lease:
            return
        _, end, until = self.lease[node]
        if self.time.now >= until:
            del self.lease[node]  # a holder stops by its own clock
            return
        self.have[node] = min(end, self.have[node] + count)
        seconds = self.book.progress(node, "k", self.have[node])
        if seconds:
            self.lease[node] = (self.have[node], end, self.time.now + seconds)
        else:
            del self.lease[node]

    @rule(node=st.sampled_from(NODES))
    def die(self, node: str) -> None:
        self.book.node_died(node)
        self.lease.pop(node, None)
        self.have[node] = 0

    @rule(node=st.sampled_from(NODES))
    def give_back(self, node: str) -> None:
        self.book.release(node, "k")
        self.lease.pop(node, None)

    @rule(seconds=st.floats(0.1, 8))
    def wait(self, seconds: float) -> None:
        self.time.now += seconds

    @invariant()
    def no_byte_is_read_twice_at_once(self) -> None:
        live = sorted(
            (start, end, node)
            for node, (start, end, until) in self.lease.items()
            if until > self.time.now and start < end
        )
        for (_, end, _), (start, _, _) in itertools.pairwise(live):
            assert end <= start
        for start, end, node in live:
            assert {self.book.holder("k", at) for at in (start, end - 1)} == {node}

    def teardown(self) -> None:
        # Whatever happened: one node that keeps asking gets all, in bounded time.
        for _ in range(50):
            if self.have["a"] == SIZE:
                break
            self.ask("a", set())
            self.read("a", SIZE)
            self.time.now += 5
        assert self.have["a"] == SIZE


TestReaders = Readers.TestCase
TestReaders.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def is_later(answer: float | Later) -> bool:
    return isinstance(answer, Later) and answer.seconds > 0


def test_permits_are_limited_and_served_in_order(time: Time) -> None:
    permits = RegistryPermits(time, 2, ttl_seconds=TTL)
    assert permits.ask("a", "1") == permits.ask("b", "1") == TTL
    assert is_later(permits.ask("c", "1"))
    assert is_later(permits.ask("d", "1"))
    permits.give_back("a", "1")
    assert is_later(permits.ask("d", "1"))  # c came first
    assert permits.ask("c", "1") == TTL
    assert permits.ask("b", "1") == TTL  # a renewal
    assert permits.used == 2


def test_who_is_next_in_a_line_that_moves_asks_again_soon(time: Time) -> None:
    """Where permits last milliseconds, no fixed pause may be what a blob costs."""
    permits = RegistryPermits(time, 1, ttl_seconds=TTL)

    def pause(node: str) -> float:
        answer = permits.ask(node, "1")
        assert isinstance(answer, Later)
        return answer.seconds

    permits.ask("a", "1")
    waits = [pause(node) for node in "bcdefghijklmnopqrst"]
    assert waits == sorted(waits)
    assert waits[0] < 0.05 < waits[5] < waits[-1] <= 1.0
    time.now += 0.01
    permits.give_back("a", "1")
    assert permits.ask("b", "1") == TTL
    assert pause("c") == waits[0], "it has moved up"
    # One that lasts is waited for without many questions: none later than by a fraction of it.
    for _ in range(20):
        time.now += 0.4
        permits.ask("b", "1")
        assert pause("c") <= 1.0
    assert pause("c") > 10 * waits[0]
    permits.give_back("b", "1")
    permits.give_back("c", "1")
    assert permits.ask("d", "1") == TTL
    assert pause("e") == waits[0]


def test_permits_end_with_their_time_and_their_node(time: Time) -> None:
    permits = RegistryPermits(time, 1, ttl_seconds=TTL)
    permits.ask("a", "1")
    assert is_later(permits.ask("b", "1"))
    time.now += TTL
    # b did not ask again, so it has lost its place too.
    assert permits.ask("c", "1") == TTL
    assert is_later(permits.ask("b", "1"))
    permits.node_died("c")
    assert permits.ask("b", "1") == TTL


def test_a_dead_node_does_not_block_the_line(time: Time) -> None:
    permits = RegistryPermits(time, 1, ttl_seconds=TTL)
    permits.ask("a", "1")
    permits.ask("b", "1")
    permits.ask("c", "1")
    permits.node_died("b")
    permits.give_back("a", "1")
    assert permits.ask("c", "1") == TTL


def test_too_many_requests_stop_new_permits_for_everybody(time: Time) -> None:
    permits = RegistryPermits(time, 4, ttl_seconds=TTL)
    assert permits.ask("a", "1") == TTL
    permits.pause(5)
    permits.pause(1)
    assert is_later(permits.ask("b", "1"))
    assert permits.ask("a", "1") == TTL
    time.now += 5
    assert permits.ask("b", "1") == TTL


def test_permits_are_declared_again_after_a_restart(time: Time) -> None:
    permits = RegistryPermits(time, 1, ttl_seconds=TTL, restarted=True)
    assert is_later(permits.ask("c", "1"))
    assert permits.declare("a", "1") == permits.declare("b", "1") == TTL
    time.now += 9
    assert permits.ask("a", "1") == TTL
    time.now += 2
    assert permits.used == 1
    assert is_later(permits.declare("b", "1"))


def test_a_limit_of_none_is_refused(time: Time) -> None:
    with pytest.raises(UsageError, match="origin_connections"):
        RegistryPermits(time, 0)
