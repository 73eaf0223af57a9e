from __future__ import annotations

import io
import pickle
from dataclasses import replace

import lz4.frame
import msgpack
import pytest

from stowray.pipeline.clock import Clock
from stowray.pipeline.errors import UsageError
from stowray.pipeline.progress import Progress
from stowray.pipeline.run_record import SAMPLES, Recorder, Run, RunRecord, Span

SPAN = Span(
    "host/a:1", "n1", "sha256:aa", "blob", "done", 10, 0.5, 2.0, "", ((1.0, 4, "downloading"),), 1
)
RESULT = {"seconds": {"total": 1.5}, "fetched_bytes": 10, "manifest_requests": 1}
RECORD = RunRecord(
    "bench",
    "0.1.0",
    1000.0,
    {"processors": 2},
    {"runs": 1},
    (
        Run("host/a:1", "cold", 1, 0.0, 1.5, RESULT, None, {"seconds": 1.7}, (SPAN,)),
        Run("host/a:1", "cold", 2, 2.0, 0.1, None, {"message": "gone"}),
    ),
)


def document() -> dict:
    return msgpack.unpackb(lz4.frame.decompress(RECORD.to_bytes()))


def packed(changed: object) -> bytes:
    return lz4.frame.compress(msgpack.packb(changed), content_checksum=True)


def test_what_is_written_is_read(tmp_path) -> None:
    path = tmp_path / "a.run"
    RECORD.write(path)
    assert RunRecord.read(path) == RECORD


def test_the_form_is_msgpack_in_an_lz4_frame() -> None:
    made = document()
    assert made["format"] == "stowray-run"
    assert made["form"] == 1
    assert made["runs"][0]["spans"][0]["samples"] == [[1.0, 4, "downloading"]]


def test_a_record_that_counts_no_retries_is_read() -> None:
    made = document()
    del made["runs"][0]["spans"][0]["retries"]
    assert RunRecord.from_bytes(packed(made), "x").runs[0].spans[0].retries == 0


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"plain text", id="text"),
        pytest.param(RECORD.to_bytes()[:-6], id="cut off"),
        pytest.param(
            RECORD.to_bytes()[:40] + b"\0" + RECORD.to_bytes()[41:], id="one byte changed"
        ),
        pytest.param(pickle.dumps(RECORD), id="a pickle"),
        pytest.param(lz4.frame.compress(b"\xc1"), id="no msgpack"),
        pytest.param(packed([1]), id="no map"),
        pytest.param(packed({"format": "other", "form": 1}), id="another format"),
    ],
)
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(UsageError, match="not a run record"):
        RunRecord.from_bytes(data, "x")


def test_a_record_of_a_later_form_says_so() -> None:
    with pytest.raises(UsageError, match="form 2; this stowray reads 1"):
        RunRecord.from_bytes(packed({**document(), "form": 2}), "x")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("started",), float("nan")),
        (("started",), "x"),
        (("machine",), []),
        (("runs",), 5),
        (("runs", 0, "reference"), 7),
        (("runs", 0, "seconds"), -1.0),
        (("runs", 0, "result", "seconds"), {"total": "<script>"}),
        (("runs", 0, "result", "fetched_bytes"), None),
        (("runs", 0, "process"), {"seconds": []}),
        (("runs", 0, "spans", 0, "total"), "many"),
        (("runs", 0, "spans", 0, "samples"), [[1, 2]]),
        (("runs", 0, "spans", 0, "completed"), True),
    ],
)
def test_a_field_of_another_type_is_damage(place: tuple, value: object) -> None:
    made = document()
    inner = made
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    with pytest.raises(UsageError, match="damaged"):
        RunRecord.from_bytes(packed(made), "x")


def test_a_frame_that_swells_is_cut_at_the_limit(monkeypatch) -> None:
    monkeypatch.setattr("stowray.pipeline.run_record.DOCUMENT_LIMIT", 1 << 20)
    bomb = io.BytesIO()
    with lz4.frame.LZ4FrameFile(bomb, "wb") as frame:
        for _ in range(8):
            frame.write(bytes(1 << 20))
    with pytest.raises(UsageError, match="not a run record"):
        RunRecord.from_bytes(bomb.getvalue(), "x")


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def clock(self) -> Clock:
        return Clock(monotonic=lambda: self.now, wall=lambda: self.now)


def test_the_recorder_keeps_when_what_happened() -> None:
    time = Time()
    recorder = Recorder(time.clock())
    progress = Progress(node="n1", clock=time.clock())
    report = progress.reporter("host/a:1")
    for moment, status, current in (
        (101.0, "waiting", 0),
        (102.5, "downloading", 4),
        (104.0, "done", 10),
    ):
        time.now = moment
        report("blob", "sha256:aa", status, current, 10)
        recorder(progress.events())
    (span,) = recorder.spans("host/a:1")
    assert (span.started, span.active, span.end) == (1.0, 2.5, 4.0)
    assert (span.status, span.total, span.node) == ("done", 10, "n1")
    assert span.samples == ((1.0, 0, "waiting"), (2.5, 4, "downloading"), (4.0, 10, "done"))
    assert recorder.spans("another") == ()


def test_a_long_span_keeps_its_ends_and_thins_out_between() -> None:
    time = Time()
    recorder = Recorder(time.clock())
    progress = Progress(clock=time.clock())
    for step in range(SAMPLES * 3):
        time.now += 1
        progress.record("a", "blob", "x", "downloading", step)
        recorder(progress.events())
    (span,) = recorder.spans()
    assert len(span.samples) <= SAMPLES
    assert span.samples[0][1] == 0
    assert span.samples[-1][1] == SAMPLES * 3 - 1
    moments = [moment for moment, _, _ in span.samples]
    assert moments == sorted(moments)


def test_what_never_ended_ends_where_it_was_last_heard_of() -> None:
    open_span = replace(SPAN, completed=None, samples=((0.6, 1, "downloading"), (3.0, 2, "x")))
    assert open_span.end == 3.0
    assert replace(open_span, samples=()).end == 0.5
