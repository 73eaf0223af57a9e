"""Nodes × images as a table: the one picture that the report and the live page share.

Invariant: a row depends on its own node only, so that a live page can send one without the others;
every word from images, nodes and registries is escaped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from stowray.html_page import text
from stowray.prewarm_text import cell_word, image_names
from stowray.text import seconds_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stowray.pipeline.prewarm_rows import Cell, NodeRow

_SIGNS: Final = {
    "pulled": ("✓", "good"),
    "present": ("✓", "good"),
    "not wanted": ("–", "plain"),
    "-": ("–", "plain"),
    "working": ("…", "plain"),
    "waiting": ("…", "plain"),
}
STYLE: Final = """
td.good, .good { color: var(--green); } td.bad, .bad { color: var(--red); }
.matrix td, .matrix th { text-align: left; }
"""


def matrix_table(references: Sequence[str], rows: str, *, body_id: str = "") -> str:
    """Return the table round ``rows``, which are markup of :func:`matrix_row`."""
    heads = "".join(
        f'<th scope="col" title="{text(reference)}">{text(name)}</th>'
        for name, reference in zip(image_names(references), references, strict=True)
    )
    named = f' id="{body_id}"' if body_id else ""
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Nodes and images">'
        '<table class="matrix"><caption>Each image on each node</caption><thead><tr>'
        f'<th scope="col">node</th><th scope="col">state</th>{heads}</tr></thead>'
        f"<tbody{named}>{rows}</tbody></table></div>"
    )


def matrix_row(
    node: NodeRow,
    cells: Sequence[Cell],
    references: Sequence[str],
    percents: Mapping[str, int] | None = None,
) -> str:
    """Return the row of one node; ``percents`` says how far images are that are at work."""
    own = {cell.reference: cell for cell in cells}
    told = percents or {}
    return (
        f'<tr><th scope="row">{text(node.name)}</th>{_state(node)}'
        + "".join(_cell(own.get(name), told.get(name)) for name in references)
        + "</tr>"
    )


def _state(node: NodeRow) -> str:
    kind = "good" if node.state == "ready" else "plain"
    kind = "bad" if node.error is not None else kind
    return f'<td class="{kind}">{text(node.state)}</td>'


def _cell(cell: Cell | None, percent: int | None) -> str:
    word = cell_word(cell)
    sign, kind = _SIGNS.get(word, ("✗", "bad"))
    said = word
    if cell is not None and cell.status == "done" and cell.seconds:
        said += f" {seconds_text(cell.seconds)}"
    elif percent is not None and word == "working":
        said = f"{percent}%"
    error = "" if cell is None or cell.error is None else f' title="{text(cell.error["message"])}"'
    return f'<td class="{kind}"{error}><span aria-hidden="true">{sign}</span> {text(said)}</td>'
