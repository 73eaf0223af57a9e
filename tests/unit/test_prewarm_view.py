from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowray.pipeline.clock import Clock
from stowray.pipeline.errors import NodeError, describe
from stowray.pipeline.prewarm_report import PrewarmReport
from stowray.pipeline.prewarm_rows import CELL_STATUSES, Cell, CellStatus, NodeRow, WaveRow
from stowray.pipeline.progress import Event, Progress
from stowray.prewarm_picture import PrewarmPicture
from stowray.prewarm_text import cell_word, clip, failures, image_names, who_has_what
from stowray.prewarm_view import Display, LiveView, PlainView, picture_lines
from tests.support.prewarm import MIB, make_report

IMAGES = ("docker.io/library/debian:12", "ghcr.io/acme/app:1")
NODES = tuple(f"worker-{number}" for number in range(4))
LOST = describe(NodeError("worker-3", "worker-3 has left the cluster"))


class Time:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> Clock:
        return Clock(monotonic=lambda: self.now)


def event(node: str, image: str, kind: str, id: str, current: int, total: int) -> Event:
    status = "done" if current == total else "downloading"
    return Event(1.0, image, node, id, kind, status, current, total, started=1.0)


steps = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(NODES),
            st.sampled_from(IMAGES),
            st.sampled_from(["blob", "layer"]),
            st.sampled_from("xyz"),
            st.integers(0, 20 * MIB),
            st.integers(0, 20 * MIB),
        ),
        st.tuples(
            st.integers(0, 7),
            st.sampled_from(CELL_STATUSES),
            st.sampled_from([0, MIB, 100 * MIB]),
        ),
    ),
    max_size=30,
)


@given(steps)
def test_percentages_never_fall_and_end_at_a_hundred(
    script: list[tuple[object, ...]],
) -> None:
    picture = PrewarmPicture(Time().clock())
    report = make_report(NODES, IMAGES, status="working", size=0)
    picture.take(report)
    last = picture.figures().fraction
    cells_then = [picture.cell_fraction(cell) for cell in report.cells]
    for step in script:
        if len(step) == 6:
            picture.see([event(*step)])  # type: ignore[arg-type]
        else:
            number, status, size = step
            cells = list(report.cells)
            cells[number] = replace(cells[number], status=status)  # type: ignore[index, arg-type]
            images = tuple(replace(image, size=size) for image in report.images)
            report = replace(report, cells=tuple(cells), images=images)
            picture.take(report)
        figures = picture.figures()
        assert last <= figures.fraction <= 1.0
        over = all(cell.status not in ("waiting", "working") for cell in report.cells)
        assert (figures.fraction == 1.0) is over or last == 1.0
        cells_now = [picture.cell_fraction(cell) for cell in report.cells]
        assert all(now >= then for now, then in zip(cells_now, cells_then, strict=True))
        last, cells_then = figures.fraction, cells_now
    picture.take(make_report(NODES, IMAGES))
    assert picture.figures().fraction == 1.0


def test_another_run_begins_at_nothing() -> None:
    picture = PrewarmPicture(Time().clock())
    picture.take(make_report(NODES, IMAGES))
    assert picture.figures().fraction == 1.0
    picture.take(make_report(NODES, IMAGES, status="working", run="another"))
    assert picture.figures().fraction == 0.0
    stream = io.StringIO()
    view = PlainView(stream, Time().clock())
    for run in "12":
        view.report(make_report(["a"], IMAGES[:1], run=run))
    assert len(stream.getvalue().splitlines()) == 2


def test_download_and_unpack_weigh_alike() -> None:
    picture = PrewarmPicture(Time().clock())
    picture.take(make_report(["a"], IMAGES[:1], status="working", size=10 * MIB))
    picture.see([event("a", IMAGES[0], "blob", "x", 10 * MIB, 10 * MIB)])
    assert picture.figures().fraction == pytest.approx(0.5)
    picture.see([event("a", IMAGES[0], "layer", "x", 5 * MIB, 10 * MIB)])
    assert picture.figures().fraction == pytest.approx(0.75)
    assert picture.node_fraction("a") == pytest.approx(0.75)


