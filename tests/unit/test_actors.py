"""The parts of the crew that know nothing of Ray."""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/
from __future__ import annotations

import platform
import threading
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgpack
import pytest

import stowray
from stowray.actors import environment, foreign, frames, wire
from stowray.actors.headwatch import LOOK_SECONDS, PATIENCE_SECONDS, HeadWatch
from stowray.actors.pool import Pool
from stowray.actors.progress import Board
from stowray.actors.tasks import EARLY_LIMIT, Tasks
from stowray.pipeline.clock import Clock
from stowray.pipeline.engine import PullOptions
from stowray.pipeline.errors import NodeError
from stowray.pipeline.platform import Platform
from stowray.pipeline.progress import Event
from stowray.pipeline.settings import RegistrySettings, Settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def event(id: str, status: str, current: int = 0, *, node: str = "n") -> Event:
    return Event(1.0, "r", node, id, "blob", status, current, 10, started=1.0)


def test_a_task_learns_of_its_cancellation() -> None:
    tasks = Tasks()
    with tasks.running("a") as a, tasks.running("b") as b:
        assert tasks.count() == 2
        assert tasks.cancel("a")
        assert a()
        assert not b()
    assert tasks.count() == 0


def test_a_cancellation_may_come_before_its_task() -> None:
    tasks = Tasks()
    assert not tasks.cancel("a")
    with tasks.running("a") as cancelled:
        assert cancelled()
    with tasks.running("a") as cancelled:
        assert not cancelled()


def test_early_cancellations_are_bounded() -> None:
    tasks = Tasks()
    for number in range(EARLY_LIMIT + 1):
        tasks.cancel(str(number))
    with tasks.running("0") as cancelled:
        assert not cancelled()
    with tasks.running(str(EARLY_LIMIT)) as cancelled:
        assert cancelled()


@dataclass
class Actors:
    started: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    lose: dict[str, Callable[[], None]] = field(default_factory=dict)

    def pool(self, size: int) -> Pool[str]:
        return Pool(
            "fetch", size, start=self.start, end=self.ended.append, watch=self.lose.__setitem__
        )

    def start(self, name: str) -> str:
        self.started.append(name)
        return name


def test_the_least_busy_member_is_taken() -> None:
    actors = Actors()
    pool = actors.pool(2)
    first, second, third = pool.take(), pool.take(), pool.take()
    assert {first.name, second.name} == {"fetch/1", "fetch/2"}
    assert third is first
    pool.give_back(second)
    assert pool.take() is second


def test_a_lost_member_is_replaced_once() -> None:
    actors = Actors()
    pool = actors.pool(1)
    lost, same = pool.take(), pool.take()
    assert lost is same
    pool.give_back(lost, is_lost=True)
    pool.give_back(same, is_lost=True)
    assert actors.started == ["fetch/1", "fetch/2"]
    assert actors.ended == ["fetch/1"]
    assert pool.take().name == "fetch/2"
    pool.close()
    assert actors.ended == ["fetch/1", "fetch/2"]


def test_members_that_died_idle_get_no_task() -> None:
    actors = Actors()
    pool = actors.pool(3)
    for name in ("fetch/1", "fetch/3"):
        actors.lose[name]()
    assert {pool.take().name for _ in range(3)} == {"fetch/2", "fetch/4", "fetch/5"}
    assert actors.ended == ["fetch/1", "fetch/3"]


def test_a_closed_pool_replaces_nobody() -> None:
    actors = Actors()
    pool = actors.pool(1)
    member = pool.take()
    pool.close()
    pool.give_back(member, is_lost=True)
    assert actors.started == ["fetch/1"]


def test_a_silent_head_becomes_an_error_in_time() -> None:
    now = [0.0]
    answers = [True]
    watch = HeadWatch(
        "10.0.0.1:6379",
        is_there=lambda _address: answers[0],
        clock=Clock(monotonic=lambda: now[0]),
    )
    while now[0] < 100:
        now[0] += 1
        watch.look()
    answers[0] = False
    with pytest.raises(NodeError, match=r"10\.0\.0\.1:6379: the head of the Ray cluster"):
        for _ in range(30):
            now[0] += 1
            watch.look()
    assert watch.is_silent, "a call must not be made again to a dead head"
    assert now[0] - 100 <= PATIENCE_SECONDS + 2 * LOOK_SECONDS < 30


def test_a_head_that_answers_again_is_forgiven() -> None:
    now = [0.0]
    watch = HeadWatch(
        "a:1",
        # Silent for ten seconds of every twenty.
        is_there=lambda _address: now[0] % 20 < 10,
        clock=Clock(monotonic=lambda: now[0]),
    )
    while now[0] < 200:
        now[0] += 1
        watch.look()


def test_frames_hold_events_whole() -> None:
    events = [event("a", "downloading", 3), event("b", "failed", 1)]
    assert frames.unpack(frames.pack(events)) == events


def test_the_forwarder_sends_the_last_state_of_each_and_all_at_the_end() -> None:
    sent: list[Event] = []
    held = threading.Event()

    def send(frame: bytes) -> bool:
        held.wait()
        sent.extend(frames.unpack(frame))
        return True

    forwarder = frames.Forwarder(send)
    forwarder([event("a", "downloading", 1)])
    for current in range(2, 9):
        forwarder([event("a", "downloading", current)])
    forwarder([event("b", "done", 10)])
    held.set()
    forwarder.close(10.0)
    assert sent[-2:] == [event("a", "downloading", 8), event("b", "done", 10)]
    assert len(sent) <= 3, "a slow receiver must get fewer frames, not all of them late"


