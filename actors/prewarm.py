"""Pre-warming: every image of a plan on every selected node of a Ray cluster, one download in all.

Invariant: whatever ends a run, in seconds nothing of it works on: its actors are unnamed, owned by
this driver and ended by it; what was fetched is kept for the next run. The caller's thread never
waits for Ray itself, so that a signal or a dead head ends the wait.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stowray.actors.connect import connect
from stowray.actors.headwatch import HeadWatch
from stowray.actors.prewarm_access import on_any_node
from stowray.actors.wire import origin_environment
from stowray.pipeline.engine import never
from stowray.pipeline.errors import (
    CancelledError,
    DeadlineError,
    NodeError,
    StowrayError,
    describe,
)
from stowray.pipeline.lock_file import read_lock

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from stowray.actors.cluster_watch import ClusterWatch
    from stowray.actors.embedded import RayAddress
    from stowray.actors.prewarm_context import RunContext
    from stowray.actors.prewarm_run import ClusterRun
    from stowray.actors.prewarm_state import RunState
    from stowray.pipeline.cluster_plan import ClusterPlan
    from stowray.pipeline.dry_run import DryRun
    from stowray.pipeline.lock_file import LockFile
    from stowray.pipeline.prewarm_plan import PrewarmPlan
    from stowray.pipeline.prewarm_report import PrewarmReport
    from stowray.pipeline.progress import Progress
    from stowray.pipeline.settings import Settings

TICK_SECONDS = 0.1
CHANGE_SECONDS = 0.5
POLL_SECONDS = 0.2
NODES_SECONDS = 30.0
# What a cancelled run takes to tell its actors before it ends them.
CANCEL_SECONDS = 0.5
END_SECONDS = 2.0
# For words to actors whose head is dead to get out.
LEAVE_SECONDS = 0.5


def _states_of(report: PrewarmReport) -> str:
    """Return how many nodes are in which state."""
    states = Counter(node.state for node in report.nodes)
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "no nodes"


def _why(error: BaseException | None) -> dict[str, Any]:
    """Return what rows are told that were open when the run ended, with ``error`` if it did so."""
    if isinstance(error, StowrayError):
        return describe(error)
    return describe(NodeError("the run", "has ended before anything became of it"))


def _to_nobody(_report: PrewarmReport) -> None:
    """Show nothing."""


class PrewarmRun:
    """Runs ``plan`` on the Ray that the settings lead to; close it after use.

    ``on_change`` gets the report so far, at most about twice a second, on a thread of the run's.
    ``lock`` is the lock file to honour and to write; with ``watch`` a run goes on for nodes that
    join, until it is cancelled. A Ray that is started here has ``embedded_nodes`` nodes.
    """

    def __init__(
        self,
        plan: PrewarmPlan,
        settings: Settings,
        *,
        progress: Progress,
        lock: Path | None = None,
        watch: bool = False,
        embedded_nodes: int = 1,
    ) -> None:
        self.on_change: Callable[[PrewarmReport], None] = _to_nobody
        self._plan = plan
        self._settings = on_any_node(settings)
        self._progress = progress
        self._lock = lock or (Path(plan.lock) if plan.lock else None)
        self._watch = watch
        self._embedded_nodes = embedded_nodes
        self._stack = ExitStack()
        self._ray: RayAddress | None = None

    def plan(self, cancelled: Callable[[], bool] = never) -> DryRun:
        """Return what :meth:`run` would do; looks at every node and changes nothing.

        Raises what :meth:`run` does, and CancelledError or DeadlineError when it was ended before
        it was known: half a plan is none.
        """
        from stowray.pipeline.dry_run import DryRun

        report, found = self._carry_out("plan", _plan, cancelled)
        return DryRun(found, report)

    def run(self, cancelled: Callable[[], bool] = never) -> PrewarmReport:
        """Bring every image to every node and return what came of it.

        A cancelled run, and one whose time is up, returns the report of what was reached. Raises
        what concerns the run as a whole: UsageError, NodeError (no cluster, its head is dead),
        DeadlineError (no answer when connecting); ``on_change`` has got what was reached then.
        """
        return self._carry_out("prewarm", _warm, cancelled)[0]

    def status(self, repair: bool = False, cancelled: Callable[[], bool] = never) -> PrewarmReport:
        """Return what is on the disk of every node; with ``repair`` bring what is missing."""
        return self._carry_out("status", _repair if repair else _status, cancelled)[0]

    def close(self) -> None:
        """Leave the Ray, and end it if it was started here."""
        stack, self._stack, self._ray = self._stack, ExitStack(), None
        stack.close()

    def _carry_out(
        self,
        command: str,
        work: Callable[[_Under], Awaitable[Any]],
        cancelled: Callable[[], bool],
    ) -> tuple[PrewarmReport, Any]:
        # Before any Ray is looked for or started: a file that is none is the user's to change.
        locked = None if self._lock is None else read_lock(self._lock)
        if self._ray is None:
            self._ray = connect(self._settings, self._stack, embedded_nodes=self._embedded_nodes)[0]
        under = _Under(self, self._ray, command, cancelled)
        under.locked = locked
        try:
            value = under.wait(work)
        except BaseException as error:
            under.state.fail_open(_why(error))
            under.tell_job("failed", str(error) or type(error).__name__)
            self.on_change(under.state.report())
            raise
        if command != "plan":
            # A report of a run that has ended leaves nothing open, whatever was overlooked.
            under.state.fail_open(_why(None))
        report = under.state.report()
        if command == "prewarm" and report.exit_code:
            under.tell_job("failed", f"not everything is where it should be: {_states_of(report)}")
        else:
            under.tell_job("done")
        self.on_change(report)
        return report, value


class _Under:
    """One run under way, its event loop on a thread of its own."""

    def __init__(
        self, owner: PrewarmRun, ray: RayAddress, command: str, cancelled: Callable[[], bool]
    ) -> None:
        from stowray.actors.prewarm_state import RunState

        self.plan = owner._plan
        self.lock = owner._lock
        self.locked: LockFile | None = None
        self.goes_on = owner._watch and command == "prewarm"
        self.state: RunState = RunState(
            secrets.token_hex(8), command, self.plan.failure.minimum_ready
        )
        self.is_idle = False
        self.cluster: ClusterRun
        self._owner = owner
        self._ray = ray
        self._cancelled = cancelled
        self._given_up = False
        self._watch: ClusterWatch
        self._context: RunContext
        self._told = 0.0

    # -- threads ----------------------------------------------------------------------------------

    def wait(self, work: Callable[[_Under], Awaitable[Any]]) -> Any:
        """Carry ``work`` out and return what it returns; nothing of it is left after that."""
        values: list[Any] = []
        failures: list[BaseException] = []

        def carry_out() -> None:
            try:
                values.append(asyncio.run(self._main(work)))
            except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
                failures.append(error)

        thread = threading.Thread(target=carry_out, name="prewarm-run", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(POLL_SECONDS)
        except BaseException:
            # Ctrl-C of a program that has no handler of its own for it.
            self._given_up = True
            thread.join()
            raise
        if failures:
            raise failures[0]
        return values[0]

    async def _main(self, work: Callable[[_Under], Awaitable[Any]]) -> Any:
        from stowray.actors import cluster, frames
        from stowray.actors.cluster_watch import ClusterWatch
        from stowray.actors.follow import Follower
        from stowray.actors.prewarm_access import RunAccess
        from stowray.actors.prewarm_context import RunContext
        from stowray.actors.prewarm_images import RunImages
        from stowray.actors.prewarm_pulse import Pulse
        from stowray.actors.prewarm_run import ClusterRun

        owner, state = self._owner, self.state
        resolver = cluster.start_resolver(cluster.Placement(self._ray.node_id, restarts=8))
        board = cluster.start_progress(cluster.Placement(self._ray.node_id))
        self._watch = ClusterWatch(HeadWatch(self._ray.address))
        follower = Follower(board, state.run, frames.merging(owner._progress))
        self._context = RunContext(
            run=state.run,
            token=secrets.token_urlsafe(32),
            plan=self.plan,
            settings=owner._settings,
            access=RunAccess(owner._settings, origin_environment(os.environ)),
            state=state,
            progress=owner._progress,
            resolver=resolver,
            board=board,
        )
        self.images = RunImages(
            resolver,
            owner._settings,
            owner._progress,
            locked=self.locked,
        )
        self.cluster = ClusterRun(self._context, self.images, driver_node=self._ray.node_id)
        pulse = Pulse(
            self.cluster.nodes.values,
            resolver,
            board,
            on_silent=self.cluster.note_silent,
            on_restart=self.cluster.note_restart,
        )
        beating = asyncio.ensure_future(pulse.run())
        try:
            return await self._guarded(work, beating)
        finally:
            beating.cancel()
            await self._end(follower, resolver, board)

    async def _end(self, follower: Any, resolver: Any, board: Any) -> None:
        from stowray.actors import cluster

        is_lost = self._watch.failure is not None
        in_order = not (is_lost or self.state.interrupted)
        try:
            # With a dead head there is nobody to carry an order out: actors end themselves, now
            # that they are told, or later because nobody asks them to stay.
            if is_lost:
                await self.cluster.hear(CANCEL_SECONDS)
                self.cluster.leave()
                for actor in (resolver, board):
                    cluster.forget(actor.beat.remote(0.0))
                await asyncio.sleep(LEAVE_SECONDS)
            else:
                await self.cluster.close(END_SECONDS if in_order else CANCEL_SECONDS)
        finally:
            follower.close()
            self._watch.close()
            if not is_lost:
                cluster.end(resolver)
                cluster.end(board)
            for wish in self.plan.images:
                self._owner._progress.fail_open(wish.reference.canonical, "the run has ended")

    async def _guarded(
        self, work: Callable[[_Under], Awaitable[Any]], pulse: asyncio.Task[None]
    ) -> Any:
        task = asyncio.ensure_future(work(self))
        while True:
            done, _ = await asyncio.wait({task, pulse}, timeout=TICK_SECONDS)
            if done:
                # Of these two it ends by a mistake of ours only.
                return done.pop().result()
            self._tick()
            reason = self._reason_to_stop()
            if reason is not None:
                task.cancel()
                await asyncio.wait({task}, timeout=END_SECONDS)
                return self._stopped(reason)

    def _tick(self) -> None:
        alive = self._watch.nodes
        if alive is not None:
            self.cluster.note_living(alive, is_over=self.is_idle)
        now = time.monotonic()
        if self.state.changed and now - self._told >= CHANGE_SECONDS:
            self._told = now
            self.state.changed = False
            self.tell_job("downloading" if self.state.cells else "resolving")
            self._owner.on_change(self.state.report())

    def _reason_to_stop(self) -> StowrayError | None:
        seconds = self.plan.failure.deadline_seconds
        if self._given_up or self._cancelled():
            return CancelledError("prewarm")
        if self._watch.failure is not None:
            return self._watch.failure
        if seconds and self.state.seconds > seconds:
            return DeadlineError("the pre-warm run", seconds)
        return None

    def _stopped(self, reason: StowrayError) -> None:
        """Say in the report why the run ended early; raises what no report can be made of."""
        state = self.state
        if isinstance(reason, CancelledError) and self.is_idle:
            # All was done; only nodes that might come were waited for.
            return
        state.interrupted = isinstance(reason, CancelledError)
        for name in list(state.nodes):
            if state.nodes[name].state == "working":
                state.fail_deliveries(name, self.plan.deliver, describe(reason))
        state.fail_open(describe(reason))
        is_told = isinstance(reason, CancelledError | DeadlineError) and bool(state.nodes)
        if not is_told or state.command == "plan":
            raise reason

    def tell_job(self, status: str, error: str = "") -> None:
        """Tell watchers how far the run as a whole is: cells that are over, of all."""
        cells = self.state.cells.values()
        over = sum(cell.status not in ("waiting", "working") for cell in cells)
        self._owner._progress.record(
            "", "job", self.state.run, status, over, len(cells), error=error
        )

    # -- for the kinds of work --------------------------------------------------------------------

    async def nodes(self) -> dict[str, dict[str, Any]]:
        """Return Ray's descriptions of the living nodes."""
        waited = 0.0
        while self._watch.nodes is None:
            await asyncio.sleep(TICK_SECONDS)
            waited += TICK_SECONDS
            if waited > NODES_SECONDS:
                raise DeadlineError("asking the head of the Ray cluster for its nodes", waited)
        return self._watch.nodes


