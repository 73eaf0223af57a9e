"""What the nodes of somebody else's cluster have installed, asked before any actor of ours starts.

Invariant: the question is a function sent by value that uses the standard library only, so that it
runs also where Stowray is missing or of another version; the answer to a mismatch is one sentence.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import stowray
from stowray.actors import cluster
from stowray.pipeline.errors import NodeError, StowrayError

if TYPE_CHECKING:
    from collections.abc import Sequence

PROBE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What one node has; ``version`` is empty where the package is missing."""

    node_id: str
    address: str
    version: str = ""
    python: str = ""
    uid: int = -1
    host: str = ""
    error: str = ""


def probe_nodes(node_ids: Sequence[str], addresses: Sequence[str]) -> list[NodeReport]:
    """Ask each node what it has; one that does not answer in time bears an ``error``."""
    calls = [(node_id, cluster.ask_by_value(_look, node_id)) for node_id in node_ids]
    reports = []
    for (node_id, call), address in zip(calls, addresses, strict=True):
        try:
            found = cluster.wait(call, f"node {address}", seconds=PROBE_SECONDS)
        except StowrayError as error:
            reports.append(NodeReport(node_id, address, error=str(error)))
        else:
            reports.append(NodeReport(node_id, address, **found))
    return reports


def require_like(reports: Sequence[NodeReport]) -> None:
    """Raise NodeError with one sentence when nodes cannot take our actors."""
    wanted = stowray.__version__
    python = ".".join(platform.python_version_tuple()[:2])
    complaints = []
    for report in reports:
        if report.error:
            complaints.append(f"{report.address} does not answer ({report.error})")
        elif not report.version:
            complaints.append(f"{report.address} has no stowray")
        elif report.version != wanted:
            complaints.append(f"{report.address} has stowray {report.version}")
        elif report.python.rpartition(".")[0] != python:
            complaints.append(f"{report.address} has Python {report.python}")
    if complaints:
        raise NodeError(
            "cluster",
            f"this program is stowray {wanted} on Python {python}, but "
            f"{'; '.join(complaints)} (install the same stowray on every node)",
        )


def _look() -> dict[str, Any]:
    """Run on the node: read what is there without importing any of it."""
    import importlib.util
    import os
    import platform
    import re
    import socket

    version = ""
    found = importlib.util.find_spec("stowray")
    if found is not None and found.origin:
        try:
            with open(found.origin, encoding="utf-8") as file:
                match = re.search(r'^__version__ = "([^"]+)"', file.read(), re.MULTILINE)
        except OSError:
            match = None
        version = match[1] if match else "unknown"
    return {
        "version": version,
        "python": platform.python_version(),
        "uid": os.geteuid(),
        "host": socket.gethostname(),
    }
