from __future__ import annotations

import http.client
import json
import re
import socket
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowray.cli.app import run
from stowray.cli.context import Context
from stowray.cli.running import Running
from stowray.html_timeline import Going, timelines
from stowray.pipeline.errors import NodeError, UsageError, describe
from stowray.pipeline.progress import Event
from stowray.ui import LiveUi
from stowray.ui_model import ROWS_LIMIT, LivePage
from stowray.ui_parts import MESSAGE_BYTES, Parts
from stowray.ui_server import UiLimits
from stowray.ui_spans import LiveSpans
from tests.support.prewarm import MIB, ScriptedRun, make_report, make_spans
from tests.unit.test_html_report import HOSTILE, Page, full_report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stowray.pipeline.prewarm_report import PrewarmReport

IMAGES = ("docker.io/library/debian:12", "ghcr.io/acme/app:1", "quay.io/a/b:2", "quay.io/a/c:3")
QUICK = UiLimits(frame_seconds=0.01, heartbeat_seconds=0.2)
SECONDS = 120.0


class Browser:
    """One event stream, read as a browser does; ``parts`` is what it would show."""

    def __init__(self, url: str, *, since: int = 0, last_id: int | None = None) -> None:
        address = urlsplit(url)
        self.connection = http.client.HTTPConnection(address.netloc, timeout=SECONDS)
        headers = {} if last_id is None else {"Last-Event-ID": str(last_id)}
        self.connection.request("GET", f"{address.path}events?since={since}", headers=headers)
        self.response = self.connection.getresponse()
        self.parts: dict[str, str] = {}
        self.version = 0
        self.messages: list[tuple[float, int, dict[str, str]]] = []
        self.over = False

    def read(self) -> bool:
        """Take one message; False when the server has ended."""
        data = ""
        while True:
            line = self.response.readline().decode().rstrip("\n")
            if line.startswith("id: "):
                self.version = int(line[4:])
            elif line.startswith("data: "):
                data = line[6:]
            elif not line and data:
                break
            elif not line and self.response.isclosed():
                return False
        message: dict[str, Any] = json.loads(data)
        assert message["version"] == self.version
        self.parts.update(message["parts"])
        self.over = message["over"]
        self.messages.append((time.monotonic(), len(data), message["parts"]))
        return True

    def until(self, name: str, word: str) -> None:
        while word not in self.parts.get(name, ""):
            assert self.read(), f"ended without {word!r} in {name}"

    def close(self) -> None:
        self.connection.close()


@contextmanager
def watching(ui: LiveUi, **how: int) -> Iterator[Browser]:
    browser = Browser(ui.url, **how)
    try:
        yield browser
    finally:
        browser.close()


@pytest.fixture
def ui() -> Iterator[LiveUi]:
    with LiveUi("127.0.0.1:0", limits=QUICK) as ui:
        yield ui


def get(url: str, path: str = "", method: str = "GET") -> tuple[int, http.client.HTTPMessage, str]:
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.netloc, timeout=SECONDS)
    try:
        connection.request(method, path or address.path)
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()
    finally:
        connection.close()


def stream_status(ui: LiveUi) -> int:
    """Return how a further browser is answered."""
    with watching(ui) as browser:
        return browser.response.status


def working(nodes: int, fraction: float, run: str = "0123") -> tuple[PrewarmReport, list[Event]]:
    """Return a run of so many nodes in its middle, and its events."""
    names = [f"worker-{number:04d}" for number in range(nodes)]
    report = make_report(names, IMAGES, status="working", size=8 * MIB, seconds=1.0, run=run)
    done = int(fraction * 8 * MIB)
    status = "done" if done == 8 * MIB else "downloading"
    events = [
        Event(1.0, image, name, f"sha256:{place:064x}", kind, status, done, 8 * MIB, started=1.0)
        for name in names
        for place, image in enumerate(IMAGES)
        for kind in ("blob", "layer")
    ]
    return report, events


