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

    import ray

PROBE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class NodeReport:
    """What one node has; ``version`` is empty where the package is missing.

    ``node`` is the name that the environment of its raylet, or the settings file named there, gives
    it.
    """

    node_id: str
    address: str
    version: str = ""
    python: str = ""
    uid: int = -1
    host: str = ""
    node: str = ""
    error: str = ""


def ask(node_id: str) -> ray.ObjectRef[dict[str, Any]]:
    """Begin to ask one node; the answer has the fields of a :class:`NodeReport`."""
    return cluster.ask_by_value(_look, node_id)


def probe_nodes(node_ids: Sequence[str], addresses: Sequence[str]) -> list[NodeReport]:
    """Ask each node what it has; one that does not answer in time bears an ``error``."""
    calls = [(node_id, ask(node_id)) for node_id in node_ids]
    reports = []
    for (node_id, call), address in zip(calls, addresses, strict=True):
        try:
            found = cluster.wait(call, f"node {address}", seconds=PROBE_SECONDS)
        except StowrayError as error:
            reports.append(NodeReport(node_id, address, error=str(error)))
        else:
            reports.append(NodeReport(node_id, address, **found))
    return reports


def complaint(report: NodeReport) -> str:
    """Return why a node cannot take our actors, the half of a sentence; empty when it can."""
    python = ".".join(platform.python_version_tuple()[:2])
    if report.error:
        return f"does not answer ({report.error})"
    if not report.version:
        return "has no stowray"
    if report.version != stowray.__version__:
        return f"has stowray {report.version}"
    if report.python.rpartition(".")[0] != python:
        return f"has Python {report.python}"
    return ""


def mismatch(complaints: Sequence[str]) -> str:
    """Return the sentence that these complaints make."""
    python = ".".join(platform.python_version_tuple()[:2])
    return (
        f"this program is stowray {stowray.__version__} on Python {python}, but "
        f"{'; '.join(complaints)} (install the same stowray on every node)"
    )


def require_like(reports: Sequence[NodeReport]) -> None:
    """Raise NodeError with one sentence when nodes cannot take our actors."""
    found = [(report.address, complaint(report)) for report in reports]
    complaints = [f"{address} {text}" for address, text in found if text]
    if complaints:
        raise NodeError("cluster", mismatch(complaints))


def _look() -> dict[str, Any]:
    """Run on the node: read what is there without importing any of it."""
    import importlib.util
    import os
    import platform
    import re
    import socket
    import tomllib

    version = ""
    found = importlib.util.find_spec("stowray")
    if found is not None and found.origin:
        try:
            with open(found.origin, encoding="utf-8") as file:
                match = re.search(r'^__version__ = "([^"]+)"', file.read(), re.MULTILINE)
        except OSError:
            match = None
        version = match[1] if match else "unknown"
    node = os.environ.get("STOWRAY_NODE", "")
    settings = os.environ.get("STOWRAY_CONFIG", "")
    if settings and not node:
        try:
            with open(settings, "rb") as file:
                node = str(tomllib.load(file).get("node", ""))
        except (OSError, ValueError, RecursionError):
            # Whoever works there with these settings will say what is wrong with them.
            node = ""
    return {
        "version": version,
        "python": platform.python_version(),
        "uid": os.geteuid(),
        "host": socket.gethostname(),
        "node": node,
    }
