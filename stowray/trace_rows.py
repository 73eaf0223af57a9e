"""How the parts of a run are called and ordered where it is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stowray.pipeline.errors import escape

if TYPE_CHECKING:
    from stowray.pipeline.run_record import Run, Span

KINDS = ("resolve", "manifest", "blob", "layer", "commit", "image", "job")
NAMES = {
    "resolve": "resolve",
    "manifest": "document",
    "blob": "fetch",
    "layer": "unpack",
    "commit": "commit",
    "image": "image",
    "job": "job",
}


def title_of(run: Run) -> str:
    """Return which run this was: ``cold 3``, or ``pull``."""
    return "pull" if run.mode == "pull" else f"{run.mode} {run.number}"


def track_of(span: Span) -> str:
    """Return the name of a span's track: ``fetch 3f2a91c0b7de``."""
    name = NAMES.get(span.kind, escape(span.kind))
    if span.kind in ("resolve", "image"):
        return name
    return f"{name} {escape(span.id.partition(':')[2] or span.id)[:12]}"


def ordered(run: Run) -> list[Span]:
    """Return the spans as they are drawn: by begin of the layer, its fetch above its unpacking."""
    firsts: dict[str, float] = {}
    for span in run.spans:
        firsts[span.id] = min(firsts.get(span.id, span.started), span.started)

    def key(span: Span) -> tuple[int, float, str, int]:
        rank = KINDS.index(span.kind) if span.kind in KINDS else len(KINDS)
        group = 0 if span.kind in ("resolve", "manifest") else 2 if span.kind == "commit" else 1
        return (group, firsts[span.id], span.id, rank)

    return sorted((span for span in run.spans if span.kind != "image"), key=key)
