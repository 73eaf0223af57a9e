"""Steps that do the same take turns, and nobody waits in a place that others need."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from stowray.pipeline.crew import LocalCrew
from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import CancelledError, NodeError
from stowray.pipeline.fetch import Fetched
from stowray.pipeline.plan import Step
from stowray.pipeline.run import Outcome
from stowray.pipeline.settings import RegistrySettings, Settings, UnpackSettings
from stowray.pipeline.store import Store
from stowray.pipeline.turns import Turns

if TYPE_CHECKING:
    from pathlib import Path

    from stowray.pipeline.progress import Report

SECONDS = 30.0
KEY = ("fetch", "sha256:1")


class Work:
    """Starts that are noted and ended by hand."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.futures: dict[str, Future[Outcome]] = {}
        self.tells: dict[str, Report] = {}
        self.heard: dict[str, list[tuple[Any, ...]]] = {}

    def submit(
        self, turns: Turns, name: str, key: tuple[str, ...] = KEY, cancelled: Any = lambda: False
    ) -> Future[Outcome]:
        self.heard[name] = []

        def start(tell: Report) -> Future[Outcome]:
            self.started.append(name)
            self.tells[name] = tell
            self.futures[name] = Future()
            return self.futures[name]

        def report(*what: Any) -> None:
            self.heard[name].append(what)

        return turns.submit(key, start, report, cancelled)


def test_one_at_a_time_and_all_in_the_end() -> None:
    turns, work = Turns(), Work()
    futures = [work.submit(turns, name) for name in "abc"]
    assert work.started == ["a"]
    for name, future in zip("abc", futures, strict=True):
        assert work.started[-1] == name
        assert not future.done()
        work.futures[name].set_result(Outcome(source=name))
        assert future.result(SECONDS).source == name
    assert work.submit(turns, "d") and work.started[-1] == "d", "the key is still taken"


def test_other_keys_do_not_wait() -> None:
    turns, work = Turns(), Work()
    work.submit(turns, "a")
    work.submit(turns, "b", ("fetch", "sha256:2"))
    work.submit(turns, "c", ("stage", "sha256:1"))
    assert work.started == ["a", "b", "c"]


def test_who_waited_for_one_that_failed_does_it_itself() -> None:
    turns, work = Turns(), Work()
    first, second = work.submit(turns, "a"), work.submit(turns, "b")
    work.futures["a"].set_exception(NodeError("worker 0", "ended"))
    with pytest.raises(NodeError):
        first.result(SECONDS)
    work.futures["b"].set_result(Outcome(source="b"))
    assert second.result(SECONDS).source == "b"


def test_who_is_cancelled_leaves_and_the_others_do_not_notice() -> None:
    turns, work = Turns(), Work()
    gone = threading.Event()
    first = work.submit(turns, "a")
    second = work.submit(turns, "b", cancelled=gone.is_set)
    third = work.submit(turns, "c")
    gone.set()
    with pytest.raises(CancelledError):
        second.result(SECONDS)
    work.futures["a"].set_result(Outcome())
    work.futures["c"].set_result(Outcome())
    assert first.done() and third.result(SECONDS) == Outcome()
    assert work.started == ["a", "c"]


def test_who_waits_hears_how_far_it_is_but_not_how_it_ends() -> None:
    turns, work = Turns(), Work()
    work.submit(turns, "a")
    work.submit(turns, "b")
    work.tells["a"]("blob", "sha256:1", "waiting", 0, 9)
    work.tells["a"]("blob", "sha256:1", "downloading", 5, 9)
    work.tells["a"]("blob", "sha256:1", "done", 9, 9)
    assert [what[2:4] for what in work.heard["b"]] == [("downloading", 5)]
    assert [what[2] for what in work.heard["a"]] == ["waiting", "downloading", "done"]


def test_what_cannot_be_started_is_told_and_the_turn_goes_on() -> None:
    turns, work = Turns(), Work()

    def refuse(_tell: Report) -> Future[Outcome]:
        raise NodeError("workers", "the pool is closed")

    with pytest.raises(NodeError):
        turns.submit(KEY, refuse, lambda *_: None, lambda: False)
    work.submit(turns, "a")
    waiting = turns.submit(KEY, refuse, lambda *_: None, lambda: False)
    last = work.submit(turns, "b")
    work.futures["a"].set_result(Outcome())
    with pytest.raises(NodeError):
        waiting.result(SECONDS)
    work.futures["b"].set_result(Outcome())
    last.result(SECONDS)


class _Fetcher:
    """Fetches what is not held at once."""

    def __init__(self, held: Digest) -> None:
        self.held = held
        self.go_on = threading.Event()

    def fetch(self, _source: Any, descriptor: Descriptor, **_: Any) -> Fetched:
        if descriptor.digest == self.held:
            assert self.go_on.wait(SECONDS)
        return Fetched(descriptor.digest, "registry")


def test_a_layer_that_many_images_share_leaves_the_connections_to_others(tmp_path: Path) -> None:
    def step(name: bytes) -> Step:
        return Step("fetch", "fetch", Descriptor("application/x", Digest.of(name), len(name)))

    settings = Settings(
        store=str(tmp_path / "store"),
        registry=RegistrySettings(connections=2),
        unpack=UnpackSettings(workers=1),
    )
    image: Any = SimpleNamespace(reference=None)
    with Store.open(tmp_path / "store") as store:
        crew = LocalCrew(settings, store)
        try:
            fetcher: Any = _Fetcher(Digest.of(b"shared"))

            def submit(name: bytes) -> Future[Outcome]:
                return crew.submit(step(name), image, fetcher, lambda *_: None, lambda: False)

            shared = [submit(b"shared") for _ in range(5)]
            own = [submit(b"own %d" % number) for number in range(5)]
            for future in own:
                assert future.result(SECONDS).source == "registry"
            assert not any(future.done() for future in shared)
            fetcher.go_on.set()
            for future in shared:
                future.result(SECONDS)
        finally:
            crew.close()
