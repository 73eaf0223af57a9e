"""The actor of one node of a run, as the driver reaches it.

Invariant: no call is waited for longer than its deadline or the node's life; whether the node lives
is not left to Ray, which takes a minute to miss one whose cable was cut: the actor is asked again
and again, and while there is none, the node's raylet is.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from stowray.actors import cluster
from stowray.actors.lifeline import Silence
from stowray.pipeline.errors import NodeError, StowrayError

if TYPE_CHECKING:
    from collections.abc import Callable

CONNECT_SECONDS = 3.0
DEATH_SECONDS = 10.0
ENDED = "its actor has ended"


class NodeLink:
    """The way to a node; ``raylet`` is where that of the node listens, ``HOST:PORT``.

    ``on_lost`` is called when the actor's process has ended and nobody had ended it, ``on_news``
    with what its answers to the question whether it lives say besides.
    """

    def __init__(
        self,
        name: str,
        node_id: str,
        raylet: str,
        *,
        on_lost: Callable[[], None],
        on_news: Callable[[dict[str, Any]], None],
    ) -> None:
        self.silence = Silence()
        self._name = name
        self._node_id = node_id
        self._raylet = raylet
        self._on_lost = on_lost
        self._on_news = on_news
        self._actor: Any = None
        self._has_begun = False
        self._beat: asyncio.Task[None] | None = None
        self._death: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reason = ""

    @property
    def is_dead(self) -> bool:
        """Return whether the node is gone."""
        return self._death.done()

    def die(self, reason: str) -> None:
        """Note that the node is gone: nothing is waited for any more."""
        if not self._death.done():
            self._reason = reason
            self._death.set_result(None)

    def start(self, unpackers: int) -> None:
        """Start an actor, in place of the one that was there."""
        self._has_begun = False
        if self._actor is not None:
            cluster.end(self._actor)
        place = cluster.Placement(self._node_id)
        self._actor = cluster.start_node(place, self._name, unpackers, stays=False, lazy=True)

    def has_begun(self) -> None:
        """Note that the actor has given its first answer: from now on it is asked if it lives."""
        self._has_begun = True
        self.silence.end()

    def beat(self, stay: float) -> None:
        """Ask whether the node lives, unless it has not answered yet, and ask its actor to stay.

        Without another question it stays so many seconds.
        """
        if self._actor is None or self.is_dead:
            self.silence.end()
        elif self._beat is None or self._beat.done():
            self._beat = asyncio.ensure_future(self._ask_for_life(stay))

    async def _ask_for_life(self, stay: float) -> None:
        if not self._has_begun:
            if await answers(self._raylet):
                self.silence.end()
            return
        actor = self._actor
        try:
            news = await cluster.ask(actor.beat.remote(stay), self._name)
        except StowrayError as error:
            # No word of the node: a connection that is cut fails like that as well.
            if cluster.is_lost(error) and self._actor is actor and self._has_begun:
                self._has_begun = False
                self._on_lost()
        else:
            self.silence.end()
            self._on_news(news)

    async def ask(self, method: str, *arguments: Any, seconds: float | None = None) -> Any:
        """Call the actor; raises our errors only, at once when the node dies."""
        if self.is_dead or self._actor is None:
            raise NodeError(self._name, self._reason or ENDED)
        call = getattr(self._actor, method).remote(*arguments)
        asking = asyncio.ensure_future(cluster.ask(call, self._name, seconds))
        try:
            await asyncio.wait({asking, self._death}, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                return asking.result()
            raise NodeError(self._name, self._reason)
        except NodeError as error:
            if cluster.is_homeless(error):
                # Ray knows already what we shall be told in a moment.
                await asyncio.wait({self._death}, timeout=DEATH_SECONDS)
            raise
        finally:
            if not asking.done():
                asking.cancel()

    def tell(self, method: str, *arguments: Any) -> None:
        """Call the actor, if there is one, and do not wait for what becomes of it."""
        if self._actor is not None:
            cluster.forget(getattr(self._actor, method).remote(*arguments))

    async def end(self, seconds: float) -> None:
        """End the actor and all that it started, in order if that takes at most ``seconds``."""
        actor, self._actor = self._actor, None
        self._has_begun = False
        if actor is None:
            return
        if not self.is_dead and seconds:
            # Its members go with it in any case; those that are told go at once.
            with contextlib.suppress(StowrayError):
                await cluster.ask(actor.end_run.remote(), self._name, seconds)
        cluster.end(actor)

    def leave(self) -> None:
        """Have the actor end itself: with a dead head nobody else would."""
        self.tell("beat", 0.0)


async def answers(address: str) -> bool:
    """Return whether something takes connections at ``address``, ``HOST:PORT``."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except (OSError, ValueError):
        return False
    writer.close()
    return True
