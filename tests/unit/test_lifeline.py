"""When silence counts, and that a process nobody needs any more ends."""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/

from __future__ import annotations

import subprocess
import sys
import threading

from stowray.actors.lifeline import Lifeline, Silence
from stowray.actors.prewarm_pulse import BEATS_PER_SECOND, SILENCE_SECONDS, intervals


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


def test_silence_is_counted_and_a_word_ends_it() -> None:
    clock = Clock()
    silence = Silence(clock.monotonic)
    for seconds in range(1, 6):
        clock.now += 1.0
        assert silence.look() == seconds
    silence.end()
    clock.now += 1.0
    assert silence.look() == 1.0


def test_who_stood_still_itself_does_not_take_that_for_silence() -> None:
    clock = Clock()
    silence = Silence(clock.monotonic)
    clock.now += 3600.0
    assert silence.look() == 2.0
    clock.now += 3600.0
    assert silence.look(usual=20.0) == 42.0


def test_a_lifeline_is_lost_once_when_nobody_holds_it() -> None:
    lost = threading.Event()
    line = Lifeline(lost.set, seconds=3600.0)
    line.hold(0.0)
    assert lost.wait(60.0)


def test_many_nodes_are_asked_less_often_and_given_more_time() -> None:
    for nodes in (1, 4, 1000, 10_000, 100_000):
        interval, patience = intervals(nodes)
        assert nodes / interval <= BEATS_PER_SECOND
        assert patience >= max(SILENCE_SECONDS, 3 * interval)


OWNED = """
import sys
from stowray.actors.lifeline import outlive_not
from stowray.actors.processes import Process
outlive_not(Process.find(int(sys.argv[1])))
"""


def test_a_process_ends_with_its_owner() -> None:
    owner = subprocess.Popen(["sleep", "3600"])
    owned = subprocess.Popen([sys.executable, "-c", OWNED, str(owner.pid)])
    try:
        owner.kill()
        owner.wait()
        assert owned.wait(timeout=120.0) != 0
    finally:
        owned.kill()
        owned.wait()
