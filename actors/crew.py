"""The crew of one pull on a node: steps become calls of pool members.

Invariant: a pull has no more calls under way than its own share, so that several pulls never wait
for each other in a member's queue; a stage is handed out only after the fetch that it follows; a
cancelled step has ended after a few seconds, because a member that does not listen is replaced.
"""

from __future__ import annotations

import itertools
import math
import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stowray.actors import cluster
from stowray.actors.ways import Ways
from stowray.pipeline.crew import Commits, unpack_arguments
from stowray.pipeline.errors import CancelledError, from_wire
from stowray.pipeline.progress import Event
from stowray.pipeline.run import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.actors.pool import Member, Pool
    from stowray.pipeline.fetch import Fetcher
    from stowray.pipeline.image import Image
    from stowray.pipeline.plan import Step
    from stowray.pipeline.progress import Progress, Report
    from stowray.pipeline.settings import Settings
    from stowray.pipeline.store import Store

CANCEL_POLL_SECONDS = 0.05
# A member that was told to stop and has not after this long is ended: Ctrl-C has five seconds.
CANCEL_GRACE_SECONDS = 3.0
# A fetching actor has 64 threads.
SPREAD_SHARE = 60


@dataclass(slots=True, eq=False)
class _Call:
    """One step, or several commits, on the way; ``member`` is None until it is handed out."""

    key: str
    step: Step | None
    task: dict[str, Any]
    pool: Pool[Any]
    report: Report
    cancelled: Callable[[], bool]
    future: Future[Any] = field(default_factory=Future)
    member: Member[Any] | None = None
    told_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Pools:
    """The pools of a node."""

    fetchers: Pool[Any]
    unpackers: Pool[Any]

    def present(self) -> list[Member[Any]]:
        """Return the members of both that were made and not lost."""
        return [*self.fetchers.present(), *self.unpackers.present()]

    def close(self) -> None:
        """End all members of both."""
        self.fetchers.close()
        self.unpackers.close()


class _Committers:
    """The members of a crew as those who carry out commits."""

    def __init__(self, crew: ActorCrew) -> None:
        self._crew = crew

    def submit(
        self,
        operation: str,
        arguments: dict[str, Any],
        *,
        on_progress: Callable[[int, int], None],
        cancelled: Callable[[], bool],
    ) -> Future[dict[str, Any]]:
        """Queue several commits; see :class:`stowray.pipeline.crew.Workers`."""
        return self._crew.commit(arguments, cancelled)


def _cancelled(call: _Call) -> CancelledError:
    return CancelledError("commits" if call.step is None else call.step.id)


def _say_nothing(*_what: Any, **_more: Any) -> None:
    """Report to nobody."""


