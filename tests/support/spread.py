"""A cluster of stores in this process: servers, fetchers and leases over real sockets."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Self

from stowray.pipeline.arriving import Arriving
from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.fetch import Fetched, Fetcher
from stowray.pipeline.origin_leases import OriginLeases
from stowray.pipeline.reference import Reference
from stowray.pipeline.registry import Registry
from stowray.pipeline.registry_permits import RegistryPermits
from stowray.pipeline.serve import BlobServer, ServeLimits, bearer
from stowray.pipeline.serve_limits import RUN_LIMITS
from stowray.pipeline.settings import RegistrySettings
from stowray.pipeline.source_actions import Patience
from stowray.pipeline.spread import Blob, NodeState, Part, Portion, Spread, spread
from stowray.pipeline.spread_fetch import SpreadFetcher
from stowray.pipeline.spread_leases import LocalLeases
from stowray.pipeline.spread_shared import Shared
from stowray.pipeline.store import Store
from tests.support.registry import OCI_LAYER, FakeRegistry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from stowray.pipeline.stripes import Stripe

TOKEN = "of-this-run"
# Small figures of everything that is waited for, so that tests of faults end soon.
QUICK = Patience(silence=0.5, answer=2.0, slow=1.0, starved=3.0, avoid=1.0)


class Node:
    """One node: its store, what serves it, and what fetches into it."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.name = name
        self.store = Store.open(cluster.folder / name)
        self.server = BlobServer(
            self.store,
            authorize=bearer(TOKEN),
            allowed=lambda digest: str(digest) in cluster.allowed,
            limits=cluster.limits,
        )
        self.address = self.server.start()
        self.registry = Registry(cluster.settings)
        self.shared: Shared | None = None
        self.fetcher: SpreadFetcher | None = None
        self.dead = threading.Event()

    def join(self, part: Part) -> None:
        """Begin with a part; what is known of before is forgotten."""
        cluster = self.cluster
        self.shared = Shared(
            node=self.name,
            token=TOKEN,
            leases=cluster.leases.of(self.name),
            patience=cluster.patience,
            **cluster.options,
        )
        self.take(part)

    def take(self, part: Part) -> None:
        """Take another part of the same run."""
        assert self.shared is not None
        settings = self.cluster.settings
        self.fetcher = SpreadFetcher(
            self.store,
            [self.registry],
            settings,
            part=part,
            shared=self.shared,
            fallback=Fetcher(self.store, [self.registry], settings),
        )

    def fetch(self, digest: str) -> Fetched:
        assert self.fetcher is not None
        data = self.cluster.origin.blobs[digest]
        size = self.cluster.sizes.get(digest, len(data))
        return self.fetcher.fetch(
            self.cluster.reference,
            Descriptor(OCI_LAYER, Digest(digest), size),
            report=lambda *_, **__: None,
            cancelled=self.dead.is_set,
        )

    def die(self) -> None:
        """Serve and fetch no more; as far as others can see the machine is gone."""
        self.server.stop()
        self.dead.set()

    def close(self) -> None:
        self.server.stop()
        self.registry.close()
        self.store.close()


