"""Walk a plan: submit each step when its inputs are done.

Invariant: a step is submitted once its ``needs`` are done and its ``follows`` was submitted; the
first failure cancels what is still under way and is the one that is raised; a step lost with a
dead worker is submitted again, a bounded number of times. Where a step runs (threads and processes
of this machine, or actors) is the business of ``submit``; the walk is the same for all. What one
finished step costs the walk does not depend on the number of steps.
"""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING, Protocol

from stowray.pipeline.errors import CancelledError, NodeError, StowrayError
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from stowray.pipeline.plan import Plan, Step

LOST_TRIES = 3
POLL_SECONDS = 0.1


@dataclass(slots=True)
class Outcome:
    """What one finished step tells: plain data, so that it may come from another process.

    ``source`` is where fetched bytes came from (``store`` when none were), sizes are bytes and
    ``seconds`` is the time that the step itself took.
    """

    source: str = ""
    fetched_bytes: int = 0
    seconds: float = 0.0
    unpacked_size: int = 0
    existed: bool = False


class Submit(Protocol):
    """How the walk hands a step to whoever carries it out."""

    def __call__(self, step: Step, cancelled: Callable[[], bool]) -> Future[Outcome]:
        """Start ``step`` and return at once.

        The future fails with a StowrayError; with NodeError when the worker that had the step
        died. ``cancelled`` turns true when the whole pull ends early.
        """


class _Walk:
    """Where a walk stands; ``next_steps`` names those that a step's end or start may free."""

    def __init__(self, plan: Plan, *, commits_in_order: bool) -> None:
        self.waiting = {step.id: step for step in plan.steps}
        self.submitted: set[str] = set()
        self.outcomes: dict[str, Outcome] = {}
        self.tries: dict[str, int] = {}
        self.failure: StowrayError | None = None
        self.next_steps: dict[str, list[Step]] = {}
        self._commits_in_order = commits_in_order
        for step in plan.steps:
            for other in step.needs if step.follows is None else (*step.needs, step.follows):
                self.next_steps.setdefault(other, []).append(step)

    def is_ready(self, step: Step) -> bool:
        """Return whether a waiting step may be submitted now."""
        if step.follows is not None and step.follows not in self.submitted:
            return False
        return all(need in self.outcomes or self._is_ahead(step, need) for need in step.needs)

    def _is_ahead(self, step: Step, need: str) -> bool:
        """Return whether ``need`` is a commit that will be done before ``step`` is begun."""
        return (
            self._commits_in_order
            and step.kind == "commit"
            and need.startswith("commit:")
            and need in self.submitted
        )


def run_plan(
    plan: Plan,
    submit: Submit,
    cancelled: Callable[[], bool] = lambda: False,
    *,
    commits_in_order: bool = False,
) -> dict[str, Outcome]:
    """Carry ``plan`` out through ``submit`` and return the outcome of each step by its ID.

    Blocks until every submitted step has ended, also after a failure or a cancellation, so that
    nothing works on after the caller has gone on. Raises the first failure, or CancelledError.
    ``commits_in_order`` says that ``submit`` carries commits out in the order in which it gets
    them, each after the one before it has ended well: then a commit is submitted as soon as only
    commits that were submitted stand before it.
    """
    walk = _Walk(plan, commits_in_order=commits_in_order)
    finished: queue.SimpleQueue[tuple[Step, Future[Outcome]]] = queue.SimpleQueue()
    running = 0
    candidates = plan.steps

    def stop() -> bool:
        return walk.failure is not None or cancelled()

    def start(step: Step) -> None:
        walk.tries[step.id] = walk.tries.get(step.id, 0) + 1
        future = submit(step, stop)
        future.add_done_callback(lambda done: finished.put((step, done)))

    while True:
        if candidates and not stop():
            for step in _take_ready(walk, candidates):
                start(step)
                running += 1
        if running == 0:
            break
        try:
            step, future = finished.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue
        running -= 1
        candidates = _settle(walk, step, future)
    if walk.failure is not None:
        raise walk.failure
    if walk.waiting:
        raise CancelledError("pull")
    return walk.outcomes


def _take_ready(walk: _Walk, candidates: Sequence[Step]) -> list[Step]:
    """Return what may be submitted now, in plan order, and count it as submitted."""
    ready: list[Step] = []
    # A stage may start in the same round as the fetch that it follows.
    pending = list(candidates)
    for step in pending:
        if step.id in walk.waiting and walk.is_ready(step):
            del walk.waiting[step.id]
            walk.submitted.add(step.id)
            ready.append(step)
            pending += walk.next_steps.get(step.id, ())
    return ready


def _settle(walk: _Walk, step: Step, future: Future[Outcome]) -> tuple[Step, ...]:
    """Note how a step ended; return the steps that may be ready by it."""
    if future.cancelled():
        if walk.failure is None:
            walk.failure = CancelledError(step.id)
        return ()
    error = future.exception()
    if error is None:
        walk.outcomes[step.id] = future.result()
        return tuple(walk.next_steps.get(step.id, ()))
    if isinstance(error, NodeError) and walk.failure is None and walk.tries[step.id] < LOST_TRIES:
        # The worker died with the step: every step is idempotent, so another member repeats it.
        walk.waiting[step.id] = step
        walk.submitted.discard(step.id)
        return (step,)
    if not isinstance(error, StowrayError):
        raise error
    if walk.failure is None or _is_consequence(walk.failure, error):
        walk.failure = error
    return ()


def _is_consequence(known: StowrayError, error: StowrayError) -> bool:
    """Return whether ``known`` only came about because of ``error``: the cause is worth more."""
    return isinstance(known, CancelledError) and not isinstance(error, CancelledError)
