"""Our pages in a headless Chromium: what it says of them, asks for, shows, and reads out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from stowray.html_report import html_report
from stowray.pipeline.errors import NodeError, describe
from stowray.pipeline.progress import Event
from stowray.ui import LiveUi
from tests.support.browser import Tab, browser
from tests.support.command import Stowray
from tests.support.prewarm import MIB, make_report, make_spans
from tests.support.proxy import CountingProxy
from tests.support.registry import FakeRegistry
from tests.support.small import small_tar

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stowray.pipeline.prewarm_report import PrewarmReport

IMAGES = ("docker.io/library/debian:12", "ghcr.io/acme/app:1")
LINK = "document.getElementById('link').textContent"
ROWS = "document.querySelectorAll('#rows tr').length"
# Nothing sticks out sideways but what scrolls by itself.
FITS = "document.documentElement.scrollWidth <= window.innerWidth"


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with browser() as tab:
        yield tab


@pytest.fixture
def ui() -> Iterator[LiveUi]:
    with LiveUi("127.0.0.1:0") as ui:
        yield ui


def show(ui: LiveUi, nodes: int, fraction: float) -> PrewarmReport:
    """Let a run be so far on so many nodes."""
    names = [f"worker-{number:04d}" for number in range(nodes)]
    report = make_report(names, IMAGES, status="working", size=8 * MIB, seconds=1.0)
    done = int(fraction * 8 * MIB)
    ui.take(report)
    ui.see(
        [
            Event(1.0, image, name, f"sha256:{n:064x}", kind, "downloading", done, 8 * MIB, 1.0)
            for name in names
            for n, image in enumerate(IMAGES)
            for kind in ("blob", "layer")
        ]
    )
    return report


def is_sound(tab: Tab, allowed: str = "file:") -> None:
    """No complaint of the browser, and no request but for the page's own."""
    assert tab.complaints == []
    assert tab.requests
    foreign = [url for url in tab.requests if not url.startswith((allowed, "data:"))]
    assert foreign == []


def test_the_live_page_goes_on_and_ends(tab: Tab, ui: LiveUi) -> None:
    show(ui, 8, 0.25)
    tab.look()
    tab.open(ui.url)
    tab.until(f"{LINK} === 'Live.'")
    tab.until("document.title === '25% · Pre-warm'")
    assert tab.ask(ROWS) == 8
    show(ui, 8, 0.75)
    tab.until("document.title === '75% · Pre-warm'")
    tab.until("document.querySelector('#rows tr:last-child').textContent.includes('75%')")
    tab.until("document.querySelector('#p-time svg') !== null")
    names = [f"worker-{number:04d}" for number in range(8)]
    report = make_report(names, IMAGES, spans=make_spans(names))
    lost = replace(report.nodes[3], state="dead", error=describe(NodeError(names[3], "left")))
    ui.take(replace(report, nodes=(*report.nodes[:3], lost, *report.nodes[4:])))
    tab.until("document.querySelector('#rows tr:nth-child(4)').textContent.includes('dead')")
    tab.until("document.getElementById('s-trouble').textContent.includes('left')")
    ui.close()
    tab.until(f"{LINK} === 'The run has ended; this is its last state.'")
    # The server is gone; what it gave last stays.
    tab.listen(0.5)
    assert tab.ask("document.querySelectorAll('.matrix tbody tr').length") == 8
    assert "What each source gave" in tab.ask("document.body.textContent")
    is_sound(tab, ui.url)


def test_the_live_page_without_scripts_has_the_state_of_its_loading(tab: Tab, ui: LiveUi) -> None:
    show(ui, 3, 0.5)
    tab.open(ui.url, scripts=False)
    tab.call("Emulation.setScriptExecutionDisabled", value=False)
    assert tab.ask(ROWS) == 3
    assert "As it was when this page was loaded" in tab.ask(LINK)
    assert not [url for url in tab.requests if url.endswith("events")]


def test_a_live_page_that_loses_its_connection_comes_back(tab: Tab, ui: LiveUi) -> None:
    show(ui, 3, 0.25)
    address = urlsplit(ui.url)
    proxy = CountingProxy(address.netloc)
    try:
        tab.open(f"http://{proxy.host}{address.path}")
        tab.until(f"{LINK} === 'Live.'")
        proxy.cut()
        tab.until(f"{LINK}.startsWith('The connection is lost')")
        show(ui, 3, 0.5)
        tab.until(f"{LINK} === 'Live.'")
        tab.until("document.title === '50% · Pre-warm'")
        assert tab.ask(ROWS) == 3
    finally:
        proxy.close()


def test_the_live_page_can_be_used_with_the_keyboard(tab: Tab, ui: LiveUi) -> None:
    show(ui, 3, 0.25)
    tab.open(ui.url)
    tab.until("document.querySelectorAll('#p-time details').length === 3")
    where = "document.activeElement.textContent"
    while "worker-0001" not in tab.ask(where) or tab.ask(
        "document.activeElement.tagName"
    ).lower() not in ("summary",):
        assert tab.ask("document.activeElement !== document.body") or tab.press("Tab") is None
        tab.press("Tab")
    tab.press("Enter")
    opened = "document.querySelector('details[data-of=\"worker-0001\"]').open"
    tab.until(opened)
    # It is drawn anew, and stays open, with the reader where he was.
    tab.ask("window.before = document.querySelector('#p-time svg')")
    show(ui, 3, 0.5)
    tab.until("document.querySelector('#p-time svg') !== window.before")
    assert tab.ask(opened)
    assert "worker-0001" in tab.ask(where)


