"""The process that holds a session: a private Ray, and the warm crew in it.

Run as ``python -m stowray.actors.session_host`` by ``session start``, its configuration on stdin;
answers one JSON line when the crew is warm. Invariant: all processes of the session are below this
one and end with it, however it ends, because Ray ties them to their parent's life.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import stowray
from stowray.actors import processes
from stowray.actors.door import Door
from stowray.actors.embedded import embedded_ray, started_below
from stowray.actors.headwatch import HeadWatch
from stowray.actors.link import RayLink
from stowray.actors.processes import Process
from stowray.actors.session_state import (
    PROTOCOL,
    Session,
    door_path,
    remove_state,
    write_state,
)
from stowray.pipeline.clock import Boot
from stowray.pipeline.errors import DeadlineError, NodeError, StowrayError, to_wire

if TYPE_CHECKING:
    from stowray.actors.embedded import RayAddress

LOOK_SECONDS = 1.0
ASK_SECONDS = 60.0
WARM_SECONDS = 45.0
# Those without which a Ray serves nobody.
_CORE = ("gcs_server", "raylet")


def main() -> None:
    """Hold one session until SIGTERM, until nobody has used it for long, or until its Ray dies."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: stop.set())
    config = json.loads(sys.stdin.buffer.read())
    try:
        _hold(config, stop)
    except StowrayError as error:
        _answer({"error": to_wire(error)})
        sys.exit(1)


def _hold(config: dict[str, Any], stop: threading.Event) -> None:
    folder = Path(config["folder"])
    with embedded_ray() as address:
        crew = _start_crew(address, config)
        session = _describe(address, door_path(folder))
        with closing(Door(Path(session.door), crew)):
            write_state(folder, session)
            try:
                _answer({"ready": True})
                _watch(session, crew.node, float(config["idle_seconds"]), stop)
            finally:
                remove_state(folder, session.host)


def _watch(session: Session, node: Any, idle_seconds: float, stop: threading.Event) -> None:
    """Return when the session is told to end, has had nothing to do for long, or cannot go on."""
    from stowray.actors import cluster

    core = [process for process in session.processes if process.name in _CORE]
    asked = time.monotonic()
    while not stop.wait(LOOK_SECONDS):
        if not all(process.is_alive for process in core):
            # Without them nobody can be served; what is left ends with this process.
            return
        if time.monotonic() - asked >= min(ASK_SECONDS, idle_seconds):
            asked = time.monotonic()
            # While the actor starts anew it has no answer: it is asked another time.
            with contextlib.suppress(NodeError, DeadlineError):
                about = cluster.wait(node.describe.remote(), "session crew", seconds=10.0)
                if about["idle_seconds"] > idle_seconds:
                    return


def _start_crew(address: RayAddress, config: dict[str, Any]) -> RayLink:
    """Start the session's actors and return their handles, all of them warm."""
    from stowray.actors import cluster

    def place(role: str) -> cluster.Placement:
        return cluster.Placement(address.node_id, cluster.session_name(role), restarts=-1)

    node = cluster.start_node(place("node"), config["node"], config["unpackers"], stays=True)
    resolver = cluster.start_resolver(place("resolver"))
    progress = cluster.start_progress(place("progress"))
    cluster.wait(resolver.pid.remote(), "session resolver", seconds=WARM_SECONDS)
    cluster.wait(node.members.remote(), "session crew", seconds=WARM_SECONDS)
    where = f"node {config['node']}"
    return RayLink(
        address, resolver, progress, node, HeadWatch(address.address), where, is_session=True
    )


def _describe(address: RayAddress, door: Path) -> Session:
    token_path = address.token_path or Path()
    return Session(
        address=address.address,
        token_path=str(token_path),
        directory=str(token_path.parent),
        door=str(door),
        version=stowray.__version__,
        protocol=PROTOCOL,
        python=sys.executable,
        boot_id=Boot.read().boot_id,
        pid_namespace=processes.pid_namespace(),
        created=time.time(),
        host=Process.own(),
        processes=tuple(started_below(token_path.parent)),
    )


def _answer(line: dict[str, Any]) -> None:
    """Send the one line that ``session start`` waits for, and let go of the pipe."""
    with os.fdopen(os.dup(1), "wb") as pipe:
        pipe.write(json.dumps(line).encode() + b"\n")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


if __name__ == "__main__":
    main()
