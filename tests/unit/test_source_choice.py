from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowray.pipeline.fates import ABANDONED, GROWING, PROVEN, WRONG
from stowray.pipeline.source_actions import (
    ORIGIN,
    Action,
    AskLease,
    Fetch,
    GiveUp,
    Patience,
    Pause,
    Probe,
)
from stowray.pipeline.source_blame import Hop, find_liar
from stowray.pipeline.source_choice import SourceChoice
from stowray.pipeline.source_standing import Pace, Standing

PATIENCE = Patience(least_rate=10.0, margin=0)
RATE = 100.0
SIZE = 10_000


def choice(*sources: str, standing: Standing | None = None, size: int = SIZE) -> SourceChoice:
    return SourceChoice(sources, size, standing or Standing(), PATIENCE)


def flow(one: SourceChoice, start: float, seconds: int, rate: float) -> Action | None:
    """Let bytes come evenly, with a tick each second, until something is to be done."""
    for second in range(1, seconds + 1):
        action = one.received(int(rate), start + second)
        action = action or one.tick(start + second, RATE)
        if action is not None:
            return action
    return None


def test_the_parent_first_and_on_to_the_end() -> None:
    one = choice("parent", "sibling")
    assert one.begin(0.0) == Fetch("parent", 0)
    assert flow(one, 0.0, 100, RATE) is None
    assert one.done
    assert not one.reports
    assert one.tick(500.0, RATE) is None


@pytest.mark.parametrize("event", ["failed", "silent"])
def test_a_dead_parent_is_replaced_at_the_same_byte(event: str) -> None:
    one = choice("parent", "sibling")
    one.begin(0.0)
    one.received(123, 0.5)
    if event == "failed":
        action: Action | None = one.failed(1.0, "connection reset")
    else:
        assert one.tick(1.4, RATE) is None
        assert one.tick(1.5, RATE) == Probe("parent")
        assert one.tick(2.4, RATE) is None
        action = one.tick(2.5, RATE)
    assert action == Fetch("sibling", 123)
    assert [(report.source, report.kind) for report in one.reports] == [("parent", "failed")]


def test_a_source_that_has_more_than_it_sends_is_slow() -> None:
    one = choice("parent", "sibling")
    one.begin(0.0)
    assert flow(one, 0.0, 5, RATE / 5) == Probe("parent")
    position = one.position
    assert one.told(2.1, position + 1, "grandparent") == Fetch("sibling", position)
    assert one.reports[-1].kind == "slow"


def test_a_source_that_receives_slowly_itself_is_slow() -> None:
    one = choice("parent", "sibling")
    one.begin(0.0)
    flow(one, 0.0, 5, RATE / 5)
    position = one.position
    assert one.told(2.1, position, "grandparent") == Probe("grandparent")
    assert one.told(2.2, position + 1, "root") == Fetch("sibling", position)
    assert [(report.source, report.kind) for report in one.reports] == [("parent", "slow")]


def test_only_the_children_of_a_slow_node_leave_it() -> None:
    one = choice("parent", "sibling")
    one.begin(0.0)
    flow(one, 0.0, 5, RATE / 5)
    position = one.position
    assert one.told(2.1, position, "grandparent") == Probe("grandparent")
    assert one.told(2.2, position, "root") == Probe("root")
    # The grandparent is the slow one, and it is for the parent to leave it.
    assert one.told(2.3, position + 1, ORIGIN) is None
    assert one.source == "parent"
    assert one.is_starved


def test_a_dead_node_further_up_is_for_its_own_children_to_notice() -> None:
    one = choice("parent", "sibling")
    one.begin(0.0)
    assert one.tick(1.0, RATE) == Probe("parent")
    assert one.told(1.1, 0, "grandparent") == Probe("grandparent")
    assert one.tick(2.2, RATE) is None
    assert one.source == "parent"
    assert not one.reports


@pytest.mark.parametrize("bytes_come", [False, True])
def test_a_dead_node_further_up_is_not_the_next_to_be_tried(bytes_come: bool) -> None:
    one = choice("parent", "grandparent", "other")
    one.begin(0.0)
    assert one.tick(1.0, RATE) == Probe("parent")
    assert one.told(1.1, 0, "grandparent") == Probe("grandparent")
    if bytes_come:  # the parent has another source by now
        assert one.received(10, 1.9) is None
    else:
        assert one.tick(2.2, RATE) is None
    assert one.failed(2.5, "gone") == Fetch("other", one.position)