def test_what_is_read_out_is_the_percentage_and_nothing_else(tab: Tab, ui: LiveUi) -> None:
    show(ui, 3, 0.25)
    tab.open(ui.url)
    tab.until(f"{LINK} === 'Live.'")
    regions = tab.ask(
        "[...document.querySelectorAll('[aria-live], [role=status], [role=alert], [role=log]')]"
        ".map(e => [e.id, e.getAttribute('aria-live'), e.textContent])"
    )
    assert regions == [["p-heard", "polite", "25 percent"]]
    tree = tab.tree()
    roles = {entry["role"] for entry in tree}
    assert {"main", "table", "columnheader", "rowheader", "heading", "progressbar"} <= roles
    for role in ("table", "progressbar", "image"):
        named = [entry["name"] for entry in tree if entry["role"] == role]
        assert named, role
        assert all(named), role
    assert [entry["name"] for entry in tree if entry["role"] == "region"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_live_page_follows_the_colours_and_the_width(tab: Tab, ui: LiveUi, dark: bool) -> None:
    show(ui, 3, 0.25)
    tab.look(dark=dark, width=420)
    tab.open(ui.url)
    tab.until(f"{LINK} === 'Live.'")
    paper, ink = (
        [int(part) for part in colour.strip("rgb()").split(",")]
        for colour in tab.ask(
            "['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name])"
        )
    )
    assert (sum(paper) < sum(ink)) is dark
    assert tab.ask(FITS)
    tab.look()


def test_a_thousand_nodes_are_shown_and_the_page_stays_usable(tab: Tab, ui: LiveUi) -> None:
    show(ui, 1000, 0.125)
    tab.open(ui.url)
    tab.until(f"{LINK} === 'Live.'")
    for turn in range(2, 7):
        show(ui, 1000, turn / 8)
    tab.until("document.title === '75% · Pre-warm'")
    tab.until("document.querySelector('#rows tr:last-child').textContent.includes('75%')")
    assert tab.ask(ROWS) == 1000
    names = tab.ask("[...document.querySelectorAll('#rows th')].map(e => e.textContent)")
    assert names == sorted(names)
    is_sound(tab, ui.url)


def test_a_hostile_name_runs_nothing_in_the_live_page(tab: Tab, ui: LiveUi) -> None:
    evil = "<img src=x onerror='window.evil=1'><script>window.evil=1</script>"
    tab.open(ui.url)
    tab.until(f"{LINK} === 'Live.'")
    report = make_report([evil], (evil,), spans=make_spans([evil]))
    error = describe(NodeError(evil, evil))
    ui.take(replace(report, cells=(replace(report.cells[0], error=error),), warnings=(evil,)))
    tab.until(f"{ROWS} === 1")
    assert tab.ask("document.querySelector('#rows th').textContent") == evil
    ui.close()
    tab.until(f"{LINK}.startsWith('The run has ended')")
    assert tab.ask("window.evil === undefined && document.querySelector('main img') === null")
    is_sound(tab, ui.url)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages that commands write, made by these commands."""
    folder = tmp_path_factory.mktemp("pages")
    command = Stowray(folder / "store", folder)
    with FakeRegistry() as registry:
        layers = [small_tar({f"etc/{n}": b"x" * 50_000 * (n + 1)}) for n in range(3)]
        registry.add_image("a/b", "1", layers)
        reference = f"{registry.host}/a/b:1"
        command.run("pull", "--record", folder / "record", reference)
        command.run("trace", folder / "record", "-o", folder / "trace.html")
        command.run(
            *("bench", reference, "--runs", "2", "--disk", folder, "--html", folder / "bench.html")
        )
    names = [f"worker-{number}" for number in range(5)]
    report = make_report(names, IMAGES, spans=make_spans(names))
    (folder / "report.html").write_text(html_report(report))
    return folder


@pytest.mark.parametrize("name", ["trace", "bench", "report"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_page_of_a_command_is_shown_without_a_complaint(
    tab: Tab, pages: Path, name: str, dark: bool
) -> None:
    tab.look(dark=dark)
    tab.open((pages / f"{name}.html").as_uri())
    tab.listen(0.3)
    is_sound(tab)
    assert tab.requests == [(pages / f"{name}.html").as_uri()]
    # The pictures are really drawn: bars with an extent, in colours other than the paper's.
    drawn = tab.ask(
        "[...document.querySelectorAll('svg rect, svg circle, svg line')]"
        ".filter(e => e.getBoundingClientRect().width > 0 || e.getBoundingClientRect().height > 0)"
        ".length"
    )
    assert drawn > 3
    paper = tab.ask("getComputedStyle(document.body).backgroundColor")
    fills = tab.ask(
        "[...new Set([...document.querySelectorAll('svg rect, svg circle')]"
        ".map(e => getComputedStyle(e).fill))]"
    )
    assert fills
    assert paper not in fills
    assert tab.ask(FITS)


@pytest.mark.parametrize("name", ["trace", "bench", "report"])
def test_a_page_of_a_command_can_be_walked_through_and_read_out(
    tab: Tab, pages: Path, name: str
) -> None:
    tab.look(width=420)
    tab.open((pages / f"{name}.html").as_uri())
    assert tab.ask(FITS)
    tab.ask("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    stops = "[...document.querySelectorAll('a, summary, [tabindex=\"0\"]')]"
    count = min(12, tab.ask(f"{stops}.length"))
    for place in range(count):
        tab.press("Tab")
        assert tab.ask(f"{stops}.indexOf(document.activeElement)") == place
    tree = tab.tree()
    roles = [entry["role"] for entry in tree]
    assert "main" in roles
    assert "heading" in roles
    assert "table" in roles
    assert all(
        entry["name"] for entry in tree if entry["role"] in ("table", "image", "graphics-symbol")
    )
    tab.look()
