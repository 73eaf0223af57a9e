from __future__ import annotations

import socket
import threading

import pytest

from stowray.pipeline.clock import SYSTEM_CLOCK
from stowray.pipeline.watchdog import Watch, Watchdog

RATE = 1000
WINDOW = 10.0


def watch(**state: object) -> Watch:
    made = Watch("http://h/x", None, 0.0, 40.0)
    for name, value in state.items():
        setattr(made, name, value)
    return made


@pytest.fixture
def dog() -> Watchdog:
    return Watchdog(SYSTEM_CLOCK, RATE, WINDOW)


def test_headers_have_a_deadline_that_bytes_do_not_prolong(dog: Watchdog) -> None:
    assert dog.judge(watch(received=10**9), 39.9) == ""
    assert dog.judge(watch(received=10**9), 40.0) == "silent"


def test_a_body_may_take_any_time(dog: Watchdog) -> None:
    steady = watch(in_body=True)
    for second in range(1, 1000):
        steady.waited = second * 10.0
        steady.received = second * 10 * RATE
        assert dog.judge(steady, second * 10.0) == ""


def test_a_trickle_is_too_slow(dog: Watchdog) -> None:
    trickle = watch(in_body=True, waited=10.0, received=2)
    assert dog.judge(trickle, 10.0) == "slow"


def test_a_trickle_after_a_fast_start_is_too_slow(dog: Watchdog) -> None:
    trickle = watch(in_body=True, waited=10.0, received=10**9)
    assert dog.judge(trickle, 10.0) == ""
    trickle.waited, trickle.received = 20.0, 10**9 + 2
    assert dog.judge(trickle, 20.0) == "slow"


def test_a_read_under_way_counts_as_waiting(dog: Watchdog) -> None:
    silent = watch(in_body=True, waiting_since=100.0)
    assert dog.judge(silent, 109.0) == ""
    assert dog.judge(silent, 110.0) == "slow"


def test_a_slow_reader_is_not_held_against_the_source(dog: Watchdog) -> None:
    # Much time has passed, little of it in reads.
    assert dog.judge(watch(in_body=True, waited=1.0, received=2), 10_000.0) == ""


def test_cancelled_comes_first(dog: Watchdog) -> None:
    assert dog.judge(watch(cancelled=lambda: True), 0.0) == "cancelled"


def test_a_cut_ends_a_blocked_read() -> None:
    near, far = socket.socketpair()
    with near, far:
        made = watch(in_body=True)
        made.attach(near, reused=False)
        got: list[bytes] = []
        reader = threading.Thread(target=lambda: got.append(near.recv(1)))
        reader.start()
        made.cut("cancelled")
        reader.join(10)
        assert got == [b""]
        assert made.verdict == "cancelled"


def test_a_socket_that_comes_after_the_cut_is_cut() -> None:
    near, far = socket.socketpair()
    with near, far:
        made = watch()
        made.cut("cancelled")
        made.cut("closed")
        made.attach(near, reused=False)
        assert near.recv(1) == b""
        assert made.verdict == "cancelled"


def test_the_thread_ends_with_the_watchdog() -> None:
    dog = Watchdog(SYSTEM_CLOCK, RATE, WINDOW)
    dog.add(watch(headers_deadline=1e18))
    named = [thread for thread in threading.enumerate() if thread.name == "watchdog"]
    assert named
    dog.close()
    assert not set(named) & set(threading.enumerate())
