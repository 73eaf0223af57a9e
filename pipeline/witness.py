"""What a node can say of the bytes of one blob, for those who look for who sent wrong ones.

Invariant: a digest stands for all bytes before its offset as this node has them, or had them before
it gave them up itself; nothing is said of bytes that were never hashed.
"""

from __future__ import annotations

import os
from dataclasses import field
from typing import TYPE_CHECKING, Any, Final

from stowray.pipeline.errors import NotFoundError
from stowray.pipeline.ingest import CHECKPOINT_EVERY, CONDEMNED
from stowray.pipeline.journal import Journal
from stowray.pipeline.stripe_state import StripeState
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.store import Store

_READ_SIZE: Final = 1 << 20
# More offsets than a blob of 8 TiB has.
_POINT_LIMIT: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Witness:
    """The checkpoints of one node: offset to digest.

    ``complete`` tells that the node has proven the blob. ``condemned`` are those of the bytes that
    it found wrong itself and gave up last. ``upstreams`` tell whom it reads each stripe from.
    """

    generation: int = 0
    complete: bool = False
    checkpoints: Mapping[int, bytes] = field(default_factory=dict)
    condemned: Mapping[int, bytes] = field(default_factory=dict)
    upstreams: tuple[str | None, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON document."""
        return {
            "generation": self.generation,
            "complete": self.complete,
            "checkpoints": {str(at): value.hex() for at, value in self.checkpoints.items()},
            "condemned": {str(at): value.hex() for at, value in self.condemned.items()},
            "upstreams": list(self.upstreams),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Witness:
        """Return what :meth:`to_dict` described; ValueError when it is something else."""
        try:
            return cls(
                int(fields["generation"]),
                bool(fields["complete"]),
                _points(fields["checkpoints"]),
                _points(fields["condemned"]),
                tuple(None if name is None else str(name) for name in fields["upstreams"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not what a peer says of its checkpoints: {error}") from error


def read_witness(store: Store, digest: Digest) -> Witness:
    """Return what this store can say of a blob; one that is committed is hashed once more."""
    try:
        descriptor = store.open_blob(digest)
    except NotFoundError:
        return _arriving(store, digest)
    try:
        return Witness(complete=True, checkpoints=_hash(descriptor, digest))
    finally:
        os.close(descriptor)


def _arriving(store: Store, digest: Digest) -> Witness:
    directory = store.ingest_path(digest)
    history = Journal(directory / "journal").read()
    condemned = Journal(directory / CONDEMNED).read()
    upstreams: tuple[str | None, ...] = ()
    shown = StripeState.follow(directory)
    if shown is not None:
        try:
            upstreams = tuple(shown.upstream(index) for index in range(shown.count))
        finally:
            shown.close()
    return Witness(
        history.generation,
        False,
        {point.offset: point.digest for point in history.checkpoints},
        {point.offset: point.digest for point in condemned.checkpoints},
        upstreams,
    )


def _hash(descriptor: int, digest: Digest) -> dict[int, bytes]:
    hasher = digest.hasher()
    found: dict[int, bytes] = {}
    at = 0
    while part := os.pread(
        descriptor, min(_READ_SIZE, CHECKPOINT_EVERY - at % CHECKPOINT_EVERY), at
    ):
        hasher.update(part)
        at += len(part)
        if at % CHECKPOINT_EVERY == 0:
            found[at] = hasher.copy().digest()
    found[at] = hasher.digest()
    return found


def _points(fields: Mapping[str, str]) -> dict[int, bytes]:
    if len(fields) > _POINT_LIMIT:
        raise ValueError("more checkpoints than any blob has")
    return {int(at): bytes.fromhex(value) for at, value in fields.items()}