def test_a_node_that_is_asked_and_bytes_come_at_once_is_not_suspected() -> None:
    one = choice("parent", "grandparent", "other")
    one.begin(0.0)
    one.tick(1.0, RATE)
    one.told(1.1, 0, "grandparent")
    assert one.received(10, 1.15) is None  # before any answer can be here
    assert one.failed(2.5, "gone") == Fetch("grandparent", 10)


def test_how_long_a_source_had_none_itself_says_nothing_of_its_rate() -> None:
    one = choice("parent", "sibling")
    one.begin(0.0)
    assert one.tick(1.0, RATE) == Probe("parent")
    assert one.told(1.1, 0, "grandparent") == Probe("grandparent")
    # The grandparent is dead; the parent finds another source at 2.9.
    assert one.received(int(RATE), 2.9) is None
    assert one.tick(3.0, RATE) is None
    assert one.received(int(RATE), 3.9) is None
    assert one.tick(4.0, RATE) is None
    assert flow(one, 4.0, 20, RATE) is None
    assert one.source == "parent"


def at_the_verdict(pace: float) -> tuple[SourceChoice, Action | None]:
    """Ask a source that is at `pace` otherwise, and whose own source has more than it."""
    one = choice("parent", "grandparent", "other")
    one.begin(0.0)
    flow(one, 0.0, 5, RATE / 5)
    assert one.told(2.1, one.position, "grandparent", pace=pace) == Probe("grandparent")
    return one, one.told(2.2, one.position + 1, "root", pace=RATE)


def test_a_source_that_is_quick_otherwise_is_waited_for_to_leave_its_slow_one() -> None:
    one, action = at_the_verdict(RATE)
    assert action is None
    assert one.is_starved
    # And who is slow further up is no better than it.
    assert one.failed(2.5, "gone") == Fetch("other", one.position)


def test_a_source_that_is_slow_with_everybody_is_left() -> None:
    one, action = at_the_verdict(RATE / 5)
    assert action == Fetch("grandparent", one.position)
    assert [(report.source, report.kind) for report in one.reports] == [("parent", "slow")]


def test_a_slow_source_that_blames_nobody_is_left_however_far_up_the_bytes_are() -> None:
    one = choice("parent", "other")
    one.begin(0.0)
    flow(one, 0.0, 5, RATE / 5)
    position = one.position
    assert one.told(2.1, position, "grandparent", pace=RATE / 5) == Probe("grandparent")
    assert one.told(2.2, position, "root", pace=RATE / 5) == Probe("root")
    assert one.told(2.3, position + 1, ORIGIN, pace=RATE) == Fetch("other", position)


def test_a_source_that_gives_enough_in_bursts_is_kept() -> None:
    one = choice("parent", "sibling")
    one.begin(0.0)
    for second in range(1, 60):
        if second % 3 == 0:
            assert one.received(int(3 * RATE), second) is None
        action = one.tick(second, RATE)
        while isinstance(action, Probe):
            upstream = {"parent": "grandparent", "grandparent": None}[action.source]
            action = one.told(second, one.position, upstream)
        assert action is None
    assert one.source == "parent"


def test_nodes_that_wait_for_each_other_are_not_asked_for_ever() -> None:
    one = choice("parent")
    one.begin(0.0)
    action: Action | None = one.tick(1.0, RATE)
    asked = 0
    while isinstance(action, Probe):
        asked += 1
        assert asked < 100
        action = one.told(1.0, 0, "other" if action.source == "parent" else "parent")
    assert action is None
    assert one.is_starved


def test_a_root_that_gets_nothing_from_the_origin_is_not_slow_at_once() -> None:
    one = choice("root")
    one.begin(0.0)
    now = 0.0
    action: Action | None = None
    while not isinstance(action, AskLease):
        now += 1.0
        assert now < 30
        action = one.tick(now, RATE)
        if isinstance(action, Probe):
            action = one.told(now, 0, ORIGIN)
    # A root that is stuck for good keeps its lease alive: it has to be complained of in the end.
    assert now >= PATIENCE.starved
    assert action == AskLease(0, slow=("root",))