async def _plan(under: _Under) -> ClusterPlan:
    nodes = await under.cluster.gather((await under.nodes()).values(), for_all=True)
    await under.cluster.look(nodes)
    return under.cluster.cluster_plan()


async def _warm(under: _Under) -> None:
    cluster, state = under.cluster, under.state
    nodes = await cluster.gather((await under.nodes()).values())
    nodes = await cluster.look(nodes)
    if under.lock is not None:
        under.images.write_lock(under.lock)
    await cluster.warm_in_waves(nodes)
    state.drift, untold = await under.images.drift()
    state.warnings += untold
    state.manifest_requests = under.images.requests
    if under.goes_on:
        await _go_on(under)


async def _go_on(under: _Under) -> None:
    """Warm nodes that join, until somebody ends it."""
    await under.cluster.rest()
    while True:
        under.is_idle = True
        new = under.cluster.returned()
        known = under.cluster.names
        joined = [
            entry for id, entry in (await under.nodes()).items() if id not in known or id in new
        ]
        if not joined:
            await asyncio.sleep(TICK_SECONDS * 5)
            continue
        under.is_idle = False
        await under.cluster.join(joined)


async def _status(under: _Under) -> None:
    nodes = await under.cluster.gather((await under.nodes()).values(), for_all=True)
    await under.cluster.assign(nodes)
    await asyncio.gather(*(_look(under, node) for node in nodes))


async def _look(under: _Under, node: Any) -> None:
    state = under.state
    try:
        found = await node.presence()
    except StowrayError as error:
        if not node.is_dead:
            state.fail_node(node.name, describe(error))
        return
    for image, here in zip(node.images, found, strict=True):
        status = "exists" if here["present"] else "partial" if here["bytes"] else "missing"
        state.update_cell(
            node.name, image.planned.reference, status=status, present=here["present"]
        )
    state.settle_node(node.name)


async def _repair(under: _Under) -> None:
    nodes = await under.cluster.gather((await under.nodes()).values())
    await under.cluster.warm_in_waves(await under.cluster.look(nodes))
