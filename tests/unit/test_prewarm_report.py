from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowray.pipeline import errors
from stowray.pipeline.errors import UsageError, describe
from stowray.pipeline.lock_file import Drift
from stowray.pipeline.prewarm_report import PrewarmReport, exit_code_of
from stowray.pipeline.prewarm_rows import (
    CELL_STATUSES,
    NODE_STATES,
    BlobSpan,
    Cell,
    CellStatus,
    Delivery,
    ImageRow,
    NodeRow,
    NodeState,
    Remark,
    WaveRow,
    count_ready,
    lost_cells,
    node_state,
    origin_and_peer_bytes,
)

NOT_FOUND = describe(errors.NotFoundError("a manifest", "registry"))
NODE = describe(errors.NodeError("n1", "left"))
STORAGE = describe(errors.StorageError("/store", "the disk is full"))

texts = st.text(max_size=8)
counts = st.integers(0, 2**50)
moments = st.none() | st.floats(0, 1e6)
failures = st.none() | st.sampled_from([NOT_FOUND, NODE, STORAGE])
nodes = st.builds(
    NodeRow,
    name=texts,
    node_id=texts,
    store=texts,
    state=st.sampled_from(NODE_STATES),
    error=failures,
    wave=st.integers(0, 5),
    disk_free=counts,
)
images = st.builds(
    ImageRow, texts, texts, st.dictionaries(texts, texts, max_size=2), counts, failures
)
cells = st.builds(
    Cell,
    texts,
    texts,
    st.sampled_from(CELL_STATUSES),
    texts,
    st.none() | st.fixed_dictionaries({"reference": texts, "layers": st.just([])}),
    failures,
    st.booleans(),
    st.floats(0, 1e6),
)
spans = st.builds(
    BlobSpan,
    texts,
    texts,
    counts,
    moments,
    moments,
    moments,
    moments,
    st.dictionaries(texts, counts, max_size=2),
)
waves = st.builds(
    WaveRow, st.integers(0, 5), st.lists(texts, max_size=2).map(tuple), counts, moments, moments
)


def several(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(strategy, max_size=3).map(tuple)


reports = st.builds(
    PrewarmReport,
    run=texts,
    command=st.sampled_from(["prewarm", "status"]),
    seconds=st.floats(0, 1e6),
    nodes=several(nodes),
    images=several(images),
    cells=several(cells),
    spans=several(spans),
    remarks=several(st.builds(Remark, texts, texts, texts, texts, counts, texts)),
    origin_bytes=counts,
    drift=several(st.builds(Drift, texts, texts, texts, texts)),
    deliveries=several(st.builds(Delivery, texts, texts, texts, failures)),
    waves=several(waves),
    warnings=several(texts),
    minimum_ready=st.floats(0, 1),
    interrupted=st.booleans(),
)


@given(reports)
def test_a_report_survives_json(report: PrewarmReport) -> None:
    assert PrewarmReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@given(reports)
def test_zero_is_said_only_when_nothing_is_missing(report: PrewarmReport) -> None:
    wrong = (
        (not report.is_tolerated and any(not cell.is_fine for cell in report.cells))
        or (not report.is_tolerated and any(entry.error for entry in report.deliveries))
        or report.interrupted
    )
    if wrong:
        assert report.exit_code != 0
    if report.exit_code == 0 and not report.is_tolerated:
        assert all("error" not in line for line in report.results())


def test_the_lists_name_each_state_and_status() -> None:
    assert get_args(NodeState) == NODE_STATES
    assert get_args(CellStatus) == CELL_STATUSES


@pytest.mark.parametrize(
    "data",
    [{}, {"format": 2}, {"format": 1, "cells": [{"status": "done"}]}, {"format": 1, "nodes": 3}],
    ids=["nothing", "later format", "a cell without a node", "no list"],
)
def test_what_is_no_report_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        PrewarmReport.from_dict(data)


def test_keys_of_a_later_version_are_passed_over() -> None:
    plain = PrewarmReport(cells=(Cell("a", "r"),)).to_dict()
    plain["cells"][0]["mood"] = "fine"
    plain["weather"] = "rain"
    assert PrewarmReport.from_dict(plain) == PrewarmReport(cells=(Cell("a", "r"),))


DONE = Cell("a", "r", "done", present=True)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        pytest.param([DONE], 0, id="all there"),
        pytest.param([DONE, Cell("b", "r", "skipped")], 0, id="not wanted on one node"),
        pytest.param([DONE, Cell("b", "r", "failed", error=NOT_FOUND)], 1, id="one failed"),
        pytest.param([Cell("a", "r", "failed", error=NOT_FOUND)], 3, id="all failed alike"),
        pytest.param(
            [Cell("a", "r", "failed", error=NOT_FOUND), Cell("b", "r", "failed", error=STORAGE)],
            1,
            id="all failed, each in its own way",
        ),
        pytest.param([Cell("a", "r", "missing")], 3, id="missing everywhere"),
        pytest.param([DONE, Cell("b", "r", "partial")], 1, id="partial somewhere"),
        pytest.param([DONE, Cell("b", "r", "skipped", error=NODE)], 1, id="a wave not begun"),
        pytest.param([Cell("a", "r", "done")], 1, id="done, but not verified"),
        pytest.param([Cell("a", "r", "working")], 1, id="not at its end"),
    ],
)
def test_the_exit_status_follows_from_the_cells(cells: list[Cell], expected: int) -> None:
    report = PrewarmReport(cells=tuple(cells))
    assert report.exit_code == expected
    assert replace(report, interrupted=True).exit_code == 130


