"""A pre-warm run as one HTML page: who has what, from where, when, and what went wrong.

Invariant: the page needs no network and no script, every word from images, nodes and registries is
escaped, and whatever a picture shows a table says too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from stowray.html_matrix import STYLE as MATRIX_STYLE
from stowray.html_matrix import matrix_row, matrix_table
from stowray.html_page import page, table, text
from stowray.html_timeline import STYLE as TIMELINE_STYLE
from stowray.html_timeline import timelines
from stowray.pipeline.prewarm_rows import PEER
from stowray.prewarm_picture import most_telling, node_cells
from stowray.prewarm_text import count_text, failures, states_text
from stowray.text import seconds_text, size_text

if TYPE_CHECKING:
    from stowray.pipeline.prewarm_report import PrewarmReport
    from stowray.pipeline.prewarm_rows import NodeRow

# A page is to be read: the JSON report has all rows.
ROWS_LIMIT: Final = 1000
SLOWEST: Final = 10
STYLE: Final = (
    MATRIX_STYLE
    + TIMELINE_STYLE
    + """
h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
.verdict { font-size: 1.05rem; border-left: 4px solid currentColor; padding: .2rem .8rem; }
.bar { display: inline-block; height: .7rem; border-radius: 2px; vertical-align: middle; }
ul { padding-left: 1.2rem; } li { overflow-wrap: anywhere; }
nav { margin-top: 1rem; } nav a { margin-right: 1rem; color: var(--blue); }
"""
)


def html_report(report: PrewarmReport) -> str:
    """Return the page of a run."""
    return page(report_title(report), report_body(report), STYLE)


def report_title(report: PrewarmReport) -> str:
    """Return what the page is called."""
    return "Pre-warm report" if report.command == "prewarm" else "Status of a cluster"


def report_body(report: PrewarmReport) -> str:
    """Return what stands on the page of a run."""
    sections = [
        ("matrix", "Nodes and images", _matrix(report)),
        ("trouble", "What went wrong", trouble(report)),
        ("time", "Over time", timelines(report)),
        ("sources", "Bytes by source", _sources(report)),
        ("slowest", "Slowest parts", _slowest(report)),
        ("waves", "Waves", _waves(report)),
        ("deliveries", "Deliveries", _deliveries(report)),
        ("images", "Images", _images(report)),
        ("nodes", "Nodes", _nodes(report)),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{text(heading)}</a>' for name, heading, _ in shown)
    body = [f"<h1>{text(report_title(report))}</h1>", _head(report)]
    body.append(f'<nav aria-label="Sections">{links}</nav>')
    body += [
        f'<section aria-labelledby="{name}"><h2 id="{name}">{text(heading)}</h2>{content}</section>'
        for name, heading, content in shown
    ]
    return "".join(body)


def _head(report: PrewarmReport) -> str:
    code = report.exit_code
    if report.interrupted:
        verdict = "Interrupted: what follows is what was reached."
    elif code == 0 and any(not cell.is_fine for cell in report.cells):
        verdict = "Enough nodes are ready, as the plan asks; not all of them."
    elif code == 0:
        verdict = "Every image is on every node that it is wanted on, checked on disk."
    else:
        verdict = f"Not everything is where it should be (exit status {code})."
    states = states_text(_states(report))
    figures: list[list[object]] = [
        ["nodes", states],
        ["images", len(report.images)],
        ["time", seconds_text(report.seconds)],
        ["from the origin", size_text(report.origin_bytes)],
        ["from peers", size_text(report.peer_bytes)],
        ["manifest requests", report.manifest_requests],
    ]
    about = f"run {report.run}, begun {report.started}, stowray {report.version}"
    return (
        f'<p class="dim">{text(about)}</p>'
        f'<p class="verdict {"good" if code == 0 else "bad"}" role="status">{text(verdict)}</p>'
        + table("The run in figures", ["what", "value"], figures)
    )


def _states(report: PrewarmReport) -> dict[str, int]:
    states: dict[str, int] = {}
    for node in report.nodes:
        states[node.state] = states.get(node.state, 0) + 1
    return states


def _matrix(report: PrewarmReport) -> str:
    if not report.nodes:
        return ""
    cells = node_cells(report)
    nodes: list[NodeRow] = list(report.nodes)
    left = max(0, len(nodes) - ROWS_LIMIT)
    if left:
        nodes = most_telling(nodes, {})[:ROWS_LIMIT]
    references = [image.reference for image in report.images]
    rows = "".join(matrix_row(node, cells[node.name], references) for node in nodes)
    more = f"<p>{left} more nodes are in the JSON report.</p>" if left else ""
    return matrix_table(references, rows) + more


def trouble(report: PrewarmReport, limit: int = ROWS_LIMIT) -> str:
    """Return errors, warnings and remarks, at most ``limit`` of each; empty when there is none."""
    parts = []
    groups = (
        ("Errors", failures(report)),
        ("Warnings", list(report.warnings)),
        ("Drift: tags that moved", [str(drift) for drift in report.drift]),
    )
    for heading, lines in groups:
        if lines:
            entries = "".join(f"<li>{text(line)}</li>" for line in lines[:limit])
            parts.append(f"<h3>{heading}</h3><ul>{entries}</ul>")
    if report.remarks:
        rows: list[list[object]] = [
            [
                remark.node,
                remark.source,
                remark.kind,
                remark.digest[:19],
                size_text(remark.position),
                remark.detail,
            ]
            for remark in report.remarks[:limit]
        ]
        head = ["node", "source", "what", "blob", "at", "detail"]
        told = count_text(len(report.remarks), "remark")
        parts.append(
            f'<details class="matrix"><summary>{told} about sources: no failure, nodes went on '
            f"from others</summary>{table('As nodes made them', head, rows)}</details>"
        )
    return "".join(parts)


def _sources(report: PrewarmReport) -> str:
    given = report.by_source()
    if not given:
        return ""
    most = max(1, *given.values())
    total = max(1, sum(given.values()))
    rows = []
    for source, size in list(given.items())[:ROWS_LIMIT]:
        is_peer = source.startswith(PEER)
        colour = "var(--blue)" if is_peer else "var(--purple)"
        kind = "node" if is_peer else "registry"
        rows.append(
            f'<tr><th scope="row">{text(source.removeprefix(PEER))}</th><td>{kind}</td>'
            f"<td>{size_text(size)}</td><td>{100 * size / total:.1f} %</td>"
            f'<td class="wide"><span class="bar" aria-hidden="true" '
            f'style="width:{12 * size / most:.2f}rem;background:{colour}"></span></td></tr>'
        )
    heads = "".join(
        f'<th scope="col">{name}</th>' for name in ("source", "kind", "bytes", "share", "")
    )
    return (
        '<div class="scroll"><table><caption>What each source gave</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _slowest(report: PrewarmReport) -> str:
    spans = sorted(report.spans, key=lambda span: -(span.fetch_seconds + span.apply_seconds))
    rows: list[list[object]] = [
        [
            span.node,
            span.digest[:19],
            size_text(span.size),
            seconds_text(span.fetch_seconds),
            seconds_text(span.apply_seconds),
            ", ".join(span.by_source) or "store",
        ]
        for span in spans[:SLOWEST]
        if span.fetch_seconds + span.apply_seconds > 0
    ]
    if not rows:
        return ""
    head = ["node", "blob", "size", "download", "unpack", "sources"]
    return table(f"The {len(rows)} that took longest", head, rows)


def _waves(report: PrewarmReport) -> str:
    if len(report.waves) < 2:
        return ""
    rows: list[list[object]] = [
        [
            wave.number + 1,
            len(wave.nodes),
            wave.ready,
            "" if wave.started is None else f"{wave.started:.1f}",
            "" if wave.completed is None else f"{wave.completed:.1f}",
            "passed" if wave.passed else "not passed" if wave.started is not None else "not begun",
        ]
        for wave in report.waves
    ]
    head = ["wave", "nodes", "ready", "begun (s)", "ended (s)", "outcome"]
    return table("A wave begins when the one before it is verified", head, rows)


def _deliveries(report: PrewarmReport) -> str:
    rows: list[list[object]] = [
        [
            entry.node,
            entry.reference,
            entry.runtime,
            "taken" if entry.error is None else entry.error["message"],
        ]
        for entry in report.deliveries[:ROWS_LIMIT]
    ]
    head = ["node", "image", "runtime", "outcome"]
    return table("Images handed to runtimes", head, rows) if rows else ""


def _images(report: PrewarmReport) -> str:
    rows: list[list[object]] = []
    for image in report.images:
        rows.append([image.reference, "as named", image.resolved, size_text(image.size)])
        rows += [["", platform, digest, ""] for platform, digest in image.digests.items()]
    head = ["image", "platform", "digest", "size"]
    return table("What each reference named", head, rows) if rows else ""


def _nodes(report: PrewarmReport) -> str:
    rows: list[list[object]] = [
        [
            node.name,
            node.address,
            node.platform,
            node.store,
            size_text(node.disk_free),
            size_text(node.disk_needed),
            f"the store of {node.shares_with}" if node.shares_with else "",
        ]
        for node in report.nodes[:ROWS_LIMIT]
    ]
    head = ["node", "address", "platform", "store", "disk free", "disk needed", "shares"]
    told = count_text(len(report.nodes), "node")
    return table(f"{told}, as each described itself", head, rows) if rows else ""
