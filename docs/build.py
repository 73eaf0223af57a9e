"""Make the documentation as a site: Markdown to HTML, the reference from the program itself.

    python docs/build.py build/site

Needs no network, and what it makes needs none either. Every link between pages is checked.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
import tomllib
from pathlib import Path

import click
from markdown_it import MarkdownIt

from stowray import __version__
from stowray.cli.app import COMMANDS, cli
from stowray.cli.help import EXAMPLES, GROUPS, HelpfulCommand
from stowray.html_page import page, text
from stowray.pipeline import errors

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# Section -> pages in the order of the menu; a name in brackets is made here.
MENU = {
    "": ["index"],
    "Tutorial": ["tutorial"],
    "How to": [
        "howto/ray",
        "howto/schedulers",
        "howto/runtimes",
        "howto/python",
        "howto/measure",
        "howto/trouble",
        "prewarm",
        "registries",
    ],
    "Reference": ["reference/commands", "reference/settings", "reference/results", "differences"],
    "Explanation": ["explanation/design", "explanation/trust", "explanation/tar"],
}
STYLE = """
body { max-width: 72rem; display: block; } .layout { display: grid; gap: 2.5rem;
  grid-template-columns: 13rem minmax(0, 1fr); } nav ul { list-style: none; padding: 0; margin: 0; }
nav h2 { font-size: .85rem; margin: 1.2rem 0 .2rem; color: var(--dim); } a { color: var(--blue); }
nav a[aria-current] { font-weight: 700; color: var(--ink); text-decoration: none; }
pre { background: var(--band); border: 1px solid var(--line); border-radius: 4px;
  padding: .7rem .9rem; overflow-x: auto; } code { background: var(--band); }
pre code { background: none; } th, td { white-space: normal; text-align: left;
  vertical-align: top; } article { max-width: 46rem; }
.skip { position: absolute; left: -100rem; } .skip:focus { left: 1rem; }
@media (max-width: 50rem) { .layout { display: block; } }
"""


class BrokenError(Exception):
    """A page that the site needs, or that a page links to, is missing."""


def main(target: Path) -> None:
    """Write the site to ``target``, which is emptied first."""
    made = {
        "reference/commands": commands_page(),
        "reference/settings": settings_page(),
        "reference/results": results_page(),
    }
    sources: dict[str, str] = {}
    for name in (name for names in MENU.values() for name in names):
        path = DOCS / f"{name}.md"
        if name in made:
            sources[name] = made[name]
        elif path.exists():
            sources[name] = path.read_text(encoding="utf-8")
    titles = {name: title_of(name, source) for name, source in sources.items()}
    shutil.rmtree(target, ignore_errors=True)
    for name, source in sources.items():
        path = target / f"{name}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        html = render(name, source, titles)
        path.write_text(html, encoding="utf-8")
        for file in re.findall(r'href="(?:\.\./)*files/([^"]+)\.txt"', html):
            copy = target / "files" / f"{file}.txt"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, copy)
    print(f"{target}: {len(sources)} pages")


def title_of(name: str, source: str) -> str:
    """Return a page's first heading."""
    first = re.search(r"^# (.+)$", source, re.MULTILINE)
    if first is None:
        raise BrokenError(f"{name} has no heading")
    return first[1].replace("`", "")


def render(name: str, source: str, titles: dict[str, str]) -> str:
    """Return one page as HTML with the menu beside it."""
    up = "../" * name.count("/")
    menu = []
    for section, names in MENU.items():
        here = [other for other in names if other in titles]
        if not here:
            continue
        heading = f"<h2>{text(section)}</h2>" if section else ""
        items = "".join(
            f'<li><a href="{up}{other}.html"{" aria-current=page" if other == name else ""}>'
            f"{text(titles[other])}</a></li>"
            for other in here
        )
        menu.append(f"{heading}<ul>{items}</ul>")
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(source)
    body = re.sub(r'href="([^"]+)"', lambda match: f'href="{link(name, match[1], titles)}"', body)
    body = re.sub(r"<table>.*?</table>", r'<div class="scroll">\g<0></div>', body, flags=re.DOTALL)
    return page(
        f"{titles[name]} · Stowray {__version__}",
        '<a class="skip" href="#text">Skip the menu</a><div class="layout">'
        f'<nav aria-label="Pages">{"".join(menu)}</nav><article id="text">{body}</article></div>',
        STYLE,
    )


def link(name: str, target: str, titles: dict[str, str]) -> str:
    """Return a link of the Markdown as the site has it; BrokenError if it leads nowhere."""
    if re.match(r"[a-z]+:", target) or target.startswith("#"):
        return target
    path, _, anchor = target.partition("#")
    found = (DOCS / name).parent / path
    resolved = Path(*_normal(found.relative_to(ROOT).parts))
    if resolved.parts[0] == "docs" and resolved.suffix == ".md":
        other = str(resolved.relative_to("docs").with_suffix(""))
        if other in titles:
            return f"{path.removesuffix('.md')}.html{'#' + anchor if anchor else ''}"
    if not (ROOT / resolved).is_file():
        raise BrokenError(f"{name} links to {target}")
    # A file of the source tree that is no page comes along as it is.
    return f"{'../' * name.count('/')}files/{resolved}.txt"