def test_a_root_that_gets_little_is_complained_of() -> None:
    one = SourceChoice(["root"], SIZE, Standing(), Patience(margin=1000))
    one.begin(0.0)
    assert one.tick(1.0, RATE) == Probe("root")
    assert one.told(1.1, 5, ORIGIN) is None
    assert one.tick(2.2, RATE) == Probe("root")
    assert one.told(2.3, 6, ORIGIN) == AskLease(0, slow=("root",))


def test_a_source_that_is_behind_is_left_at_once() -> None:
    one = choice("parent", "sibling", "other")
    one.begin(0.0)
    one.received(100, 0.5)
    assert one.failed(0.6, "gone") == Fetch("sibling", 100)
    assert one.started(0.7, 99) == Fetch("other", 100)
    assert one.started(0.8, 100) is None
    # Being behind is no fault that would make anybody read from the origin again.
    assert one.failed(0.9, "gone") == AskLease(100, failed=("parent", "other"))


def test_a_source_that_waits_is_kept_for_a_while() -> None:
    one = choice("parent", "sibling")
    one.begin(0.0)
    assert one.tick(1.0, RATE) == Probe("parent")
    assert one.told(1.1, 0, None) is None
    assert one.is_starved
    assert one.tick(2.0, RATE) is None
    assert one.tick(2.2, RATE) == Probe("parent")
    assert one.told(2.3, 0, None) is None
    assert one.tick(1.0 + PATIENCE.starved, RATE) == Probe("parent")
    one.told(1.1 + PATIENCE.starved, 0, None)
    assert one.tick(1.2 + PATIENCE.starved, RATE) == Fetch("sibling", 0)
    assert one.reports[-1].kind == "starved"


def test_a_source_that_recovers_is_kept() -> None:
    one = choice("parent", "sibling")
    one.begin(0.0)
    one.tick(1.0, RATE)
    one.told(1.1, 0, None)
    assert flow(one, 1.1, 40, RATE) is None
    assert one.source == "parent"
    assert not one.is_starved


def test_a_trickle_does_not_keep_a_waiting_source_for_ever() -> None:
    one = choice("parent", "sibling")
    now = 0.0
    action: Action | None = one.begin(now)
    while not isinstance(action, Fetch) or action.source == "parent":
        now += 1.0
        assert now < 30
        action = one.received(1, now) or one.tick(now, RATE)
        if isinstance(action, Probe):
            action = one.told(now, one.position, None)
    assert action == Fetch("sibling", one.position)


def test_bytes_answer_a_probe_too() -> None:
    one = choice("parent")
    one.begin(0.0)
    one.tick(1.0, RATE)
    one.received(5, 1.5)
    assert one.told(1.6, 99, "other") is None
    assert one.tick(1.9, RATE) is None


def test_a_node_with_a_slow_link_blames_nobody() -> None:
    pace = Pace()
    expected = pace.observe([RATE / 5, RATE / 5, RATE / 5.1])
    one = SourceChoice(["parent"], SIZE, Standing(), Patience(least_rate=1.0))
    one.begin(0.0)
    for second in range(1, 30):
        assert one.received(int(RATE / 5), second) is None
        assert one.tick(second, expected) is None
    assert not one.reports


def test_the_pace_fades_slowly_when_few_streams_are_left() -> None:
    pace = Pace()
    assert pace.observe([1.0, 100.0, 90.0, 2000.0]) == 100.0
    assert 90.0 < pace.observe([3.0]) < 100.0
    # Nor do many streams that are slow at once look usual.
    assert pace.observe([3.0, 3.0, 3.0]) > 80.0


def test_who_is_done_waits_for_nobody() -> None:
    one = choice("parent", size=10)
    assert one.is_starved
    one.begin(0.0)
    assert not one.is_starved
    one.received(10, 1.0)
    assert not one.is_starved


def test_a_root_reads_from_the_origin_up_to_the_end_of_its_lease() -> None:
    one = choice()
    assert one.begin(0.0) == AskLease(0)
    assert one.tick(5.0, RATE) is None  # the answer is awaited
    assert one.granted(5.0, 4000) == Fetch(ORIGIN, 0)
    assert one.received(3999, 6.0) is None
    assert one.tick(99.0, RATE) is None  # the registry client has its own patience
    assert one.received(1, 99.0) == AskLease(4000)
    assert one.later(99.0, 3.0) == Pause(102.0)
    assert one.tick(101.0, RATE) is None
    assert one.tick(102.0, RATE) == AskLease(4000)
    assert one.granted(102.0, SIZE) == Fetch(ORIGIN, 4000)
    assert one.received(SIZE - 4000, 103.0) is None
    assert one.done


