"""The record of a snapshot: one committed link of a chain.

Invariant: a record of another version, or one that is not whole, is no record.
"""

from __future__ import annotations

from typing import Any

from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import InvalidDigestError
from stowray.pipeline.values import dataclass

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One committed link of a chain; ``layer`` names its tree, sizes are in bytes."""

    chain_id: Digest
    parent: Digest | None
    diff_id: Digest
    blob: Digest
    layer: str
    tar_size: int
    unpacked_size: int
    entries: int
    created: float

    def payload(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {
            "version": _VERSION,
            "chain_id": self.chain_id,
            "parent": self.parent,
            "diff_id": self.diff_id,
            "blob": self.blob,
            "layer": self.layer,
            "tar_size": self.tar_size,
            "unpacked_size": self.unpacked_size,
            "entries": self.entries,
            "created": self.created,
        }

    @classmethod
    def parse(cls, payload: dict[str, Any]) -> Snapshot | None:
        """Return the snapshot that :meth:`payload` described; None for any other version."""
        if payload.get("version") != _VERSION:
            return None
        try:
            parent = payload["parent"]
            return cls(
                chain_id=Digest(str(payload["chain_id"])),
                parent=None if parent is None else Digest(str(parent)),
                diff_id=Digest(str(payload["diff_id"])),
                blob=Digest(str(payload["blob"])),
                layer=str(payload["layer"]),
                tar_size=int(payload["tar_size"]),
                unpacked_size=int(payload["unpacked_size"]),
                entries=int(payload["entries"]),
                created=float(payload["created"]),
            )
        except (KeyError, TypeError, ValueError, InvalidDigestError):
            return None


def chain_id_of(parent: Digest | None, diff_id: Digest) -> Digest:
    """Return the chain ID of ``diff_id`` on ``parent`` (image-spec, config.md, "Layer ChainID")."""
    return diff_id if parent is None else Digest.of(f"{parent} {diff_id}".encode("ascii"))
