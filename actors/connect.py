"""Which Ray is used, and the way into it.

Invariant: a Ray that is there is used before one is started: the one that this process is connected
to already (a worker always is), else the ``--address`` or ``RAY_ADDRESS`` given, else this node's
warm session, else a private one.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from stowray.actors.embedded import attached_ray, embedded_ray, is_connected, joined_ray
from stowray.actors.session_state import warm_session
from stowray.pipeline.errors import StorageError, UsageError
from stowray.pipeline.files import read_regular

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

    from stowray.actors.embedded import RayAddress
    from stowray.actors.session_state import Session
    from stowray.pipeline.settings import Settings


LOOK_SECONDS = 1.0


def session_for(settings: Settings) -> Session | None:
    """Return the session that a pull with these settings goes through, if there is one.

    With the engine "auto" that is so also in a program that is connected to some other Ray.
    """
    if _address(settings) or (settings.engine == "ray" and is_connected()):
        return None
    return warm_session()


def connect(
    settings: Settings,
    stack: ExitStack,
    *,
    embedded_nodes: int = 1,
    leaves: Callable[[], bool] = lambda: False,
) -> tuple[RayAddress, bool]:
    """Connect until ``stack`` is closed; return the Ray and whether it is this node's session.

    A Ray that is started here has ``embedded_nodes`` nodes. ``leaves`` is asked in the end whether
    this process ends with the stack: then a session is left without the goodbye. Raises NodeError,
    DeadlineError, UsageError.
    """
    address = _address(settings)
    if is_connected():
        return stack.enter_context(joined_ray()), False
    if address and address != "local":
        return stack.enter_context(attached_ray(address)), False
    session = None if address else warm_session()
    if session is not None and embedded_nodes == 1:
        ray = attached_ray(session.address, token_path=Path(session.token_path), leaves=leaves)
        return stack.enter_context(ray), True
    return stack.enter_context(embedded_ray(nodes=embedded_nodes)), False


def passed_over(settings: Settings) -> str:
    """Return the address of a Ray that runs on this node and that :func:`connect` does not use.

    Empty where there is none, or where what is used was named. It is what `ray start` leaves for
    `ray.init()`: whoever runs a command beside it, as `ray symmetric-run` does, may mean that one.
    """
    if _address(settings) or is_connected() or warm_session() is not None:
        return ""
    folder = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
    try:
        address = read_regular(folder / "ray" / "ray_current_cluster", 256).decode("ascii").strip()
    except (OSError, StorageError, UnicodeDecodeError):
        return ""
    host, _, port = address.rpartition(":")
    if not re.fullmatch(r"[A-Za-z0-9.:\[\]-]+", host) or not port.isdecimal():
        # Anybody may write below /tmp.
        return ""
    try:
        socket.create_connection((host.strip("[]"), int(port)), LOOK_SECONDS).close()
    except (OSError, OverflowError):
        return ""
    return address


def _address(settings: Settings) -> str:
    address = settings.address or os.environ.get("RAY_ADDRESS", "")
    if "://" in address:
        raise UsageError(
            "--address", "Ray Client (ray://…) is not supported: run on a node of the cluster"
        )
    return address