steps = st.lists(
    st.one_of(
        st.tuples(st.sampled_from("abcdef"), st.text("xyz", max_size=9)),
        st.integers(0, 12),
        st.just("reconnect"),
    ),
    max_size=60,
)


@given(steps)
def test_a_reader_ends_with_what_is_there_however_it_came_and_went(script: list[object]) -> None:
    parts, shown, version = Parts(), dict[str, str](), 0
    reader = parts.reader(0)
    for step in script:
        if isinstance(step, tuple):
            parts.put(*step)
        elif isinstance(step, int):
            batch = reader.take(step)
            if batch is not None:
                size = sum(len(markup) for markup in batch.parts.values())
                assert size <= step or len(batch.parts) == 1
                shown |= batch.parts
                version = batch.version
        else:
            parts.leave(reader)
            reader = parts.reader(version)
    while (batch := reader.take(5)) is not None:
        shown |= batch.parts
        version = batch.version
    assert version == parts.version
    assert {name: markup for name, markup in shown.items() if markup} == {
        name: parts.get(name) for name in "abcdef" if parts.get(name)
    }


def test_no_part_waits_for_ever_behind_others_that_change_all_the_time() -> None:
    parts = Parts()
    reader = parts.reader(0)
    sent: set[str] = set()
    for turn in range(20):
        for name in "abcdef":
            parts.put(name, f"{turn:10d}")
        batch = reader.take(20)
        assert batch is not None
        sent |= set(batch.parts)
    assert sent == set("abcdef")


def test_a_number_from_nowhere_gets_everything() -> None:
    parts = Parts()
    parts.put("a", "1")
    assert parts.reader(99).dirty == {"a": None}
    assert parts.reader(1).dirty == {}


def test_nothing_is_told_without_the_token(ui: LiveUi) -> None:
    ui.take(make_report(["secret-node"], IMAGES))
    path = urlsplit(ui.url).path
    wrong = (
        "/",
        "/events",
        "/live.js",
        "/favicon.ico",
        f"{path[:-2]}/",
        f"{path[:-1]}x/",
        "//",
        "/é",
    )
    for place in wrong:
        status, headers, body = get(ui.url, place.replace("é", "%C3%A9"))
        assert status == 403, place
        assert "secret-node" not in body
        assert headers["Cache-Control"] == "no-store"
    assert get(ui.url)[0] == 200
    assert get(ui.url, f"{path}other")[0] == 404
    assert get(ui.url, path, "POST")[0] == 405
    status, headers, _ = get(ui.url, path[:-1])
    assert (status, headers["Location"]) == (308, path)
    assert len(path.strip("/")) >= 32


def test_two_runs_have_two_tokens() -> None:
    with LiveUi("127.0.0.1:0") as one, LiveUi("127.0.0.1:0") as other:
        assert urlsplit(one.url).path != urlsplit(other.url).path


def test_the_address_stays_in_the_browser_and_nothing_foreign_is_loaded(ui: LiveUi) -> None:
    ui.take(full_report("word"))
    for path in ("", "live.js"):
        _, headers, body = get(ui.url, urlsplit(ui.url).path + path)
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["X-Content-Type-Options"] == "nosniff"
        policy = dict(
            part.strip().partition(" ")[::2]
            for part in headers["Content-Security-Policy"].split(";")
        )
        assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == "'self'"
        assert not re.search(r"https?://(?!www\.w3\.org)", body)
    _, _, body = get(ui.url)
    page = Page(body)
    loaded = {value for _, name, value in page.attributes if name in ("src", "href")}
    assert {value for value in loaded if not value.startswith("#")} == {"live.js", "data:,"}
    assert not any(name.startswith("on") for _, name, _ in page.attributes)