def test_nodes_and_images_without_cells_count() -> None:
    dead = NodeRow("b", state="dead", error=NODE)
    assert PrewarmReport(nodes=(NodeRow("a"), dead), cells=(DONE,)).exit_code == 1
    assert PrewarmReport(nodes=(dead,)).exit_code == 6
    lost = ImageRow("r", error=NOT_FOUND)
    assert PrewarmReport(images=(lost,)).exit_code == 3
    other = replace(DONE, reference="s")
    assert PrewarmReport(images=(lost, ImageRow("s")), cells=(other,)).exit_code == 1
    refused = Delivery("a", "r", "podman", STORAGE)
    assert PrewarmReport(cells=(DONE,), deliveries=(refused,)).exit_code == 1


def test_results_are_in_the_order_of_the_plan_and_name_their_node() -> None:
    pulled = {"reference": "other spelling", "digest": "sha256:d", "layers": [], "node": "x"}
    report = PrewarmReport(
        nodes=(NodeRow("b"), NodeRow("a"), NodeRow("c", error=NODE)),
        images=(ImageRow("s", error=NOT_FOUND), ImageRow("r", resolved="sha256:i")),
        cells=(
            Cell("a", "r", "failed", error=STORAGE),
            Cell("b", "r", "done", result=pulled, present=True),
        ),
    )
    assert report.results() == [
        {"reference": "s", "node": None, "error": NOT_FOUND},
        {**pulled, "reference": "r", "node": "b", "status": "done", "present": True},
        {"reference": "r", "node": "a", "error": STORAGE},
        {"reference": "s", "node": "c", "error": NODE},
        {"reference": "r", "node": "c", "error": NODE},
    ]
    assert PrewarmReport(nodes=(NodeRow("c", error=NODE),)).results() == [
        {"reference": None, "node": "c", "error": NODE}
    ]


def test_status_says_what_is_there() -> None:
    report = PrewarmReport(
        command="status",
        nodes=(NodeRow("a"),),
        images=(ImageRow("r", resolved="sha256:i"),),
        cells=(Cell("a", "r", "missing", digest="sha256:d"),),
    )
    assert report.results() == [
        {
            "reference": "r",
            "node": "a",
            "digest": "sha256:d",
            "resolved": "sha256:i",
            "status": "missing",
            "present": False,
        }
    ]


def test_ready_nodes_go_by_any_spelling_of_the_reference() -> None:
    report = PrewarmReport(
        nodes=(NodeRow("a", node_id="1"), NodeRow("b", node_id="2")),
        cells=(
            Cell("a", "docker.io/library/debian:12", "done", present=True),
            Cell("b", "docker.io/library/debian:12", "done", present=False),
        ),
    )
    for spelling in ("debian:12", "docker.io/debian:12", "docker.io/library/debian:12"):
        assert [node.name for node in report.ready_nodes(spelling)] == ["a"]
    assert report.ready_nodes("debian:13") == ()


@pytest.mark.parametrize(
    ("states", "minimum", "enough"),
    [
        (("ready", "ready", "dead"), 1.0, False),
        (("ready", "ready", "dead"), 0.66, True),
        (("ready", "skipped"), 1.0, True),
        ((), 1.0, True),
    ],
)
def test_enough_counts_the_nodes_that_are_wanted(
    states: tuple[NodeState, ...], minimum: float, enough: bool
) -> None:
    rows = tuple(NodeRow(str(number), state=state) for number, state in enumerate(states))
    assert PrewarmReport(nodes=rows, minimum_ready=minimum).enough is enough
    left_out = NodeRow("later", state="skipped", error=NODE)
    assert not PrewarmReport(nodes=(*rows, left_out), minimum_ready=1.0).enough


