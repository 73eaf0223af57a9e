"""Drivers that pre-warm the nodes of a test's cluster, as programs of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.ray_cluster import command_of
from tests.support.tars import archive, directory, file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Protocol

    from tests.support.origin import Origin
    from tests.support.ray_cluster import RayCluster
    from tests.support.registry import FakeRegistry

    class Cluster(Protocol):
        """What a driver needs to know of its cluster."""

        @property
        def address(self) -> str: ...

        @property
        def environment(self) -> Mapping[str, str]: ...


ROOT = Path(__file__).parents[2]
SECONDS = 240.0
HELD = 3 << 20
OURS = ("NodeActor", "FetchActor", "UnpackActor", "ResolverActor", "ProgressActor")


class Driver:
    """One program under way; ``wanted`` is what it is told to do.

    ``enter`` makes of a command one that runs where the driver is to be.
    """

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        wanted: Mapping[str, Any],
        *,
        enter: Callable[[list[str]], list[str]] = list,
        **variables: str,
    ) -> None:
        settings = {"store": str(folder / "{node}"), "address": cluster.address}
        told = {"do": "run", **wanted, "settings": settings | wanted.get("settings", {})}
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("RAY_", "XDG_", "STOWRAY_"))
        }
        self.folder = folder
        self.process = subprocess.Popen(
            enter([sys.executable, "-m", "tests.support.prewarm_driver", json.dumps(told)]),
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={
                **kept,
                **cluster.environment,
                "XDG_RUNTIME_DIR": str(folder),
                **variables,
            },
        )

    def send(self, number: signal.Signals) -> None:
        """Send the program a signal, also where another one stands between (nsenter)."""
        pid = self.process.pid
        while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if b"nsenter" not in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:
                break
            pid = int(children[0])
        os.kill(pid, number)

    def line(self) -> dict[str, Any]:
        """Return the next change of the report; the last line is the report itself."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the driver ended with {self.process.wait()}"
        found: dict[str, Any] = json.loads(line)
        return found

    def cancel(self) -> None:
        self.send(signal.SIGTERM)

    def finish(self) -> tuple[int, dict[str, Any]]:
        """Wait for the end; return the exit status and what was said last."""
        output, _ = self.process.communicate(timeout=SECONDS)
        assert output, f"the driver ended with {self.process.returncode} and said nothing"
        return self.process.returncode, json.loads(output.splitlines()[-1])

    def end(self) -> None:
        if self.process.poll() is None:
            self.send(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def layer(name: str, size: int = 1000) -> bytes:
    """Return a layer of one random file: like no other, and not compressible."""
    return archive(directory(name), file(f"{name}/file", os.urandom(size)))


def add_image(registry: FakeRegistry, name: str, *sizes: int) -> str:
    """Add an image with layers of these sizes and return its reference."""
    layers = [layer(f"{name}{number}", size) for number, size in enumerate(sizes)]
    registry.add_image(f"a/{name}", "1", layers)
    return f"{registry.host}/a/{name}:1"


def states(report: Mapping[str, Any]) -> dict[str, str]:
    return {node["name"]: node["state"] for node in report["nodes"]}


def statuses(report: Mapping[str, Any]) -> dict[str, set[str]]:
    """Return what became of the cells of each node."""
    found: dict[str, set[str]] = {}
    for cell in report["cells"]:
        found.setdefault(cell["node"], set()).add(cell["status"])
    return found


def ours(cluster: RayCluster, node: str, *kinds: str) -> list[int]:
    """Return the processes of our actors on a node."""
    return [
        pid
        for pid in cluster.processes(node)["workers"]
        if any(kind in command_of(pid) for kind in kinds or OURS)
    ]


def add_held(registry: FakeRegistry, source: Origin, size: int = HELD) -> tuple[str, str]:
    """Add an image whose one layer the origin gives two thirds of until it is let go on.

    Returns its reference and its blob's path.
    """
    reference = add_image(registry, "held", size).replace(registry.host, source.host)
    (blob,) = [digest for digest, data in registry.blobs.items() if len(data) > size // 2]
    source.hold_after(size * 2 // 3)
    return reference, f"/blobs/{blob}"


def arrived(folder: Path, node: str) -> int:
    """Return how many bytes of unfinished blobs a node's store holds."""
    found = (folder / node / "ingest").rglob("data*")
    return sum(path.stat().st_blocks * 512 for path in found if path.is_file())


def is_gone(cluster: RayCluster) -> bool:
    return not any(ours(cluster, name) for name in cluster.names)
