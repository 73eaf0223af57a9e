"""The actor that owns the stores of one node and walks the plans of all pulls there.

Invariant: pulls run side by side, each on its own thread and with its own share of the pools, and
share every blob and layer through the store's locks; the same walk as in-process, so the same
results; when a pull has ended, nothing of it works on. In a pre-warm run the actor also serves its
store to the run's other nodes (``node_run``).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import ray

import stowray
from stowray.actors import cluster, frames
from stowray.actors.crew import ActorCrew, Pools
from stowray.actors.engines import NodeEngine, Stores
from stowray.actors.lifeline import LEAVE_SECONDS, Lifeline, leave_now
from stowray.actors.member_watch import MemberWatch
from stowray.actors.node_run import NodeRun
from stowray.actors.pool import Pool
from stowray.actors.processes import Process
from stowray.actors.session_state import PROTOCOL
from stowray.actors.spread_fetchers import lease_client
from stowray.actors.tasks import Tasks
from stowray.actors.ways import Ways
from stowray.actors.wire import options_from_dict, settings_from_dict
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import NodeError, StowrayError, to_wire
from stowray.pipeline.files import raise_descriptor_limit
from stowray.pipeline.image import Image
from stowray.pipeline.progress import Progress
from stowray.pipeline.resolve import document_digests
from stowray.pipeline.source import source_from_dict

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stowray.pipeline.settings import Settings
    from stowray.pipeline.store import Store

DRIVER_POLL_SECONDS = 1.0
IDLE_SYNC_SECONDS = 2.0
# Between being made for a run and the driver's first word.
BEGIN_SECONDS = 120.0
LEAVE_POLL_SECONDS = 0.05


class NodeActor:
    """The shell round :class:`NodeEngine`, one per pull, over two pools."""

    def __init__(self, node: str, unpackers: int, stays: bool, lazy: bool) -> None:
        self._stores = Stores()
        raise_descriptor_limit()
        self._node = node
        self._tasks = Tasks()
        self._used = time.monotonic()
        self._runs: dict[str, Progress] = {}
        # Of each pull of a pre-warm run, kept until the run ends.
        self._ways: dict[str, Ways] = {}
        self._prewarm: NodeRun | None = None
        # A run's actor is begun for a driver that may be gone before it says its first word.
        self._lifeline = Lifeline(self._leave, seconds=BEGIN_SECONDS) if lazy else None
        node_id = cluster.own_node_id()
        self._pools = Pools(
            fetchers=Pool(
                f"fetch/{node}",
                max(1, unpackers // 4),
                start=lambda _name: cluster.start_fetcher(node_id),
                end=cluster.end,
                watch=cluster.when_ended,
                lazy=lazy,
            ),
            unpackers=Pool(
                f"unpack/{node}",
                unpackers,
                start=lambda _name: cluster.start_unpacker(node_id),
                end=cluster.end,
                watch=cluster.when_ended,
                lazy=lazy,
            ),
        )
        self._watch = MemberWatch(self._pools.present, lambda actor: actor.pid.remote().future())
        self._syncer = _Syncer(self._tasks) if stays else None

    @ray.method(concurrency_group="control")
    def describe(self) -> dict[str, Any]:
        """Return who this is: versions, node, store and processes."""
        return {
            "version": stowray.__version__,
            "protocol": PROTOCOL,
            "node": self._node,
            "pid": os.getpid(),
            "uid": os.geteuid(),
            "pulls": self._tasks.count(),
            "idle_seconds": 0.0 if self._tasks.count() else time.monotonic() - self._used,
        }

    @ray.method(concurrency_group="control")
    def members(self) -> dict[str, list[int]]:
        """Return the process numbers of the pools' members, once all have started."""
        return {
            "fetchers": self._pids(self._pools.fetchers),
            "unpackers": self._pids(self._pools.unpackers),
        }

    @ray.method(concurrency_group="pulls")
    def pull(self, request: dict[str, Any]) -> dict[str, Any]:
        """Bring one resolved image into the store; ``{result, events}`` or ``{error, events}``.

        With ``spread``, as a part of the pre-warm run that was begun, also what each blob's way
        was, and whether all of it is on disk now.
        """
        progress = Progress(node=request["settings"]["node"] or self._node)
        run = request["run"]
        self._runs[run] = progress
        forwarder = self._forwarder(request)
        if forwarder is not None:
            progress.watch(forwarder)
        reply: dict[str, Any]
        ways = Ways()
        if request["spread"] is not None:
            self._ways[run] = ways
        warnings: list[str] = []
        try:
            with self._tasks.running(run) as cancelled:
                is_over = _or_orphaned(request, cancelled)
                result = self._pull(request, progress, ways, warnings, is_over)
                reply = {"result": result}
                if request["spread"] is not None:
                    reply["presence"] = self._begun().presence(request["spread"]["image"])
        except StowrayError as error:
            reply = {"error": to_wire(error)}
        finally:
            self._runs.pop(run, None)
            self._used = time.monotonic()
            progress.close()
            if forwarder is not None:
                forwarder.close()
        events = [event.to_wire() for event in progress.events()]
        return {**reply, "events": events, "ways": ways.all(), "warnings": warnings}

    @ray.method(concurrency_group="control")
    def begin_run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Open the store for a pre-warm run and serve it to the run; see :class:`NodeRun`."""
        self._end_run()
        self._ways.clear()
        self._prewarm = NodeRun(request, self._stores)
        return self._prewarm.describe()

    @ray.method(concurrency_group="pulls")
    def survey(self, images: list[dict[str, Any]]) -> dict[str, Any]:
        """Say what of the images is here; see :meth:`NodeRun.survey`."""
        return self._begun().survey(images)

    @ray.method(concurrency_group="control")
    def accept(self, part: dict[str, Any], digests: list[str], works: bool) -> None:
        """Take this node's part of the spread; with ``works`` there is something to do."""
        self._begun().accept(part, digests)
        if works:
            self._pools.fetchers.members()
            self._pools.unpackers.members()

    @ray.method(concurrency_group="pulls")
    def declare(self, spread: dict[str, Any]) -> None:
        """Tell the owner of the leases, started anew, what this node has of the run's blobs."""
        run = self._prewarm
        if run is not None:
            run.declare(lease_client(run.task(spread)))

    @ray.method(concurrency_group="pulls")
    def presence(self, images: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Look on disk for each of the images; see :meth:`NodeRun.presence`."""
        return [self._begun().presence(image) for image in images]

    @ray.method(concurrency_group="pulls")
    def deliver(self, request: dict[str, Any]) -> dict[str, Any]:
        """Hand an image that is here to runtimes; see :meth:`NodeRun.deliver`."""
        image = Image.from_dict(request["image"])
        with self._tasks.running(request["run"]) as cancelled:
            return self._begun().deliver(image, request["runtimes"], cancelled)

    @ray.method(concurrency_group="control")
    def end_run(self) -> None:
        """End the serving and the pools, at the end of a pre-warm run."""
        self._end_run()
        self._pools.close()

    @ray.method(concurrency_group="control")
    def came(self, runs: list[str], seconds: float) -> dict[str, list[dict[str, Any]]]:
        """Say how blobs came in these pulls, which were given up; they get so long to end."""
        until = time.monotonic() + seconds
        while self._runs.keys() & set(runs) and time.monotonic() < until:
            time.sleep(LEAVE_POLL_SECONDS)
        return {run: ways.all() for run in runs if (ways := self._ways.get(run)) is not None}

    @ray.method(concurrency_group="life")
    def beat(self, seconds: float) -> dict[str, list[dict[str, Any]]]:
        """Stay for so many seconds from now on; without a driver who says so no longer.

        With 0 all is given up at once, also where no head is left to end this process. Returns how
        blobs have come so far, of each pull under way.
        """
        if self._lifeline is None:
            self._lifeline = Lifeline(self._leave, seconds=seconds)
        if seconds:
            self._lifeline.hold(seconds)
        else:
            self._leave()
        under_way = [(run, ways) for run, ways in self._ways.copy().items() if run in self._runs]
        return {run: ways.all() for run, ways in under_way}

    @ray.method(concurrency_group="notes")
    def note(self, run: str, frame: bytes, way: dict[str, Any] | None = None) -> None:
        """Take over a frame of a member's events; one of an ended run is dropped.

        ``way`` is how a blob has come so far; what its task's result says of that is the last word.
        """
        progress = self._runs.get(run)
        if progress is None:
            return
        for event in frames.unpack(frame):
            progress.merge(event)
        ways = self._ways.get(run)
        if ways is not None and way is not None:
            ways.note(way)

    @ray.method(concurrency_group="control")
    def cancel(self, run: str) -> bool:
        """Give one pull up; it ends soon with CancelledError."""
        return self._tasks.cancel(run)

    @ray.method(concurrency_group="control")
    def close(self) -> None:
        """End the pools."""
        self._pools.close()

    def _leave(self) -> None:
        """Give everything up, and end this process; the pools' members notice and end as well."""
        self._tasks.cancel_all()
        self._end_run()
        until = time.monotonic() + LEAVE_SECONDS
        while self._tasks.count() and time.monotonic() < until:
            time.sleep(LEAVE_POLL_SECONDS)
        leave_now()

    def _end_run(self) -> None:
        run, self._prewarm = self._prewarm, None
        if run is not None:
            run.close()

    def _begun(self) -> NodeRun:
        if self._prewarm is None:
            # The actor was started anew since: whoever asks begins the run again.
            raise NodeError(self._node, cluster.LOST)
        return self._prewarm

    def _pull(
        self,
        request: dict[str, Any],
        progress: Progress,
        ways: Ways,
        warnings: list[str],
        cancelled: Callable[[], bool],
    ) -> dict[str, Any]:
        settings = settings_from_dict(request["settings"])
        origin = {name: request[name] for name in ("settings", "environment")}
        spread = None
        if request["spread"] is None:
            store = self._store(request, settings)
        else:
            run = self._begun()
            store = run.store
            origin["environment"] = run.environment
            origin["access"] = request["access"]
            # Each fetching actor keeps a limit of its own: together they keep the node's.
            fetchers = self._pools.fetchers.size
            spread = run.task(request["spread"])
            spread["bandwidth"] = -(-spread["bandwidth"] // fetchers)
        source = source_from_dict(request["source"])
        image = Image.from_dict(request["image"])
        digests = [
            *document_digests(image),
            *(layer.digest for layer in image.layers),
            # Trees staged by diff ID and not yet committed.
            *image.diff_ids,
        ]
        crew = ActorCrew(
            self._pools,
            run=request["run"],
            owner=cluster.own_handle(),
            settings=settings,
            origin=origin,
            store=store,
            progress=progress,
            spread=spread,
            ways=ways,
            warn=warnings.append,
        )
        engine = NodeEngine(settings, progress=progress, store=store, crew=crew)
        try:
            with store.lease(
                f"pull {source.canonical}", digests=digests, chain_ids=image.chain_ids
            ):
                for digest, body in request["documents"].items():
                    store.put_blob(Digest(digest), body)
                    store.confirm(Digest(digest), source.name)
                options = options_from_dict(request["options"])
                return engine.pull_image(source, image, options, cancelled).to_dict()
        finally:
            engine.close()
            if self._syncer is not None:
                self._syncer.touch(store)

    def _store(self, request: dict[str, Any], settings: Settings) -> Store:
        """Return the store that the request names, else the one that the settings give here."""
        return self._stores.get(request["store"] or str(settings.store_path()))

    def _forwarder(self, request: dict[str, Any]) -> frames.Forwarder | None:
        actor = request["progress"]
        if actor is None:
            return None
        # All pulls of a pre-warm run are shown together.
        run = request["run"] if request["spread"] is None else request["spread"]["run"]

        def send(frame: bytes) -> bool:
            try:
                cluster.wait(actor.note.remote(run, frame), "progress", seconds=10.0)
            except StowrayError:
                # The run goes on without it; the result brings the final events.
                return False
            return True

        return frames.Forwarder(send, nodes=request["nodes"])

    def _pids(self, pool: Pool[Any]) -> list[int]:
        calls = [(member.name, member.actor.pid.remote()) for member in pool.members()]
        return [cluster.wait(call, name, seconds=30.0) for name, call in calls]


class _Syncer:
    """Makes stores durable when no pull has run for a while, off every pull's path."""

    def __init__(self, tasks: Tasks) -> None:
        self._tasks = tasks
        self._written: dict[Path, Store] = {}
        self._wanted = threading.Event()
        threading.Thread(target=self._serve, name="sync", daemon=True).start()

    def touch(self, store: Store) -> None:
        """Note that something was written to ``store``."""
        self._written[store.path] = store
        self._wanted.set()

    def _serve(self) -> None:
        while True:
            self._wanted.wait()
            time.sleep(IDLE_SYNC_SECONDS)
            if self._tasks.count():
                continue
            self._wanted.clear()
            written, self._written = self._written, {}
            for store in written.values():
                # Until a sync succeeds the store is trusted for this boot only: no harm.
                with contextlib.suppress(StowrayError, OSError):
                    store.sync()


def _or_orphaned(request: dict[str, Any], cancelled: Callable[[], bool]) -> Callable[[], bool]:
    """Return ``cancelled``, true also when the driver of a session's pull has died."""
    if request["driver"] is None:
        return cancelled
    driver = Process.from_dict(request["driver"])
    looked = time.monotonic()
    is_orphan = False

    def is_over() -> bool:
        nonlocal looked, is_orphan
        now = time.monotonic()
        if now - looked > DRIVER_POLL_SECONDS:
            looked = now
            is_orphan = not driver.is_alive
        return is_orphan or cancelled()

    return is_over
