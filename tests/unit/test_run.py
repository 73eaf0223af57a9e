from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from stowray.pipeline.errors import CancelledError, DigestMismatchError, NodeError
from stowray.pipeline.plan import stage_id
from stowray.pipeline.run import LOST_TRIES, Outcome, run_plan
from tests.unit.test_plan import make_image, plan_for


class Recorder:
    """Carries steps out at once, in threads, and notes their order."""

    def __init__(self, failures=None) -> None:
        self.started: list[str] = []
        self.ended: list[str] = []
        self.failures: dict[str, list[BaseException]] = failures or {}
        self._pool = ThreadPoolExecutor(8)
        self._lock = threading.Lock()

    def __call__(self, step, cancelled) -> Future[Outcome]:
        with self._lock:
            self.started.append(step.id)
        return self._pool.submit(self._do, step)

    def _do(self, step) -> Outcome:
        with self._lock:
            pending = self.failures.get(step.id)
            error = pending.pop(0) if pending else None
            if error is None:
                self.ended.append(step.id)
        if error is not None:
            raise error
        return Outcome(source=step.kind)


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], list("abcdefghij"), ["a", "b", "a"]])
def test_every_step_ends_after_what_it_needs(names) -> None:
    plan = plan_for(make_image(names))
    recorder = Recorder()
    outcomes = run_plan(plan, recorder)
    assert set(outcomes) == {step.id for step in plan.steps}
    for step in plan.steps:
        for need in step.needs:
            assert recorder.ended.index(need) < recorder.ended.index(step.id)
        if step.follows:
            assert recorder.started.index(step.follows) < recorder.started.index(step.id)


def test_a_stage_starts_beside_its_fetch() -> None:
    plan = plan_for(make_image(["a"]))
    both = threading.Barrier(2, timeout=30)
    pool = ThreadPoolExecutor(8)

    def submit(step, _cancelled):
        def work() -> Outcome:
            # Each side waits for the other: neither could finish if they ran one after the other.
            if step.id.startswith("stage") or step.descriptor.size == 11:
                both.wait() if step.kind != "commit" else None
            return Outcome()

        return pool.submit(work)

    assert len(run_plan(plan, submit)) == 4


def test_the_first_failure_stops_the_rest_and_is_the_one_raised() -> None:
    image = make_image(["a", "b", "c"])
    plan = plan_for(image)
    failure = DigestMismatchError("layer", "x", "y")
    recorder = Recorder({stage_id(image.diff_ids[0], image.layers[0].digest): [failure]})
    with pytest.raises(DigestMismatchError) as caught:
        run_plan(plan, recorder)
    assert caught.value is failure
    assert not any(id.startswith("commit") for id in recorder.started)


def test_a_lost_step_is_submitted_again_but_not_for_ever() -> None:
    image = make_image(["a"])
    stage = stage_id(image.diff_ids[0], image.layers[0].digest)
    recorder = Recorder({stage: [NodeError("w", "died")] * (LOST_TRIES - 1)})
    assert len(run_plan(plan_for(image), recorder)) == 4
    assert recorder.started.count(stage) == LOST_TRIES

    recorder = Recorder({stage: [NodeError("w", "died")] * LOST_TRIES})
    with pytest.raises(NodeError):
        run_plan(plan_for(image), recorder)
    assert recorder.started.count(stage) == LOST_TRIES


def test_a_cause_wins_over_the_cancellations_that_it_brought() -> None:
    image = make_image(["a"])
    cancelled_first = {
        stage_id(image.diff_ids[0], image.layers[0].digest): [CancelledError("stage")],
        f"fetch:{image.layers[0].digest}": [DigestMismatchError("blob", "x", "y")],
    }
    with pytest.raises(DigestMismatchError):
        run_plan(plan_for(image), Recorder(cancelled_first))


def test_cancelling_waits_for_what_runs_and_starts_nothing_more() -> None:
    image = make_image(["a", "b"])
    plan = plan_for(image)
    stop = threading.Event()
    running: list[Future[Outcome]] = []
    pool = ThreadPoolExecutor(8)

    def submit(step, cancelled):
        stop.set()

        def work() -> Outcome:
            while not cancelled():
                threading.Event().wait(0.001)
            raise CancelledError(step.id)

        future = pool.submit(work)
        running.append(future)
        return future

    with pytest.raises(CancelledError):
        run_plan(plan, submit, stop.is_set)
    assert all(future.done() for future in running)


def test_a_plan_with_nothing_to_do_submits_nothing() -> None:
    image = make_image(["a"])
    blobs = {image.layers[0].digest, image.manifest.config.digest}
    recorder = Recorder()
    assert run_plan(plan_for(image, blobs, set(image.chain_ids)), recorder) == {}
    assert recorder.started == []
