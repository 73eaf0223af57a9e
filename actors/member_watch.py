"""Whether the members of a node's pools answer: one that stands still is ended.

Invariant: only a process that has answered before, and then nothing for ``SILENCE_SECONDS``, is
ended, and it alone: by its number and start time. Its death is what the pool and whoever waits for
its task learn of, as of any other. A stopped process carries out nobody's order to end, and it
holds the locks of what it was writing.
"""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

from stowray.actors.lifeline import Silence
from stowray.actors.processes import Process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from stowray.actors.pool import Member

ASK_SECONDS = 2.0
SILENCE_SECONDS = 15.0


class _Watched:
    """One member: the question that is out, and for how long nothing was heard."""

    def __init__(self) -> None:
        self.question: Future[int] | None = None
        self.process: Process | None = None
        self.silence = Silence()


class MemberWatch:
    """Asks all ``members()`` every ``ask_seconds``, on a thread of its own, until closed.

    ``ask(actor)`` puts the question for the number of its process.
    """

    def __init__(
        self,
        members: Callable[[], Iterable[Member[Any]]],
        ask: Callable[[Any], Future[int]],
        *,
        ask_seconds: float = ASK_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> None:
        self._members = members
        self._ask = ask
        self._interval = ask_seconds
        self._patience = silence_seconds
        self._watched: dict[Member[Any], _Watched] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="member-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            members = list(self._members())
            self._watched = {member: self._watched.get(member) or _Watched() for member in members}
            for member, watched in self._watched.items():
                self._look(member, watched)

    def _look(self, member: Member[Any], watched: _Watched) -> None:
        question = watched.question
        if question is not None and question.done():
            # One that failed says that the process has ended: others are told of that as well.
            if question.exception() is None:
                watched.process = Process.find(question.result())
                watched.silence.end()
            question = None
        if question is None:
            watched.question = self._ask(member.actor)
        elif watched.silence.look(self._interval) > self._patience and watched.process is not None:
            watched.process.send(signal.SIGKILL)
