"""What a worker does: stage one layer or commit one, from plain arguments to a plain result.

Shared by the local worker processes and the unpack actors, so that both engines do the same.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stowray.pipeline.clock import Boot
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import CancelledError, DigestMismatchError, NodeError, UsageError
from stowray.pipeline.limits import LayerLimits
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

# The owner cancels a stage whose fetch has failed, and its death ends the worker: as long as it
# lives and does not cancel, the blob's writer may be waiting its turn at a rate-limited registry.
FOLLOW_SECONDS = 24 * 3600.0


TRIES = 8


def prove_diff_id(
    open_read: Callable[[], AbstractContextManager[Callable[[], bytes]]],
    diff_id: Digest,
    blob: Digest,
    limits: LayerLimits,
    cancelled: Callable[[], bool],
) -> None:
    """Raise DigestMismatchError unless ``blob`` is, uncompressed, what ``diff_id`` names.

    For a blob whose layer need not be staged, because another blob brought the same one.
    """
    from stowray.pipeline.compress import decompress
    from stowray.pipeline.ingest_home import GenerationChanged

    for _ in range(TRIES):
        hasher = diff_id.hasher()
        try:
            with open_read() as read:
                inflate = decompress(read, limits)
                while chunk := inflate():
                    hasher.update(chunk)
                    if cancelled():
                        raise CancelledError(f"layer {diff_id}")
        except GenerationChanged:
            continue
        actual = f"{diff_id.algorithm}:{hasher.hexdigest()}"
        if actual != diff_id:
            raise DigestMismatchError(f"layer {diff_id} of blob {blob}", diff_id, actual)
        return
    raise NodeError(f"layer {diff_id}", f"wrong bytes arrived {TRIES} times in a row")


def preload() -> None:
    """Import what the first task is going to need."""
    import isal.igzip  # noqa: F401

    import stowray.pipeline.follower
    import stowray.pipeline.layer
    import stowray.pipeline.overlay
    import stowray.pipeline.removal  # noqa: F401


class LayerTasks:
    """Carries out tasks; keeps the stores that it has opened."""

    def __init__(self) -> None:
        self._snapshots: dict[str, tuple[Store, Snapshots]] = {}

    def run(
        self,
        operation: str,
        arguments: dict[str, Any],
        on_progress: Callable[[int, int], None],
        cancelled: Callable[[], bool],
    ) -> dict[str, Any]:
        """Carry out ``stage`` or ``commit``; see :func:`stowray.pipeline.crew.unpack_arguments`.

        ``commits`` is several commits one after the other, up to the first that fails.
        """
        if operation == "commits":
            steps = arguments["steps"]
            return {"results": [self.run("commit", one, on_progress, cancelled) for one in steps]}
        begun = time.perf_counter()
        store, snapshots = self._open(arguments)
        digest, size = Digest(arguments["digest"]), int(arguments["size"])
        diff_id = Digest(arguments["diff_id"])
        limits = LayerLimits(**{name: v for name, v in arguments["limits"].items() if v})
        consumed = 0
        proven: Digest | None = None
        # Set when the stage has failed: the rest of the blob may be long in coming.
        interrupted = threading.Event()

        @contextmanager
        def open_read() -> Iterator[Callable[[], bytes]]:
            nonlocal consumed, proven
            consumed, proven = 0, None
            interrupted.clear()
            with store.follow(
                digest,
                size,
                cancelled=lambda: cancelled() or interrupted.is_set(),
                grace_seconds=FOLLOW_SECONDS,
            ) as follower:

                def read() -> bytes:
                    nonlocal consumed
                    data = follower.read()
                    consumed += len(data)
                    on_progress(consumed, size)
                    return data

                yield read
                if follower.proven and follower.offset == size:
                    proven = digest

        if operation == "stage":
            below = arguments.get("parent")
            staged = snapshots.stage(
                diff_id,
                open_read,
                parent=Digest(below) if below else None,
                limits=limits,
                cancelled=cancelled,
                interrupt=interrupted.set,
                proven=lambda: proven,
            )
            existed, unpacked = staged.existed, staged.unpacked_size
            if existed and staged.blob != digest and not snapshots.knows(diff_id, digest):
                prove_diff_id(open_read, diff_id, digest, limits, cancelled)
        elif operation == "commit":
            parent = arguments["parent"]
            snapshot = snapshots.commit(
                Digest(arguments["chain_id"]),
                Digest(parent) if parent else None,
                diff_id,
                digest,
                open_read,
                limits=limits,
                cancelled=cancelled,
                interrupt=interrupted.set,
                proven=lambda: proven,
            )
            existed, unpacked = False, snapshot.unpacked_size
        else:
            raise UsageError(operation, "a worker knows only stage, commit and commits")
        return {
            "seconds": time.perf_counter() - begun,
            "unpacked_size": unpacked,
            "existed": existed,
        }

    def _open(self, arguments: dict[str, Any]) -> tuple[Store, Snapshots]:
        path = arguments["store"]
        if path not in self._snapshots:
            store = Store.open(Path(path), boot=Boot(*arguments["boot"]))
            self._snapshots[path] = (store, Snapshots(store))
        return self._snapshots[path]
