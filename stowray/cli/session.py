"""``stowray session``: the warm private Ray of this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from stowray.cli.context import command

if TYPE_CHECKING:
    from stowray.cli.context import Context


@command("session", short_help="Start, stop or show the warm private Ray.")
@click.argument("action", type=click.Choice(["start", "stop", "status"]))
def session_command(context: Context, action: str) -> int:
    """Keep a private Ray with a warm crew on this machine, so that commands need not start one.

    It listens on loopback only, behind a token. `stop` ends exactly the processes that `start`
    recorded. `status` exits with 3 when no session runs.
    """
    from stowray.actors import session

    state = getattr(session, action)(context.settings)
    if context.json:
        print(json.dumps(state.to_dict()))  # noqa: T201
    else:
        print(state.sentence())  # noqa: T201
    return 3 if action == "status" and not state.running else 0
