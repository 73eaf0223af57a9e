"""Figures of pulls and of a mirror in Prometheus' text format.

Names follow https://prometheus.io/docs/practices/naming/: base units, ``_total`` for counters. In a
file (for node_exporter's textfile collector) counters go on from what the file says, so that
``rate()`` holds over runs. Invariant: labels hold host names, stages and classes only, no
reference, path or URL: nothing secret, and few of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import threading
import time
from typing import TYPE_CHECKING, Any

from stowray import __version__
from stowray.pipeline.files import replace_file, translated
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from stowray.pipeline.progress import Event, Key
    from stowray.pipeline.serve_limits import Served
    from stowray.pipeline.store import Store

_SAMPLE = re.compile(r"(stowray_\w+)(\{[^\n]*\})? ([0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]{1,3})?)")

Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Family:
    kind: str
    text: str


_FAMILIES = {
    "stowray_build_info": _Family("gauge", "The version of stowray, as a label; always 1."),
    "stowray_pulls_total": _Family("counter", "References pulled, by how it ended."),
    "stowray_fetched_bytes_total": _Family("counter", "Bytes of layers, by where they came from."),
    "stowray_manifest_requests_total": _Family("counter", "Requests to registries for documents."),
    "stowray_retries_total": _Family("counter", "Times that a blob was asked for again."),
    "stowray_failures_total": _Family("counter", "References that failed, by class of the error."),
    "stowray_stage_duration_seconds": _Family("summary", "How long each stage of a pull took."),
    "stowray_last_run_timestamp_seconds": _Family("gauge", "When a run last ended."),
    "stowray_prewarm_runs_total": _Family("counter", "Pre-warm runs, by how they ended."),
    "stowray_prewarm_duration_seconds": _Family("summary", "How long pre-warm runs took."),
    "stowray_prewarm_nodes": _Family("gauge", "Nodes of the last pre-warm run, by state."),
    "stowray_prewarm_images": _Family("gauge", "Images on nodes of the last run, by status."),
    "stowray_prewarm_bytes_total": _Family("counter", "Bytes that came to nodes, by source."),
    "stowray_prewarm_blob_seconds": _Family("summary", "How long blobs took on nodes, by stage."),
    "stowray_prewarm_remarks_total": _Family("counter", "Remarks of nodes on sources, by kind."),
    "stowray_bench_pulls_total": _Family("counter", "Pulls measured, by registry and mode."),
    "stowray_bench_duration_seconds": _Family("summary", "How long stages of measured pulls took."),
    "stowray_doctor_findings": _Family("gauge", "Findings of the last look, by state."),
    "stowray_served_requests_total": _Family("counter", "Requests answered, by method and code."),
    "stowray_served_bytes_total": _Family("counter", "Bytes of bodies of complete answers."),
    "stowray_served_cut_total": _Family("counter", "Answers that were cut off."),
    "stowray_store_size_bytes": _Family("gauge", "Bytes of the blobs in the store."),
    "stowray_store_blobs": _Family("gauge", "Blobs in the store."),
    "stowray_store_references": _Family("gauge", "References in the store."),
    "stowray_store_free_bytes": _Family("gauge", "Bytes free on the disk of the store."),
}


class Metrics:
    """Counters and gauges by name and labels; may be fed from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[str, Labels], float] = {}
        self._retries: dict[Key, int] = {}
        self.set("stowray_build_info", 1, version=__version__)

    def add(self, name: str, value: float, **labels: str) -> None:
        """Let a counter rise by ``value``."""
        key = name, tuple(sorted(labels.items()))
        with self._lock:
            self._values[key] = self._values.get(key, 0) + value

    def set(self, name: str, value: float, **labels: str) -> None:
        """Give a gauge its present value."""
        with self._lock:
            self._values[name, tuple(sorted(labels.items()))] = value

    def watch(self, events: Sequence[Event]) -> None:
        """Count the retries that progress events tell of."""
        for event in events:
            counted = self._retries.get(event.key, 0)
            if event.retries > counted:
                self._retries[event.key] = event.retries
                self.add("stowray_retries_total", event.retries - counted)

    def pulled(self, result: dict[str, Any]) -> None:
        """Count a result line."""
        self.add("stowray_pulls_total", 1, result="done")
        self.add("stowray_manifest_requests_total", result["manifest_requests"])
        for layer in result["layers"]:
            if layer["fetched_bytes"]:
                self.fetched("stowray_fetched_bytes_total", layer["fetched_bytes"], layer["source"])
        for stage, seconds in result["seconds"].items():
            self.add("stowray_stage_duration_seconds_sum", seconds, stage=stage)
            self.add("stowray_stage_duration_seconds_count", 1, stage=stage)

    def fetched(self, name: str, size: int, source: str) -> None:
        """Count bytes from a registry's host, or from a path, which is not told."""
        self.add(name, size, source=_host(source))

    def failed(self, kind: str) -> None:
        """Count a reference that failed with an error of class ``kind``."""
        self.add("stowray_pulls_total", 1, result="failed")
        self.add("stowray_failures_total", 1, type=kind)

    def served(self, answer: Served) -> None:
        """Count an answered request of the mirror."""
        method = answer.method if answer.method in ("GET", "HEAD") else "other"
        self.add("stowray_served_requests_total", 1, method=method, code=str(answer.status))
        if not answer.complete:
            self.add("stowray_served_cut_total", 1)
        elif answer.method == "GET":
            self.add("stowray_served_bytes_total", answer.length)

    def measure(self, store: Store) -> None:
        """Set the gauges of a store."""
        sizes = list(_blob_sizes(store.path / "blobs" / "sha256"))
        self.set("stowray_store_blobs", len(sizes))
        self.set("stowray_store_size_bytes", sum(sizes))
        self.set("stowray_store_references", len(store.references()))
        free = os.statvfs(store.path)
        self.set("stowray_store_free_bytes", free.f_bavail * free.f_frsize)

    def text(self) -> str:
        """Return everything in the text exposition format."""
        with self._lock:
            values = sorted(self._values.items())
        lines: list[str] = []
        for name, family in _FAMILIES.items():
            own = [(key, value) for key, value in values if _family(key[0]) == name]
            if own:
                lines += [f"# HELP {name} {family.text}", f"# TYPE {name} {family.kind}"]
                lines += [f"{key}{_labels(labels)} {value:.17g}" for (key, labels), value in own]
        return "\n".join(lines) + "\n"

    def write(self, path: Path) -> None:
        """Put everything at ``path``, counters on top of those that the file has already.

        Runs that end at the same time take turns; whoever reads sees the old file or the new one.
        """
        from stowray.pipeline.run_record import file_mode

        self.set("stowray_last_run_timestamp_seconds", time.time())
        turn = path.with_name(f".{path.name}.lock")
        with translated(path, "write the metrics"), open(turn, "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                self._go_on_from(path.read_text(encoding="utf-8", errors="replace"))
            replace_file(path, self.text().encode(), mode=file_mode())

    def _go_on_from(self, before: str) -> None:
        for line in before.splitlines():
            found = _SAMPLE.fullmatch(line)
            if found is None or _FAMILIES.get(_family(found[1]), _GAUGE).kind == "gauge":
                continue
            labels = dict(re.findall(r'(\w+)="([^"\\]*)"', found[2] or ""))
            self.add(found[1], float(found[3]), **labels)


_GAUGE = _Family("gauge", "")


def _family(sample: str) -> str:
    for suffix in ("_sum", "_count"):
        if sample.removesuffix(suffix) in _FAMILIES:
            return sample.removesuffix(suffix)
    return sample


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    escaped = (
        (name, value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n"))
        for name, value in labels
    )
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}"


def _host(source: str) -> str:
    """Return a source without a path: archives on disk are all one."""
    return "disk" if source.startswith("/") else re.sub(r'["\\\s]', "_", source)


def _blob_sizes(folder: Path) -> Iterable[int]:
    try:
        with os.scandir(folder) as entries:
            yield from _sizes(entries)
    except FileNotFoundError:
        return


def _sizes(entries: Iterator[os.DirEntry[str]]) -> Iterator[int]:
    for entry in entries:
        try:
            yield entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            # Collected meanwhile.
            continue
