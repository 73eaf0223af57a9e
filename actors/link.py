"""The ways to a crew of actors: their handles in this process's Ray, or a session's door.

Invariant: a call that was lost with its actor is made again, for all calls are idempotent and Ray
restarts the actor; whatever ends a call, nothing of it works on after a few seconds. Replies are
plain data; what they say of errors is for the caller to raise.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from stowray.actors.follow import Follower
from stowray.pipeline.errors import CancelledError, NodeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.actors.embedded import RayAddress
    from stowray.actors.headwatch import HeadWatch

TRIES = 3
RESTART_SECONDS = 1.0
# Members have three seconds to stop and are ended then; Ctrl-C has five.
CANCEL_SECONDS = 4.5


class Link(Protocol):
    """What an engine needs of a crew. Requests and replies: ``wire``; they bear a ``run``."""

    @property
    def is_session(self) -> bool:
        """Return whether the actors outlive this process."""

    def resolve(self, request: dict[str, Any], cancelled: Callable[[], bool]) -> dict[str, Any]:
        """Have a reference resolved; see :meth:`ResolverActor.resolve`."""

    def pull(
        self,
        request: dict[str, Any],
        cancelled: Callable[[], bool],
        take: Callable[[bytes], None],
    ) -> dict[str, Any]:
        """Have an image pulled; see :meth:`NodeActor.pull`. ``take`` is given frames of events."""


@dataclass(frozen=True, slots=True)
class RayLink:
    """Handles of actors; ``where`` names their node in errors."""

    ray: RayAddress
    resolver: Any
    progress: Any
    node: Any
    head: HeadWatch
    where: str
    is_session: bool

    def resolve(self, request: dict[str, Any], cancelled: Callable[[], bool]) -> dict[str, Any]:
        """See :meth:`Link.resolve`."""
        return self._ask(self.resolver, self.resolver.resolve, request, "resolver", cancelled)

    def pull(
        self,
        request: dict[str, Any],
        cancelled: Callable[[], bool],
        take: Callable[[bytes], None],
    ) -> dict[str, Any]:
        """See :meth:`Link.pull`."""
        request = {**request, "progress": self.progress}
        follower = Follower(self.progress, request["run"], take)
        try:
            return self._ask(self.node, self.node.pull, request, self.where, cancelled)
        finally:
            follower.close()

    def _ask(
        self,
        actor: Any,
        method: Any,
        request: dict[str, Any],
        where: str,
        cancelled: Callable[[], bool],
    ) -> dict[str, Any]:
        from stowray.actors import cluster

        wait = _Wait(actor, request["run"], self.head, cancelled)
        tries = 0
        while True:
            tries += 1
            call = method.remote(request)
            try:
                reply: dict[str, Any] = cluster.wait(call, where, look=wait.look)
            except NodeError:
                if tries >= TRIES or wait.is_given_up or self.head.is_silent:
                    raise
                # Ray takes a moment to start the actor again.
                time.sleep(RESTART_SECONDS)
                continue
            except BaseException:
                # Ctrl-C among them: nothing may work on after this call has ended.
                wait.give_up()
                cluster.settle(call, wait.seconds_left)
                raise
            return reply


class _Wait:
    """What is looked at while a call is under way: the head, and whether it is still wanted."""

    def __init__(
        self, actor: Any, run: str, head: HeadWatch, cancelled: Callable[[], bool]
    ) -> None:
        self._actor = actor
        self._run = run
        self._head = head
        self._cancelled = cancelled
        self._given_up_at = 0.0

    @property
    def is_given_up(self) -> bool:
        """Return whether the actor was told to stop."""
        return self._given_up_at > 0.0

    @property
    def seconds_left(self) -> float:
        """Return what an actor that was told to stop still has for it."""
        return max(0.0, self._given_up_at + CANCEL_SECONDS - time.monotonic())

    def look(self) -> None:
        """Pass a cancellation on; raise when nothing comes of it, or when the head is dead."""
        self._head.look()
        if self._cancelled():
            self.give_up()
        if self.is_given_up and not self.seconds_left:
            raise CancelledError("pull")

    def give_up(self) -> None:
        """Tell the actor once that the result is not wanted any more."""
        if not self.is_given_up:
            self._given_up_at = time.monotonic()
            self._actor.cancel.remote(self._run)
