"""A Ray cluster that is none: whole pre-warm runs in this process, with nodes that do as told.

Everything between :class:`~stowray.actors.prewarm.PrewarmRun` and Ray's handles is the real one;
actors are objects here, their methods coroutines, and a registry's answer is a dictionary's.
"""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/

from __future__ import annotations

import asyncio
import hashlib
import platform
import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import stowray
from stowray.actors import cluster, cluster_watch, follow, foreign, prewarm, prewarm_access
from stowray.actors.prewarm_images import RunImage, RunImages
from stowray.pipeline.errors import (
    CancelledError,
    DeadlineError,
    NodeError,
    StowrayError,
    to_wire,
)
from stowray.pipeline.prewarm_plan_file import parse_plan
from stowray.pipeline.prewarm_survey import PlannedImage, PlannedLayer
from stowray.pipeline.progress import Progress
from stowray.pipeline.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import pytest

    from stowray.pipeline.platform import Platform
    from stowray.pipeline.reference import Reference

    Call = tuple["Actor", str, tuple[Any, ...]]
    Behaviour = dict[str, Callable[..., Awaitable[Any]]]

BLOB = 10


class Actor:
    """Answers to every method with what its ``do_METHOD`` returns, and with None without one."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("do_", "__")):
            raise AttributeError(name)
        return SimpleNamespace(remote=lambda *arguments: (self, name, arguments))

    async def answer(self, method: str, arguments: tuple[Any, ...]) -> Any:
        work = getattr(self, f"do_{method}", None)
        return None if work is None else await work(*arguments)


class Board(Actor):
    """Also an owner of the leases: each answers to nothing that matters here."""

    async def do_beat(self, _stay: float) -> str:
        return "epoch"

    async def do_tell(self, *_about: Any) -> str:
        return "epoch"


class FakeNode(Actor):
    """The actor of one node; ``own`` methods are asked in place of these and get it first."""

    def __init__(self, name: str, own: Behaviour, platform: str) -> None:
        self.name = name
        self.dead = asyncio.Event()
        self.cancelled: set[str] = set()
        self._own = own
        self._platform = platform

    async def answer(self, method: str, arguments: tuple[Any, ...]) -> Any:
        own = self._own.get(method)
        if own is not None:
            return await own(self, *arguments)
        return await super().answer(method, arguments)

    async def do_begin_run(self, _request: dict[str, Any]) -> dict[str, Any]:
        return {
            "wall": time.time(),
            "address": f"{self.name}.example:7000",
            "nonce": f"store of {self.name}",
            "network": "",
            "platform": self._platform,
            "store": "/store",
        }

    async def do_survey(self, images: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "name": self.name,
            "wants": {image["reference"]: image["digest"] for image in images},
            "free": 1 << 40,
            "store": f"store of {self.name}",
        }

    async def do_presence(self, images: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"bytes": BLOB, "present": True} for _ in images]

    async def do_pull(self, request: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(0.02)
        reply: dict[str, Any] = {"events": [], "ways": [], "warnings": []}
        if request["run"] in self.cancelled:
            return reply | {"error": to_wire(CancelledError("pull"))}
        return reply | {"result": {}, "presence": {"present": True}}

    async def do_cancel(self, run: str) -> None:
        self.cancelled.add(run)

    async def do_deliver(self, request: dict[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(request["runtimes"])

    async def do_came(self, _runs: list[str], _seconds: float) -> dict[str, Any]:
        return {}

    async def do_beat(self, _stay: float) -> dict[str, Any]:
        return {}


@dataclass
class FakeCluster:
    """The nodes by Ray's ID, and what becomes of a reference when it is asked for.

    ``refusals`` are looked up by canonical reference, and may be functions that return an error or
    None. ``behaviour`` and ``platforms`` are by name of node, ``silent`` names those that no
    question by value reaches.
    """

    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    refusals: dict[str, StowrayError | Callable[[], StowrayError | None]] = field(
        default_factory=dict
    )
    behaviour: dict[str, Behaviour] = field(default_factory=dict)
    platforms: dict[str, str] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    resolving_seconds: float = 0.0
    resolved: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)

    def add(self, name: str, **own: Callable[..., Awaitable[Any]]) -> str:
        """Add a node; ``own`` are methods of its actor."""
        node_id = f"id-{name}"
        self.behaviour[name] = own
        self.nodes[node_id] = {
            "NodeID": node_id,
            "NodeName": name,
            "NodeManagerAddress": "127.0.0.9",
            "NodeManagerPort": 1,
            "NodeManagerHostname": name,
            "Resources": {"CPU": 1.0},
            "Labels": {},
            "Alive": True,
        }
        return node_id

    def remove(self, name: str) -> None:
        """Let a node leave."""
        self.nodes.pop(f"id-{name}", None)

    def run(self, document: dict[str, Any], *, watch: bool = False) -> prewarm.PrewarmRun:
        """Return a run of the plan."""
        plan = parse_plan(document, "plan")
        return prewarm.PrewarmRun(plan, Settings(), progress=Progress(), watch=watch)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stand in for Ray until the test ends."""
        fake = self

        class Watch:
            def __init__(self, _head: object) -> None:
                self.failure = None

            @property
            def nodes(self) -> dict[str, dict[str, Any]]:
                return dict(fake.nodes)

            def close(self) -> None:
                """Nothing was begun."""

        class Access:
            def __init__(self, *_about: Any) -> None:
                self.for_nodes = Settings()
                self.environment: dict[str, str] = {}

            async def to(self, _reference: Reference) -> dict[str, Any]:
                return {}

        async def resolve(_images: RunImages, reference: Reference, platform: Platform) -> Any:
            return await fake._resolve(reference, platform)

        async def no_drift(_images: RunImages) -> tuple[tuple[()], list[str]]:
            return (), []

        for name, stand_in in {
            "start_node": self._start_node,
            "start_resolver": lambda _place: Board(),
            "start_progress": lambda _place: Board(),
            "ask": self._ask,
            "forget": self._forget,
            "end": self._end,
        }.items():
            monkeypatch.setattr(cluster, name, stand_in)
        monkeypatch.setattr(foreign, "ask", self._probe)
        monkeypatch.setattr(cluster_watch, "ClusterWatch", Watch)
        monkeypatch.setattr(follow, "Follower", lambda *_: SimpleNamespace(close=lambda: None))
        monkeypatch.setattr(prewarm_access, "RunAccess", Access)
        monkeypatch.setattr(RunImages, "_resolve", resolve)
        monkeypatch.setattr(RunImages, "drift", no_drift)
        here = SimpleNamespace(node_id="id-driver", address="head")
        monkeypatch.setattr(prewarm, "connect", lambda *_, **__: (here, None))

    # -- what stands in ---------------------------------------------------------------------------

    def _start_node(self, _place: Any, name: str, _unpackers: int, **_options: bool) -> FakeNode:
        self.started.append(name)
        platform = self.platforms.get(name, "linux/amd64")
        return FakeNode(name, self.behaviour.get(name, {}), platform)

    async def _ask(self, call: Call, where: str, seconds: float | None = None) -> Any:
        actor, method, arguments = call
        if not isinstance(actor, FakeNode):
            return await actor.answer(method, arguments)
        work = asyncio.ensure_future(actor.answer(method, arguments))
        dead = asyncio.ensure_future(actor.dead.wait())
        try:
            await asyncio.wait({work, dead}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            if dead.done():
                raise NodeError(where, cluster.LOST)
            raise DeadlineError(where, seconds or 0.0)
        finally:
            work.cancel()
            dead.cancel()

    def _forget(self, call: Call) -> None:
        async def ask() -> None:
            try:
                await self._ask(call, "")
            except StowrayError:
                return

        asyncio.ensure_future(ask())  # noqa: RUF006 - it is forgotten

    def _end(self, actor: Actor) -> None:
        if isinstance(actor, FakeNode):
            actor.dead.set()

    def _probe(self, node_id: str) -> Call:
        return (_Probe(self, node_id), "look", ())

    async def _resolve(self, reference: Reference, platform: Platform) -> RunImage | StowrayError:
        self.resolved.append(reference.canonical)
        refusal = self.refusals.get(reference.canonical)
        error = refusal() if callable(refusal) else refusal
        await asyncio.sleep(self.resolving_seconds)
        if error is not None:
            return error
        text = f"{reference.canonical} {platform}"
        digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
        planned = PlannedImage(
            reference.canonical,
            digest,
            digest,
            str(platform),
            reference.registry,
            {digest: BLOB},
            (PlannedLayer(digest, BLOB, digest),),
        )
        image: Any = SimpleNamespace(to_dict=dict, platform=platform, reference=reference)
        return RunImage(reference, image, {}, planned)


class _Probe(Actor):
    def __init__(self, fake: FakeCluster, node_id: str) -> None:
        self._fake = fake
        self._node_id = node_id

    async def do_look(self) -> dict[str, str]:
        name = self._fake.nodes[self._node_id]["NodeName"]
        if name in self._fake.silent:
            raise NodeError(name, "no answer")
        return {
            "version": stowray.__version__,
            "python": platform.python_version(),
            "host": name,
            "node": "",
        }


def after(seconds: float) -> Callable[[], bool]:
    """Return what tells whether so many seconds have passed: who cancels a run then."""
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until


def later(seconds: float, work: Callable[[], object]) -> None:
    """Do ``work`` in so many seconds."""
    timer = threading.Timer(seconds, work)
    timer.daemon = True
    timer.start()
