"""How long a call to an actor is waited for that nobody wants any more."""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from stowray.actors import cluster, link
from stowray.pipeline.errors import CancelledError, NodeError

if TYPE_CHECKING:
    from collections.abc import Callable


class Calls:
    """A node actor that hears of a cancellation and goes on; ``settled`` are the waits for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, now: Callable[[], float]) -> None:
        self.settled: list[float] = []
        self._now = now
        for name in ("pull", "cancel"):
            setattr(self, name, type("Method", (), {"remote": staticmethod(lambda *_: None)}))
        monkeypatch.setattr(cluster, "wait", self._wait)
        monkeypatch.setattr(cluster, "settle", lambda _call, seconds: self.settled.append(seconds))

    def _wait(self, _call: object, where: str, *, look: Callable[[], None]) -> None:
        while self._now() < 1000.0:
            look()
        raise NodeError(where, "has ended")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        self.now += 0.25
        return self.now


def test_an_actor_that_does_not_stop_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C has five seconds in all: not as many for each place that waits."""
    clock = Clock()
    monkeypatch.setattr(link, "time", clock)
    node: Any = Calls(monkeypatch, lambda: clock.now)
    ray: Any = None
    head: Any = type("Head", (), {"look": lambda _self: None, "is_silent": False})()
    way = link.RayLink(ray, None, None, node, head, "n1", is_session=False)
    with pytest.raises(CancelledError):
        way._ask(node, node.pull, {"run": "r"}, "n1", lambda: True)
    assert clock.now - 100.0 + sum(node.settled) < 6.0
