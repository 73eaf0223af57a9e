"""The frame of the live page and its script.

Invariant: the page asks for nothing but what the server below the same token gives; the script puts
in place what it is sent, which is markup of ours with every foreign word escaped, and adds no words
of others. Without scripts the page shows the state at which it was loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from stowray.html_page import page
from stowray.html_report import STYLE

if TYPE_CHECKING:
    from collections.abc import Sequence

POLICY: Final = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'unsafe-inline'; "
    "img-src data:; base-uri 'none'; form-action 'none'"
)
_STYLE: Final = """
progress { width: 100%; max-width: 40rem; height: .8rem; accent-color: var(--blue); }
.heard { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
#link { font-weight: 600; } #link.lost { color: var(--red); } #link.over { color: var(--dim); }
"""
# `icon`: otherwise a browser asks for one, without the token.
_HEAD: Final = '<link rel="icon" href="data:,"><script src="live.js" defer></script>'

SCRIPT: Final = """\
"use strict";
(() => {
  const frame = document.getElementById("live");
  const link = document.getElementById("link");
  const rows = new Map();
  let version = Number(frame.dataset.version);
  let over = false;

  function say(words, kind) {
    if (link.textContent !== words) link.textContent = words;
    link.className = kind;
  }

  function parsed(markup) {
    const made = document.createElement("template");
    made.innerHTML = markup;
    return made.content;
  }

  function settle(number, row) {
    const body = document.getElementById("rows");
    if (body === null) return;
    let next = null;
    for (const other of rows.keys()) {
      if (other > number && (next === null || other < next)) next = other;
    }
    body.insertBefore(row, next === null ? null : rows.get(next));
  }

  function putRow(number, markup) {
    const before = rows.get(number);
    if (markup === "") {
      if (before !== undefined) before.remove();
      rows.delete(number);
      return;
    }
    const row = parsed(markup).firstElementChild;
    if (before !== undefined && before.isConnected) before.replaceWith(row);
    else settle(number, row);
    rows.set(number, row);
  }

  function replace(box, markup) {
    const focused = box.contains(document.activeElement) ? document.activeElement : null;
    const details = focused && focused.closest("details");
    // Whoever reads a bar with the keyboard goes on reading it; the next part brings the news.
    if (focused && focused.tagName.toLowerCase() === "g") return;
    const opened = new Map();
    for (const entry of box.querySelectorAll("details[data-of]")) {
      opened.set(entry.dataset.of, entry.open);
    }
    const scrolled = box.querySelector(".scroll") ? box.querySelector(".scroll").scrollLeft : 0;
    box.replaceChildren(parsed(markup));
    for (const entry of box.querySelectorAll("details[data-of]")) {
      if (opened.has(entry.dataset.of)) entry.open = opened.get(entry.dataset.of);
      if (focused && details && details.dataset.of === entry.dataset.of) {
        entry.querySelector("summary").focus({ preventScroll: true });
      }
    }
    if (scrolled) box.querySelector(".scroll").scrollLeft = scrolled;
  }

  function put(name, markup) {
    if (name.startsWith("row-")) return putRow(Number(name.slice(4)), markup);
    if (name === "title") {
      document.title = markup;
      return;
    }
    const box = document.getElementById("p-" + name);
    if (box === null) return;
    replace(box, markup);
    box.hidden = markup === "";
    const section = document.getElementById("s-" + name);
    if (section !== null) section.hidden = markup === "";
    if (name === "matrix") {
      const body = document.getElementById("rows");
      if (body !== null) {
        for (const number of [...rows.keys()].sort((a, b) => a - b)) body.append(rows.get(number));
      }
    }
  }

  function take(message) {
    for (const [name, markup] of Object.entries(message.parts)) put(name, markup);
    version = message.version;
    if (!message.over) return;
    over = true;
    if (document.getElementById("p-final").childElementCount) frame.remove();
    say("The run has ended; this is its last state.", "over");
  }

  function open() {
    const source = new EventSource("events?since=" + version);
    source.onopen = () => say("Live.", "");
    source.onmessage = (event) => {
      take(JSON.parse(event.data));
      if (over) source.close();
    };
    source.onerror = () => {
      if (over) return;
      say("The connection is lost; trying again. What is shown may be old.", "lost");
      if (source.readyState === EventSource.CLOSED) setTimeout(open, 5000);
    };
  }

  for (const row of document.querySelectorAll("tr[data-row]")) {
    rows.set(Number(row.dataset.row), row);
  }
  if (frame.dataset.over === "1") {
    frame.remove();
    say("The run has ended; this is its last state.", "over");
  } else open();
})();
"""


def live_page(parts: dict[str, str], rows: Sequence[str], version: int, *, over: bool) -> str:
    """Return the document with everything that is known now."""

    def box(name: str, tag: str = "div") -> str:
        markup = parts.get(name, "")
        hidden = "" if markup else " hidden"
        return f'<{tag} id="p-{name}"{hidden}>{markup}</{tag}>'

    def section(name: str, heading: str) -> str:
        hidden = "" if parts.get(name) else " hidden"
        return (
            f'<section id="s-{name}" aria-labelledby="h-{name}"{hidden}>'
            f'<h2 id="h-{name}">{heading}</h2>{box(name)}</section>'
        )

    matrix = parts.get("matrix", "").replace("</tbody>", f"{''.join(rows)}</tbody>", 1)
    parts = {**parts, "matrix": matrix}
    ended = over and parts.get("final")
    live = "".join(
        (
            f'<div id="live" data-version="{version}" data-over="{int(bool(ended))}">',
            f"<h1>Pre-warm</h1>{box('about')}{box('verdict')}{box('bar')}{box('figures')}",
            section("matrix", "Nodes and images"),
            section("trouble", "What went wrong"),
            section("time", "Over time"),
            "</div>",
        )
    )
    # Only this is read out by itself, and not at every step.
    heard = '<p class="heard" id="p-heard" role="status" aria-live="polite" aria-atomic="true">'
    body = (
        f"{heard}{parts.get('heard', '')}</p>"
        '<p id="link">As it was when this page was loaded; with scripts it would be live.</p>'
        f"{live}{box('final')}"
    )
    return page(parts.get("title") or "Pre-warm", body, STYLE + _STYLE, policy=POLICY, head=_HEAD)
