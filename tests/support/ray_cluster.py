"""A Ray cluster of several nodes on this machine: one `ray.cluster_utils.Cluster`, many stores.

Invariant: the cluster lives in a process of its own, on loopback, with a temporary folder of its
own; every node that it started is ended with it, by process id, also when the test's process dies.
A program that is to use it is given `environment` and `address`; each node's raylet, and so all of
its workers, has `STOWRAY_NODE` set to its name: `{node}` in a store's path tells them apart.

    with ray_cluster(folder, ["n0", "n1", "n2", "n3"]) as cluster:
        stowray.attempt("prewarm", "--address", cluster.address, reference, env=cluster.environment)
        cluster.kill("n2")
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

REPOSITORY = Path(__file__).parents[2]
OBJECT_STORE = 80 << 20
END_SECONDS = 60.0


class RayCluster:
    """The cluster; the first node is the head, and drivers that join are on it."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        *,
        variables: Mapping[str, str] | None = None,
        labels: Mapping[str, Mapping[str, str]] | None = None,
        resources: Mapping[str, Mapping[str, float]] | None = None,
        system: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.names = list(names)
        self.address = ""
        self._variables = dict(variables or {})
        self._labels = labels or {}
        self._resources = resources or {}
        self._system = dict(system or {})
        self._process: subprocess.Popen[str] | None = None
        # unix(7): a socket's path has 108 bytes, and Ray puts up to 66 of its own behind this.
        self._temporary = Path(tempfile.mkdtemp(prefix="sw-ray-", dir="/tmp"))

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs to reach the cluster and what its nodes run with."""
        return {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_TMPDIR": str(self._temporary),
            "CONTAINERD_ADDRESS": str(self.containerd),
            **self._variables,
        }

    @property
    def containerd(self) -> Path:
        """Where all nodes look for a containerd, which tests start when they need one."""
        return self._temporary / "containerd" / "containerd.sock"

    @property
    def logs(self) -> Path:
        """Where Ray's own logs are while the cluster runs."""
        return self._temporary / "session_latest" / "logs"

    def start(self) -> None:
        kept = {key: os.environ[key] for key in ("PATH", "LANG", "HOME") if key in os.environ}
        with (self.folder / "cluster.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.ray_cluster_host"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=REPOSITORY,
                env={**kept, **self.environment},
            )
        names, self.names = self.names, []
        for name in names:
            self.add(name)

    def add(self, name: str, *, named: bool = True, **variables: str) -> None:
        """Start one more node and wait until it belongs to the cluster.

        One that is not ``named`` tells nobody that this is its name.
        """
        answer = self._ask(
            {
                "do": "add",
                "name": name,
                "named": named,
                "variables": {"STOWRAY_NODE": name if named else "", **variables},
                "labels": dict(self._labels.get(name, {})),
                "resources": dict(self._resources.get(name, {})),
                "object_store": OBJECT_STORE,
                "system": self._system,
            }
        )
        self.address = answer["address"]
        self.names.append(name)

    def processes(self, name: str) -> dict[str, list[int]]:
        """Return the process ids of a node: `raylet`, and `workers` that it started."""
        raylet = self._ask({"do": "processes", "name": name})["raylet"]
        return {"raylet": [raylet], "workers": _children(raylet)}

    def kill(self, name: str) -> None:
        """End a node and all its processes at once, as a machine that loses its power."""
        found = self.processes(name)
        for process in (*found["raylet"], *found["workers"]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._ask({"do": "remove", "name": name})
        self.names.remove(name)

    def kill_head(self) -> None:
        """End the head's GCS, so that the cluster knows nothing any more."""
        for process in self._ask({"do": "gcs"})["gcs"]:
            os.kill(process, signal.SIGKILL)

    def freeze(self, name: str) -> None:
        """Stop all processes of a node without ending them, as a machine that hangs."""
        found = self.processes(name)
        for process in (*found["raylet"], *found["workers"]):
            os.kill(process, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        found = self.processes(name)
        for process in (*found["raylet"], *found["workers"]):
            os.kill(process, signal.SIGCONT)

    def close(self) -> None:
        process, self._process = self._process, None
        try:
            if process is not None:
                assert process.stdin
                with contextlib.suppress(OSError):
                    process.stdin.close()  # the host ends its nodes and then itself
                try:
                    process.wait(timeout=END_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                if process.stdout:
                    process.stdout.close()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process and process.stdin and process.stdout
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            log = (self.folder / "cluster.log").read_text(errors="replace")
            raise RuntimeError(f"the cluster's host ended:\n{log[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{request['do']}: {answer['error']}")
        return answer


def _children(parent: int) -> list[int]:
    """Return all processes below one."""
    below: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                # proc_pid_stat(5): the name may contain anything but ends with the last bracket.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                below.setdefault(int(fields[1]), []).append(int(entry.name))
    found: list[int] = []
    left = [parent]
    while left:
        children = below.get(left.pop(), [])
        found += children
        left += children
    return found


def command_of(process: int) -> str:
    """Return what a process calls itself (Ray names workers by their actor), empty when gone."""
    try:
        line = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return ""
    return line.replace(b"\0", b" ").decode(errors="replace").strip()


@contextlib.contextmanager
def ray_cluster(folder: Path, names: Sequence[str], **options: Any) -> Iterator[RayCluster]:
    """Run a cluster with these nodes; `folder` gets its log, options are those of RayCluster."""
    cluster = RayCluster(folder, names, **options)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
