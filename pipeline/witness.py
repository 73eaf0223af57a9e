"""What a node can say of a blob that is still on its way to it.

Invariant: a digest stands for all bytes before its offset as this node has them in the generation
that is named; nothing is said of bytes that were never hashed.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any, Final

from stowray.pipeline.journal import Journal
from stowray.pipeline.stripe_state import StripeState
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.store import Store

# More offsets than a blob of 8 TiB has.
_POINT_LIMIT: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Witness:
    """The checkpoints of one generation, offset to digest, and whom each stripe is read from."""

    generation: int = 0
    checkpoints: Mapping[int, bytes] = field(default_factory=dict)
    upstreams: tuple[str | None, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON document."""
        return {
            "generation": self.generation,
            "checkpoints": {str(at): value.hex() for at, value in self.checkpoints.items()},
            "upstreams": list(self.upstreams),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Witness:
        """Return what :meth:`to_dict` described; ValueError when it is something else."""
        try:
            points = fields["checkpoints"]
            if len(points) > _POINT_LIMIT:
                raise ValueError("more checkpoints than any blob has")
            return cls(
                int(fields["generation"]),
                {int(at): bytes.fromhex(value) for at, value in points.items()},
                tuple(None if name is None else str(name) for name in fields["upstreams"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not what a peer says of its checkpoints: {error}") from error


def read_witness(store: Store, digest: Digest) -> Witness:
    """Return what this store can say of an arriving blob; nothing of others."""
    directory = store.ingest_path(digest)
    history = Journal(directory / "journal").read()
    upstreams: tuple[str | None, ...] = ()
    shown = StripeState.follow(directory)
    if shown is not None:
        try:
            upstreams = tuple(shown.upstream(index) for index in range(shown.count))
        finally:
            shown.close()
    points = {point.offset: point.digest for point in history.checkpoints}
    return Witness(history.generation, points, upstreams)