class Cluster:
    """Nodes ``n0``, ``n1``, … with empty stores, and an origin that records its requests."""

    def __init__(
        self,
        folder: Path,
        count: int = 4,
        *,
        patience: Patience = QUICK,
        limits: ServeLimits = RUN_LIMITS,
        settings: RegistrySettings | None = None,
        permits: int = 16,
        ttl: float = 10.0,
        **options: Any,
    ) -> None:
        self.folder = folder
        self.patience = patience
        self.limits = limits
        self.settings = settings or RegistrySettings()
        self.options = options
        self.allowed: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.origin = FakeRegistry()
        self.addresses: dict[str, str] = {}
        self.book = OriginLeases(time.monotonic, ttl_seconds=ttl)
        self.permits = RegistryPermits(time.monotonic, permits, ttl_seconds=ttl)
        self.leases = LocalLeases(self.book, self.permits, "", addresses=self.addresses)
        self._names = [f"n{number}" for number in range(count)]
        self._stack = ExitStack()
        self.nodes: dict[str, Node] = {}
        self.plan: Spread | None = None

    def __enter__(self) -> Self:
        self._stack.enter_context(self.origin)
        self.reference = Reference.parse(f"{self.origin.host}/a/b:1")
        for name in self._names:
            node = self.nodes[name] = Node(self, name)
            self._stack.callback(node.close)
            self.addresses[name] = node.address
        self._pool = self._stack.enter_context(ThreadPoolExecutor(64))
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes.values():
            node.dead.set()
        self._stack.close()

    def __getitem__(self, number: int) -> Node:
        return self.nodes[f"n{number}"]

    def add(self, data: bytes) -> str:
        """Hold a blob at the origin; all nodes of the run may have it."""
        digest = self.origin.add_blob(data)
        self.allowed.add(digest)
        return digest

    def spread(self, *digests: str, fan_out: int = 4, seed: int = 0) -> Spread:
        """Give each node its part of the planner's trees."""
        states = []
        for name, node in self.nodes.items():
            present = {d for d in digests if node.store.has(Digest(d))}
            states.append(
                NodeState(
                    name,
                    frozenset(set(digests) - present),
                    frozenset(present),
                    node.store.nonce,
                    self.addresses[name],
                )
            )
        blobs = [Blob(digest, len(self.origin.blobs[digest])) for digest in digests]
        self.plan = spread(blobs, states, fan_out=fan_out, seed=seed)
        for part in self.plan.parts():
            self.nodes[part.node].join(part)
        return self.plan

    def part(self, name: str, digest: str, sources: Mapping[Stripe, Sequence[str]]) -> Part:
        """Return a part made by hand: the sources of each stripe; without any it is the root."""
        portions = tuple(
            Portion(digest, stripe, tuple(names), int(bool(names)), 0)
            for stripe, names in sources.items()
        )
        return Part(name, portions, self.addresses)

    def arrange(self, digest: str, stripes: Sequence[Stripe], **sources: Sequence[str]) -> None:
        """Give each node just the sources that are named; who has none begins at the origin."""
        for name, node in self.nodes.items():
            node.join(self.part(name, digest, dict.fromkeys(stripes, sources.get(name, ()))))

    def is_root(self, name: str) -> bool:
        """Tell whether a node is a root of the plan."""
        assert self.plan is not None
        return any(portion.is_root for portion in self.plan.part(name).portions)

    def prefix(self, name: str, digest: str) -> int:
        """Return how many bytes from the start of an arriving blob a node has."""
        arriving = Arriving.open(self.nodes[name].store, Digest(digest))
        if arriving is None:
            return 0
        try:
            return arriving.prefix
        finally:
            arriving.close()

    def begin(self, digest: str, *names: str) -> dict[str, Future[Fetched]]:
        """Let nodes (all of them) fetch a blob, at once."""
        return {
            name: self._pool.submit(self.nodes[name].fetch, digest) for name in names or self.nodes
        }

    def fetch(self, digest: str, *names: str) -> dict[str, Fetched]:
        """Let nodes (all of them) fetch a blob and return what came of it."""
        return {
            name: future.result(timeout=120) for name, future in self.begin(digest, *names).items()
        }

    def check(self, digest: str, *names: str) -> None:
        """Check that the blob is on these nodes (all of them), byte for byte."""
        for name in names or self.nodes:
            path = self.nodes[name].store.blob_path(Digest(digest))
            assert path.read_bytes() == self.origin.blobs[digest], f"{name} HAS OTHER BYTES"

    def asked(self, digest: str) -> list[tuple[int, int]]:
        """Return the ranges of a blob that the origin was asked for, in the order of asking."""
        size = len(self.origin.blobs[digest])
        found = []
        for request in self.origin.seen(f"/blobs/{digest}", "GET"):
            if request.range is None:
                found.append((0, size))
            else:
                first, _, last = request.range.removeprefix("bytes=").partition("-")
                found.append((int(first), int(last) + 1 if last else size))
        return found


def overlap(ranges: Sequence[tuple[int, int]]) -> int:
    """Return how many bytes are in more than one of the ranges."""
    doubled, reached = 0, 0
    for start, end in sorted(ranges):
        doubled += max(0, min(reached, end) - start)
        reached = max(reached, end)
    return doubled


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Wait for a condition that another thread brings about."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"not in {seconds:g} s: {what}")
        time.sleep(0.005)


class Proxy:
    """Stands before a node's server: may change, delay or stop what the node sends."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.change: Callable[[bytearray], None] | None = None
        self.bytes_per_second = 0
        self.silent = threading.Event()
        self.passed = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._closing = threading.Event()
        self._live: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def address(self) -> str:
        host, port = self._listener.getsockname()[:2]
        return f"{host}:{port}"

    def close(self) -> None:
        self._closing.set()
        for one in [self._listener, *self._live]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(10)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, _ = self._listener.accept()
                self._live.append(client)
                host, _, port = self.target.rpartition(":")
                server = socket.create_connection((host, int(port)))
            except OSError:
                return
            self._live.append(server)
            for source, sink, answers in ((client, server, False), (server, client, True)):
                thread = threading.Thread(
                    target=self._copy, args=(source, sink, answers), daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def _copy(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        is_stripe = False
        try:
            while data := source.recv(1 << 16):
                if answers:
                    is_stripe = is_stripe or b"Stowray-Have" in data
                    if is_stripe:
                        self.passed += len(data)
                        if self.change is not None:
                            changed = bytearray(data)
                            self.change(changed)
                            data = bytes(changed)
                        if self.bytes_per_second:
                            self._closing.wait(len(data) / self.bytes_per_second)
                    while self.silent.is_set() and not self._closing.wait(0.01):
                        pass
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for one in (source, sink):
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