def test_the_children_of_a_dead_root_do_not_all_go_to_the_origin() -> None:
    first, second = choice("root"), choice("root", "first")
    first.begin(0.0)
    second.begin(0.0)
    assert first.failed(1.0, "gone") == AskLease(0, failed=("root",))
    assert second.failed(1.0, "gone") == Fetch("first", 0)
    # The root's lease has not run out yet.
    assert first.elsewhere(1.0, ["root"], SIZE, 2.0, reading=True) == Pause(3.0)
    assert first.tick(3.0, RATE) == AskLease(0, failed=("root",))
    assert first.granted(3.0, SIZE) == Fetch(ORIGIN, 0)


def test_bytes_that_a_slow_node_has_are_taken_from_it_and_no_more() -> None:
    one = choice("root")
    one.begin(0.0)
    flow(one, 0.0, 5, RATE / 5)
    position = one.position
    assert one.told(2.5, position, ORIGIN) == AskLease(position, slow=("root",))
    assert one.elsewhere(3.0, ["root"], position + 50, 1.0, reading=False) == Fetch(
        "root", position
    )
    assert one.received(49, 4.0) is None
    assert one.received(1, 4.1) == AskLease(position + 50, slow=("root",))


def test_others_who_have_the_bytes_are_asked_before_the_origin() -> None:
    one = choice("parent")
    one.begin(0.0)
    one.failed(1.0, "gone")
    assert one.elsewhere(1.0, ["owner"], SIZE, 1.0, reading=False) == Fetch("owner", 0)
    assert one.failed(2.0, "refused") == AskLease(0, failed=("parent", "owner"))
    assert one.elsewhere(2.0, ["owner"], SIZE, 30.0, reading=False) == Pause(6.0)
    assert one.tick(6.0, RATE) == Fetch("parent", 0)  # it may have come back


def test_who_has_not_got_what_was_promised_for_long_is_said_to_have_failed() -> None:
    """Its fetch has ended for good and nobody said so: else the owner names it for ever."""
    one = choice()
    now = 0.0
    assert one.begin(now) == AskLease(0)
    while now < PATIENCE.deaf:
        assert one.elsewhere(now, ["reader"], SIZE, 1.0, reading=False) == Fetch("reader", 0)
        # It may be about to give the last byte.
        assert one.started(now, 0) == AskLease(0)
        now += PATIENCE.avoid + 1.0
    assert one.elsewhere(now, ["reader"], SIZE, 1.0, reading=False) == Fetch("reader", 0)
    assert one.started(now, 0) == AskLease(0, failed=("reader",))
    one.granted(now, SIZE)
    one.received(100, now)
    # Of another byte nothing is known.
    assert one.lease_lost(now) == AskLease(100)


def test_a_busy_source_is_no_reason_to_read_from_the_origin_again() -> None:
    one = choice("parent")
    one.begin(0.0)
    assert one.busy(1.0, 2.0) == AskLease(0)
    assert one.elsewhere(1.0, ["parent"], SIZE, 9.0, reading=True) == Pause(3.0)
    assert one.tick(3.0, RATE) == Fetch("parent", 0)


def test_a_busy_origin_is_waited_for() -> None:
    one = choice()
    one.begin(0.0)
    one.granted(0.0, SIZE)
    assert one.busy(1.0, 7.0) == Pause(8.0)
    assert one.tick(8.0, RATE) == AskLease(0)


def test_a_lost_lease_ends_reading() -> None:
    one = choice()
    one.begin(0.0)
    one.granted(0.0, SIZE)
    one.received(10, 1.0)
    assert one.lease_lost(1.0) == AskLease(10)
    assert one.elsewhere(1.0, ["heir"], SIZE, 1.0, reading=True) == Fetch("heir", 10)
    assert one.lease_lost(2.0) is None


def test_who_is_banned_is_never_asked_again() -> None:
    standing = Standing()
    one, other = choice("parent", "sibling", standing=standing), choice("parent", standing=standing)
    standing.ban("parent")
    assert one.begin(0.0) == Fetch("sibling", 0)
    assert other.begin(2.0) == AskLease(0, failed=("parent",))
    # No time makes it good again.
    assert standing.usable_from("parent") == float("inf")


