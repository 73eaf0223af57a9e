from __future__ import annotations

import threading
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from stowray.pipeline.progress import FINAL, Event, Progress


def test_a_late_watcher_first_gets_the_present_state() -> None:
    progress = Progress(node="n1")
    report = progress.reporter("a:1")
    report("blob", "sha256:x", "downloading", 5, 10)
    frames: list[list[Event]] = []
    progress.watch(lambda events: frames.append(list(events)))
    assert [(event.id, event.current, event.node) for event in frames[0]] == [("sha256:x", 5, "n1")]
    report("blob", "sha256:x", "done", 10, 10)
    progress.close()
    assert frames[-1][-1].status == "done"
    assert frames[-1][-1].completed > 0


def test_a_broken_watcher_is_dropped_and_the_others_go_on() -> None:
    progress = Progress()
    seen: list[str] = []

    def broken(_events) -> None:
        raise ValueError("display is gone")

    progress.watch(broken)
    progress.watch(lambda events: seen.extend(event.status for event in events))
    progress.record("a", "blob", "x", "waiting")
    progress.flush()
    progress.record("a", "blob", "x", "done", 1, 1)
    progress.close()
    assert seen == ["waiting", "done"]


def test_frames_are_merged_between_ticks() -> None:
    progress = Progress()
    frames: list[int] = []
    slow = threading.Event()
    progress.watch(lambda events: (frames.append(len(events)), slow.wait(0.02)))
    for current in range(2000):
        progress.record("a", "blob", "x", "downloading", current, 2000)
    progress.record("a", "blob", "x", "done", 2000, 2000)
    progress.close()
    # 2000 reports may not become 2000 frames: each frame holds the latest state of each ID.
    assert len(frames) < 100
    assert set(frames) == {1}


def test_the_same_blob_on_two_nodes_is_two_things() -> None:
    progress = Progress(node="driver")
    for node, current in (("a", 3), ("b", 1)):
        progress.merge(Event(1.0, "r", node, "x", "blob", "downloading", current, 4, started=1.0))
    progress.fail_open("r", "cut off")
    progress.merge(Event(2.0, "r", "a", "x", "blob", "downloading", 4, 4, started=1.0))
    states = {event.node: (event.status, event.current) for event in progress.events()}
    assert states == {"a": ("failed", 3), "b": ("failed", 1)}


def test_open_ids_end_as_failed() -> None:
    progress = Progress()
    progress.record("a", "blob", "x", "downloading", 1, 2)
    progress.record("a", "blob", "y", "done", 2, 2)
    progress.record("b", "blob", "z", "downloading", 1, 2)
    progress.fail_open("a", "cut off")
    states = {event.id: (event.status, event.error) for event in progress.events()}
    assert states == {"x": ("failed", "cut off"), "y": ("done", ""), "z": ("downloading", "")}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["x", "y"]),
            st.sampled_from(["waiting", "downloading", "retrying", "done", "failed"]),
            st.integers(0, 100),
        ),
        max_size=30,
    )
)
def test_current_never_falls_and_a_final_status_stays(reports) -> None:
    progress = Progress()
    last: dict[str, int] = {}
    final: set[str] = set()
    for id, status, current in reports:
        progress.record("a", "blob", id, status, current, 100)
        event = {event.id: event for event in progress.events()}[id]
        assert event.current >= last.get(id, 0)
        if id in final:
            assert event.status in FINAL
        if status in FINAL:
            final.add(id)
        last[id] = event.current


def test_an_event_survives_its_dictionary() -> None:
    event = Event(1.5, "a:1", "n", "sha256:x", "blob", "done", 3, 3, 1.0, 1.5)
    assert Event.from_dict(event.to_dict()) == event
    told = replace(event, begun=1.25, retries=2)
    assert Event.from_dict(told.to_wire()) == told


def test_an_event_line_holds_what_the_contract_names() -> None:
    line = Event(1.5, "a:1", "n", "sha256:x", "blob", "done", 3, 3, 1.0, 1.5).to_dict()
    named = "time reference node id kind status current total started completed error"
    assert list(line) == named.split()


def test_retries_are_counted_when_it_is_asked_for_again() -> None:
    near, far = Progress(node="n"), Progress(node="n")
    for status in ("downloading", "retrying", "downloading", "retrying", "retrying", "downloading"):
        near.record("r", "blob", "x", status)
    assert near.events()[0].retries == 2
    for event in near.events():
        far.merge(Event.from_dict(event.to_wire()))
    near.record("r", "blob", "x", "retrying")
    near.record("r", "blob", "x", "failed")
    assert near.events()[0].retries == 2, "given up is not asked for again"
    # A frame that was overtaken takes nothing back.
    (known,) = far.events()
    far.merge(replace(known, retries=1, begun=0.0))
    assert far.events()[0].retries == 2
    assert far.events()[0].begun == known.begun > 0