def test_a_lost_receiver_ends_the_sending_only() -> None:
    calls: list[bytes] = []

    def send(frame: bytes) -> bool:
        calls.append(frame)
        return False

    forwarder = frames.Forwarder(send)
    forwarder([event("a", "downloading", 1)])
    forwarder.close(10.0)
    forwarder([event("a", "done", 10)])
    assert len(calls) == 1


def test_a_late_watcher_first_gets_the_present_state() -> None:
    board = Board()
    board.note("run", frames.pack([event("a", "downloading", 1), event("b", "downloading", 2)]))
    board.note("run", frames.pack([event("a", "done", 10)]))
    board.close("run")
    version, frame, closed = board.poll("run", 0, 10.0)
    assert closed
    assert {(e.id, e.status, e.current) for e in frames.unpack(frame)} == {
        ("a", "done", 10),
        ("b", "downloading", 2),
    }
    assert board.poll("run", version, 0.0) == (version, frames.pack([]), True)


def test_a_watcher_waits_for_news_and_gets_only_them() -> None:
    board = Board()
    board.note("run", frames.pack([event("a", "downloading", 1)]))
    version, frame, closed = board.poll("run", 0, 10.0)
    assert [e.id for e in frames.unpack(frame)] == ["a"]
    assert not closed
    teller = threading.Timer(0.05, board.note, ("run", frames.pack([event("b", "downloading", 1)])))
    teller.start()
    _, frame, _ = board.poll("run", version, 10.0)
    teller.join()
    assert [e.id for e in frames.unpack(frame)] == ["b"]
    board.close("run")


def test_the_board_keeps_nodes_apart_and_current_never_falls() -> None:
    board = Board()
    board.note("run", frames.pack([event("a", "downloading", 5, node="1")]))
    board.note("run", frames.pack([event("a", "downloading", 7, node="2")]))
    board.note("run", frames.pack([event("a", "downloading", 3, node="1")]))
    board.close("run")
    _, frame, _ = board.poll("run", 0, 10.0)
    assert sorted((e.node, e.current) for e in frames.unpack(frame)) == [("1", 5), ("2", 7)]


def test_private_settings_hold_no_secret_and_override_what_would_leak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of another cluster")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv(environment.LOOPBACK_ONLY, "1")
    monkeypatch.setenv("RAY_DEDUP_LOGS", "1")
    settings = environment.private_settings(tmp_path / "token")
    assert settings["RAY_AUTH_TOKEN"] is None
    assert settings["RAY_ADDRESS"] is None
    assert settings["RAY_AUTH_MODE"] == "token"
    assert settings["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token")
    assert settings[environment.LOOPBACK_ONLY] == "0"
    assert settings["RAY_DEDUP_LOGS"] == "1", "the user's own choice stays where it does no harm"


def test_a_guest_changes_nothing_that_the_owner_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    settings = environment.guest_settings()
    assert settings["RAY_USAGE_STATS_ENABLED"] == "1"
    assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", environment.LOOPBACK_ONLY} & set(settings)


def test_settings_of_the_environment_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("STOWRAY_TEST_A", "1")
    monkeypatch.delenv("STOWRAY_TEST_B", raising=False)
    with environment.applied({"STOWRAY_TEST_A": None, "STOWRAY_TEST_B": "2"}):
        assert "STOWRAY_TEST_A" not in os.environ
        assert os.environ["STOWRAY_TEST_B"] == "2"
    assert os.environ["STOWRAY_TEST_A"] == "1"
    assert "STOWRAY_TEST_B" not in os.environ


LIKE = foreign.NodeReport(
    "id", "10.0.0.1", version=stowray.__version__, python=platform.python_version(), uid=0
)


@pytest.mark.parametrize(
    ("report", "complaint"),
    [
        pytest.param(replace(LIKE, version=""), "10.0.0.1 has no stowray", id="missing"),
        pytest.param(
            replace(LIKE, version="0.0.1"), "10.0.0.1 has stowray 0.0.1", id="another version"
        ),
        pytest.param(replace(LIKE, python="3.9.1"), "10.0.0.1 has Python 3.9.1", id="python"),
        pytest.param(
            replace(LIKE, error="no end after 60 s"), "10.0.0.1 does not answer", id="silent"
        ),
    ],
)
def test_a_node_that_cannot_take_our_actors_is_named_in_one_sentence(
    report: foreign.NodeReport, complaint: str
) -> None:
    foreign.require_like([LIKE])
    with pytest.raises(NodeError) as caught:
        foreign.require_like([LIKE, report, replace(report, address="10.0.0.2")])
    assert complaint in str(caught.value)
    assert "10.0.0.2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_environment_that_travels_is_what_reaches_registries() -> None:
    kept = wire.origin_environment(
        {"HOME": "/root", "https_proxy": "http://p", "DOCKER_CONFIG": "/d", "MY_SECRET": "x"}
    )
    assert kept == {"HOME": "/root", "https_proxy": "http://p", "DOCKER_CONFIG": "/d"}


def test_settings_and_options_come_back_as_they_went() -> None:
    settings = Settings(store="/s", registry=RegistrySettings(plain_http=("a:1",)))
    travelled = msgpack.unpackb(msgpack.packb(wire.settings_to_dict(settings)), use_list=False)
    assert wire.settings_from_dict(travelled) == settings
    options = PullOptions(platform=Platform.parse("linux/arm/v7"), policy="never", unpack=False)
    travelled = msgpack.unpackb(msgpack.packb(wire.options_to_dict(options)), use_list=False)
    assert wire.options_from_dict(travelled) == options
