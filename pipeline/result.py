"""What a pull tells when it is done: the result line, on both engines the same."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any

from stowray.pipeline.plan import stage_id
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.image import Image
    from stowray.pipeline.plan import Plan
    from stowray.pipeline.run import Outcome


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One layer: sizes in bytes, times in seconds.

    ``source`` is ``store`` when nothing was fetched, else the host or peer that the bytes came
    from; ``unpacked_size`` is the size of the files that the layer holds, 0 if it is not unpacked.
    """

    digest: str
    diff_id: str
    chain_id: str
    size: int
    unpacked_size: int
    source: str
    fetched_bytes: int
    fetch_seconds: float
    apply_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the layer's object of the result line."""
        return {
            "digest": self.digest,
            "diff_id": self.diff_id,
            "chain_id": self.chain_id,
            "size": self.size,
            "unpacked_size": self.unpacked_size,
            "source": self.source,
            "fetched_bytes": self.fetched_bytes,
            "fetch_seconds": round(self.fetch_seconds, 6),
            "apply_seconds": round(self.apply_seconds, 6),
        }


@dataclass(frozen=True, slots=True)
class PullResult:
    """One pulled reference.

    ``digest`` is of the manifest for ``platform``, ``resolved`` what the reference pointed to (the
    index, or the same manifest); ``seconds`` has ``resolve``, ``fetch``, ``apply``, ``total``.
    """

    reference: str
    digest: str
    resolved: str
    platform: str
    config: str
    chain_id: str
    layers: tuple[LayerResult, ...]
    fetched_bytes: int
    manifest_requests: int
    seconds: dict[str, float] = field(default_factory=dict)
    engine: str = "local"
    node: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the result line."""
        return {
            "reference": self.reference,
            "digest": self.digest,
            "resolved": self.resolved,
            "platform": self.platform,
            "config": self.config,
            "chain_id": self.chain_id,
            "layers": [layer.to_dict() for layer in self.layers],
            "fetched_bytes": self.fetched_bytes,
            "manifest_requests": self.manifest_requests,
            "seconds": {name: round(value, 6) for name, value in self.seconds.items()},
            "engine": self.engine,
            "node": self.node,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PullResult:
        """Return the result that :meth:`to_dict` described."""
        layers = tuple(LayerResult(**layer) for layer in data["layers"])
        return cls(**{**data, "layers": layers})


def make_result(
    reference: str,
    image: Image,
    plan: Plan,
    outcomes: dict[str, Outcome],
    *,
    unpacked: Mapping[Digest, int],
    requests: int,
    seconds: dict[str, float],
    engine: str,
    node: str,
) -> PullResult:
    """Return the result of a plan carried out with these ``outcomes`` by step ID.

    ``unpacked`` has the unpacked size of each layer that was there already, by chain ID.
    """
    return PullResult(
        reference=reference,
        digest=str(image.manifest_descriptor.digest),
        resolved=str(image.resolved.digest),
        platform=str(image.platform),
        config=str(image.manifest.config.digest),
        chain_id=str(image.chain_id),
        layers=tuple(
            _layer_result(plan, outcomes, unpacked, index) for index in range(len(plan.layers))
        ),
        fetched_bytes=sum(
            outcomes[step.id].fetched_bytes for step in plan.steps if step.kind == "fetch"
        ),
        manifest_requests=requests,
        seconds=seconds,
        engine=engine,
        node=node,
    )


def _layer_result(
    plan: Plan, outcomes: dict[str, Outcome], unpacked: Mapping[Digest, int], index: int
) -> LayerResult:
    layer = plan.layers[index]
    fetch = outcomes.get(f"fetch:{layer.descriptor.digest}")
    stage = outcomes.get(stage_id(layer.diff_id, layer.descriptor.digest))
    commit = outcomes.get(f"commit:{layer.chain_id}")
    return LayerResult(
        digest=str(layer.descriptor.digest),
        diff_id=str(layer.diff_id),
        chain_id=str(layer.chain_id),
        size=layer.descriptor.size,
        unpacked_size=stage.unpacked_size if stage else unpacked.get(layer.chain_id, 0),
        source=fetch.source if fetch else "store",
        fetched_bytes=fetch.fetched_bytes if fetch else 0,
        fetch_seconds=fetch.seconds if fetch else 0.0,
        apply_seconds=(stage.seconds if stage else 0.0) + (commit.seconds if commit else 0.0),
    )