def _normal(parts: tuple[str, ...]) -> list[str]:
    found: list[str] = []
    for part in parts:
        if part == "..":
            found.pop()
        else:
            found.append(part)
    return found


def commands_page() -> str:
    """Return the reference of all commands, from what ``--help`` says."""
    lines = ["# Commands", "", "What `stowray COMMAND --help` says, in one place.", ""]
    context = click.Context(cli, info_name="stowray")
    common: list[tuple[str, str]] = []
    for group, names in GROUPS.items():
        lines += [f"## {group}", ""]
        for name in names:
            if name not in COMMANDS:
                continue
            command = cli.get_command(context, name)
            if not isinstance(command, HelpfulCommand):
                raise BrokenError(name)
            inner = click.Context(command, info_name=name, parent=context)
            usage = " ".join(command.collect_usage_pieces(inner))
            lines += [f"### {name}", "", f"`stowray {name} {usage}`", "", prose(command.help), ""]
            if name in EXAMPLES:
                lines += ["```text", *EXAMPLES[name], "```", ""]
            own, common = options_of(command, inner)
            if own:
                lines += table(["option", "meaning"], own)
    lines += ["## Options of every command", "", *table(["option", "meaning"], common)]
    return "\n".join(lines)


def options_of(
    command: HelpfulCommand, context: click.Context
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return a command's own options and the common ones, each with its help."""
    own: list[tuple[str, str]] = []
    common: list[tuple[str, str]] = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and isinstance(parameter, click.Option):
            row = (f"`{record[0]}`", record[1])
            if parameter.name in command.common:
                common.append(row)
            elif parameter.name != "help":
                own.append(row)
    return own, common


def prose(help_text: str | None) -> str:
    """Return a help text as Markdown: what click must not wrap is code."""
    parts = []
    for part in (help_text or "").replace("\r", "").split("\n\n"):
        if part.startswith("\b"):
            parts.append("```text\n" + part.lstrip("\b\n") + "\n```")
        else:
            parts.append(part.replace("<", "&lt;").replace("*", "\\*"))
    return "\n\n".join(parts)


def table(head: list[str], rows: list[tuple[str, str]]) -> list[str]:
    """Return the lines of a Markdown table and an empty one."""
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [f"| {' | '.join(head)} |", "|---|---|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in escaped), ""]


def settings_page() -> str:
    """Return the reference of the settings file: each key, its default and its comment."""
    source = (ROOT / "configs" / "default.toml").read_text(encoding="utf-8")
    document = tomllib.loads(source)
    lines = [
        "# Settings",
        "",
        (
            "A TOML file, named by `--config` or `STOWRAY_CONFIG`; what it leaves out keeps its "
            "default, and options on the command line win over it. `configs/default.toml` of the "
            "source has every key."
        ),
        "",
    ]
    section, comment = "", []
    for line in source.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
            lines += [f"## {section}", ""]
            comment = []
        elif line.startswith("#"):
            comment.append(line.lstrip("# "))
        elif "=" in line:
            key = line.partition(" =")[0]
            table_of = document
            for part in section.split(".") if section else ():
                table_of = table_of[part]
            lines += [f"**`{key}`** = `{line.partition('= ')[2]}`", "", " ".join(comment), ""]
            if key not in table_of:
                raise BrokenError(f"settings: {key}")
            comment = []
        else:
            comment = []
    return "\n".join(lines)


def results_page() -> str:
    """Return the reference of answers: result objects, events, errors and exit statuses."""
    from stowray.pipeline.progress import Event
    from stowray.pipeline.result import LayerResult, PullResult

    def names(kind: type) -> str:
        return ", ".join(f"`{entry.name}`" for entry in dataclasses.fields(kind))

    classes = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.StowrayError)
    ]
    rows = [
        (f"`{kind.__name__}`", f"{kind.exit_code}{', worth another try' if kind.retryable else ''}")
        for kind in sorted(classes, key=lambda kind: (kind.exit_code, kind.__name__))
    ]
    return "\n".join(
        [
            "# Answers",
            "",
            (
                "With `--json` a command answers with one JSON object per line and reference on "
                "stdout; all that is said to a person goes to stderr."
            ),
            "",
            (
                f"`pull`: {names(PullResult)}. Each of `layers`: {names(LayerResult)}. Sizes are "
                "bytes, times seconds; `source` is `store`, or where the bytes came from."
            ),
            "",
            'A failure: `{"reference": …, "error": {"type", "message", "retryable"}}`.',
            "",
            "## Exit status",
            "",
            (
                "0 done · 1 some of several failed · 2 usage · 3 not found · 4 unauthorized · 5 "
                "content is not what was promised · 6 registry or node unavailable, deadline "
                "passed · 7 storage · 130 interrupted."
            ),
            "",
            "## Errors",
            "",
            "The classes of the Python API; `type` in JSON is their name.",
            "",
            *table(["class", "exit status"], rows),
            "## Events",
            "",
            (
                f"`--progress json` writes an object per change to stderr: {names(Event)} (but for "
                "`begun`). Kinds: resolve, manifest, blob, layer, commit, image, job. Final "
                "statuses: resolved, done, exists, applied, committed, failed; every ID ends in "
                "one, and `current` never falls."
            ),
            "",
        ]
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
