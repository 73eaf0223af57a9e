"""Make the man page stowray(1) from what ``--help`` says.

    python docs/man.py docs

Invariant: commands, options and examples are those of the program, so that neither says more.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from stowray import __version__
from stowray.cli.app import COMMANDS, cli
from stowray.cli.help import EXAMPLES, GROUPS, HelpfulCommand
from stowray.pipeline.errors import StowrayError

STATUSES = {
    0: "done",
    1: "some of several failed",
    2: "usage",
    3: "not found, no such platform",
    4: "unauthorized",
    5: "content is not what was promised, or damage was found",
    6: "registry or node unavailable, deadline passed",
    7: "storage: disk full, lock, permission",
    130: "interrupted",
}
VARIABLES = {
    "STOWRAY_STORE": "where images are kept, like --store",
    "STOWRAY_CONFIG": "the settings file, like --config",
    "STOWRAY_NODE": "the name of this node",
    "REGISTRY_AUTH_FILE, DOCKER_CONFIG": "where logins are",
    "CONTAINERS_REGISTRIES_CONF": "podman's registries.conf",
    "CONTAINERD_ADDRESS, CONTAINERD_NAMESPACE": "which containerd `deliver` hands images to",
    "HTTPS_PROXY, HTTP_PROXY, NO_PROXY": "how registries are reached",
    "OTEL_*": "whether and where spans go",
    "NO_COLOR, CI": "no colours; no live view",
}


def roff(text: str) -> str:
    """Return ``text`` so that troff prints it as it is."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("…", "...").replace("→", "->")
    return "\n".join("\\&" + line if line[:1] in (".", "'") else line for line in text.split("\n"))


def paragraphs(text: str | None) -> list[str]:
    """Return a help text as lines of troff."""
    lines: list[str] = []
    for part in (text or "").split("\n\n"):
        if part.startswith("\b"):
            lines += [".PP", ".EX", roff(part.lstrip("\b\n")), ".EE"]
        else:
            lines += [".PP", roff(" ".join(part.split()))]
    return lines[1:]


def options(rows: list[tuple[str, str]]) -> list[str]:
    """Return options with what they do."""
    return [line for name, text in rows for line in (".TP", f".B {roff(name)}", roff(text))]


def page() -> str:
    """Return the whole page."""
    context = click.Context(cli, info_name="stowray")
    lines = [
        f'.TH STOWRAY 1 "" "stowray {__version__}" "User Commands"',
        ".SH NAME",
        "stowray \\- stow container images onto machines",
        ".SH SYNOPSIS",
        ".B stowray",
        r"[\fIOPTION\fR...] \fICOMMAND\fR [\fIARGUMENT\fR...]",
        ".SH DESCRIPTION",
        *paragraphs(cli.help),
        ".SH COMMANDS",
    ]
    common: list[tuple[str, str]] = []
    for group, names in GROUPS.items():
        lines.append(f'.SS "{roff(group)}"')
        for name in names:
            command = cli.get_command(context, name)
            if not isinstance(command, HelpfulCommand):
                raise TypeError(name)
            inner = click.Context(command, info_name=name, parent=context)
            usage = " ".join(command.collect_usage_pieces(inner))
            lines += [".TP", f".B stowray {name} {roff(usage)}", roff(COMMANDS[name][1]), ".RS"]
            lines += [".PP", *paragraphs(command.help)]
            own, common = command.option_rows(inner)
            lines += options([row for row in own if row[0] != "-h, --help"])
            if name in EXAMPLES:
                lines += [".PP", "Examples:", ".EX", *map(roff, EXAMPLES[name]), ".EE"]
            lines.append(".RE")
    statuses = {kind.exit_code for kind in StowrayError.__subclasses__()}
    if not statuses <= set(STATUSES):
        raise ValueError(f"no word for exit statuses {statuses - set(STATUSES)}")
    lines += [".SH OPTIONS OF EVERY COMMAND", *options(common)]
    lines += [".SH EXIT STATUS", *options([(str(n), text) for n, text in STATUSES.items()])]
    lines += [".SH ENVIRONMENT", *options(list(VARIABLES.items()))]
    lines += [".SH FILES", *options([("/var/lib/stowray", "the store of root")])]
    lines += options([("$XDG_DATA_HOME/stowray", "the store of others")])
    return "\n".join(line for line in lines if line) + "\n"


def main(target: Path) -> None:
    """Write ``stowray.1`` into the directory ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "stowray.1").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
