"""What a pull tells when it is done: the result line, on both engines the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One layer: sizes in bytes, times in seconds.

    ``source`` is ``store`` when nothing was fetched, else the host or peer that the bytes came
    from; ``unpacked_size`` is the size of the files that the layer holds.
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
