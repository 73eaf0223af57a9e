"""One node's side of a pre-warm run: its store, what it says of it, and what it gives its peers.

Invariant: peers get the digests of the run and nothing else, and only with the run's token; what is
reported as present was looked up on disk just then. Knows nothing of Ray.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from typing import TYPE_CHECKING, Any

import stowray
from stowray.actors.wire import origin_environment, settings_from_dict
from stowray.pipeline.clock import Boot
from stowray.pipeline.deliver import deliver, parse_target
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import StorageError, StowrayError, UsageError, describe
from stowray.pipeline.ingeststate import IngestState
from stowray.pipeline.leases import LOCK, leases
from stowray.pipeline.platform import Platform
from stowray.pipeline.prewarm_survey import NodeSurvey
from stowray.pipeline.resolve import document_digests
from stowray.pipeline.serve import BlobServer, bearer
from stowray.pipeline.serve_limits import RUN_LIMITS
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.spread import Part
from stowray.pipeline.spread_leases import Leases, stripe_key

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stowray.actors.engines import Stores
    from stowray.pipeline.image import Image
    from stowray.pipeline.store import Store

SWEEP_SECONDS = 2.0


class NodeRun:
    """Opens the store and serves it to the run's peers until closed.

    ``request`` is that of ``NodeActor.begin_run``. Raises StorageError, UsageError.
    """

    def __init__(self, request: Mapping[str, Any], stores: Stores) -> None:
        self.run = str(request["run"])
        self.node = str(request["node"])
        self.token = str(request["token"])
        self.settings = settings_from_dict(request["settings"])
        self.environment = _environment(request)
        self.store = stores.get(str(self.settings.store_path()))
        self.snapshots = Snapshots(self.store)
        _forget_the_dead(self.store)
        # Trees of killed unpackers may be large: nothing waits for them to go.
        threading.Thread(
            target=_sweep, args=(self.snapshots,), name="sweep-layers", daemon=True
        ).start()
        self.part = Part(self.node)
        self.stamp = ""
        self._allowed: frozenset[str] = frozenset()
        self._server = BlobServer(
            self.store,
            host=str(request["host"]),
            port=int(request["port"]),
            authorize=bearer(self.token),
            allowed=lambda digest: str(digest) in self._allowed,
            limits=RUN_LIMITS,
        )
        try:
            self._server.start()
        except UsageError:
            if not request["port"]:
                raise
            # The port of the actor that died is not free again: peers find the new one by asking.
            self._server = BlobServer(
                self.store,
                host=str(request["host"]),
                authorize=bearer(self.token),
                allowed=lambda digest: str(digest) in self._allowed,
                limits=RUN_LIMITS,
            )
            self._server.start()

    @property
    def address(self) -> str:
        """Where peers find this node, ``HOST:PORT``."""
        return self._server.address

    def describe(self) -> dict[str, Any]:
        """Return what the driver needs to know of the node; ``wall`` is its clock."""
        return {
            "version": stowray.__version__,
            "address": self.address,
            "store": str(self.store.path),
            "nonce": self.store.nonce,
            "network": self.store.capabilities.network,
            "privileged": self.snapshots.privileged,
            "platform": str(Platform.host().normalized()),
            "pid": os.getpid(),
            "uid": os.geteuid(),
            "wall": time.time(),
        }

    def survey(self, images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return a :class:`NodeSurvey` as plain values for the images that this node is to have.

        Each has ``reference``, ``digest``, ``platform``, ``blobs`` (sizes by digest) and ``chains``
        (from the base layer up).
        """
        blobs = {digest: size for image in images for digest, size in image["blobs"].items()}
        present = frozenset(
            digest for digest, size in blobs.items() if self.store.has(Digest(digest), size)
        )
        chains: set[str] = set()
        for image in images:
            chains.update(self._committed(image["chains"]))
        status = os.statvfs(self.store.path)
        return NodeSurvey(
            name=self.node,
            platform=str(images[0]["platform"]) if images else "",
            wants={str(image["reference"]): str(image["digest"]) for image in images},
            present=present,
            partial={
                digest: arrived
                for digest in blobs
                if digest not in present and (arrived := self._arrived(Digest(digest)))
            },
            chains=frozenset(chains),
            free=status.f_bavail * status.f_frsize,
            reserve=self.store.reserve_bytes,
            store=self.store.nonce,
            address=self.address,
        ).to_dict()

    def accept(self, part: Mapping[str, Any], digests: Sequence[str]) -> None:
        """Take this node's part of the spread, and serve ``digests`` from now on."""
        self.part = Part.from_dict(part)
        self.stamp = secrets.token_hex(8)
        self._allowed = frozenset(digests)

    def task(self, spread: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a fetching actor needs of a pull's ``spread``, with this node's part."""
        return {
            "run": self.run,
            "node": self.node,
            "address": self.address,
            "token": self.token,
            "part": self.part.to_dict(),
            "stamp": self.stamp,
            "leases": spread["leases"],
            "connections": spread["connections"],
            "bandwidth": spread["bandwidth"],
        }

    def declare(self, leases: Leases) -> None:
        """Tell an owner of the leases, who knows nothing yet, which stripes are all here.

        Those under way are told by whoever fetches them.
        """
        for portion in self.part.portions:
            digest, stripe = portion.digest, portion.stripe
            if self.store.has(Digest(digest), stripe.size):
                leases.has(stripe_key(digest, stripe.index, stripe.count), stripe.length)

    def presence(self, image: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``{missing, bytes, snapshot, present}`` of an image, looked up on disk.

        ``missing`` are the digests that are not here (documents, config, layers), ``bytes`` how
        much of the layers is.
        """
        blobs = dict(image["blobs"])
        missing = [
            digest for digest, size in blobs.items() if not self.store.has(Digest(digest), size)
        ]
        missing += [
            digest
            for digest in dict.fromkeys((image["resolved"], image["digest"]))
            if not self.store.has(Digest(digest))
        ]
        chains = image["chains"]
        snapshot = not chains or bool(self._committed(chains[-1:]))
        here = sum(size for digest, size in blobs.items() if digest not in missing)
        return {
            "missing": missing,
            "bytes": here,
            "snapshot": snapshot,
            "present": snapshot and not missing,
        }

    def deliver(
        self, image: Image, runtimes: Sequence[str], cancelled: Callable[[], bool]
    ) -> dict[str, Any]:
        """Hand an image that is here to each runtime; return the error of each, None for none."""
        outcomes: dict[str, Any] = {}
        digests = (*document_digests(image), *(layer.digest for layer in image.layers))
        holder = f"deliver {image.reference.canonical}"
        with self.store.lease(holder, digests=digests, chain_ids=image.chain_ids):
            for runtime in runtimes:
                try:
                    deliver(self.store, image, parse_target(runtime), cancelled=cancelled)
                except StowrayError as error:
                    outcomes[runtime] = describe(error)
                else:
                    outcomes[runtime] = None
        return outcomes

    def close(self) -> None:
        """End the server; what is in the store stays."""
        with contextlib.suppress(StowrayError):
            self._server.stop()

    def _committed(self, chains: Sequence[str]) -> Sequence[str]:
        """Return those of a chain that are here: a snapshot stands on all that are below it."""
        for depth in range(len(chains), 0, -1):
            if self.snapshots.has(Digest(chains[depth - 1])):
                return chains[:depth]
        return ()

    def _arrived(self, digest: Digest) -> int:
        try:
            state = IngestState.follow(self.store.ingest_path(digest) / "state")
        except StorageError:
            return 0
        if state is None:
            return 0
        try:
            return state.prefix
        finally:
            state.close()


def _forget_the_dead(store: Store) -> None:
    """Remove the leases of processes that were killed, of earlier runs or of this one."""
    # A collector that is at work does the same, and in a store that cannot be written they harm
    # nobody.
    with (
        contextlib.suppress(StowrayError),
        store.lock(LOCK, wait_seconds=SWEEP_SECONDS),
    ):
        leases(store, sweep=True)


def _sweep(snapshots: Snapshots) -> None:
    """Remove the unfinished layer trees of processes that were killed."""
    # In a store that cannot be written they harm nobody; a collection tells of them.
    with contextlib.suppress(StowrayError, OSError):
        snapshots.trees.sweep()


def _environment(request: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables by which registries are reached from here.

    On the driver's own machine those of the driver, whose files are here; elsewhere the node's.
    """
    if request["boot"] == Boot.read().boot_id:
        return dict(request["environment"])
    return origin_environment(os.environ)