def test_a_large_image_weighs_more_than_a_small_one() -> None:
    picture = PrewarmPicture(Time().clock())
    report = make_report(["a"], IMAGES, status="working")
    images = (replace(report.images[0], size=90 * MIB), replace(report.images[1], size=10 * MIB))
    cells = (replace(report.cells[0], status="done"), report.cells[1])
    picture.take(replace(report, images=images, cells=cells))
    assert picture.figures().fraction == pytest.approx(0.9)


def test_rates_and_the_time_that_is_left() -> None:
    time = Time()
    picture = PrewarmPicture(time.clock())
    report = make_report(["a", "b"], IMAGES[:1], status="working", size=10 * MIB)
    picture.take(report)
    assert picture.figures().eta is None
    time.now += 2.0
    # The first copy in the cluster is the origin's, the second one a node's.
    picture.see([event("a", IMAGES[0], "blob", "x", 4 * MIB, 10 * MIB)])
    picture.see([event("b", IMAGES[0], "blob", "x", 2 * MIB, 10 * MIB)])
    figures = picture.figures()
    assert (figures.origin_bytes, figures.peer_bytes) == (4 * MIB, 2 * MIB)
    assert figures.origin_rate == pytest.approx(2 * MIB)
    assert figures.peer_rate == pytest.approx(MIB)
    assert figures.eta == pytest.approx(2.0 * (40 - 6) / 6)
    # What the nodes report in the end is the truth.
    picture.take(replace(make_report(["a", "b"], IMAGES[:1]), origin_bytes=3, peer_bytes=5))
    assert (picture.figures().origin_bytes, picture.figures().peer_bytes) == (3, 5)


def test_a_blob_that_a_node_had_comes_from_nodes() -> None:
    picture = PrewarmPicture(Time().clock())
    picture.take(make_report(["a", "b"], IMAGES[:1], status="working", size=10 * MIB))
    have = Event(1.0, IMAGES[0], "a", "x", "blob", "exists", 9, 9, started=1.0)
    picture.see([have, event("b", IMAGES[0], "blob", "x", 5, 9)])
    # The same blob on the same node for another image is no further copy.
    picture.see([event("b", IMAGES[1], "blob", "x", 5, 9)])
    figures = picture.figures()
    assert (figures.origin_bytes, figures.peer_bytes) == (0, 5)


@pytest.mark.parametrize("width", [40, 80, 160])
@pytest.mark.parametrize(
    ("nodes", "images"), [(1, 1), (4, 2), (4, 40), (1000, 3)], ids=lambda value: str(value)
)
def test_a_frame_fits_the_terminal(width: int, nodes: int, images: int) -> None:
    names = [f"worker-group-with-a-long-name-{number:04d}" for number in range(nodes)]
    references = [f"registry.example/team/service-{number}:1.0" for number in range(images)]
    picture = PrewarmPicture(Time().clock())
    report = make_report(names, references, status="working")
    picture.take(replace(report, waves=(WaveRow(0, started=0.0), WaveRow(1))))
    lines = picture_lines(picture, width, 30)
    assert max(line.cell_len for line in lines) <= width
    assert len(lines) <= 30
    shown = "\n".join(line.plain for line in lines)
    assert f"{nodes} node" in shown
    if nodes == 1000:
        assert "… and" in shown


def test_a_frame_shows_troubles_first() -> None:
    names = [f"n{number:04d}" for number in range(500)]
    report = make_report(names, IMAGES[:1])
    dead = replace(report.nodes[321], state="dead", error=LOST)
    nodes = (*report.nodes[:321], dead, *report.nodes[322:])
    picture = PrewarmPicture(Time().clock())
    picture.take(replace(report, nodes=nodes))
    lines = [line.plain for line in picture_lines(picture, 80, 24)]
    first = next(number for number, line in enumerate(lines) if line.startswith("node ")) + 1
    assert lines[first].split()[:2] == ["n0321", "dead"]
    assert "ready" in lines[-1]


def test_names_from_outside_cannot_move_the_cursor() -> None:
    hostile = "\x1b[2J\rnode"
    picture = PrewarmPicture(Time().clock())
    report = make_report([hostile], IMAGES)
    picture.take(report)
    texts = [line.plain for line in picture_lines(picture, 80, 24)]
    bad = replace(report.cells[0], error=describe(NodeError(hostile, hostile)))
    report = replace(report, cells=(bad,), warnings=(hostile,))
    texts += [*who_has_what(report), *failures(report)]
    assert not any(character in text for text in texts for character in "\x1b\r")


