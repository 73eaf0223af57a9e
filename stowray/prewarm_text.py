"""What is said to a person about a pre-warm run: who has what, what came from where, what failed.

Invariant: plain text that reads the same in a terminal, a log and a mail; names from images and
nodes are escaped; a thousand nodes take no more lines than the few that need attention.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from stowray.pipeline.errors import InvalidReferenceError, escape
from stowray.pipeline.source import parse_source
from stowray.text import seconds_text, size_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stowray.pipeline.dry_run import DryRun
    from stowray.pipeline.prewarm_report import PrewarmReport
    from stowray.pipeline.prewarm_rows import Cell, NodeRow

LINES_LIMIT: Final = 40
_WORDS: Final = {"done": "pulled", "exists": "present", "skipped": "not wanted"}


def image_name(reference: str) -> str:
    """Return the last part of a reference, the part that people know it by: ``app:1.2``."""
    try:
        familiar = parse_source(reference).familiar
    except InvalidReferenceError:
        familiar = reference
    name, at, digest = familiar.partition("@")
    short = name.rpartition("/")[2]
    # A tag tells more than the digest it is pinned to.
    return escape(short if ":" in short or not at else f"{short}@{digest.partition(':')[2][:8]}")


def image_names(references: Sequence[str]) -> list[str]:
    """Return short names for ``references``, longer ones where two would be the same."""
    short = [image_name(reference) for reference in references]
    often = Counter(short)
    return [
        name if often[name] == 1 else escape(reference)
        for name, reference in zip(short, references, strict=True)
    ]


def clip(text: str, width: int) -> str:
    """Return ``text`` in at most ``width`` characters; names differ at both ends."""
    if len(text) <= width:
        return text
    if width < 6:
        return text[:width]
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def cell_word(cell: Cell | None) -> str:
    """Return what a cell says in one or two words."""
    if cell is None:
        return "-"
    if cell.status == "skipped" and cell.error is not None:
        return "not begun"
    if cell.error is not None or cell.status == "failed":
        return "failed"
    return _WORDS.get(cell.status, cell.status)


def who_has_what(report: PrewarmReport, width: int = 80) -> list[str]:
    """Return the matrix of nodes and images as lines of about ``width`` characters.

    With many nodes only those that lack something have a line of their own.
    """
    from stowray.prewarm_picture import most_telling, node_cells

    cells = node_cells(report)
    shown: Sequence[NodeRow] = report.nodes
    more = ""
    if len(shown) > LINES_LIMIT:
        ranked = most_telling(shown, {})
        lacking = sum(node.state != "ready" for node in shown)
        shown = ranked[: min(LINES_LIMIT, lacking)]
        rest = Counter(node.state for node in ranked[len(shown) :])
        more = f"… and {states_text(rest)}"
    references = [image.reference for image in report.images]
    names = image_names(references)
    first = max([len("node"), *(len(escape(node.name)) for node in shown)])
    first = min(first, max(12, width // 3))
    column = max([10, *(len(name) for name in names)])
    column = min(column, max(10, (width - first - 12) // max(1, len(names)) - 2))
    if first + 12 + len(names) * (column + 2) > width:
        head, rows = ["images"], [[_share(cells[node.name])] for node in shown]
        column = 14
    else:
        head = [clip(name, column) for name in names]
        by_image = [{cell.reference: cell for cell in cells[node.name]} for node in shown]
        rows = [[cell_word(own.get(name)) for name in references] for own in by_image]
    lines = [_line(["node", "state", *head], first, column)]
    lines += [
        _line([clip(escape(node.name), first), node.state, *row], first, column)
        for node, row in zip(shown, rows, strict=True)
    ]
    return [*lines, more] if more else lines


def failures(report: PrewarmReport) -> list[str]:
    """Return a sentence for each thing that failed; the same one for many nodes only once."""
    said: dict[str, list[str]] = {}
    placed = {cell.reference for cell in report.cells if cell.error is not None}
    for image in report.images:
        if image.error is not None and image.reference not in placed:
            said.setdefault(f"{image.reference}: {image.error['message']}", [])
    for node in report.nodes:
        if node.error is not None:
            said.setdefault(str(node.error["message"]), []).append(node.name)
    for cell in report.cells:
        if cell.error is not None:
            message = str(cell.error["message"])
            if cell.node in said.get(message, ()):
                # The node as a whole has failed so, and its cells with it.
                continue
            prefix = "" if cell.reference in message else f"{cell.reference}: "
            said.setdefault(prefix + message, []).append(cell.node)
    for delivery in report.deliveries:
        if delivery.error is not None:
            message = f"{delivery.reference} to {delivery.runtime}: {delivery.error['message']}"
            said.setdefault(message, []).append(delivery.node)
    lines = []
    for message, nodes in said.items():
        names = list(dict.fromkeys(nodes))
        where = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        known = len(names) == 1 and _names(message, names[0])
        lines.append(escape(message if known or not names else f"{where}: {message}"))
    return lines


def _names(message: str, node: str) -> bool:
    """Tell whether ``message`` names ``node`` as a word, not within a path or a longer name."""
    return re.search(rf"(?<![\w./-]){re.escape(node)}(?![\w./-])", message) is not None


def summary(report: PrewarmReport) -> list[str]:
    """Return the closing lines: what was done, from where, how long it took."""
    states = Counter(node.state for node in report.nodes)
    counted = (
        f"{count_text(len(report.images), 'image')} on {count_text(len(report.nodes), 'node')}"
    )
    lines = [f"{counted}: {states_text(states)} in {seconds_text(report.seconds)}"]
    if report.command == "prewarm":
        lines.append(
            f"{size_text(report.origin_bytes)} from the origin, {size_text(report.peer_bytes)} "
            f"from peers, {count_text(report.manifest_requests, 'manifest request')}"
        )
    lines += [f"warning: {escape(warning)}" for warning in report.warnings]
    lines += [f"drift: {escape(str(drift))}" for drift in report.drift]
    # A slow source is an observation; one that lied or died is worth a line.
    told = Counter((remark.source, remark.kind) for remark in report.remarks)
    lines += [
        f"remark: {escape(source)} {escape(kind)}{f' ({count} times)' if count > 1 else ''}"
        for (source, kind), count in told.most_common(8)
    ]
    return lines


def states_text(states: Mapping[Any, int]) -> str:
    """Return how many nodes are in which state: ``3 ready, 1 dead``."""
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none"


def plan_text(dry: DryRun) -> list[str]:
    """Return a dry run as people read it: totals, then nodes, then blobs.

    What failed before there was anything to plan is for :func:`failures`.
    """
    plan = dry.plan
    references = len({image.reference for image in plan.images})
    head = f"{count_text(references, 'image')} on {count_text(len(plan.nodes), 'node')}"
    sources = (
        f"{size_text(plan.origin_bytes)} from the origin, {size_text(plan.peer_bytes)} from peers"
    )
    lines = [f"{head}: {sources}, about {seconds_text(plan.seconds)}"]
    for registry, count in plan.requests.items():
        quota = plan.quota.get(registry)
        left = f"; {quota}" if quota is not None else ""
        lines.append(f"{escape(registry)}: {count_text(count, 'manifest request')}{left}")
    lines.append("")
    width = min(32, max([4, *(len(escape(node.name)) for node in plan.nodes)]))
    lines.append(f"{'node':<{width}}  {'have':>10}  {'need':>10}  {'disk':>10}  {'free':>10}")
    ranked = sorted(plan.nodes, key=lambda node: (not node.is_refused, -node.need_bytes))
    for node in ranked[:LINES_LIMIT]:
        have = sum(blob.size - blob.bytes for blob in node.blobs)
        note = ""
        if node.error is not None:
            note = f"  refused: {escape(str(node.error['message']))}"
        elif node.shares_with:
            note = f"  shares the store of {escape(node.shares_with)}"
        elif node.warning:
            note = "  may run out of room"
        lines.append(
            f"{clip(escape(node.name), width):<{width}}  {size_text(have):>10}  "
            f"{size_text(node.need_bytes):>10}  {size_text(node.disk_needed):>10}  "
            f"{size_text(node.disk_free):>10}{note}"
        )
    if len(ranked) > LINES_LIMIT:
        lines.append(f"… and {count_text(len(ranked) - LINES_LIMIT, 'node')} more")
    lines += ["", f"{'blob':<19}  {'size':>10}  {'have':>5}  {'need':>5}  from"]
    for blob in plan.blobs[:LINES_LIMIT]:
        source = [
            f"{name} {size_text(size)}"
            for name, size in (("origin", blob.origin_bytes), ("peers", blob.peer_bytes))
            if size
        ]
        lines.append(
            f"{blob.digest[:19]}  {size_text(blob.size):>10}  {blob.have:>5}  {blob.need:>5}  "
            f"{', '.join(source) or '-'}"
        )
    if len(plan.blobs) > LINES_LIMIT:
        lines.append(f"… and {count_text(len(plan.blobs) - LINES_LIMIT, 'blob')} more")
    lines += [f"warning: {escape(warning)}" for warning in dry.warnings]
    return lines


def count_text(number: int, thing: str) -> str:
    """Return a number of things: ``1 image``, ``3 images``."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _share(cells: Sequence[Cell]) -> str:
    wanted = [cell for cell in cells if cell.status != "skipped" or cell.error is not None]
    return f"{sum(cell.present for cell in wanted)} of {len(wanted)}"


def _line(words: Sequence[str], first: int, column: int) -> str:
    cells = [f"{words[0]:<{first}}", f"{words[1]:<8}", *(f"{word:<{column}}" for word in words[2:])]
    return "  ".join(cells).rstrip()