def test_a_source_that_begins_anew_is_asked_again_at_once() -> None:
    one = choice("parent", "sibling")
    one.begin(0.0)
    one.received(100, 1.0)
    assert one.begun_anew(1.0) == Fetch("parent", 100)
    assert one.reports == []


def test_what_is_here_is_passed_over() -> None:
    one = choice("parent")
    one.begin(0.0)
    one.received(100, 1.0)
    assert one.skipped(900, 1.0) == Fetch("parent", 1000)
    # It says nothing of how fast the source is.
    assert one.taken == 100
    assert one.skipped(SIZE - 1000, 1.0) is None
    assert one.done


def test_the_origin_is_read_on_behind_what_is_here_as_far_as_the_lease_goes() -> None:
    one = choice()
    one.begin(0.0)
    one.granted(0.0, 1000)
    one.received(100, 1.0)
    assert one.skipped(100, 1.0) is None
    assert one.skipped(800, 1.0) == AskLease(1000)


def test_an_origin_that_fails_is_tried_a_few_times() -> None:
    one = choice()
    action = one.begin(0.0)
    now = 0.0
    attempts = 0
    while not isinstance(action, GiveUp):
        if isinstance(action, AskLease):
            attempts += 1
            one.granted(now, SIZE)
            action = one.failed(now, "503")
        else:
            assert isinstance(action, Pause)
            now = action.until
            after = one.tick(now, RATE)
            assert after is not None
            action = after
    assert attempts == PATIENCE.tries
    assert "origin" in action.reason


def test_strikes_lengthen_and_are_forgiven() -> None:
    standing = Standing(5.0)
    standing.strike("a", 0.0, failed=True)
    assert standing.usable_from("a") == 5.0
    standing.strike("a", 10.0)
    assert standing.usable_from("a") == 20.0
    assert standing.has_failed("a")
    assert standing.is_slow("a")
    standing.forgive("a")
    assert not standing.has_failed("a")
    assert not standing.is_slow("a")
    standing.strike("a", 30.0)
    assert standing.usable_from("a") == 35.0


def test_many_streams_that_find_out_the_same_at_once_are_one_lapse() -> None:
    standing = Standing(5.0)
    for _ in range(50):
        standing.strike("a", 1.0, failed=True)
        standing.silent("b", 1.0, 8.0)
    assert (standing.usable_from("a"), standing.usable_from("b")) == (6.0, 6.0)
    standing.strike("a", 6.0)
    assert standing.usable_from("a") == 16.0
    assert standing.strikes("a") > standing.strikes("c")


def test_who_is_silent_for_a_moment_is_not_said_to_have_failed() -> None:
    """Else what a busy node has would be read once more from the origin."""
    one = choice("parent")
    action = one.begin(0.0)
    now, asked = 0.0, []
    while not asked or not asked[-1].failed:
        while not isinstance(action, AskLease):
            now += 0.25
            action = one.tick(now, RATE)
        asked.append(action)
        # The owner of the leases says that this node has it.
        action = one.elsewhere(now, ("parent",), SIZE, 10.0, reading=False)
        assert isinstance(action, Fetch | Pause)
        assert now < 60.0
    assert len(asked) > 1
    assert now >= PATIENCE.deaf
    assert all(wish.slow == () for wish in asked)


@pytest.mark.parametrize("how", ["bytes", "an answer", "a head"])
def test_who_was_heard_meanwhile_is_silent_anew(how: str) -> None:
    standing = Standing(5.0)
    one = SourceChoice(["parent"], SIZE, standing, PATIENCE)
    one.begin(0.0)
    assert one.unheard(1.0) == AskLease(0)
    assert one.elsewhere(7.0, ("parent",), SIZE, 10.0, reading=True) == Fetch("parent", 0)
    if how == "bytes":
        one.received(10, 9.5)
    elif how == "a head":
        one.started(9.5, 0)
    else:
        assert one.tick(9.4, RATE) == Probe("parent")
        assert one.told(9.5, 0, ORIGIN) is None
    one.unheard(10.0)
    assert not standing.has_failed("parent")
    one.elsewhere(20.0, ("parent",), SIZE, 10.0, reading=True)
    one.unheard(20.0)
    assert standing.has_failed("parent")


