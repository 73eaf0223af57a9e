"""What the rows of a pre-warm run say of bytes, whatever becomes of the pulls that brought them."""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from hypothesis import given
from hypothesis import strategies as st

from stowray.actors.prewarm_state import RunState
from stowray.actors.ways import Ways

if TYPE_CHECKING:
    from stowray.pipeline.prewarm_rows import BlobSpan

ORIGIN = "registry.example"


def way(key: str, received: int, *, ended: float = 0.0) -> dict[str, Any]:
    return {
        "kind": "fetch",
        "key": key,
        "digest": "sha256:0",
        "size": 100,
        "seconds": 1.0,
        "started": 5.0,
        "first_byte": 6.0,
        "ended": ended,
        "by_source": {ORIGIN: received},
        "remarks": [],
    }


def begun() -> RunState:
    state = RunState("run", "prewarm", 1.0, started=1.0)
    state.update_node("n")
    return state


def span_of(state: RunState) -> BlobSpan:
    (span,) = state.report().spans
    return span


def test_how_long_a_run_takes_does_not_depend_on_the_clock_of_the_wall() -> None:
    """Set by an hour, whichever way, it neither ends a run with a deadline nor lets it go on."""
    for step in (-3600.0, 3600.0):
        assert 0.0 <= RunState("run", "prewarm", 1.0, started=time.time() + step).seconds < 1800.0


def test_a_pull_of_which_nothing_more_is_heard_counts_with_what_it_said_last() -> None:
    state = begun()
    state.note_ways("n", "a", [way("a/1", 10)], 0.0, is_over=False)
    state.note_ways("n", "a", [way("a/1", 30)], 0.0, is_over=False)
    assert state.report().origin_bytes == 30
    # Its node was started anew and brings the rest.
    state.note_ways("n", "b", [way("b/1", 70, ended=9.0)], 0.0, is_over=True)
    assert state.report().origin_bytes == 100
    span = span_of(state)
    assert (span.started, span.first_byte, span.completed) == (4.0, 5.0, 8.0)


def test_a_blob_that_did_not_come_whole_is_not_complete() -> None:
    state = begun()
    state.note_ways("n", "a", [way("a/1", 30)], 0.0, is_over=True)
    assert (span_of(state).completed, span_of(state).by_source) == (None, {ORIGIN: 30})
    # One that was complete stays so when it is asked for again in vain.
    state.note_ways("n", "b", [way("b/1", 70, ended=9.0)], 0.0, is_over=True)
    state.note_ways("n", "c", [way("c/1", 5)], 0.0, is_over=True)
    assert span_of(state).completed == 8.0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(0, 50))))
def test_each_pull_counts_once_by_its_first_last_word(words: list[tuple[str, bool, int]]) -> None:
    state = begun()
    expected: dict[str, int] = {}
    over: set[str] = set()
    for run, is_over, received in words:
        state.note_ways("n", run, [way(f"{run}/1", received)], 0.0, is_over=is_over)
        if run not in over:
            expected[run] = received
        if is_over:
            over.add(run)
    assert state.report().origin_bytes == sum(expected.values())


def test_what_a_task_said_in_the_end_is_not_replaced_by_what_is_heard_late() -> None:
    ways = Ways()
    ways.note(way("1", 10))
    ways.note(way("2", 20))
    ways.end("1", way("1", 40, ended=9.0))
    ways.note(way("1", 30))
    assert {entry["key"]: entry["by_source"][ORIGIN] for entry in ways.all()} == {"1": 40, "2": 20}
