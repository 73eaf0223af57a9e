"""A private Ray for one command, or a way into one that runs already; both with a deadline.

Invariant: an embedded Ray listens on loopback only, asks for a token, and leaves neither process
nor folder nor signal handler behind. A Ray that was there before is left running when the context
ends. Every way in ends in time, with a sentence: Ray itself waits for ever for a dead address or
with a wrong token.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stowray.actors import environment, processes
from stowray.actors.headwatch import connects
from stowray.actors.scratch import scratch_directory, write_token
from stowray.pipeline.errors import DeadlineError, NodeError
from stowray.pipeline.settings import NODE_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NAMESPACE = "stowray"
# Plans, results and progress are all that passes through the object store; 78 MB is Ray's minimum.
OBJECT_STORE_SIZE = 128 << 20
START_SECONDS = 60.0
ATTACH_SECONDS = 15.0
CONNECT_SECONDS = 5.0
END_SECONDS = 5.0
SHUTDOWN_SECONDS = 10.0
DEAD_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class RayAddress:
    """A Ray that this process is connected to; ``is_own`` tells that it ends with the context."""

    address: str
    node_id: str
    is_own: bool
    token_path: Path | None = None


@contextmanager
def embedded_ray(*, num_cpus: int | None = None, nodes: int = 1) -> Iterator[RayAddress]:
    """Start a private Ray, connect to it, and end it with all its processes at the end.

    With several ``nodes`` all are on this machine and on loopback; they are called ``node-1``,
    ``node-2`` and so on, and each has ``num_cpus``.
    """
    with scratch_directory() as directory:
        token_path = write_token(directory)
        with environment.applied(environment.private_settings(token_path)):
            environment.require_loopback()
            was_imported = environment.is_ray_imported()
            import ray

            if was_imported:
                environment.refresh()
            if ray.is_initialized():
                raise NodeError("embedded Ray", "this process is connected to another Ray already")
            keeper = _Keeper(directory, num_cpus, nodes)
            try:
                node_id = keeper.start()
                yield RayAddress(keeper.address, node_id, is_own=True, token_path=token_path)
            finally:
                # Ray ends the nodes that it knows of, which those added are not.
                _stop(directory, keeper.address, END_SECONDS if nodes == 1 else 0.5)
                keeper.end()


@contextmanager
def attached_ray(
    address: str,
    *,
    token_path: Path | None = None,
    seconds: float = ATTACH_SECONDS,
    leaves: Callable[[], bool] = lambda: False,
) -> Iterator[RayAddress]:
    """Connect to the Ray at ``address``; with ``token_path`` to one that Stowray started.

    ``leaves`` tells in the end whether this process is about to end too.
    """
    settings = (
        environment.private_settings(token_path)
        if token_path is not None
        else environment.guest_settings()
    )
    with environment.applied(settings):
        was_imported = environment.is_ray_imported()
        import ray

        if was_imported:
            environment.refresh()
        if ray.is_initialized():
            raise NodeError(address, "this process is connected to another Ray already")
        _attach(address, seconds)
        gcs_address = ""
        try:
            node_id, gcs_address = _here()
            yield RayAddress(gcs_address, node_id, is_own=False, token_path=token_path)
        finally:
            if leaves():
                # Ray's goodbye may take a quarter of a second, and a process that is gone says as
                # much. Nothing here was started for this process, so that nothing waits for it.
                atexit.unregister(ray.shutdown)
            else:
                _shut_down(gcs_address)


@contextmanager
def joined_ray() -> Iterator[RayAddress]:
    """Use the Ray that this process is connected to already, as a worker always is."""
    import ray

    if not ray.is_initialized():
        raise NodeError("ray", "this process is not connected to any Ray")
    node_id, gcs_address = _here()
    yield RayAddress(gcs_address, node_id, is_own=False)


def is_connected() -> bool:
    """Return whether this process is connected to a Ray, without importing it."""
    if not environment.is_ray_imported():
        return False
    import ray

    return ray.is_initialized()


class _Keeper:
    """The thread that starts a Ray and outlives it.

    Ray lets its processes die with the thread that started them (prctl(2), PR_SET_PDEATHSIG), and
    leaves the handlers of SIGINT and SIGTERM alone outside the main thread. Besides, a caller that
    waits for a thread can be interrupted, one inside ``ray.init`` cannot.
    """

    def __init__(self, directory: Path, num_cpus: int | None, nodes: int) -> None:
        self._directory = directory
        self._num_cpus = num_cpus
        self._nodes = nodes
        self._ready = threading.Event()
        self._over = threading.Event()
        self._failures: list[BaseException] = []
        self.address = ""
        self._thread = threading.Thread(target=self._keep, name="ray-keeper", daemon=True)

    def start(self) -> str:
        """Start Ray and return the node's ID; ``address`` is the head's from then on."""
        self._thread.start()
        seconds = START_SECONDS * self._nodes
        if not self._ready.wait(seconds):
            raise DeadlineError("starting an embedded Ray", seconds)
        if self._failures:
            reason = f"did not start: {_one_line(self._failures[0])}"
            raise NodeError("embedded Ray", reason) from self._failures[0]
        node_id, self.address = _here()
        return node_id

    def end(self) -> None:
        """Let the thread end."""
        self._over.set()

    def _keep(self) -> None:
        import ray

        first = {} if self._nodes == 1 else {NODE_VARIABLE: _node_name(1)}
        try:
            with _quiet(), environment.applied(first):
                ray.init(
                    address="local",
                    num_cpus=self._num_cpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    configure_logging=False,
                    object_store_memory=OBJECT_STORE_SIZE,
                    namespace=NAMESPACE,
                    _temp_dir=str(self._directory),
                )
            for number in range(2, self._nodes + 1):
                self._add(_node_name(number))
        except BaseException as error:  # noqa: BLE001 - handed to the waiting thread, which raises
            self._failures.append(error)
        self._ready.set()
        self._over.wait()

    def _add(self, name: str) -> None:
        """Start one more node of this Ray and wait until it belongs to it."""
        from ray._private.node import Node
        from ray._private.parameter import RayParams

        _, gcs_address = _here()
        parameters = RayParams(
            gcs_address=gcs_address,
            redis_address=gcs_address,
            num_cpus=self._num_cpus,
            num_gpus=0,
            object_store_memory=OBJECT_STORE_SIZE,
            node_ip_address="127.0.0.1",
            node_name=name,
            node_manager_port=0,
            dashboard_agent_listen_port=0,
            min_worker_port=0,
            max_worker_port=0,
            # Ray's own annotation says text; it is used as a truth value.
            include_log_monitor=False,  # type: ignore[arg-type]
            temp_dir=str(self._directory),
            env_vars={NODE_VARIABLE: name},
        )
        # It returns when the raylet has told the head of itself.
        Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)


def _node_name(number: int) -> str:
    return f"node-{number}"


def _stop(directory: Path, address: str, grace_seconds: float) -> None:
    started = started_below(directory)
    in_order = False
    try:
        if address:
            in_order = _shut_down(address)
        # Otherwise ray.init may be under way yet, and ray.shutdown would wait for it.
    finally:
        for process in processes.wait_gone(started, grace_seconds if in_order else 0.0):
            process.send(signal.SIGKILL)
        processes.wait_gone(started, END_SECONDS)


def _shut_down(address: str) -> bool:
    """Leave the Ray that this process is connected to; return whether that ended in time."""
    import ray

    # In a thread of its own, because ray.shutdown waits for a dead head.
    thread = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
    thread.start()
    thread.join(SHUTDOWN_SECONDS if connects(address) else DEAD_SECONDS)
    return not thread.is_alive()


def started_below(directory: Path) -> list[processes.Process]:
    """Return the processes of the Ray whose folder is ``directory``: children of this process.

    This process may have other children; those of Ray name the folder in their arguments.
    """
    found = []
    for child in processes.children(os.getpid()):
        if os.fsencode(directory) in processes.arguments(child.pid):
            found += [child, *processes.descendants(child.pid)]
    return found


def _attach(address: str, seconds: float) -> None:
    host, _, port = address.rpartition(":")
    if "://" not in address and host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), min(CONNECT_SECONDS, seconds)).close()
        except (OSError, OverflowError) as error:
            raise NodeError(address, f"no Ray answers there ({_one_line(error)})") from error
    # In a thread of its own, because nothing else ends a wait inside ray.init. The thread starts
    # no process, so that it may end; Ray leaves the signal handlers alone outside the main thread.
    failures: list[Exception] = []
    thread = threading.Thread(
        target=_connect, args=(address, failures), name="ray-attach", daemon=True
    )
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise DeadlineError(
            f"connecting to the Ray at {address} (is its token right? see RAY_AUTH_TOKEN_PATH)",
            seconds,
        )
    if failures:
        raise NodeError(address, f"cannot connect: {_one_line(failures[0])}") from failures[0]


def _connect(address: str, failures: list[Exception]) -> None:
    import ray

    try:
        with _quiet():
            ray.init(
                address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False
            )
    except Exception as error:  # noqa: BLE001 - handed to the waiting thread, which translates it
        failures.append(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back Ray's warning that it leaves the SIGTERM handler alone: that is what is wanted.

    Also what Ray prints of nodes that die, on a thread of its own and among others on stdout, which
    is for answers: that a node is dead we say ourselves.
    """
    from ray._private import worker

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = _print_nothing
    logger = logging.getLogger("ray._private.worker")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _print_nothing(*_what: object, **_more: object) -> None:
    """Print nothing."""


def _here() -> tuple[str, str]:
    """Return the ID of this process's node and the address of the head."""
    import ray

    context = ray.get_runtime_context()
    return context.get_node_id(), context.gcs_address


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
