"""A run record in the Trace Event Format, which Perfetto and chrome://tracing open.

One process per run, one track per blob, layer and commit, and a counter of bytes received. Times
are microseconds since the record's start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stowray.pipeline.errors import escape
from stowray.trace_rows import NAMES, title_of, track_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stowray.pipeline.run_record import Run, RunRecord, Span


def trace_document(record: RunRecord) -> dict[str, Any]:
    """Return the document; JSON objects of the format's phases ``M``, ``X`` and ``C``."""
    events: list[dict[str, Any]] = []
    for pid, run in enumerate(record.runs, 1):
        events += _run_events(pid, run)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"stowray": record.version, "kind": record.kind, **_flat(record.machine)},
    }


def _run_events(pid: int, run: Run) -> Iterator[dict[str, Any]]:
    # A benchmark's pull has a clock of its own, which began when its process did.
    offset = run.started if run.mode != "pull" else 0.0
    name = f"{title_of(run)} {escape(run.reference)}"
    yield _meta(pid, 0, "process_name", name=name)
    yield {"ph": "M", "pid": pid, "name": "process_sort_index", "args": {"sort_index": pid}}
    for tid, span in enumerate(run.spans, 1):
        yield _meta(pid, tid, "thread_name", name=track_of(span))
        yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index"} | {
            "args": {"sort_index": tid}
        }
        if span.active > span.started:
            yield _slice(pid, tid, span, "waiting", offset, (span.started, span.active))
        yield _slice(
            pid, tid, span, NAMES.get(span.kind, span.kind), offset, (span.active, span.end)
        )
    yield from _received(pid, run, offset)


def _slice(
    pid: int, tid: int, span: Span, name: str, offset: float, times: tuple[float, float]
) -> dict[str, Any]:
    begun, ended = times
    return {
        "ph": "X",
        "pid": pid,
        "tid": tid,
        "name": name,
        "cat": span.kind,
        "ts": round((offset + begun) * 1e6),
        "dur": max(0, round((ended - begun) * 1e6)),
        "args": {
            "id": span.id,
            "status": span.status,
            "bytes": span.total,
            "node": span.node,
            "retries": span.retries,
            **({"error": span.error} if span.error else {}),
        },
    }


def _received(pid: int, run: Run, offset: float) -> Iterator[dict[str, Any]]:
    """Yield the bytes of all blobs together whenever one has grown."""
    steps = sorted(
        (moment, index, current)
        for index, span in enumerate(run.spans)
        if span.kind == "blob" and span.status != "exists"
        for moment, current, _ in span.samples
    )
    at: dict[int, int] = {}
    for moment, index, current in steps:
        at[index] = current
        yield {
            "ph": "C",
            "pid": pid,
            "name": "received",
            "ts": round((offset + moment) * 1e6),
            "args": {"bytes": sum(at.values())},
        }


def _meta(pid: int, tid: int, kind: str, **arguments: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "name": kind, "args": arguments}


def _flat(machine: dict[str, Any]) -> dict[str, Any]:
    return {f"machine.{name}": value for name, value in machine.items()}
