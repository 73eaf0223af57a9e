"""A pre-warm run as OpenTelemetry spans: the run, its nodes, and the blobs of the slowest of them.

Invariant: made from the report after the run has ended, and bounded: exporters drop what a queue
has no room for, and then nobody knows what. Attributes are names, digests and sizes.
"""

from __future__ import annotations

import os
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from stowray.spans import fail, nanoseconds, tracing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer

    from stowray.pipeline.prewarm_report import PrewarmReport
    from stowray.pipeline.prewarm_rows import BlobSpan, NodeRow

# Together fewer than stowray.spans.QUEUE.
NODES: Final = 1000
BLOBS: Final = 800


def export_run(
    report: PrewarmReport,
    *,
    environment: Mapping[str, str] = os.environ,
    exporter: SpanExporter | None = None,
) -> None:
    """Send the spans of a run.

    Raises UsageError when what the environment asks for is not installed.
    """
    from opentelemetry import trace

    began = datetime.fromisoformat(report.started).timestamp()
    with tracing(environment, exporter) as (tracer, parent):
        whole = tracer.start_span(
            report.command,
            context=parent,
            attributes={
                "stowray.run": report.run,
                "stowray.nodes": len(report.nodes),
                "stowray.images": len(report.images),
                "stowray.origin_bytes": report.origin_bytes,
                "stowray.peer_bytes": report.peer_bytes,
                "stowray.exit_code": report.exit_code,
            },
            start_time=nanoseconds(began),
        )
        if report.exit_code:
            fail(whole, "failed", f"exit status {report.exit_code}")
        inside = trace.set_span_in_context(whole)
        _export_nodes(tracer, report, began, inside)
        whole.end(nanoseconds(began + report.seconds))


def _export_nodes(tracer: Tracer, report: PrewarmReport, began: float, parent: Any) -> None:
    from opentelemetry import trace

    by_node: dict[str, list[BlobSpan]] = {node.name: [] for node in report.nodes}
    for span in report.spans:
        if span.started is not None:
            by_node.setdefault(span.node, []).append(span)
    ends = {name: max(map(_end, spans), default=0.0) for name, spans in by_node.items()}
    slowest = sorted(report.nodes, key=lambda node: (node.error is None, -ends[node.name]))
    left = BLOBS
    for node in slowest[:NODES]:
        spans = by_node[node.name]
        start = min((span.started or 0.0 for span in spans), default=0.0)
        own = tracer.start_span(
            "prewarm node",
            context=parent,
            attributes=_about(node, spans),
            start_time=nanoseconds(began + start),
        )
        if node.error is not None:
            fail(own, str(node.error["type"]), str(node.error["message"]))
        inside = trace.set_span_in_context(own)
        for span in spans[:left]:
            _export_blob(tracer, span, began, inside)
        left -= len(spans[:left])
        own.end(nanoseconds(began + max(start, ends[node.name])))


def _export_blob(tracer: Tracer, span: BlobSpan, began: float, parent: Any) -> None:
    blob = tracer.start_span(
        "fetch blob",
        context=parent,
        attributes={
            "stowray.id": span.digest,
            "stowray.size": span.size,
            "stowray.source": max(span.by_source, key=span.by_source.__getitem__, default="store"),
            "host.name": span.node,
        },
        start_time=nanoseconds(began + (span.started or 0.0)),
    )
    if span.first_byte is not None:
        blob.add_event("first byte", {}, nanoseconds(began + span.first_byte))
    if span.staged is not None:
        blob.add_event("unpacked", {}, nanoseconds(began + span.staged))
    blob.end(nanoseconds(began + _end(span)))


def _about(node: NodeRow, spans: list[BlobSpan]) -> dict[str, str | int]:
    return {
        "host.name": node.name,
        "stowray.status": node.state,
        "stowray.blobs": len(spans),
        "stowray.size": sum(span.size for span in spans),
    }


def _end(span: BlobSpan) -> float:
    times = (span.started, span.first_byte, span.completed, span.staged)
    return max((moment for moment in times if moment is not None), default=0.0)