def test_no_more_than_ten_frames_a_second_and_the_last_one_is_drawn() -> None:
    time = Time()
    stream = io.StringIO()
    view = LiveView(stream, time.clock())
    for number in range(1000):
        time.now += 0.001
        view.events([event("a", IMAGES[0], "blob", "x", number, 1000)])
    view.report(make_report(["a"], IMAGES[:1]))
    drawn = stream.getvalue().count("─ ") + stream.getvalue().count("━ ")
    assert drawn <= 11
    view.stop()
    assert "100%" in stream.getvalue()
    before = stream.getvalue()
    view.report(make_report(["a"], IMAGES[:1]))
    assert stream.getvalue() == before


def test_a_picture_without_colour_has_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    view = LiveView(stream, Time().clock())
    view.report(make_report(NODES, IMAGES))
    view.stop()
    assert "worker-0" in stream.getvalue()
    assert "\x1b[32m" not in stream.getvalue()


def test_a_log_gets_a_line_for_each_thing_that_ends() -> None:
    time = Time()
    stream = io.StringIO()
    view = PlainView(stream, time.clock())
    working = make_report(NODES, IMAGES, status="working")
    for _ in range(20):
        view.report(working)
    assert stream.getvalue() == ""
    done = (replace(working.cells[0], status="done", present=True, seconds=2.0),)
    view.report(replace(working, cells=(*done, *working.cells[1:])))
    view.report(replace(working, cells=(*done, *working.cells[1:])))
    assert stream.getvalue() == f"worker-0: {IMAGES[0]} pulled in 2.00 s\n"
    dead = replace(working.nodes[3], state="dead", error=LOST)
    wave = WaveRow(0, NODES, 3, 0.0, 2.0, passed=False)
    view.report(replace(working, nodes=(*working.nodes[:3], dead), waves=(wave,)))
    assert stream.getvalue().splitlines()[1:] == [
        "worker-3: dead: worker-3: worker-3 has left the cluster",
        "wave 1: 3 of 4 nodes ready, not passed",
    ]
    time.now += 60.0
    view.report(working)
    assert stream.getvalue().splitlines()[-1].startswith("12% · 2 images on 4 nodes")


def test_a_log_of_a_thousand_nodes_stays_short() -> None:
    time = Time()
    stream = io.StringIO()
    view = PlainView(stream, time.clock())
    names = [f"n{number}" for number in range(1000)]
    for second in range(100):
        time.now += 1.0
        statuses: list[CellStatus] = ["done"] * second * 10 + ["working"] * (1000 - second * 10)
        cells = tuple(
            Cell(name, IMAGES[0], status) for name, status in zip(names, statuses, strict=True)
        )
        view.report(replace(make_report(names, IMAGES[:1]), cells=cells))
    assert 5 <= len(stream.getvalue().splitlines()) <= 12


@pytest.mark.parametrize("mode", ["plain", "tty", "json", "none", "auto"])
def test_a_display_of_any_kind_watches_and_ends(mode: str) -> None:
    stream = io.StringIO()
    progress = Progress(node="a")
    display = Display(progress, mode, stream)
    progress.record(IMAGES[0], "blob", "x", "done", 5, 5)
    display.report(make_report(["a"], IMAGES[:1]))
    progress.close()
    display.close()
    said = stream.getvalue()
    if mode == "json":
        assert [json.loads(line)["node"] for line in said.splitlines()] == ["a"]
    elif mode == "none":
        assert said == ""
    else:
        assert "pulled" in said


def test_who_has_what_names_each_node_and_image() -> None:
    report = make_report(NODES, IMAGES)
    missing = replace(report.cells[3], status="missing", present=False)
    report = replace(report, cells=(*report.cells[:3], missing, *report.cells[4:]))
    lines = who_has_what(report, 80)
    assert lines[0].split() == ["node", "state", "debian:12", "app:1"]
    assert lines[2].split() == ["worker-1", "ready", "pulled", "missing"]
    assert len(lines) == 5
    narrow = who_has_what(make_report(NODES, [f"r/i{number}:1" for number in range(30)]), 80)
    assert narrow[1].split(maxsplit=2) == ["worker-0", "ready", "30 of 30"]
    assert max(len(line) for line in [*lines, *narrow]) <= 80


