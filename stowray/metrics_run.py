"""What a pre-warm run, a benchmark and a look of ``doctor`` add to the figures.

Invariant: nodes are counted by state and never named; other nodes as sources are one label.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from stowray.pipeline.bench_summary import STAGES, stage_of
from stowray.pipeline.prewarm_rows import CELL_STATUSES, NODE_STATES, origin_and_peer_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stowray.doctor import Finding
    from stowray.metrics import Metrics
    from stowray.pipeline.prewarm_report import PrewarmReport
    from stowray.pipeline.run_record import RunRecord


def count_run(metrics: Metrics, report: PrewarmReport) -> None:
    """Count a run that has ended."""
    ended = "interrupted" if report.interrupted else "failed" if report.exit_code else "done"
    metrics.add("stowray_prewarm_runs_total", 1, result=ended)
    metrics.add("stowray_prewarm_duration_seconds_sum", report.seconds)
    metrics.add("stowray_prewarm_duration_seconds_count", 1)
    metrics.add("stowray_manifest_requests_total", report.manifest_requests)
    states = Counter(node.state for node in report.nodes)
    # All of them each time: a state that nobody is in any more must not stay in the file.
    for state in NODE_STATES:
        metrics.set("stowray_prewarm_nodes", states[state], state=state)
    statuses = Counter(cell.status for cell in report.cells)
    for status in CELL_STATUSES:
        metrics.set("stowray_prewarm_images", statuses[status], status=status)
    for span in report.spans:
        _, peers = origin_and_peer_bytes(span.by_source)
        if peers:
            metrics.add("stowray_prewarm_bytes_total", peers, source="nodes")
        for source, size in span.by_source.items():
            if origin_and_peer_bytes({source: size})[0]:
                metrics.fetched("stowray_prewarm_bytes_total", size, source)
        for stage, seconds in (("fetch", span.fetch_seconds), ("apply", span.apply_seconds)):
            if seconds:
                metrics.add("stowray_prewarm_blob_seconds_sum", seconds, stage=stage)
                metrics.add("stowray_prewarm_blob_seconds_count", 1, stage=stage)
    for remark in report.remarks:
        metrics.add("stowray_prewarm_remarks_total", 1, kind=remark.kind)
    errors = [cell.error for cell in report.cells if cell.error is not None]
    seen = {cell.node for cell in report.cells}
    errors += [node.error for node in report.nodes if node.error and node.name not in seen]
    for error in errors:
        metrics.add("stowray_failures_total", 1, type=str(error["type"]))


def count_bench(metrics: Metrics, record: RunRecord) -> None:
    """Count the pulls of a benchmark by registry and mode; those into empty stores are ``cold``."""
    for run in record.runs:
        about = {"registry": _registry(run.reference), "mode": run.mode}
        if run.error is not None:
            metrics.add("stowray_bench_pulls_total", 1, result="failed", **about)
            metrics.add("stowray_failures_total", 1, type=str(run.error.get("type", "")))
            continue
        metrics.add("stowray_bench_pulls_total", 1, result="done", **about)
        for stage in STAGES:
            seconds = stage_of(run, stage)
            if seconds is not None:
                metrics.add("stowray_bench_duration_seconds_sum", seconds, stage=stage, **about)
                metrics.add("stowray_bench_duration_seconds_count", 1, stage=stage, **about)


def _registry(text: str) -> str:
    """Return the host of a reference; images on disk are all one."""
    from stowray.pipeline.reference import Reference, wire_host
    from stowray.pipeline.source import parse_source

    source = parse_source(text)
    return wire_host(source.registry) if isinstance(source, Reference) else "disk"


def count_findings(metrics: Metrics, findings: Iterable[Finding]) -> None:
    """Set how many findings of a look are of which state."""
    states = Counter(finding.state for finding in findings)
    for state in ("ok", "warn", "problem"):
        metrics.set("stowray_doctor_findings", states[state], state=state)
