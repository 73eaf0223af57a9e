"""The blobs of a run that goes on, from its events: what a timeline shows before nodes report.

Invariant: times are the driver's own, those at which it heard, so that a node's clock cannot bend
the picture; what a node has reported takes the place of what was heard. Fed by one thread.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stowray.pipeline.prewarm_rows import BlobSpan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stowray.pipeline.prewarm_report import PrewarmReport
    from stowray.pipeline.progress import Event

Place = tuple[str, str]
_BEGUN = frozenset({"downloading", "retrying", "done"})


@dataclass(slots=True)
class _Heard:
    """One blob on one node, in seconds of the clock that :meth:`LiveSpans.see` is given."""

    size: int = 0
    started: float | None = None
    first_byte: float | None = None
    completed: float | None = None
    staged: float | None = None
    unpacking: bool = False
    failed: bool = False


class LiveSpans:
    """What was heard of each blob on each node."""

    def __init__(self) -> None:
        self._heard: dict[Place, _Heard] = {}

    def clear(self) -> None:
        """Forget all: another run begins."""
        self._heard.clear()

    def see(self, events: Iterable[Event], now: float) -> None:
        """Take in events that were heard at ``now``."""
        for event in events:
            if event.kind == "blob":
                self._blob(event, now)
            elif event.kind == "layer":
                self._layer(event, now)

    def merged(
        self, report: PrewarmReport, began: float
    ) -> tuple[tuple[BlobSpan, ...], frozenset[Place]]:
        """Return the spans of ``report`` with those heard, and which go on; ``began`` is 0 s."""
        known = {(span.node, span.digest): span for span in report.spans}
        going = set()
        for place, heard in self._heard.items():
            if heard.started is None:
                continue
            if not heard.failed and (heard.completed is None or heard.unpacking):
                going.add(place)
            # A node tells in the middle where bytes came from, and only later that it is done.
            told = known.get(place) or BlobSpan(*place)
            known[place] = replace(
                told,
                size=max(told.size, heard.size),
                started=_first(told.started, _since(began, heard.started)),
                first_byte=_first(told.first_byte, _since(began, heard.first_byte)),
                completed=_first(told.completed, _since(began, heard.completed)),
                staged=_first(told.staged, _since(began, heard.staged)),
            )
        return tuple(known.values()), frozenset(going)

    def _blob(self, event: Event, now: float) -> None:
        heard = self._heard.setdefault((event.node, event.id), _Heard())
        heard.size = max(heard.size, event.total)
        heard.failed = event.status == "failed"
        if event.status == "exists":
            return
        if event.status in _BEGUN and heard.started is None:
            heard.started = now
        if heard.started is not None and event.current and heard.first_byte is None:
            heard.first_byte = now
        if event.status == "done" and heard.completed is None:
            heard.completed = now

    def _layer(self, event: Event, now: float) -> None:
        heard = self._heard.setdefault((event.node, event.id), _Heard())
        heard.unpacking = not event.is_final
        if event.status == "applied" and heard.staged is None:
            heard.staged = now


def _since(began: float, moment: float | None) -> float | None:
    return None if moment is None else round(max(0.0, moment - began), 3)


def _first(told: float | None, heard: float | None) -> float | None:
    return heard if told is None else told
