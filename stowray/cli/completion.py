"""``stowray completion``: what a shell needs to complete commands, options and references."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stowray.cli.complete import SHELLS, script
from stowray.cli.context import command

if TYPE_CHECKING:
    from stowray.cli.context import Context


@command("completion", short_help="Print shell completion: commands, options, references.")
@click.argument("shell", type=click.Choice(SHELLS))
def completion_command(context: Context, shell: str) -> int:
    r"""Print code for SHELL that completes commands, options and the references in the store.

    \b
    bash  echo 'eval "$(stowray completion bash)"' >> ~/.bashrc
    zsh   echo 'eval "$(stowray completion zsh)"' >> ~/.zshrc   # after compinit
    fish  stowray completion fish > ~/.config/fish/completions/stowray.fish
    """
    from stowray.cli.app import cli

    print(script(cli, shell), end="")  # noqa: T201
    return 0
