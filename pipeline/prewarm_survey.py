"""What every node says of itself before a pre-warm run, and what the run then is for each of them.

Invariant: plain values only, for they travel from the nodes to the driver; `cluster_plan.py` makes
the second from the first.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import field, fields
from typing import TYPE_CHECKING, Any

from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stowray.pipeline.image import Image


@dataclass(frozen=True, slots=True)
class PlannedLayer:
    """A layer by its blob and its chain ID."""

    digest: str
    size: int
    chain_id: str


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """One image for one platform: its manifest's digest and all blobs that a node needs of it.

    ``blobs`` maps digests to sizes, the config's among them.
    """

    reference: str
    digest: str
    resolved: str
    platform: str
    registry: str = ""
    blobs: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[PlannedLayer, ...] = ()

    @classmethod
    def of(cls, reference: str, image: Image) -> PlannedImage:
        """Return what there is to plan of a resolved image."""
        layers = tuple(
            PlannedLayer(str(layer.digest), layer.size, str(chain_id))
            for layer, chain_id in zip(image.layers, image.chain_ids, strict=True)
        )
        config = image.manifest.config
        return cls(
            reference=reference,
            digest=str(image.manifest_descriptor.digest),
            resolved=str(image.resolved.digest),
            platform=str(image.platform),
            registry=image.reference.registry,
            blobs={str(config.digest): config.size}
            | {layer.digest: layer.size for layer in layers},
            layers=layers,
        )


@dataclass(frozen=True, slots=True)
class NodeSurvey:
    """What a node says about itself; all that is present is trusted and was checked on disk.

    ``wants`` maps each reference that the node is to have to the digest of its manifest there.
    ``partial`` has the bytes that lie there of blobs that are not complete; ``chains`` the chain
    IDs that are committed. ``free`` bytes are free, of which ``reserve`` must stay. ``store`` is
    the store's nonce. ``error`` stands for a node that could not look.
    """

    name: str
    platform: str = ""
    wants: Mapping[str, str] = field(default_factory=dict)
    present: frozenset[str] = frozenset()
    partial: Mapping[str, int] = field(default_factory=dict)
    chains: frozenset[str] = frozenset()
    free: int = 0
    reserve: int = 0
    store: str = ""
    address: str = ""
    serves: bool = True
    error: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        plain = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        plain |= {"present": sorted(self.present), "chains": sorted(self.chains)}
        plain |= {"wants": dict(self.wants), "partial": dict(self.partial)}
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> NodeSurvey:
        """Return the survey that :meth:`to_dict` described."""
        sets = {name: frozenset(data.get(name, ())) for name in ("present", "chains")}
        return cls(**{**data, **sets})


@dataclass(frozen=True, slots=True)
class Rates:
    """What the estimate of time assumes, in bytes per second unless learned from earlier runs.

    ``origin`` is what the registry gives all nodes together, ``node`` what one node receives,
    ``unpack`` how fast one node applies compressed layers.
    """

    origin: float = 50e6
    node: float = 300e6
    unpack: float = 80e6
    start_seconds: float = 3.0


@dataclass(frozen=True, slots=True)
class BlobPlan:
    """One blob: how many stores have it and lack it, and what that costs."""

    digest: str
    size: int
    have: int
    need: int
    origin_bytes: int
    peer_bytes: int


@dataclass(frozen=True, slots=True)
class BlobNeed:
    """One blob on one node: ``have``, ``need`` or ``partial``, and where the rest will come from.

    ``bytes`` are still to come, ``origin_bytes`` of them from the origin. ``shared`` when another
    node brings them into the store of both.
    """

    digest: str
    size: int
    state: str
    bytes: int = 0
    origin_bytes: int = 0
    shared: bool = False

    @property
    def source(self) -> str:
        """Return ``store``, ``origin``, ``peers``, or ``origin and peers`` for a striped blob."""
        if self.state == "have" or self.shared:
            return "store"
        if not self.origin_bytes:
            return "peers" if self.bytes else "origin"
        return "origin" if self.origin_bytes == self.bytes else "origin and peers"


@dataclass(frozen=True, slots=True)
class NodePlan:
    """What one node has to do.

    ``disk_least`` is certain, ``disk_needed`` what it likely comes to; ``disk_free`` is without the
    reserve. ``error`` tells why the node is left out; ``warning`` what may go wrong.
    """

    name: str
    platform: str = ""
    wave: int = 0
    shares_with: str = ""
    blobs: tuple[BlobNeed, ...] = ()
    snapshots_have: int = 0
    snapshots_need: int = 0
    need_bytes: int = 0
    origin_bytes: int = 0
    peer_bytes: int = 0
    disk_least: int = 0
    disk_needed: int = 0
    disk_free: int = 0
    warning: str = ""
    error: Mapping[str, Any] | None = None
    wants: Mapping[str, str] = field(default_factory=dict)
    chains: frozenset[str] = frozenset()

    @property
    def is_refused(self) -> bool:
        """Return whether the node is left out."""
        return self.error is not None


def manifest_requests(images: Iterable[PlannedImage]) -> dict[str, int]:
    """Return how many manifests a run asks each registry for, however many nodes it has."""
    top = {(image.registry, image.reference): image.resolved for image in images}
    counts = Counter(registry for registry, _ in top)
    # Those that an index names are asked for by digest; a reference to a manifest names it itself.
    named = {
        (image.registry, image.reference, image.digest)
        for image in images
        if image.digest != image.resolved
    }
    counts.update(registry for registry, _, _ in named)
    return dict(counts)