@pytest.mark.parametrize(
    ("states", "minimum", "code"),
    [
        pytest.param(("ready", "ready", "dead"), 1.0, 1, id="all were asked for"),
        pytest.param(("ready", "ready", "dead"), 0.66, 0, id="enough"),
        pytest.param(("ready", "dead", "dead"), 0.66, 1, id="too few"),
        pytest.param(("dead", "dead", "dead"), 0.0, 6, id="none is never enough"),
    ],
)
def test_fewer_than_all_are_a_success_when_the_plan_says_so(
    states: tuple[NodeState, ...], minimum: float, code: int
) -> None:
    names = [str(number) for number in range(len(states))]
    report = PrewarmReport(
        nodes=tuple(NodeRow(name, state=state) for name, state in zip(names, states, strict=True)),
        cells=tuple(
            replace(DONE, node=name)
            if state == "ready"
            else replace(DONE, node=name, status="failed", present=False, error=NODE)
            for name, state in zip(names, states, strict=True)
        ),
        minimum_ready=minimum,
    )
    assert report.exit_code == code
    # Who looks wants to know of each node, and who hands images over of each of those.
    assert replace(report, command="status").exit_code != 0
    refused = Delivery("0", "r", "podman", error=NODE)
    assert replace(report, deliveries=(refused,)).exit_code != 0


def test_a_receipt_holds_one_node_only() -> None:
    report = PrewarmReport(
        run="1",
        nodes=(NodeRow("a"), NodeRow("b")),
        images=(ImageRow("r"),),
        cells=(DONE, replace(DONE, node="b")),
        spans=(BlobSpan("a", "sha256:x"), BlobSpan("b", "sha256:x")),
        remarks=(Remark("b", "a", "slow"),),
    )
    receipt = json.loads(json.dumps(report.receipt("b")))
    assert receipt["node"]["name"] == "b"
    assert [line["node"] for line in receipt["images"]] == ["b"]
    assert [span["node"] for span in receipt["blobs"]] == ["b"]
    assert [remark["source"] for remark in receipt["remarks"]] == ["a"]
    with pytest.raises(UsageError):
        report.receipt("c")


def test_a_dead_node_has_nothing_any_more() -> None:
    before = [DONE, Cell("a", "s", "working"), Cell("b", "r", "done", present=True)]
    after = lost_cells(before, "a", "left the cluster")
    assert [(cell.node, cell.status, cell.present) for cell in after] == [
        ("a", "failed", False),
        ("a", "failed", False),
        ("b", "done", True),
    ]
    assert after[0].error is not None
    assert "left the cluster" in after[0].error["message"]


@pytest.mark.parametrize(
    ("statuses", "state"),
    [
        (("done", "exists"), "ready"),
        (("done", "skipped"), "ready"),
        (("skipped",), "skipped"),
        (("done", "failed"), "partial"),
        (("failed", "failed"), "failed"),
        (("done", "working"), "working"),
        (("done", "waiting"), "waiting"),
    ],
)
def test_a_nodes_state_follows_from_its_cells(
    statuses: tuple[CellStatus, ...], state: NodeState
) -> None:
    own = [
        Cell("a", str(number), status, present=status in ("done", "exists"))
        for number, status in enumerate(statuses)
    ]
    assert node_state(own) == state


def test_sources_are_told_apart() -> None:
    given = {"peer:a": 5, "peer:b": 1, "registry:5000": 7, "store": 100}
    assert origin_and_peer_bytes(given) == (7, 6)
    report = PrewarmReport(
        spans=(
            BlobSpan("a", "x", by_source={"r": 1, "peer:b": 9}),
            BlobSpan("b", "x", by_source={"r": 2}),
        )
    )
    assert list(report.by_source().items()) == [("peer:b", 9), ("r", 3)]


@pytest.mark.parametrize(
    "name", [name for name in dir(errors) if name.endswith("Error") and name != "StowrayError"]
)
def test_an_error_object_has_the_exit_status_of_its_class(name: str) -> None:
    assert exit_code_of({"type": name}) == getattr(errors, name).exit_code


def test_an_unknown_class_is_a_plain_failure() -> None:
    assert exit_code_of({"type": "escape"}) == 1
    assert exit_code_of({"type": "FutureError"}) == 1
    assert exit_code_of(None) == 0


def test_who_is_to_have_nothing_is_not_counted_and_who_was_not_begun_is() -> None:
    rows = (
        NodeRow("a", state="ready"),
        NodeRow("b", state="skipped"),
        NodeRow("c", state="skipped", error=NODE),
        NodeRow("d", state="failed", error=NODE),
    )
    assert count_ready(rows) == (1, 3)
    assert count_ready(()) == (0, 0)
