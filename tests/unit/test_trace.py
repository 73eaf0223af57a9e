from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from stowray.bench_html import bench_page, comparison_page
from stowray.html_page import ticks
from stowray.pipeline.run_record import Run, RunRecord, Span
from stowray.text import seconds_text
from stowray.trace_html import trace_page
from stowray.trace_json import trace_document

HOSTILE = '"><script>alert(1)</script>\x1b[31m'
BLOB = Span(
    "host/a:1",
    "n1",
    "sha256:" + "a" * 64,
    "blob",
    "done",
    100,
    0.5,
    2.0,
    "",
    ((0.5, 0, "waiting"), (1.0, 40, "downloading"), (2.0, 100, "done")),
)
LAYER = replace(BLOB, kind="layer", status="applied", samples=())
RESULT = {"seconds": {"total": 2.0}, "fetched_bytes": 100, "manifest_requests": 1, "digest": "d"}
RECORD = RunRecord(
    "bench",
    "0.1.0",
    0.0,
    {"processors": 2, "memory": 1 << 30},
    {},
    (
        Run("host/a:1", "cold", 1, 10.0, 2.0, RESULT, None, None, (BLOB, LAYER)),
        Run("host/a:1", "cold", 2, 20.0, 2.0, None, {"message": HOSTILE}),
    ),
)


def slices(document: dict) -> list[dict]:
    return [event for event in document["traceEvents"] if event["ph"] == "X"]


def test_the_trace_has_a_slice_for_each_phase_on_one_clock() -> None:
    document = json.loads(json.dumps(trace_document(RECORD)))
    found = [(e["name"], e["ts"], e["dur"], e["pid"], e["tid"]) for e in slices(document)]
    assert found == [
        ("waiting", 10_500_000, 500_000, 1, 1),
        ("fetch", 11_000_000, 1_000_000, 1, 1),
        ("unpack", 10_500_000, 1_500_000, 1, 2),
    ]
    counters = [(e["ts"], e["args"]["bytes"]) for e in document["traceEvents"] if e["ph"] == "C"]
    assert counters == [(10_500_000, 0), (11_000_000, 40), (12_000_000, 100)]
    names = {
        (e["pid"], e["tid"]): e["args"]["name"]
        for e in document["traceEvents"]
        if e["name"] == "thread_name"
    }
    assert names == {(1, 1): "fetch aaaaaaaaaaaa", (1, 2): "unpack aaaaaaaaaaaa"}


def test_every_event_has_what_the_format_asks_of_its_phase() -> None:
    needed = {
        "X": {"pid", "tid", "ts", "dur", "name", "cat"},
        "C": {"pid", "ts", "name", "args"},
        "M": {"pid", "name", "args"},
    }
    for event in trace_document(RECORD)["traceEvents"]:
        assert needed[event["ph"]] <= set(event)
        assert all(event[key] >= 0 for key in ("ts", "dur") if key in event)


class Page(HTMLParser):
    """What a browser would make of a page: its tags, and what it would load or run."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check(page: str) -> Page:
    parsed = Page(page)
    assert parsed.open == []
    assert "\x1b" not in page
    for tag, attributes in parsed.tags:
        assert tag not in {"script", "iframe", "object", "embed", "link", "img", "base", "form"}
        for name in attributes:
            assert name not in {"src", "href", "srcset", "action"}
            assert not name.startswith("on")
    policy = [a.get("content") for t, a in parsed.tags if t == "meta" and "http-equiv" in a]
    assert policy and policy[0].startswith("default-src 'none'")
    return parsed


def hostile_record() -> RunRecord:
    span = replace(BLOB, id=HOSTILE, kind=HOSTILE, status=HOSTILE, node=HOSTILE, error=HOSTILE)
    result = {**RESULT, "seconds": {HOSTILE: 1.0}, "digest": HOSTILE}
    run = Run(HOSTILE, HOSTILE, 1, 0.0, 1.0, result, None, None, (span,))
    machine = dict.fromkeys(("processors", "memory", "kernel", "time", "load"), HOSTILE)
    return RunRecord(HOSTILE, HOSTILE, 0.0, machine, {}, (run, *RECORD.runs))


def test_pages_load_and_run_nothing_whatever_a_record_says() -> None:
    for record in (RECORD, hostile_record(), replace(RECORD, runs=())):
        check(trace_page(record))
        check(bench_page(record))


def test_pages_of_two_records_neither() -> None:
    for first, second in ((RECORD, RECORD), (hostile_record(), hostile_record())):
        check(comparison_page(first, second))
    assert comparison_page(RECORD, replace(RECORD, runs=())) == ""


def test_what_is_compared_stands_on_one_scale() -> None:
    """Two registries of one benchmark: as far right means as many seconds."""
    fast = replace(RECORD.runs[0], reference="host/fast:1", mode="cold")
    slow = replace(
        fast, reference="host/slow:1", result={**RESULT, "seconds": {"total": 40.0}}, process=None
    )
    shown = bench_page(replace(RECORD, runs=(fast, slow)))
    axes = re.findall(r'<svg class="small".*?</svg>', shown, re.DOTALL)
    marks = [re.findall(r'text-anchor="middle">([^<]+)<', axis) for axis in axes]
    assert len(marks) == 2
    assert marks[0] == marks[1]
    assert "host/slow:1 to host/fast:1, cold" in shown


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0.00 s"),
        (0.0004, "0.4 ms"),
        (0.00994, "9.9 ms"),
        (0.00996, "10 ms"),
        (0.0994, "99 ms"),
        (0.0996, "0.10 s"),
        (9.99, "9.99 s"),
        (12.4, "12 s"),
        (185, "3 min 05 s"),
    ],
)
def test_durations_are_told_in_the_unit_that_suits_them(seconds: float, said: str) -> None:
    assert seconds_text(seconds) == said


def test_a_timeline_can_be_walked_with_the_keyboard_and_read_without_the_picture() -> None:
    parsed = check(trace_page(RECORD))
    bars = [a for tag, a in parsed.tags if tag == "g"]
    assert [bar["tabindex"] for bar in bars] == ["0", "0"]
    assert bars[0]["aria-label"] == (
        "fetch aaaaaaaaaaaa, done, 100 B, from 0.00 s to 1.50 s, at work from 0.50 s"
    )
    assert any(tag == "table" for tag, _ in parsed.tags)
    assert "unpack aaaaaaaaaaaa" in parsed.text


def test_ticks_are_round_and_reach_the_highest_value() -> None:
    for highest in (0.0003, 0.07, 0.9, 1, 3.7, 12, 59, 1234.5):
        marks = ticks(highest)
        assert marks[0] == 0
        assert marks[-1] >= highest * 0.999
        assert 2 <= len(marks) <= 8
