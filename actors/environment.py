"""What Ray reads from the process environment, and when.

Invariant: a Ray that Stowray starts listens on loopback only and asks every client for a token that
lies in a file of mode 0600; a Ray that belongs to somebody else is entered with the settings that
its owner made. Ray's Python part reads some variables once, at its first import, so these settings
are applied before ``import ray``; the token itself never stands in the environment, which every
process of the user could read.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stowray.pipeline.errors import NodeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

# With "0" Ray takes 127.0.0.1 for the node's address and every one of its processes listens there
# only. The name tells of Windows and macOS, the effect is the same on Linux (tests/cluster).
LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"

# Settings that only a default is given for: whoever has set them knows better.
_COMMON = {
    # Under `uv run` Ray would build a new environment for each worker.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Worker processes run at nice 15 otherwise, behind everything else on the machine.
    "RAY_worker_niceness": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def private_settings(token_path: Path) -> dict[str, str | None]:
    """Return the variables of a Ray of our own; ``None`` stands for a variable to remove."""
    settings: dict[str, str | None] = {
        name: os.environ.get(name, value) for name, value in _COMMON.items()
    }
    settings |= {
        LOOPBACK_ONLY: "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        # It would win over the path.
        "RAY_AUTH_TOKEN": None,
        # It would send a driver elsewhere, and workers inherit it.
        "RAY_ADDRESS": None,
    }
    return settings


def guest_settings() -> dict[str, str | None]:
    """Return the variables for entering a cluster of somebody else: only defaults, no secrets."""
    return {name: os.environ.get(name, value) for name, value in _COMMON.items()}


def is_ray_imported() -> bool:
    """Return whether this process has imported Ray already."""
    return "ray" in sys.modules


@contextmanager
def applied(settings: Mapping[str, str | None]) -> Iterator[None]:
    """Keep ``settings`` in the environment of this process and its children while open."""
    before = {name: os.environ.get(name) for name in settings}
    _write(settings)
    try:
        yield
    finally:
        _write(before)


def require_loopback() -> None:
    """Raise NodeError when Ray was imported in a state in which it would listen everywhere."""
    if not is_ray_imported():
        return
    from ray._private import ray_constants

    if ray_constants.ENABLE_RAY_CLUSTER:
        raise NodeError(
            "embedded Ray",
            "this program imported ray before stowray could keep it on loopback; set "
            f"{LOOPBACK_ONLY}=0 in its environment, call ray.init() first to use that Ray, "
            "or use the local engine",
        )


def refresh() -> None:
    """Make a Ray that was imported earlier read the token settings anew."""
    # Ray's stub file leaves these two out.
    from ray._raylet import (  # type: ignore[attr-defined]
        AuthenticationTokenLoader,
        Config,
    )

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _write(settings: Mapping[str, str | None]) -> None:
    for name, value in settings.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
