"""The worker process: takes stage and commit tasks from its owner and carries them out.

Run as ``python -m stowray.pipeline.stage_worker DESCRIPTOR`` with the number of an inherited
stream socket. Invariant: one task at a time; only plain data crosses; the process ends the moment
its owner's end of the socket closes, in the middle of a task too.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any

from stowray.pipeline.errors import StorageError, StowrayError, to_wire
from stowray.pipeline.files import raise_descriptor_limit
from stowray.pipeline.frames import receive_frame, send_frame

PROGRESS_SECONDS = 0.05


class _Owner:
    """The worker's side of the socket: reads on a thread of its own so that cancels are seen."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._send_lock = threading.Lock()
        self._changed = threading.Condition()
        self._next: list[Any] | None = None
        self._cancelled: set[int] = set()
        threading.Thread(target=self._read, name="owner", daemon=True).start()

    def take(self) -> list[Any]:
        """Wait for the next task: ``[identity, operation, arguments]``."""
        with self._changed:
            self._changed.wait_for(lambda: self._next is not None)
            task, self._next = self._next, None
        return task or []

    def is_cancelled(self, identity: int) -> bool:
        """Return whether the owner has given this task up."""
        return identity in self._cancelled

    def send(self, message: Any) -> None:
        """Tell the owner; a closed socket ends the process."""
        try:
            with self._send_lock:
                send_frame(self.connection, message)
        except OSError:
            os._exit(0)

    def _read(self) -> None:
        while True:
            try:
                message = receive_frame(self.connection)
            except OSError:
                message = None
            if message is None:
                # The owner is gone: what is half done lies in temporary places and is swept up
                # by a later run; nobody is left to report to.
                os._exit(0)
            if message[0] == "cancel":
                self._cancelled.add(message[1])
            else:
                with self._changed:
                    self._next = message[1:]
                    self._changed.notify()


def serve(connection: socket.socket, *, early: bool = True) -> None:
    """Carry out tasks until the owner closes the socket.

    With ``early`` all that a task needs is imported at once, else when a task is there.
    """
    # Ctrl-C reaches the whole process group; the owner decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # The process is ours alone: modes are given exactly at creation instead of by a later call.
    os.umask(0)
    raise_descriptor_limit()
    # The tar loop holds the interpreter lock; the inflating and hashing threads must get it back
    # quickly after each chunk, and the default interval of 5 ms is longer than a chunk takes.
    sys.setswitchinterval(0.0005)
    owner = _Owner(connection)
    from stowray.pipeline.layer_tasks import LayerTasks, preload

    tasks = LayerTasks()
    if early:
        # While the owner is still asking the registry what there is to do.
        preload()
    while True:
        identity, operation, arguments = owner.take()
        _carry_out(owner, tasks, identity, operation, arguments)


def _carry_out(
    owner: _Owner, tasks: Any, identity: int, operation: str, arguments: dict[str, Any]
) -> None:
    last = 0.0

    def on_progress(current: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_SECONDS:
            last = now
            owner.send(["progress", identity, current, total])

    try:
        result = tasks.run(operation, arguments, on_progress, lambda: owner.is_cancelled(identity))
    except StowrayError as error:
        owner.send(["error", identity, *to_wire(error)])
    except OSError as error:
        owner.send(
            ["error", identity, *to_wire(StorageError(str(error.filename or ""), str(error)))]
        )
    except MemoryError:
        owner.send(["error", identity, *to_wire(StorageError("memory", "not enough memory"))])
    except Exception as error:  # noqa: BLE001 - the owner must hear of a defect, not of a dead worker
        where = traceback.format_exc(limit=-3)
        failure = StowrayError(f"internal error in {operation}: {error!r}", where)
        owner.send(["error", identity, *to_wire(failure)])
    else:
        owner.send(["done", identity, result])


def main() -> None:
    """Serve on the inherited socket named on the command line."""
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
