"""Members of a pool that stand still are ended, others never, with real processes."""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

import pytest

from stowray.actors.member_watch import MemberWatch
from stowray.actors.pool import Member

if TYPE_CHECKING:
    from collections.abc import Iterator

ECHO = "import sys\nfor line in sys.stdin:\n    sys.stdout.write(line)\n    sys.stdout.flush()\n"


class Echo:
    """A process that answers as long as it runs."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", ECHO], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.answered = threading.Semaphore(0)

    def ask(self) -> Future[int]:
        future: Future[int] = Future()
        threading.Thread(target=self._ask, args=(future,), daemon=True).start()
        return future

    def _ask(self, future: Future[int]) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(b"?\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except OSError as error:
            future.set_exception(error)
            return
        if answer:
            future.set_result(self.process.pid)
            self.answered.release()
        else:
            future.set_exception(OSError("it has ended"))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def echoes() -> Iterator[list[Echo]]:
    found = [Echo(), Echo()]
    yield found
    for one in found:
        one.close()


def test_who_stands_still_is_ended_and_nobody_else(echoes: list[Echo]) -> None:
    still, lively = echoes
    members = [Member(str(number), one) for number, one in enumerate(echoes)]
    watch = MemberWatch(lambda: members, Echo.ask, ask_seconds=0.05, silence_seconds=1.0)
    try:
        for one in echoes:
            one.answered.acquire()
        still.answered.acquire()
        still.process.send_signal(signal.SIGSTOP)
        assert still.process.wait(timeout=120) == -signal.SIGKILL
        before = [lively.answered.acquire(timeout=120) for _ in range(3)]
        assert all(before)
        assert lively.process.poll() is None
    finally:
        watch.close()


def test_who_has_not_answered_yet_is_being_started_and_left_alone(echoes: list[Echo]) -> None:
    slow, other = echoes
    slow.process.send_signal(signal.SIGSTOP)
    members = [Member("slow", slow), Member("other", other)]
    watch = MemberWatch(lambda: members, Echo.ask, ask_seconds=0.02, silence_seconds=0.2)
    try:
        # Each answer of the other one is a look at both.
        for _ in range(40):
            other.answered.acquire()
        assert slow.process.poll() is None
    finally:
        watch.close()
