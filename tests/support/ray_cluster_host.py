"""The process that holds a `ray.cluster_utils.Cluster`, for `tests/support/ray_cluster.py`.

It reads one JSON object per line and answers with one. At the end of its input it ends its nodes:
so they go with whoever started it.
"""

# ruff: noqa: TID251 - the ban on Ray is for pipeline/

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any


def main() -> int:
    # What Ray prints goes to the log: standard output is for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=False, shutdown_at_exit=True)
    nodes: dict[str, Any] = {}
    try:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                answer = _do(cluster, nodes, request)
            except Exception as error:  # noqa: BLE001 - told to the test, which then fails
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    finally:
        # Cluster.shutdown() would do, but stumbles over nodes whose processes a test has killed.
        for node in [*reversed(nodes.values())]:
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
    return 0


def _do(cluster: Any, nodes: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    what = request["do"]
    if what == "add":
        head = {} if nodes else {"include_dashboard": False, "_system_config": request["system"]}
        nodes[request["name"]] = cluster.add_node(
            num_cpus=2,
            node_ip_address="127.0.0.1",
            node_name=request["name"] if request["named"] else None,
            env_vars=request["variables"],
            labels=request["labels"] or None,
            resources=request["resources"] or None,
            object_store_memory=request["object_store"],
            **head,
        )
        return {"address": cluster.address}
    if what == "gcs":
        return {"gcs": _pids(cluster.head_node, "gcs_server")}
    name = request["name"]
    if what == "processes":
        return {"raylet": _pids(nodes[name], "raylet")[0]}
    if what == "remove":
        nodes.pop(name).kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        return {}
    raise ValueError(what)


def _pids(node: Any, kind: str) -> list[int]:
    return [process.process.pid for process in node.all_processes.get(kind, [])]


if __name__ == "__main__":
    sys.exit(main())
