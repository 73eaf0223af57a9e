"""Steps that do the same for several pulls of one process: one works, the others wait here.

Two pulls that share a layer would else both hold a thread for its blob and a worker for its tree,
of which one does nothing but wait for the other. Invariant: of all steps with one key at most one
is under way; who waits is told how far that one is, goes on when it has ended, well or not, and
leaves soon after its own pull was cancelled.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Final

from stowray.pipeline.errors import CancelledError
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.progress import Report
    from stowray.pipeline.run import Outcome

    Start = Callable[[Report], Future[Outcome]]

LOOK_SECONDS: Final = 0.05
# What tells how far the work is; how it ends is each pull's own matter.
SHARED: Final = frozenset({"downloading", "applying"})
Key = tuple[str, ...]


@dataclass(slots=True, eq=False)
class _Waiting:
    """A step that waits for its turn."""

    start: Start
    report: Report
    cancelled: Callable[[], bool]
    future: Future[Outcome]


class Turns:
    """Starts steps, one at a time of each key; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy: dict[Key, list[_Waiting]] = {}
        self._is_watching = False

    def submit(
        self, key: Key, start: Start, report: Report, cancelled: Callable[[], bool]
    ) -> Future[Outcome]:
        """Call ``start`` now or later with what it is to report to; return at once."""
        with self._lock:
            waiting = self._busy.get(key)
            if waiting is not None:
                entry = _Waiting(start, report, cancelled, Future())
                entry.future.set_running_or_notify_cancel()
                waiting.append(entry)
                self._watch()
                return entry.future
            self._busy[key] = []
        try:
            future = start(partial(self._tell, key, report))
        except BaseException:
            self._pass_on(key)
            raise
        future.add_done_callback(lambda _: self._pass_on(key))
        return future

    def _tell(
        self,
        key: Key,
        report: Report,
        kind: str,
        id: str,
        status: str,
        current: int = 0,
        total: int = 0,
        error: str = "",
    ) -> None:
        report(kind, id, status, current, total, error)
        if status in SHARED and self._busy.get(key):
            with self._lock:
                waiting = tuple(self._busy.get(key, ()))
            for entry in waiting:
                entry.report(kind, id, status, current, total)

    def _pass_on(self, key: Key) -> None:
        with self._lock:
            waiting = self._busy.pop(key, [])
        for entry in waiting:
            try:
                future = self.submit(key, entry.start, entry.report, entry.cancelled)
            except BaseException as error:  # noqa: BLE001 - raised where somebody waits for it
                entry.future.set_exception(error)
            else:
                future.add_done_callback(partial(_hand_over, entry.future))

    def _watch(self) -> None:
        """See to it that somebody looks for cancelled pulls; the lock is held."""
        if not self._is_watching:
            self._is_watching = True
            threading.Thread(target=self._look, name="turns", daemon=True).start()

    def _look(self) -> None:
        pause = threading.Event()
        while True:
            pause.wait(LOOK_SECONDS)
            gone: list[tuple[Key, _Waiting]] = []
            with self._lock:
                for key, waiting in self._busy.items():
                    gone += [(key, entry) for entry in waiting if entry.cancelled()]
                for key, entry in gone:
                    self._busy[key].remove(entry)
                self._is_watching = is_needed = any(self._busy.values())
            for key, entry in gone:
                entry.future.set_exception(CancelledError(" ".join(key)))
            if not is_needed:
                return


def _hand_over(target: Future[Outcome], done: Future[Outcome]) -> None:
    error = done.exception()
    if error is not None:
        target.set_exception(error)
    else:
        target.set_result(done.result())