@given(st.text(max_size=40) | st.just(HOSTILE))
def test_no_text_from_outside_becomes_markup(word: str) -> None:
    def drawn(word: str, end: str | None) -> Page:
        page = LivePage()
        page.take(full_report(word))
        page.see([Event(1.0, word, word, word, "blob", "downloading", 5, 10, started=1.0)])
        page.draw()
        if end is not None:
            page.end(end)
        return Page(page.html())

    for end in (None, "", word):
        plain, page = drawn("word", end and "word"), drawn(word, end)
        assert set(page.tags) == set(plain.tags)
        assert page.tags.count("script") == 1
        names = {name for _, name, _ in plain.attributes}
        assert {name for _, name, _ in page.attributes} <= names
        assert not any(character in page.words for character in "\x1b\u202e")


def test_a_browser_sees_the_run_go_on_and_end(ui: LiveUi) -> None:
    with watching(ui) as browser:
        assert browser.response.headers["Content-Type"].startswith("text/event-stream")
        browser.until("figures", "looking for nodes")
        report, events = working(4, 0.5)
        ui.take(report)
        ui.see(events)
        browser.until("figures", "50%")
        browser.until("row-3", "50%")
        assert "<progress" in browser.parts["bar"]
        browser.until("time", "worker-0003")
        ui.take(make_report([f"worker-{n:04d}" for n in range(4)], IMAGES))
        browser.until("row-3", "pulled")
        ui.close()
        while browser.read():
            pass
        assert browser.over
        assert "Every image is on every node" in browser.parts["final"]


def test_the_timeline_has_what_is_under_way_and_then_what_nodes_report() -> None:
    page = LivePage()
    report, events = working(2, 0.5)
    page.take(report)
    page.see(events)
    page.draw()
    drawn = page.parts.get("time")
    assert "fill-coming" in drawn
    assert "so far" in drawn
    page = LivePage()
    names = [node.name for node in report.nodes]
    page.take(make_report(names, IMAGES, spans=make_spans(names, 4)))
    page.see(events)
    page.draw()
    # The nodes' own word about a blob takes the place of what was heard of it.
    assert page.parts.get("time").count("<g ") == 2 + 4 + 4
    assert 'class="fill-coming" x=' not in page.parts.get("time")


def test_what_nodes_tell_of_a_blob_in_its_middle_goes_on_with_it() -> None:
    report, events = working(2, 0.5)
    name, other = (node.name for node in report.nodes)
    events = [event for event in events if event.node == name]
    (span,) = make_spans([name], 1)
    digest = f"sha256:{0:064x}"
    half = replace(span, digest=digest, first_byte=0.5, completed=None, staged=None)
    done = replace(span, digest=f"sha256:{9:064x}", staged=None)
    heard = LiveSpans()
    heard.see([event for event in events if event.id == digest], 100.0)
    began = 90.0
    spans, going = heard.merged(
        replace(report, spans=(half, done, replace(done, node=other))), began
    )
    assert going == {(name, digest)}
    assert {row.digest: row.by_source for row in spans}[digest] == span.by_source
    drawn = timelines(replace(report, spans=spans), going=Going(30.0, going))
    # Both the node's bar and the blob's go on until now, with bytes of whom it told.
    assert 'class="fill-origin" x=' in drawn
    assert f"{name}: 2 blobs" in drawn
    assert "so far 30 s" in drawn
    unpacking = re.findall(r'class="fill-unpack" x="[^"]*" y="[^"]*" width="([^"]*)"', drawn)
    assert unpacking == []
    ended = replace(events[0], status="done", current=8 * MIB)
    layer = replace(events[1], status="applied", current=8 * MIB)
    heard.see([ended, layer], 105.0)
    spans, going = heard.merged(
        replace(report, spans=(half, done, replace(done, node=other))), began
    )
    assert not going
    (last,) = [row for row in spans if row.digest == digest]
    assert (last.completed, last.staged) == (15.0, 15.0)