class ActorCrew:
    """Hands the steps of one pull to pool members; close it when the pull has ended.

    ``origin`` is what a fetcher needs to know of the driver: settings and environment. In a
    pre-warm run ``spread`` is what it needs to know of the run, and ``ways`` gets an entry for each
    task, of a fetch with all that gave bytes of the blob, also if it failed.
    """

    commits_in_order = True

    def __init__(
        self,
        pools: Pools,
        *,
        run: str,
        owner: Any,
        settings: Settings,
        origin: dict[str, Any],
        store: Store,
        progress: Progress,
        spread: dict[str, Any] | None = None,
        ways: Ways | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._pools = pools
        self._run = run
        self._owner = owner
        self._settings = settings
        self._origin = origin
        self._store = store
        self._progress = progress
        self._spread = spread
        self._ways = ways or Ways()
        self._warn = warn
        self._reference = ""
        self._shares = {
            pools.fetchers: max(settings.registry.connections, pools.unpackers.size),
            pools.unpackers: pools.unpackers.size,
        }
        if spread is not None:
            # Most of them wait for a peer to have a first byte, which must keep nobody from
            # fetching what other peers wait for: the fetcher bounds its connections itself.
            self._shares[pools.fetchers] = SPREAD_SHARE * pools.fetchers.size
        self._commits = Commits(settings, store, _Committers(self))
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._queues: dict[Pool[Any], deque[_Call]] = {pool: deque() for pool in self._shares}
        self._under_way: set[_Call] = set()
        self._handed_out: set[str] = set()
        # Ray completes its futures on a thread of its own, which must do no more than pass them on.
        self._replies: queue.SimpleQueue[tuple[_Call, Member[Any], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._serve, name="crew", daemon=True)
        self._thread.start()

    def start_early(self) -> None:
        """Do nothing: the members run already."""

    def submit(
        self,
        step: Step,
        image: Image,
        fetcher: Fetcher,
        report: Report,
        cancelled: Callable[[], bool],
    ) -> Future[Outcome]:
        """Queue one step; the members have fetchers of their own."""
        source = image.reference
        if step.kind == "commit":
            self._reference = source.canonical
            return self._commits.submit(step, report, cancelled)
        task = self._task(source.canonical)
        if step.kind == "fetch":
            pool = self._pools.fetchers
            task |= {
                "store": str(self._store.path),
                "source": source.to_dict(),
                "descriptor": step.descriptor.to_dict(),
                "spread": self._spread,
                **self._origin,
            }
        else:
            pool = self._pools.unpackers
            arguments = unpack_arguments(self._settings, self._store, step)
            task |= {"kind": step.kind, "arguments": arguments}
            report("layer", str(step.descriptor.digest), "waiting", 0, step.descriptor.size)
        return self._queue(_Call(task["key"], step, task, pool, report, cancelled))

    def commit(
        self, arguments: dict[str, Any], cancelled: Callable[[], bool]
    ) -> Future[dict[str, Any]]:
        """Queue the commits that ``arguments`` name, one after the other, as one call."""
        task = self._task(self._reference) | {"kind": "commits", "arguments": arguments}
        pool = self._pools.unpackers
        return self._queue(_Call(task["key"], None, task, pool, _say_nothing, cancelled))

    def _task(self, reference: str) -> dict[str, Any]:
        """Return what a member needs to know for any task."""
        return {
            "key": f"{self._run}/{next(self._numbers)}",
            "run": self._run,
            "owner": self._owner,
            "node": self._settings.node_name,
            "reference": reference,
        }

    def _queue(self, call: _Call) -> Future[Any]:
        call.future.set_running_or_notify_cancel()
        with self._lock:
            waiting = self._queues[call.pool]
            # A commit ends a layer's work and frees the ones above it: before any stage.
            (waiting.appendleft if call.step is None else waiting.append)(call)
        self._hand_out()
        return call.future

    def close(self) -> None:
        """End the crew's thread; the members stay."""
        self._replies.put(None)
        self._thread.join()

    def _hand_out(self) -> None:
        chosen: list[_Call] = []
        with self._lock:
            # Fetches first: stages that follow them become free by it.
            for pool, waiting in self._queues.items():
                busy = sum(1 for call in self._under_way if call.pool is pool)
                for call in [call for call in waiting if self._is_free(call)]:
                    if busy >= self._shares[pool]:
                        break
                    waiting.remove(call)
                    self._under_way.add(call)
                    if call.step is not None:
                        self._handed_out.add(call.step.id)
                    chosen.append(call)
                    busy += 1
        for call in chosen:
            self._start(call)

    def _is_free(self, call: _Call) -> bool:
        follows = None if call.step is None else call.step.follows
        return follows is None or follows in self._handed_out

    def _start(self, call: _Call) -> None:
        member = call.pool.take()
        call.member = member
        reply = member.actor.run.remote(call.task).future()
        reply.add_done_callback(lambda done: self._replies.put((call, member, done)))

    def _finish(self, call: _Call, member: Member[Any], done: Future[Any]) -> None:
        error = done.exception()
        call.pool.give_back(member, is_lost=error is not None and cluster.is_loss(error))
        with self._lock:
            self._under_way.discard(call)
        if error is None:
            reply = done.result()
            for event in reply["events"]:
                self._progress.merge(Event.from_dict(event))
            if call.step is not None:
                self._note_way(call, call.step, reply)
            if self._warn is not None:
                for text in reply.get("warnings", ()):
                    self._warn(text)
            if "error" in reply:
                call.future.set_exception(from_wire(*reply["error"]))
            elif call.step is None:
                call.future.set_result(reply["outcome"])
            else:
                self._report_end(call, call.step)
                call.future.set_result(Outcome(**reply["outcome"]))
        elif call.told_at and cluster.is_loss(error):
            call.future.set_exception(_cancelled(call))
        else:
            call.future.set_exception(cluster.translate(error, member.name))
        self._hand_out()

    def _note_way(self, call: _Call, step: Step, reply: dict[str, Any]) -> None:
        way = reply.get("way") or {
            "kind": step.kind,
            "digest": str(step.descriptor.digest),
            "size": step.descriptor.size,
            "seconds": reply["outcome"]["seconds"],
            "ended": time.time(),
        }
        self._ways.end(call.key, way)

    def _report_end(self, call: _Call, step: Step) -> None:
        if step.kind == "stage":
            size = step.descriptor.size
            call.report("layer", str(step.descriptor.digest), "applied", size, size)

    def _serve(self) -> None:
        """Settle replies as they come, and look after cancellations in between."""
        looked = time.monotonic()
        while True:
            try:
                reply = self._replies.get(timeout=CANCEL_POLL_SECONDS)
            except queue.Empty:
                pass
            else:
                if reply is None:
                    return
                self._finish(*reply)
            if time.monotonic() - looked >= CANCEL_POLL_SECONDS:
                looked = time.monotonic()
                self._look_after_cancelled()

    def _look_after_cancelled(self) -> None:
        self._cancel_queued()
        with self._lock:
            under_way = list(self._under_way)
        for call in under_way:
            self._cancel_under_way(call)

    def _cancel_queued(self) -> None:
        given_up: list[_Call] = []
        with self._lock:
            for waiting in self._queues.values():
                mine = [call for call in waiting if call.cancelled()]
                for call in mine:
                    waiting.remove(call)
                given_up += mine
        for call in given_up:
            call.future.set_exception(_cancelled(call))

    def _cancel_under_way(self, call: _Call) -> None:
        member = call.member
        if member is None or not call.cancelled():
            return
        now = time.monotonic()
        if not call.told_at:
            call.told_at = now
            member.actor.cancel.remote(call.key)
        elif now - call.told_at > CANCEL_GRACE_SECONDS:
            # The death ends the call; other pulls' tasks on it are done again elsewhere.
            call.told_at = math.inf
            cluster.end(member.actor)
