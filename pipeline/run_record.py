"""A record of runs to keep, compare and draw: who did what when, and what came of it.

Invariant: a record is plain data in a versioned envelope, a msgpack document in an LZ4 frame with a
checksum, so that reading one, also a stranger's, can neither run code nor take more memory than
:data:`DOCUMENT_LIMIT`. It holds no credentials: options and results only. Times inside are seconds
since the record's start.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict, field
from typing import TYPE_CHECKING, Any

from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.errors import UsageError
from stowray.pipeline.files import replace_file, translated
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from stowray.pipeline.progress import Event

FORMAT = "stowray-run"
VERSION = 1
DOCUMENT_LIMIT = 256 << 20
# A span keeps the shape of its progress; of a long one every second sample goes.
SAMPLES = 512

Sample = tuple[float, int, str]


@dataclass(frozen=True, slots=True)
class Span:
    """The life of one thing that was worked on: a blob, a layer, a commit, a resolution.

    ``samples`` are ``(seconds, current, status)`` in order; ``completed`` None was never reached.
    """

    reference: str
    node: str
    id: str
    kind: str
    status: str
    total: int
    started: float
    completed: float | None
    error: str = ""
    samples: tuple[Sample, ...] = ()
    retries: int = 0

    @property
    def active(self) -> float:
        """Return when work on it was first seen to have begun: waiting its turn is no work."""
        if not self.samples or self.samples[0][2] != "waiting":
            return self.started
        begun = (moment for moment, _, status in self.samples if status != "waiting")
        return min(max(next(begun, self.end), self.started), self.end)

    @property
    def end(self) -> float:
        """Return when it ended, or when it was last heard of."""
        if self.completed is not None:
            return self.completed
        return max([self.started, *(moment for moment, _, _ in self.samples)])


@dataclass(frozen=True, slots=True)
class Run:
    """One pull of one reference: ``mode`` is ``pull``, or ``cold`` or ``warm`` in a benchmark.

    ``process`` has ``seconds``, ``cpu_seconds`` and ``max_rss`` (bytes) of a whole process where
    one was started for the run. Either ``result`` or ``error`` is there, in the form of the result
    line.
    """

    reference: str
    mode: str
    number: int
    started: float
    seconds: float
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    process: dict[str, float] | None = None
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class RunRecord:
    """All runs of one command; ``started`` is wall-clock seconds."""

    kind: str
    version: str
    started: float
    machine: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    runs: tuple[Run, ...] = ()

    def to_bytes(self) -> bytes:
        """Return the record as a file's bytes."""
        import lz4.frame
        import msgpack

        body = msgpack.packb({"format": FORMAT, "form": VERSION, **asdict(self)})
        return bytes(lz4.frame.compress(body, content_checksum=True))

    def write(self, path: Path) -> None:
        """Put the record at ``path``, which holds the old file or the whole new one."""
        with translated(path, "write the run record"):
            replace_file(path, self.to_bytes(), mode=file_mode())

    @classmethod
    def read(cls, path: Path) -> RunRecord:
        """Return the record in a file; UsageError when it holds none that this version reads."""
        with translated(path, "read the run record"):
            data = path.read_bytes()
        return cls.from_bytes(data, str(path))

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> RunRecord:
        """Return the record in ``data``; ``name`` is for the error."""
        document = _document(data, name)
        if document.get("form") != VERSION:
            raise UsageError(
                name, f"a run record of form {document.get('form')!r}; this stowray reads {VERSION}"
            )
        try:
            return cls(
                kind=_text(document["kind"]),
                version=_text(document["version"]),
                started=_number(document["started"]),
                machine=_table(document["machine"]),
                options=_table(document["options"]),
                runs=tuple(_run(entry) for entry in document["runs"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(name, "a damaged run record: record it again") from error


class Recorder:
    """Watches a :class:`~stowray.pipeline.progress.Progress` and keeps what it saw as spans."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self.started = clock.wall()
        self._clock = clock
        self._last: dict[tuple[str, str, str, str], Event] = {}
        self._samples: dict[tuple[str, str, str, str], list[Sample]] = {}

    def __call__(self, events: Sequence[Event]) -> None:
        """Take over changed events."""
        for event in events:
            key = event.key
            self._last[key] = event
            samples = self._samples.setdefault(key, [])
            if event.begun and event.is_final and samples and samples[-1][2] == "waiting":
                # Begun and ended between two looks.
                samples.append((self._since(event.begun), samples[-1][1], "begun"))
            samples.append((self._since(event.time), event.current, event.status))
            if len(samples) > SAMPLES:
                # The first and the last say more than any between.
                del samples[1:-1:2]

    def now(self) -> float:
        """Return the seconds since the record began."""
        return max(0.0, self._clock.wall() - self.started)

    def spans(self, reference: str | None = None) -> tuple[Span, ...]:
        """Return what was seen, of one reference or of all, in order of first appearance."""
        return tuple(
            Span(
                reference=event.reference,
                node=event.node,
                id=event.id,
                kind=event.kind,
                status=event.status,
                total=event.total,
                started=self._since(event.started),
                completed=self._since(event.completed) if event.completed else None,
                error=event.error,
                samples=tuple(self._samples[key]),
                retries=event.retries,
            )
            for key, event in self._last.items()
            if reference is None or event.reference == reference
        )

    def _since(self, wall: float) -> float:
        return max(0.0, wall - self.started)


def machine() -> dict[str, Any]:
    """Return what a reader of figures wants to know of the machine that made them."""
    try:
        load = os.getloadavg()[0]
    except OSError:
        load = -1.0
    return {
        "processors": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "load": round(load, 2),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def file_mode() -> int:
    """Return the mode of an ordinary file that this user makes."""
    from stowray.pipeline.tree_ops import process_umask

    return 0o666 & ~process_umask()


def _document(data: bytes, name: str) -> dict[str, Any]:
    import lz4.frame
    import msgpack

    refusal = UsageError(name, "not a run record: `bench --record` and `pull --record` write them")
    try:
        # The frame claims a size; only what comes out is believed.
        expander = lz4.frame.LZ4FrameDecompressor()
        body = expander.decompress(data, max_length=DOCUMENT_LIMIT)
        if not expander.eof:
            raise refusal
        document = msgpack.unpackb(body, strict_map_key=True)
    except (RuntimeError, ValueError, msgpack.exceptions.UnpackException) as error:
        raise refusal from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise refusal
    return document


def _run(entry: Any) -> Run:
    values = _table(entry)
    return Run(
        reference=_text(values["reference"]),
        mode=_text(values["mode"]),
        number=int(_number(values["number"])),
        started=_number(values["started"]),
        seconds=_number(values["seconds"]),
        result=None if values["result"] is None else _result(values["result"]),
        error=None if values["error"] is None else _table(values["error"]),
        process=None if values["process"] is None else _numbers(values["process"]),
        spans=tuple(_span(span) for span in values["spans"]),
    )


def _result(entry: Any) -> dict[str, Any]:
    """Return a result whose figures are figures; the rest of it is only ever shown as text."""
    values = _table(entry)
    _numbers(values["seconds"])
    _number(values["fetched_bytes"])
    _number(values["manifest_requests"])
    return values


def _span(entry: Any) -> Span:
    values = _table(entry)
    return Span(
        **{name: _text(values[name]) for name in ("reference", "node", "id", "kind", "status")},
        total=int(_number(values["total"])),
        started=_number(values["started"]),
        completed=None if values["completed"] is None else _number(values["completed"]),
        error=_text(values["error"]),
        samples=tuple(_samples(values["samples"])),
        # Records of earlier versions do not count them.
        retries=int(_number(values.get("retries", 0))),
    )


def _samples(entries: Any) -> Iterable[Sample]:
    for moment, current, status in entries:
        yield _number(moment), int(_number(current)), _text(status)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e18:
        raise TypeError(value)
    return value


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(value)
    return value


def _numbers(value: Any) -> dict[str, float]:
    return {_text(name): _number(number) for name, number in _table(value).items()}
