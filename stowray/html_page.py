"""The frame of our HTML pages: one file, light and dark, without network; reports have no script.

Invariant: every text that comes from outside passes :func:`text`; a content security policy forbids
whatever would slip through, so that a page made from a stranger's record cannot act.
"""

from __future__ import annotations

import html

from stowray.pipeline.errors import escape

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #59636e; --paper: #ffffff;
  --line: #d5dae0; --band: #f4f6f8; --blue: #1f6feb; --orange: #b35900; --green: #1a7f37;
  --purple: #8250df; --grey: #6e7781; --red: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --dim: #9aa4b0; --paper: #14171b;
  --line: #333a43; --band: #1c2127; --blue: #6cb0ff; --orange: #f0a35c; --green: #56d364;
  --purple: #bc9cff; --grey: #8b949e; --red: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; overflow-wrap: anywhere; }
p { margin: .25rem 0 1rem; } .dim { color: var(--dim); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums;
  min-width: min(22rem, 100%); }
caption { text-align: left; color: var(--dim); padding-bottom: .25rem; }
th, td { padding: .2rem .9rem .2rem 0; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
td.wide { white-space: normal; overflow-wrap: anywhere; text-align: left; }
.scroll { overflow-x: auto; } .scroll > svg { min-width: 38rem; }
code { font: .92em ui-monospace, monospace; }
svg { display: block; width: 100%; max-width: 68rem; height: auto; }
svg.small { max-width: 48rem; } svg text { fill: var(--ink); font-size: 12px; }
svg .axis { stroke: var(--line); } svg text.dim { fill: var(--dim); }
:focus-visible { outline: 2px solid var(--blue); outline-offset: 2px; }
svg :focus-visible { outline: none; stroke: var(--ink); stroke-width: 2; }
summary { cursor: pointer; padding: .25rem 0; }
.key { display: inline-flex; gap: .4rem; align-items: center; margin-right: 1.2rem; }
.key i { width: .9rem; height: .9rem; border-radius: 2px; display: inline-block; }
@media print { body { max-width: none; } }
"""


def text(value: object) -> str:
    """Return a value as text that is safe inside an element or a quoted attribute."""
    return html.escape(escape(str(value)), quote=True)


def page(title: str, body: str, style: str = "", *, policy: str = POLICY, head: str = "") -> str:
    """Return a whole document; all but ``title``, which is text, are markup of ours."""
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}{style}</style>{head}</head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


def table(caption: str, head: list[str], rows: list[list[object]]) -> str:
    """Return a table with its first column as row headings; all cells are text."""
    heading = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    lines = "".join(
        f'<tr><th scope="row">{text(row[0])}</th>'
        + "".join(f"<td>{text(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><caption>{text(caption)}</caption>'
        f"<thead><tr>{heading}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def ticks(highest: float, count: int = 6) -> list[float]:
    """Return round values from 0 up to at least ``highest``, about ``count`` of them."""
    if highest <= 0:
        return [0.0, 1.0]
    step = 10.0**-9
    while highest / step > count:
        digit = float(f"{step:e}"[0])
        step *= 2.5 if digit == 2.0 else 2.0
    marks = [0.0]
    while marks[-1] < highest * 0.999999:
        marks.append(len(marks) * step)
    return marks