def test_who_comes_back_is_sent_what_is_new_and_nothing_else(ui: LiveUi) -> None:
    report, events = working(20, 0.25)
    ui.take(report)
    ui.see(events)
    with watching(ui) as browser:
        browser.until("figures", "25%")
        browser.until("row-19", "25%")
        version = browser.version
    changed = replace(report.nodes[7], state="dead", error=describe(NodeError("n", "gone")))
    nodes = (*report.nodes[:7], changed, *report.nodes[8:])
    ui.take(replace(report, nodes=nodes))
    with watching(ui, last_id=version) as again:
        again.until("row-7", "dead")
        assert [name for name in again.parts if name.startswith("row-")] == ["row-7"]


def test_a_page_begins_where_its_document_ends(ui: LiveUi) -> None:
    report, events = working(20, 0.25)
    ui.take(report)
    ui.see(events)
    _, _, body = get(ui.url)
    assert body.count("<tr data-row=") == 20
    assert "<title>25% · Pre-warm</title>" in body
    found = re.search(r'data-version="(\d+)"', body)
    assert found
    with watching(ui, since=int(found[1])) as browser:
        ui.see(working(20, 0.75)[1])
        browser.until("figures", "75%")
        assert "matrix" not in browser.parts


def test_a_thousand_nodes_make_few_and_small_messages(ui: LiveUi) -> None:
    report, _ = working(1000, 0.0)
    ui.take(report)
    began = time.monotonic()
    with watching(ui) as browser:
        for turn in range(1, 21):
            ui.see(working(1000, turn / 21)[1])
            ui.take(replace(report, seconds=float(turn)))
        browser.until("figures", "95%")
        browser.until("row-999", "95%")
    seconds = browser.messages[-1][0] - began
    assert len(browser.messages) <= seconds / QUICK.frame_seconds + 2
    largest = max(
        size for _, size, parts in browser.messages if len(parts) > 1 or "time" not in parts
    )
    # JSON puts a backslash before each quotation mark.
    assert largest < 2 * MESSAGE_BYTES
    status, _, body = get(ui.url)
    assert status == 200
    assert body.count("<tr data-row=") == 1000
    assert len(body) < MIB


def test_ten_thousand_nodes_do_not_make_a_larger_page() -> None:
    page = LivePage()
    report, events = working(ROWS_LIMIT * 10, 0.5)
    late = replace(report.nodes[-1], state="failed", error=describe(NodeError("n", "no room")))
    page.take(replace(report, nodes=(*report.nodes[:-1], late)))
    page.see(events)
    page.draw()
    body = page.html()
    assert body.count("<tr data-row=") == ROWS_LIMIT
    assert report.nodes[-1].name in page.parts.get("row-0")
    assert len(body) < MIB


def test_nodes_that_leave_and_another_run_leave_no_rows_behind() -> None:
    page = LivePage()
    page.take(working(5, 0.5)[0])
    page.draw()
    page.take(working(2, 0.5, run="another")[0])
    page.draw()
    assert page.html().count("<tr data-row=") == 2
    assert page.parts.get("row-4") == ""


def test_nothing_is_drawn_for_nobody_and_the_run_only_leaves_word() -> None:
    page = LivePage()
    report, events = working(100, 0.5)
    for _ in range(10):
        page.take(report)
        page.see(events)
    assert page.parts.version == 0


def test_a_browser_that_hangs_is_dropped_and_hinders_nobody() -> None:
    limits = replace(QUICK, streams=2, stall_seconds=0.3)
    with LiveUi("127.0.0.1:0", limits=limits) as ui:
        address = urlsplit(ui.url)
        hung = socket.create_connection((address.hostname, address.port), timeout=SECONDS)
        hung.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        request = f"GET {address.path}events HTTP/1.1\r\nHost: x\r\n\r\n"
        hung.sendall(request.encode())
        with watching(ui) as browser:
            browser.read()
            # Both places are taken until the one that reads nothing has been hung up on.
            assert stream_status(ui) == 503
            turn = 0
            while (status := stream_status(ui)) != 200:
                assert status == 503
                for _ in range(20):
                    turn += 1
                    names = [f"{turn}-{'x' * 500}-{number}" for number in range(200)]
                    ui.take(make_report(names, IMAGES[:1], run=str(turn)))
                    browser.until("row-199", f"{turn}-")
        hung.close()


