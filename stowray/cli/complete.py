"""What shells are offered while somebody types: commands, options, references in the store.

Invariant: a completion only reads, is quiet whatever goes wrong, and imports no more than it needs:
it runs with every press of the key.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    add_completion_class,
    shell_complete,
    split_arg_string,
)

from stowray.cli.context import COMPLETION
from stowray.pipeline.errors import StowrayError

if TYPE_CHECKING:
    from collections.abc import Iterable

SHELLS = ("bash", "zsh", "fish")

# Click's own script hands over words that bash has broken at each colon, which references have.
# https://www.gnu.org/software/bash/manual/html_node/Bash-Variables.html (COMP_WORDBREAKS)
_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n'
    local response completion type value
    response=$(COMP_LINE="$COMP_LINE" COMP_POINT="$COMP_POINT" \\
        STOWRAY_WORDBREAKS="$COMP_WORDBREAKS" %(complete_var)s=bash_complete "$1")
    for completion in $response; do
        IFS=',' read -r type value <<< "$completion"
        case $type in
            dir) COMPREPLY=(); compopt -o dirnames ;;
            file) COMPREPLY=(); compopt -o default ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done
    return 0
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class Bash(BashComplete):
    """Completion for a bash that breaks words at colons, or does not."""

    source_template = _BASH
    _cut = 0

    @classmethod
    def _check_version(cls) -> None:
        """Take the shell at its word: it may be another machine's."""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the whole words before the cursor and the one at it."""
        line = os.environ.get("COMP_LINE", "")
        line = line[: int(os.environ.get("COMP_POINT") or len(line))]
        words = split_arg_string(line)
        incomplete = "" if not words or line[-1:].isspace() else words.pop()
        self._cut = self._broken(incomplete)
        return words[1:], incomplete

    def _broken(self, word: str) -> int:
        """Return where in the value of ``word`` bash begins the word that it completes."""
        breaks = os.environ.get("STOWRAY_WORDBREAKS", ":=")
        if word.startswith("--") and "=" in word:
            word = word.partition("=")[2]
        return max((word.rfind(mark) for mark in ":=" if mark in breaks), default=-1) + 1

    def format_completion(self, item: CompletionItem[str]) -> str:
        """Return one answer; bash keeps what stands before the break."""
        return f"{item.type},{item.value[self._cut :]}"


class Fish(FishComplete):
    """Completion for fish; click's script cuts an answer at its second comma."""

    def format_completion(self, item: CompletionItem[str]) -> str:
        """Return one answer, its description without commas."""
        if item.help:
            item = CompletionItem(item.value, item.type, item.help.replace(",", ";"))
        return super().format_completion(item)


class ReferenceText(click.ParamType[str]):
    """A reference: any text, completed from the store."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Take the text as it is; what it means is the command's affair."""
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        """Return the references in the store, as people write them."""
        try:
            names = list(_references(ctx))
        except (StowrayError, OSError):
            return []
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


class PathText(click.ParamType[str]):
    """A path that need not exist: any text, completed as files or as directories."""

    def __init__(self, kind: str) -> None:
        self.name = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Take the text as it is."""
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        """Leave it to the shell."""
        return [CompletionItem(incomplete, type=self.name)]


REFERENCE = ReferenceText()
FILE = PathText("file")
DIRECTORY = PathText("dir")


def completed(command: click.Command) -> click.Command:
    """Give plain parameters of a command the completion that their metavar promises."""
    for parameter in command.params:
        if not isinstance(parameter.type, click.types.StringParamType):
            continue
        metavar = (parameter.metavar or "").strip("[]").rstrip(".")
        if isinstance(parameter, click.Argument) and metavar.startswith("REF"):
            parameter.type = REFERENCE
        elif metavar in ("DIR", "DEST", "UPPERDIR"):
            parameter.type = DIRECTORY
        elif metavar == "FILE":
            parameter.type = FILE
    return command


def _references(ctx: click.Context) -> Iterable[str]:
    from stowray.cli.context import Context
    from stowray.pipeline.reference import Reference
    from stowray.pipeline.store import Store

    context = Context()
    for level in (ctx.parent, ctx):
        if level is not None:
            context.merge(
                {name: level.params.get(name) for name in ("store", "config")}  # the rest is no use
            )
    path = context.store_path()
    if not path.is_dir():
        return
    for record in Store.open(path, create=False).references():
        try:
            yield Reference.parse(record.reference).familiar
        except StowrayError:
            # An image on disk: what it is called is what was typed.
            yield record.reference


def answer(group: click.Command, instruction: str) -> int:
    """Answer a shell's question, as ``_STOWRAY_COMPLETE`` puts it, and return the exit status."""
    add_completion_class(Bash)
    add_completion_class(Fish)
    return shell_complete(completed(group), {}, "stowray", COMPLETION, instruction)


def script(group: click.Command, shell: str) -> str:
    """Return the code that a shell evaluates to complete ``stowray``."""
    from click.shell_completion import get_completion_class

    add_completion_class(Bash)
    add_completion_class(Fish)
    kind = get_completion_class(shell)
    if kind is None:
        raise ValueError(shell)
    return kind(group, {}, "stowray", COMPLETION).source()
