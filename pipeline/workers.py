"""A pool of worker processes that stage and commit layers beside the fetching process.

Tar application is Python work per entry, which threads of one process cannot do at once; separate
processes can, and a hostile layer that exhausts one takes nothing else with it. Invariant: a task
runs in one worker at a time; a worker's death fails its task with NodeError and a new worker takes
its place; when the owner dies, its workers see the closed socket and end at once.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import field
from typing import TYPE_CHECKING, Any

from stowray.pipeline.errors import CancelledError, NodeError, from_wire
from stowray.pipeline.frames import receive_frame, send_frame
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

CANCEL_POLL_SECONDS = 0.05
END_SECONDS = 3.0


@dataclass(slots=True)
class _Task:
    """One request to a worker: an operation's name, its plain arguments, and whom to tell."""

    operation: str
    arguments: dict[str, Any]
    on_progress: Callable[[int, int], None]
    cancelled: Callable[[], bool]
    future: Future[dict[str, Any]] = field(default_factory=Future)


class _Worker:
    """The owner's side of one worker process."""

    def __init__(self, number: int, *, fork_beside: list[socket.socket] | None = None) -> None:
        """Start the process: by exec, or by a fork that drops the sockets of its siblings."""
        self.number = number
        ours, theirs = socket.socketpair()
        self.connection = ours
        if fork_beside is None:
            self.pid = _start_by_exec(theirs)
        else:
            self.pid = _start_by_fork([*fork_beside, ours], theirs, early=number == 0)
        theirs.close()

    def run(self, identity: int, task: _Task) -> dict[str, Any]:
        """Carry out one task; raises what the worker raised, NodeError when it died."""
        poller = select.poll()
        poller.register(self.connection, select.POLLIN)
        told = False
        looked = time.monotonic()
        try:
            send_frame(self.connection, ["run", identity, task.operation, task.arguments])
            while True:
                arrived = poller.poll(CANCEL_POLL_SECONDS * 1000)
                now = time.monotonic()
                if not told and now - looked >= CANCEL_POLL_SECONDS:
                    looked = now
                    if task.cancelled():
                        told = True
                        send_frame(self.connection, ["cancel", identity])
                if not arrived:
                    continue
                message = receive_frame(self.connection)
                if message is None:
                    raise NodeError(f"worker {self.number}", "the process ended in mid-work")
                kind, number, *rest = message
                if number != identity:
                    continue
                if kind == "progress":
                    task.on_progress(*rest)
                elif kind == "done":
                    result: dict[str, Any] = rest[0]
                    return result
                else:
                    raise from_wire(*rest)
        except OSError as error:
            raise NodeError(f"worker {self.number}", f"connection lost: {error}") from error

    def end(self) -> None:
        """Close the connection, upon which the process ends, and reap it."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        deadline = time.monotonic() + END_SECONDS
        while True:
            try:
                done, _ = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                return
            if done:
                return
            if time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(0.002)


class WorkerPool:
    """At most ``size`` worker processes, started when first needed, fed from one queue in order."""

    def __init__(self, size: int, *, fork: bool = False) -> None:
        self.size = max(1, size)
        self._fork = fork
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._workers: dict[int, _Worker] = {}
        self._lock = threading.Lock()
        self._identities = itertools.count(1)
        self._outstanding = 0
        self._closed = False

    def start_early(self) -> None:
        """Fork all workers now, while this process still has a single thread.

        A child forked beside running threads may inherit a held lock; without other threads the
        fork is sound and saves each worker the interpreter's start-up.
        """
        if self._fork and threading.active_count() == 1:
            for number in range(self.size):
                siblings = [worker.connection for worker in self._workers.values()]
                self._workers[number] = _Worker(number, fork_beside=siblings)

    def submit(
        self,
        operation: str,
        arguments: dict[str, Any],
        *,
        on_progress: Callable[[int, int], None],
        cancelled: Callable[[], bool],
    ) -> Future[dict[str, Any]]:
        """Queue one operation; the future yields its plain result."""
        task = _Task(operation, arguments, on_progress, cancelled)
        with self._lock:
            if self._closed:
                raise NodeError("workers", "the pool is closed")
            self._outstanding += 1
            if len(self._threads) < min(self.size, self._outstanding):
                number = len(self._threads)
                thread = threading.Thread(
                    target=self._serve, args=(number,), name=f"worker-{number}", daemon=True
                )
                self._threads.append(thread)
                thread.start()
        self._tasks.put(task)
        return task.future

    def close(self) -> None:
        """End all workers; queued tasks are cancelled, running ones end with NodeError."""
        with self._lock:
            self._closed = True
            threads = list(self._threads)
        for _ in threads:
            self._tasks.put(None)
        for thread in threads:
            thread.join()
        for number in list(self._workers):
            self._workers.pop(number).end()

    def _serve(self, number: int) -> None:
        while True:
            task = self._tasks.get()
            if task is None:
                return
            if task.future.set_running_or_notify_cancel():
                self._carry_out(number, task)
            with self._lock:
                self._outstanding -= 1

    def _carry_out(self, number: int, task: _Task) -> None:
        if task.cancelled():
            task.future.set_exception(CancelledError(task.operation))
            return
        try:
            worker = self._workers.get(number)
            if worker is None:
                worker = self._workers[number] = _Worker(number)
            result = worker.run(next(self._identities), task)
        except NodeError as error:
            dead = self._workers.pop(number, None)
            if dead is not None:
                dead.end()
            task.future.set_exception(error)
        except Exception as error:  # noqa: BLE001 - handed on through the future, whatever it is
            task.future.set_exception(error)
        else:
            task.future.set_result(result)


def _start_by_exec(theirs: socket.socket) -> int:
    descriptor = theirs.fileno()
    os.set_inheritable(descriptor, True)
    # posix_spawn does not run Python code between fork and exec, so threads do not matter.
    return os.posix_spawn(
        sys.executable,
        # -P: a module of the user's working directory must not be imported in place of ours.
        [sys.executable, "-P", "-m", "stowray.pipeline.stage_worker", str(descriptor)],
        dict(os.environ),
        file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
        # Ctrl-C goes to the whole process group; the owner decides what it means, from the start.
        setsigmask=[signal.SIGINT],
    )


def _start_by_fork(others: list[socket.socket], theirs: socket.socket, *, early: bool) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        # The owner's ends: a copy kept open here would hide the owner's death from a sibling.
        for connection in others:
            connection.close()
        from stowray.pipeline.stage_worker import serve

        # One is sure to be needed; the others would only be in the way of their owner's start.
        serve(theirs, early=early)
        status = 0
    finally:
        os._exit(status)
