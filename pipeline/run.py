"""Walk a plan: submit each step when its inputs are done.

Invariant: a step is submitted once its ``needs`` are done and its ``follows`` was submitted; the
first failure cancels what is still under way and is the one that is raised; a step lost with a
dead worker is submitted again, a bounded number of times. Where a step runs (threads and processes
of this machine, or actors) is the business of ``submit``; the walk is the same for all.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from stowray.pipeline.errors import CancelledError, NodeError, StowrayError

if TYPE_CHECKING:
    from collections.abc import Callable
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


@dataclass(slots=True)
class _Walk:
    waiting: dict[str, Step]
    submitted: set[str] = field(default_factory=set)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)
    failure: StowrayError | None = None


def run_plan(
    plan: Plan,
    submit: Submit,
    cancelled: Callable[[], bool] = lambda: False,
) -> dict[str, Outcome]:
    """Carry ``plan`` out through ``submit`` and return the outcome of each step by its ID.

    Blocks until every submitted step has ended, also after a failure or a cancellation, so that
    nothing works on after the caller has gone on. Raises the first failure, or CancelledError.
    """
    walk = _Walk(waiting={step.id: step for step in plan.steps})
    finished: queue.SimpleQueue[tuple[Step, Future[Outcome]]] = queue.SimpleQueue()
    running = 0

    def stop() -> bool:
        return walk.failure is not None or cancelled()

    def start(step: Step) -> None:
        walk.submitted.add(step.id)
        walk.tries[step.id] = walk.tries.get(step.id, 0) + 1
        future = submit(step, stop)
        future.add_done_callback(lambda done: finished.put((step, done)))

    while True:
        if not stop():
            for step in _ready(walk):
                del walk.waiting[step.id]
                start(step)
                running += 1
        if running == 0:
            break
        try:
            step, future = finished.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue
        running -= 1
        _settle(walk, step, future)
    if walk.failure is not None:
        raise walk.failure
    if walk.waiting:
        raise CancelledError("pull")
    return walk.outcomes


def _ready(walk: _Walk) -> list[Step]:
    ready = []
    # In plan order; a stage may start in the same round as the fetch that it follows.
    started = set(walk.submitted)
    for step in walk.waiting.values():
        if step.follows is not None and step.follows not in started:
            continue
        if all(need in walk.outcomes for need in step.needs):
            ready.append(step)
            started.add(step.id)
    return ready


def _settle(walk: _Walk, step: Step, future: Future[Outcome]) -> None:
    if future.cancelled():
        if walk.failure is None:
            walk.failure = CancelledError(step.id)
        return
    error = future.exception()
    if error is None:
        walk.outcomes[step.id] = future.result()
        return
    if isinstance(error, NodeError) and walk.failure is None and walk.tries[step.id] < LOST_TRIES:
        # The worker died with the step: every step is idempotent, so another member repeats it.
        walk.waiting[step.id] = step
        return
    if not isinstance(error, StowrayError):
        raise error
    if walk.failure is None or _is_consequence(walk.failure, error):
        walk.failure = error


def _is_consequence(known: StowrayError, error: StowrayError) -> bool:
    """Return whether ``known`` only came about because of ``error``: the cause is worth more."""
    return isinstance(known, CancelledError) and not isinstance(error, CancelledError)
