"""Pulls as OpenTelemetry spans, for whoever runs a collector: ``pip install stowray[otel]``.

Spans are exported when the standard variables say so: ``OTEL_TRACES_EXPORTER`` (``otlp`` or
``console``) or an ``OTEL_EXPORTER_OTLP_ENDPOINT``; ``OTEL_SDK_DISABLED`` and the exporter ``none``
turn them off, ``TRACEPARENT`` names the parent. Invariant: made from the record after the work has
ended, so that no collector holds up a pull or fails it; attributes are names, digests and sizes.
https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from stowray import __version__
from stowray.pipeline.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span as OpenSpan
    from opentelemetry.trace import Tracer

    from stowray.pipeline.run_record import Run, RunRecord, Span

_NAMES = {
    "resolve": "resolve",
    "manifest": "fetch manifest",
    "blob": "fetch blob",
    "layer": "apply layer",
    "commit": "commit snapshot",
}
# What the queue of a BatchSpanProcessor holds unless OTEL_BSP_MAX_QUEUE_SIZE says otherwise.
QUEUE = 2048
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def wanted(environment: Mapping[str, str]) -> bool:
    """Return whether the environment asks for spans; imports nothing."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    exporter = environment.get("OTEL_TRACES_EXPORTER", "")
    if exporter:
        return exporter != "none"
    return any(environment.get(name) for name in _ENDPOINTS)


def export(
    runs: Sequence[Run],
    started: float,
    *,
    environment: Mapping[str, str] = os.environ,
    exporter: SpanExporter | None = None,
) -> None:
    """Send the spans of ``runs``, whose times count from ``started`` (wall-clock seconds).

    Raises UsageError when what the environment asks for is not installed.
    """
    count = sum(1 + len(run.spans) for run in runs)
    with tracing(environment, exporter, count) as (tracer, parent):
        for run in runs:
            _export_run(tracer, run, started, parent)


def export_bench(
    record: RunRecord,
    *,
    environment: Mapping[str, str] = os.environ,
    exporter: SpanExporter | None = None,
) -> None:
    """Send the spans of a benchmark: one for all of it, its pulls inside; see :func:`export`."""
    from opentelemetry import trace

    count = 1 + sum(1 + len(run.spans) for run in record.runs)
    with tracing(environment, exporter, count) as (tracer, parent):
        whole = tracer.start_span(
            record.kind,
            context=parent,
            attributes={"stowray.runs": len(record.runs)},
            start_time=nanoseconds(record.started),
        )
        inside = trace.set_span_in_context(whole)
        for run in record.runs:
            _export_run(tracer, run, record.started, inside)
        end = max((run.started + run.seconds for run in record.runs), default=0.0)
        whole.end(nanoseconds(record.started + end))


@contextmanager
def tracing(
    environment: Mapping[str, str], exporter: SpanExporter | None = None, count: int = 0
) -> Iterator[tuple[Tracer, Any]]:
    """Yield a tracer and the parent that the environment names; all is sent at the end.

    ``count`` is how many spans there will be at most: what a queue has no room for is dropped.
    """
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError as error:
        raise UsageError(
            "OTEL_*", "OpenTelemetry is not installed: pip install stowray[otel]"
        ) from error

    resource = Resource.create({"service.version": __version__, **_service(environment)})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(
        BatchSpanProcessor(
            exporter or _exporter(environment), max_queue_size=max(count, QUEUE) if count else None
        )
    )
    tracer = provider.get_tracer("stowray", __version__)
    carrier = {
        name.lower(): environment[name]
        for name in ("TRACEPARENT", "TRACESTATE")
        if name in environment
    }
    parent = TraceContextTextMapPropagator().extract(carrier)
    try:
        yield tracer, parent
    finally:
        provider.shutdown()


def _service(environment: Mapping[str, str]) -> dict[str, str]:
    return {} if environment.get("OTEL_SERVICE_NAME") else {"service.name": "stowray"}


def _exporter(environment: Mapping[str, str]) -> SpanExporter:
    kind = environment.get("OTEL_TRACES_EXPORTER") or "otlp"
    if kind == "console":
        import sys

        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter(out=sys.stderr)
    if kind != "otlp":
        raise UsageError("OTEL_TRACES_EXPORTER", f"{kind!r} is none of otlp, console, none")
    protocol = environment.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    if protocol != "http/protobuf":
        raise UsageError("OTEL_EXPORTER_OTLP_PROTOCOL", f"{protocol!r} is not http/protobuf")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise UsageError("OTEL_*", "no OTLP exporter here: pip install stowray[otel]") from error
    made: SpanExporter = OTLPSpanExporter()
    return made


def _export_run(tracer: Tracer, run: Run, started: float, parent: Any) -> None:
    from opentelemetry import trace

    attributes: dict[str, str | int] = {"container.image.name": run.reference}
    if run.mode != "pull":
        attributes |= {"stowray.mode": run.mode, "stowray.number": run.number}
        # The clock of a benchmark's pull began with its process.
        origin = started + run.started
    else:
        origin = started
    if run.result is not None:
        attributes |= {
            "oci.manifest.digest": run.result["digest"],
            "stowray.platform": run.result["platform"],
            "stowray.engine": run.result["engine"],
            "stowray.fetched_bytes": run.result["fetched_bytes"],
        }
    whole = tracer.start_span(
        "pull",
        context=parent,
        attributes=attributes,
        start_time=nanoseconds(started + run.started),
    )
    if run.error is not None:
        fail(whole, str(run.error["type"]), str(run.error["message"]))
    inside = trace.set_span_in_context(whole)
    for part in run.spans:
        if part.kind in _NAMES:
            _export_part(tracer, part, origin, inside)
    whole.end(nanoseconds(started + run.started + run.seconds))


def _export_part(tracer: Tracer, part: Span, started: float, parent: Any) -> None:
    span = tracer.start_span(
        _NAMES[part.kind],
        context=parent,
        attributes={
            "stowray.id": part.id,
            "stowray.size": part.total,
            "stowray.status": part.status,
            "stowray.retries": part.retries,
            "host.name": part.node,
        },
        start_time=nanoseconds(started + part.active),
    )
    for moment, current, status in part.samples:
        if status == "retrying":
            span.add_event("retry", {"stowray.size": current}, nanoseconds(started + moment))
    if part.status == "failed":
        fail(span, "failed", part.error)
    span.end(nanoseconds(started + part.end))


def fail(span: OpenSpan, kind: str, text: str) -> None:
    """Give a span the status of an error of class ``kind``."""
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR, text))


def nanoseconds(seconds: float) -> int:
    """Return a time as OpenTelemetry counts it."""
    return int(seconds * 1e9)