def test_who_has_what_of_many_nodes_names_those_that_lack_something() -> None:
    report = make_report([f"n{number}" for number in range(1000)], IMAGES)
    late = replace(report.nodes[500], state="partial")
    report = replace(report, nodes=(*report.nodes[:500], late, *report.nodes[501:]))
    lines = who_has_what(report)
    assert len(lines) == 3
    assert lines[1].startswith("n500")
    assert lines[2] == "… and 999 ready"


def test_the_same_failure_on_many_nodes_is_one_sentence() -> None:
    error = describe(NodeError("registry", "does not answer"))
    report = make_report([f"n{number}" for number in range(50)], IMAGES[:1], status="failed")
    cells = tuple(replace(cell, error=error) for cell in report.cells)
    said = failures(replace(report, cells=cells))
    assert len(said) == 1
    assert "n0, n1, n2 and 47 more" in said[0]
    lost = replace(report.nodes[3], error=LOST)
    alone = PrewarmReport(nodes=(lost,), cells=(Cell("n3", IMAGES[0], "failed", error=LOST),))
    assert len(failures(alone)) == 1


def test_names_stay_different_when_they_are_made_short() -> None:
    digest = "sha256:" + "ab" * 32
    assert image_names(["docker.io/library/debian:12", f"r.io/app@{digest}"]) == [
        "debian:12",
        "app@abababab",
    ]
    alike = ["a.io/app:1", "b.io/app:1", "c.io/other:1"]
    assert image_names(alike) == ["a.io/app:1", "b.io/app:1", "other:1"]
    assert clip("worker-group-0001", 9) == "work…0001"
    assert clip("short", 9) == "short"


@pytest.mark.parametrize(
    ("cell", "word"),
    [
        (None, "-"),
        (Cell("a", "r", "done"), "pulled"),
        (Cell("a", "r", "exists"), "present"),
        (Cell("a", "r", "skipped"), "not wanted"),
        (Cell("a", "r", "skipped", error=LOST), "not begun"),
        (Cell("a", "r", "missing"), "missing"),
        (Cell("a", "r", "done", error=LOST), "failed"),
    ],
)
def test_a_cell_in_a_word(cell: Cell | None, word: str) -> None:
    assert cell_word(cell) == word


def test_before_any_node_is_known_nothing_is_counted() -> None:
    lines = picture_lines(PrewarmPicture(), 80, 24)
    assert [line.plain for line in lines] == ["looking for nodes"]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("node n1: no answer", "node n1: no answer"),
        ("/stores/n1: cannot open the store", "n1: /stores/n1: cannot open the store"),
        ("n10 gave nothing", "n1: n10 gave nothing"),
    ],
)
def test_a_failure_names_its_node_once(message: str, said: str) -> None:
    error = {"type": "NodeError", "message": message, "retryable": False}
    report = PrewarmReport(nodes=(NodeRow("n1", state="failed", error=error),))
    assert failures(report) == [said]


def test_an_answer_goes_where_it_should_beside_a_live_view() -> None:
    """As in ``J=$(stowray prewarm … --json)`` at a prompt: the view is the terminal's only."""
    script = (
        "import sys\n"
        "from stowray.pipeline.clock import SYSTEM_CLOCK\n"
        "from stowray.prewarm_view import LiveView\n"
        "from tests.support.prewarm import make_report\n"
        "view = LiveView(sys.stderr, SYSTEM_CLOCK)\n"
        "view.report(make_report(('worker-1',), ('debian:12',)))\n"
        "print('the answer')\n"
        "view.stop()\n"
    )
    main, side = pty.openpty()
    with open(side, "wb", buffering=0) as terminal:
        done = subprocess.run(
            [sys.executable, "-c", script],
            stderr=terminal,
            stdout=subprocess.PIPE,
            env={"PATH": os.environ["PATH"], "TERM": "xterm-256color"},
            check=True,
            timeout=120,
        )
    with open(main, "rb", buffering=0) as seen:
        shown = seen.read(1 << 16)
    assert done.stdout == b"the answer\n"
    assert b"worker-1" in shown
    assert b"the answer" not in shown