def test_a_source_that_turned_this_stripe_away_is_asked_no_more() -> None:
    one = choice("parent", "sibling")
    one.begin(0.0)
    assert one.turned_away(1.0) == Fetch("sibling", 0)
    assert one.failed(2.0, "gone") == AskLease(0, ("sibling",))
    one.elsewhere(2.0, ("holder",), SIZE, 10.0, reading=True)
    assert one.turned_away(3.0) == AskLease(0, ("sibling",))
    assert [(report.source, report.kind) for report in one.reports] == [("sibling", "failed")]


@given(
    events=st.lists(
        st.tuples(
            st.sampled_from(["bytes", "failed", "busy", "tick", "told", "anew", "skip", "lost"]),
            st.integers(1, 400),
            st.booleans(),
        ),
        max_size=40,
    ),
    sources=st.lists(st.sampled_from("abcd"), unique=True, max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_whatever_happens_the_stripe_is_completed(
    events: list[tuple[str, int, bool]], sources: list[str]
) -> None:
    one = SourceChoice(sources, 2000, Standing(), Patience(tries=10**6))
    now = 0.0
    lease = 0

    def settle(action: Action | None) -> None:
        nonlocal lease
        while isinstance(action, AskLease):
            assert action.position == one.position
            lease = min(2000, one.position + 700)
            action = one.granted(now, lease)
        if isinstance(action, Fetch):
            assert action.position == one.position
            assert action.source == ORIGIN or not one._standing.is_banned(action.source)

    settle(one.begin(now))
    for kind, count, flag in events:
        now += count / 100
        if one.done:
            break
        if kind == "tick" or one.source is None:
            settle(one.tick(now, 100.0))
        elif kind == "bytes":
            end = lease if one.source == ORIGIN else 2000
            settle(one.received(min(count, end - one.position), now))
        elif kind == "failed":
            settle(one.failed(now, "broken"))
        elif kind == "busy":
            settle(one.busy(now, count / 100))
        elif kind == "told":
            settle(one.told(now, count, "x" if flag else None))
        elif kind == "anew":
            settle(one.begun_anew(now))
        elif kind == "skip":
            end = lease if one.source == ORIGIN else 2000
            settle(one.skipped(min(count, end - one.position), now))
        else:
            settle(one.lease_lost(now))
    for _ in range(3000):
        if one.done:
            break
        now += 1.0
        if one.source is None:
            settle(one.tick(now, 0.0))
        else:
            end = lease if one.source == ORIGIN else 2000
            settle(one.received(min(100, end - one.position), now))
    assert one.done


RIGHT, OTHER = b"right", b"other"


@pytest.mark.parametrize(
    ("hops", "liar"),
    [
        pytest.param([], None, id="nobody"),
        pytest.param([Hop(ORIGIN)], ORIGIN, id="from the origin"),
        pytest.param([Hop("parent", claimed=True)], "parent", id="said it was proven"),
        pytest.param([Hop("parent", fate=PROVEN)], "parent", id="had right ones"),
        pytest.param([Hop("parent", fate=GROWING, told=RIGHT)], "parent", id="has right ones"),
        pytest.param([Hop("parent", fate=GROWING)], None, id="does not say"),
        pytest.param([Hop("parent")], None, id="does not know any more"),
        pytest.param([Hop("parent", fate=WRONG)], None, id="passed on, from whom it does not say"),
        pytest.param(
            [Hop("parent", fate=WRONG), Hop("root", claimed=True)], "root", id="passed on"
        ),
        pytest.param(
            [Hop("parent", fate=ABANDONED), Hop(ORIGIN)], ORIGIN, id="passed on, and gave up"
        ),
        pytest.param(
            [Hop("parent", fate=GROWING, told=OTHER), Hop("root", fate=PROVEN)],
            "root",
            id="has the same wrong ones",
        ),
        pytest.param(
            [Hop("parent", fate=WRONG), Hop("middle"), Hop("root", claimed=True)],
            None,
            id="one between cannot say",
        ),
    ],
)
def test_the_first_hop_that_had_right_bytes_is_to_blame(hops: list[Hop], liar: str | None) -> None:
    assert find_liar(RIGHT, hops) == liar