def test_a_hung_browser_does_not_keep_the_command_from_ending() -> None:
    ui = LiveUi("127.0.0.1:0", limits=replace(QUICK, farewell_seconds=0.1, stall_seconds=3600.0))
    ui.start()
    address = urlsplit(ui.url)
    with socket.create_connection((address.hostname, address.port)) as hung:
        hung.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        hung.sendall(f"GET {address.path}events HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        with watching(ui) as browser:
            for turn in range(6):
                names = [f"{turn}-{'x' * 900}-{number}" for number in range(900)]
                ui.take(make_report(names, IMAGES[:1], run=str(turn)))
                browser.until("row-899", f"{turn}-")
            thread = ui._thread
            ui.close()
            assert thread
            assert not thread.is_alive()


def test_a_port_that_is_taken_is_told_before_anything_begins(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(UsageError):
            LiveUi(taken)
        assert run(["prewarm", "a/b:1", "--ui", taken]) == 2
    assert "another program listens there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "listen", ["0.0.0.0:0", "[::]:0", "0:0", "host:99999", "[::1:0", "no.such.host.invalid:0"]
)
def test_an_address_that_is_none_or_all_is_refused(listen: str) -> None:
    assert run(["-q", "prewarm", "a/b:1", "--ui", listen]) == 2


@pytest.mark.parametrize("listen", ["", "0", ":0", "127.0.0.1"])
def test_what_is_left_out_is_loopback_and_a_free_port(listen: str) -> None:
    with LiveUi(listen) as ui:
        assert ui.url.startswith("http://127.0.0.1:")
        assert ui.is_loopback


def _running(report: PrewarmReport, error: Exception | None = None, **options: object) -> Browser:
    """Carry out a scripted run with the page open, and return the browser that saw its end."""
    context = Context()
    context.merge({"progress": "none", **options})
    browser = None
    try:
        with Running(context, ui="127.0.0.1:0") as running:
            scripted = ScriptedRun([report], running.progress)
            scripted.gate.set()
            running.take(scripted)
            assert running._ui
            browser = Browser(running._ui.url)
            browser.read()
            scripted.run(running.cancelled)
            if error is not None:
                raise error
    except NodeError:
        assert error is not None
    assert browser is not None
    while browser.read():
        pass
    browser.close()
    return browser


def test_the_page_of_a_command_ends_with_its_report(capsys: pytest.CaptureFixture[str]) -> None:
    browser = _running(make_report(["a", "b"], IMAGES), quiet=True)
    assert browser.over
    assert "Every image is on every node" in browser.parts["final"]
    # Also with -q: nobody else could tell where the page is.
    assert "live page at http://127.0.0.1:" in capsys.readouterr().err


def test_the_page_of_a_run_without_a_report_says_why() -> None:
    error = NodeError("head", "<b>the head</b> is dead")
    browser = _running(make_report(["a", "b"], IMAGES, status="working"), error)
    assert browser.over
    assert "final" not in browser.parts
    assert "&lt;b&gt;the head&lt;/b&gt; is dead" in browser.parts["verdict"]


def test_the_address_is_a_field_of_a_log_line(capsys: pytest.CaptureFixture[str]) -> None:
    _running(make_report(["a"], IMAGES), log_json=True)
    line = json.loads(capsys.readouterr().err.splitlines()[0])
    assert line["event"] == "ui"
    assert line["url"] in line["message"]


def test_a_page_on_the_network_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: it only asks which address of this machine would be used.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("no address but loopback here")
        own = probe.getsockname()[0]
    context = Context()
    context.merge({"progress": "none"})
    with Running(context, ui=f"{own}:0"):
        pass
    assert "unencrypted" in capsys.readouterr().err
