"""Pre-warm runs over a cluster that is not there: handles whose calls are functions in here.

All of the driver is real; Ray, the resolver's answers and the processes on the nodes are not.
"""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/

from __future__ import annotations

import asyncio
import platform
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import stowray
from stowray.actors import (
    cluster,
    cluster_watch,
    follow,
    foreign,
    prewarm,
    prewarm_access,
    prewarm_images,
)
from stowray.pipeline.errors import CancelledError, DeadlineError, NodeError, StowrayError, to_wire
from stowray.pipeline.prewarm_plan_file import parse_plan
from stowray.pipeline.prewarm_survey import PlannedImage, PlannedLayer
from stowray.pipeline.progress import Progress
from stowray.pipeline.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import pytest

    Method = Callable[..., Awaitable[Any]]

POLL_SECONDS = 0.01


@dataclass
class Actor:
    """A node's actor; ``own`` are methods that take the place of ours, with the actor first.

    ``told`` is what it was asked for and did, in order.
    """

    name: str
    own: dict[str, Method]
    told: list[tuple[str, str]]
    pull_seconds: float = 0.0
    has_begun: bool = False
    cancelled: set[str] = field(default_factory=set)
    dead: asyncio.Event = field(default_factory=asyncio.Event)

    def __getattr__(self, method: str) -> Any:
        if method.startswith(("do_", "_")):
            raise AttributeError(method)
        return SimpleNamespace(remote=lambda *arguments: (self, method, arguments))

    async def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        if method in ("accept", "survey", "presence", "pull", "deliver") and not self.has_begun:
            raise NodeError(self.name, cluster.LOST)
        own = self.own.get(method)
        if own is not None:
            return await own(self, *arguments)
        return await getattr(self, f"do_{method}")(*arguments)

    def note(self, what: str) -> None:
        self.told.append((what, self.name))

    async def until_cancelled(self, run: str, seconds: float) -> bool:
        """Work for so long; return whether ``run`` was given up meanwhile."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if run in self.cancelled:
                return True
            await asyncio.sleep(POLL_SECONDS)
        return False

    async def do_begin_run(self, request: dict[str, Any]) -> dict[str, Any]:
        self.has_begun = True
        return {
            "wall": time.time(),
            "address": f"{request['host']}:7000",
            "nonce": self.name,
            "network": "",
            "platform": "linux/amd64",
            "store": "/store",
        }

    async def do_survey(self, images: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "name": self.name,
            "platform": "linux/amd64",
            "wants": {image["reference"]: image["digest"] for image in images},
            "present": [],
            "partial": {},
            "chains": [],
            "free": 1 << 40,
            "reserve": 0,
            "store": self.name,
            "address": "127.0.0.9:7000",
        }

    async def do_presence(self, images: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"missing": [], "bytes": 1, "snapshot": True, "present": True} for _ in images]

    async def do_pull(self, request: dict[str, Any]) -> dict[str, Any]:
        self.note("pull")
        rest: dict[str, Any] = {"events": [], "ways": [], "warnings": []}
        if await self.until_cancelled(request["run"], self.pull_seconds):
            return {"error": to_wire(CancelledError("pull")), **rest}
        self.note("pulled")
        return {"result": {}, "presence": {"present": True}, **rest}

    async def do_deliver(self, request: dict[str, Any]) -> dict[str, Any]:
        self.note("deliver")
        return dict.fromkeys(request["runtimes"])

    async def do_cancel(self, run: str) -> bool:
        self.note("cancel")
        self.cancelled.add(run)
        return True

    async def do_accept(self, *_arguments: Any) -> None: ...

    async def do_came(self, _runs: list[str], _seconds: float) -> dict[str, Any]:
        return {}

    async def do_end_run(self) -> None: ...

    async def do_beat(self, _seconds: float) -> dict[str, Any]:
        return {}

    # What the driver asks of the resolver and of the board.
    async def do_tell(self, *_arguments: Any) -> None: ...

    async def do_node_died(self, *_arguments: Any) -> None: ...


class _Watch:
    """The cluster as the head tells of it."""

    failure = None

    def __init__(self, nodes: dict[str, dict[str, Any]]) -> None:
        self._described = nodes

    @property
    def nodes(self) -> dict[str, dict[str, Any]]:
        return dict(self._described)

    def close(self) -> None: ...


class _Access:
    def __init__(self, settings: Settings, _environment: object) -> None:
        self.for_nodes = settings
        self.environment: dict[str, str] = {}

    async def to(self, _reference: object) -> dict[str, Any]:
        return {}


class Cluster:
    """Nodes by name; ``started`` are all actors of nodes that ever were, ``told`` what they did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started: list[Actor] = []
        self.told: list[tuple[str, str]] = []
        self._nodes: dict[str, dict[str, Any]] = {}
        self._own: dict[str, dict[str, Method]] = {}
        self._pull_seconds: dict[str, float] = {}
        for name in ("start_node", "ask", "forget", "end"):
            monkeypatch.setattr(cluster, name, getattr(self, f"_{name}"))
        for name in ("start_resolver", "start_progress"):
            monkeypatch.setattr(cluster, name, lambda _place: Actor("", {}, self.told))
        monkeypatch.setattr(cluster_watch, "ClusterWatch", lambda _head: _Watch(self._nodes))
        monkeypatch.setattr(
            follow, "Follower", lambda *_arguments: SimpleNamespace(close=lambda: None)
        )
        monkeypatch.setattr(foreign, "ask", lambda node_id: (None, "probe", (node_id,)))
        monkeypatch.setattr(prewarm_access, "RunAccess", _Access)
        monkeypatch.setattr(prewarm_images.RunImages, "_resolve", _resolve)
        monkeypatch.setattr(prewarm_images.RunImages, "drift", _no_drift)
        here = SimpleNamespace(node_id="here", address="here")
        monkeypatch.setattr(prewarm, "connect", lambda *_arguments, **_more: (here, None))

    def add(self, name: str, *, pull_seconds: float = 0.0, **own: Method) -> None:
        """Add a node whose pulls take so long; ``own`` methods take the place of its actor's."""
        self._nodes[f"id-{name}"] = {
            "NodeID": f"id-{name}",
            "NodeName": name,
            "NodeManagerAddress": "127.0.0.9",
            "NodeManagerPort": 1,
            "NodeManagerHostname": name,
            "Resources": {"CPU": 1.0},
            "Labels": {},
            "Alive": True,
        }
        self._own[name] = own
        self._pull_seconds[name] = pull_seconds

    def run(self, document: dict[str, Any], *, watch: bool = False) -> prewarm.PrewarmRun:
        plan = parse_plan(document, "plan")
        return prewarm.PrewarmRun(plan, Settings(), progress=Progress(), watch=watch)

    @property
    def left(self) -> list[str]:
        """The nodes of which an actor was not ended."""
        return [actor.name for actor in self.started if not actor.dead.is_set()]

    def _start_node(self, _place: object, name: str, _unpackers: int, **_more: bool) -> Actor:
        actor = Actor(name, self._own[name], self.told, self._pull_seconds[name])
        self.started.append(actor)
        return actor

    def _end(self, actor: Actor) -> None:
        actor.dead.set()

    async def _ask(self, call: Any, where: str, seconds: float | None = None) -> Any:
        actor, method, arguments = call
        if actor is None:
            return _probe(self._nodes[arguments[0]])
        if actor.dead.is_set():
            raise NodeError(where, cluster.LOST)
        work = asyncio.ensure_future(actor.call(method, arguments))
        dead = asyncio.ensure_future(actor.dead.wait())
        try:
            await asyncio.wait({work, dead}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if actor.dead.is_set():
                work.cancel()
                raise NodeError(where, cluster.LOST)
            raise DeadlineError(where, seconds or 0.0)
        finally:
            # Whoever asks no more leaves the call running, as with Ray.
            dead.cancel()

    def _forget(self, call: Any) -> None:
        async def ask() -> None:
            try:
                await self._ask(call, "")
            except StowrayError:
                return

        asyncio.ensure_future(ask())  # noqa: RUF006 - ends by itself


def _probe(described: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": stowray.__version__,
        "python": platform.python_version(),
        "host": described["NodeName"],
        "node": "",
    }


async def _resolve(_images: object, reference: Any, wanted: Any) -> prewarm_images.RunImage:
    digest = f"sha256:{abs(hash(reference.canonical)):064x}"
    planned = PlannedImage(
        reference.canonical,
        digest,
        digest,
        str(wanted),
        reference.registry,
        {digest: 10},
        (PlannedLayer(digest, 10, digest),),
    )
    image: Any = SimpleNamespace(to_dict=dict, platform=wanted, reference=reference)
    return prewarm_images.RunImage(reference, image, {}, planned)


async def _no_drift(_images: object) -> tuple[tuple[()], list[str]]:
    return (), []
