"""A private Ray for one command, or a way into one that runs already; both with a deadline.

Invariant: an embedded Ray listens on loopback only, asks for a token, and leaves neither process
nor folder nor signal handler behind. A Ray that was there before is left running when the context
ends. Every way in ends in time, with a sentence: Ray itself waits for ever for a dead address or
with a wrong token.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stowray.actors import environment, processes
from stowray.actors.scratch import scratch_directory, write_token
from stowray.pipeline.errors import DeadlineError, NodeError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAMESPACE = "stowray"
# Plans, results and progress are all that passes through the object store; 78 MB is Ray's minimum.
OBJECT_STORE_SIZE = 128 << 20
ATTACH_SECONDS = 15.0
CONNECT_SECONDS = 5.0
END_SECONDS = 5.0
SHUTDOWN_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class RayAddress:
    """A Ray that this process is connected to; ``is_own`` tells that it ends with the context."""

    address: str
    node_id: str
    is_own: bool
    token_path: Path | None = None


@contextmanager
def embedded_ray(*, num_cpus: int | None = None) -> Iterator[RayAddress]:
    """Start a private Ray, connect to it, and end it with all its processes at the end."""
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
            try:
                yield _start(directory, token_path, num_cpus)
            finally:
                _stop(directory)


@contextmanager
def attached_ray(
    address: str, *, token_path: Path | None = None, seconds: float = ATTACH_SECONDS
) -> Iterator[RayAddress]:
    """Connect to the Ray at ``address``; with ``token_path`` to one that Stowray started."""
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
        try:
            yield _here(is_own=False, token_path=token_path)
        finally:
            _shut_down()


@contextmanager
def joined_ray() -> Iterator[RayAddress]:
    """Use the Ray that this process is connected to already, as a worker always is."""
    import ray

    if not ray.is_initialized():
        raise NodeError("ray", "this process is not connected to any Ray")
    yield _here(is_own=False, token_path=None)


def is_connected() -> bool:
    """Return whether this process is connected to a Ray, without importing it."""
    if not environment.is_ray_imported():
        return False
    import ray

    return ray.is_initialized()


def _start(directory: Path, token_path: Path, num_cpus: int | None) -> RayAddress:
    import ray

    with _kept_handlers():
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                object_store_memory=OBJECT_STORE_SIZE,
                namespace=NAMESPACE,
                _temp_dir=str(directory),
            )
        except (RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            raise NodeError("embedded Ray", f"did not start: {_one_line(error)}") from error
    return _here(is_own=True, token_path=token_path)


def _stop(directory: Path) -> None:
    started = started_below(directory)
    try:
        _shut_down()
    finally:
        for process in processes.wait_gone(started, END_SECONDS):
            process.send(signal.SIGKILL)
        processes.wait_gone(started, END_SECONDS)


def _shut_down() -> None:
    """Leave the Ray that this process is connected to, even one whose head no longer answers."""
    import ray

    # In a thread of its own, because ray.shutdown waits for a dead head.
    thread = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
    thread.start()
    thread.join(SHUTDOWN_SECONDS)


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
    # no process, and Ray leaves the signal handlers alone outside the main thread.
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

    logger = logging.getLogger("ray._private.worker")
    level = logger.level
    # It warns that it leaves the SIGTERM handler alone, which is what is wanted here.
    logger.setLevel(logging.ERROR)
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    except Exception as error:  # noqa: BLE001 - handed to the waiting thread, which translates it
        failures.append(error)
    finally:
        logger.setLevel(level)


def _here(*, is_own: bool, token_path: Path | None) -> RayAddress:
    import ray

    context = ray.get_runtime_context()
    return RayAddress(
        address=context.gcs_address,
        node_id=context.get_node_id(),
        is_own=is_own,
        token_path=token_path,
    )


@contextmanager
def _kept_handlers() -> Iterator[None]:
    """Undo what Ray does to the handlers of SIGTERM and SIGINT."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            if handler is not None:
                signal.signal(number, handler)


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
