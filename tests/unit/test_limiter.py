from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.clock import Clock
from stowray.pipeline.errors import CancelledError, UnavailableError
from stowray.pipeline.limiter import DOCUMENT_PERMITS, Limiter
from stowray.pipeline.node_limits import NodeLimits

if TYPE_CHECKING:
    from pathlib import Path


def test_a_host_has_so_many_permits_and_no_more() -> None:
    limiter = Limiter(2)
    first = limiter.acquire("h", document=False)
    limiter.acquire("h", document=False)
    with pytest.raises(CancelledError):
        limiter.acquire("h", document=False, cancelled=lambda: limiter.held("h") == 2)
    # Another host, and documents of the same host, are not held up.
    limiter.acquire("g", document=False)
    limiter.acquire("h", document=True)
    first()
    limiter.acquire("h", document=False, cancelled=lambda: False)


def test_documents_are_limited_too() -> None:
    limiter = Limiter(1)
    for _ in range(DOCUMENT_PERMITS):
        limiter.acquire("h", document=True)
    with pytest.raises(CancelledError):
        limiter.acquire("h", document=True, cancelled=lambda: limiter.held("h") > 0)


def test_giving_back_twice_gives_back_once() -> None:
    limiter = Limiter(2)
    first = limiter.acquire("h", document=False)
    limiter.acquire("h", document=False)
    first()
    first()
    assert limiter.held("h") == 1


def test_a_waiter_gets_the_permit_that_comes_back() -> None:
    limiter = Limiter(1)
    release = limiter.acquire("h", document=False)
    got = threading.Event()

    def wait() -> None:
        limiter.acquire("h", document=False)()
        got.set()

    thread = threading.Thread(target=wait)
    thread.start()
    release()
    assert got.wait(10)
    thread.join()
    assert limiter.held("h") == 0


def test_a_pause_holds_all_requests_to_the_host() -> None:
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    limiter = Limiter(4, Clock(monotonic=lambda: now[0], sleep=sleep))
    limiter.pause("h", 2.0)
    limiter.pause("h", 1.0)  # a shorter one does not end it
    limiter.acquire("g", document=False)
    assert now[0] == 0.0
    limiter.acquire("h", document=False)
    assert now[0] >= 2.0
    limiter.pause("h", 60.0)
    before = now[0]
    with pytest.raises(CancelledError):
        limiter.acquire("h", document=True, cancelled=lambda: now[0] > before + 1.0)
    assert now[0] < before + 2.0


def test_who_has_others_to_ask_leaves_when_a_pause_comes(tmp_path: Path) -> None:
    """Also one that another process was asked for; a pause of before is waited for."""
    ours, theirs = NodeLimits(tmp_path), NodeLimits(tmp_path)
    limiter = Limiter(1, shared=[ours])
    release = limiter.acquire("h", document=False)
    is_waiting = threading.Event()

    def look() -> bool:
        is_waiting.set()
        return False

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(limiter.acquire, "h", document=False, can_leave=True, cancelled=look)
        assert is_waiting.wait(60)
        theirs.pause("h", 200.0)
        with pytest.raises(UnavailableError, match="left alone"):
            waiting.result(timeout=60)
    release()
    # Nobody else was there: this one comes again, and waits as long as it has to.
    asked = itertools.count()
    with pytest.raises(CancelledError):
        limiter.acquire("h", document=False, can_leave=True, cancelled=lambda: next(asked) > 3)
    assert limiter.held("h") == 0
    limiter.close()
    theirs.close()
