from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowray.html_report import ROWS_LIMIT, html_report
from stowray.pipeline.errors import NodeError, describe
from stowray.pipeline.lock_file import Drift
from stowray.pipeline.prewarm_report import PrewarmReport
from stowray.pipeline.prewarm_rows import Delivery, Remark, WaveRow
from tests.support.prewarm import make_report, make_spans

VOID = {"meta", "link", "br", "img", "input", "hr"}
LOADING = ("src", "href", "xlink:href", "action", "data", "poster", "srcset")
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&\x1b[31m\u202e"


class Page(HTMLParser):
    """What a browser would see; refuses markup that does not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def full_report(word: str) -> PrewarmReport:
    """Return a report that has ``word`` wherever somebody else chooses the text."""
    error = describe(NodeError(word, word))
    nodes = [word, "worker-1"]
    report = make_report(nodes, [word, "registry.example/app:1"])
    failed = replace(report.cells[0], status="failed", present=False, error=error)
    row = replace(report.nodes[0], address=word, store=word, platform=word, error=error)
    spans = make_spans(nodes)
    return replace(
        report,
        nodes=(row, report.nodes[1]),
        cells=(failed, *report.cells[1:]),
        spans=(replace(spans[0], digest=word, by_source={word: 5, f"peer:{word}": 5}), *spans[1:]),
        remarks=(Remark(word, word, word, word, 7, word),),
        drift=(Drift(word, word, word, word),),
        deliveries=(Delivery(word, word, word), Delivery(word, word, word, error)),
        waves=(WaveRow(0, (word,), 1, 0.0, 1.0, True), WaveRow(1)),
        warnings=(word,),
    )


@given(st.text(max_size=40) | st.just(HOSTILE))
def test_no_text_from_outside_becomes_markup(word: str) -> None:
    plain, page = Page(html_report(full_report("word"))), Page(html_report(full_report(word)))
    assert set(page.tags) <= set(plain.tags)
    assert {"script", "img", "iframe", "object", "link"}.isdisjoint(page.tags)
    assert {name for _, name, _ in page.attributes} <= {name for _, name, _ in plain.attributes}
    assert not any(character in page.words for character in "\x1b\u202e")


def test_a_page_loads_nothing() -> None:
    page = Page(html_report(full_report("word")))
    loaded = [value for _, name, value in page.attributes if name in LOADING]
    assert loaded
    assert all(value.startswith("#") for value in loaded)
    targets = {value for _, name, value in page.attributes if name == "id"}
    assert {value.removeprefix("#") for value in loaded} <= targets
    policy = next(v for tag, n, v in page.attributes if tag == "meta" and n == "content")
    assert "default-src 'none'" in policy


def test_a_picture_can_be_read_without_seeing_it() -> None:
    page = Page(html_report(full_report("word")))
    bars = [v for tag, name, v in page.attributes if tag == "g" and name == "aria-label"]
    focusable = [v for tag, name, v in page.attributes if tag == "g" and name == "tabindex"]
    assert len(bars) == len(focusable) >= 6
    assert all(bars)
    assert page.tags.count("caption") == page.tags.count("table")
    headings = [v for tag, name, v in page.attributes if tag == "th" and name == "scope"]
    assert page.tags.count("th") == len(headings)


@pytest.mark.parametrize(
    "report",
    [
        PrewarmReport(),
        make_report([], ["a/b:1"]),
        make_report(["n"], ["a/b:1"], status="missing", command="status"),
        make_report(["n"], ["a/b:1"], interrupted=True),
    ],
    ids=["empty", "no node", "status", "interrupted"],
)
def test_a_run_of_any_kind_has_a_page(report: PrewarmReport) -> None:
    assert "<h1>" in html_report(report)


def test_the_verdict_is_that_of_the_report() -> None:
    good = Page(html_report(make_report(["n"], ["a/b:1"]))).words
    bad = Page(html_report(make_report(["n"], ["a/b:1"], status="missing"))).words
    assert "Every image is on every node" in good
    assert "exit status 3" in bad


def test_many_nodes_make_a_page_that_says_what_it_leaves_out() -> None:
    nodes = [f"n{number:05d}" for number in range(ROWS_LIMIT + 500)]
    report = make_report(nodes, ["a/b:1"])
    late = replace(report.nodes[-1], state="failed", error=describe(NodeError("n", "x")))
    page = Page(
        html_report(replace(report, nodes=(*report.nodes[:-1], late), spans=make_spans(nodes)))
    )
    assert "500 more nodes are in the JSON report" in page.words
    assert nodes[-1] in page.words
