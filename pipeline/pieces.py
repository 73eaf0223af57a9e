"""Where two copies of a blob differ: digests of its pieces.

Invariant: the pieces that a store tells are of a blob whose own digest was proven in the same
reading; one that fails that is put aside, and its node says so. What another node tells of pieces
is a hint only: the digest of the whole decides.
"""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any, Final

from stowray.pipeline.errors import NotFoundError
from stowray.pipeline.files import translated
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.store import Store

# What is fetched again for one wrong byte; a blob of 8 TiB has as many as are taken from a peer.
PIECE_SIZE: Final = 1 << 20
_PIECE_LIMIT: Final = 1 << 23
_DIGEST_SIZE: Final = hashlib.sha256().digest_size

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a node says of a blob: the SHA-256 of each MiB, if it has the blob and it is right.

    ``damaged``: it had the blob and has found it wrong just now.
    """

    digests: tuple[bytes, ...] = ()
    complete: bool = False
    damaged: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON document."""
        return {
            "pieces": b"".join(self.digests).hex(),
            "complete": self.complete,
            "damaged": self.damaged,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Pieces:
        """Return what :meth:`to_dict` described; ValueError when it is something else."""
        try:
            joined = bytes.fromhex(fields["pieces"])
            digests = tuple(
                joined[at : at + _DIGEST_SIZE] for at in range(0, len(joined), _DIGEST_SIZE)
            )
            told = cls(digests, bool(fields["complete"]), bool(fields["damaged"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not what a peer says of pieces: {error}") from error
        if len(digests) > _PIECE_LIMIT or len(joined) % _DIGEST_SIZE:
            raise ValueError("not as many pieces as a blob can have")
        return told


def piece_digest(data: bytes) -> bytes:
    """Return what stands for a piece."""
    return hashlib.sha256(data).digest()


def read_pieces(store: Store, digest: Digest) -> Pieces:
    """Hash the pieces of a committed blob and the whole of it anew."""
    try:
        descriptor = store.open_blob(digest)
    except NotFoundError:
        return Pieces()
    whole = digest.hasher()
    try:
        with translated(store.blob_path(digest), "compare a blob"):
            size = os.fstat(descriptor).st_size
            found = []
            for start, end in _ranges(size):
                data = os.pread(descriptor, end - start, start)
                whole.update(data)
                found.append(piece_digest(data))
    finally:
        os.close(descriptor)
    if f"{digest.algorithm}:{whole.hexdigest()}" == digest:
        return Pieces(tuple(found), complete=True)
    # Read once more, and put aside if it is wrong again: the next pull fetches it.
    return Pieces(damaged=not store.prove(digest))


def differing(descriptor: int, size: int, right: Sequence[bytes]) -> list[Range] | None:
    """Return the pieces of a file that differ from ``right``; None when it is of another blob."""
    ranges = list(_ranges(size))
    if len(ranges) != len(right):
        return None
    return [
        (start, end)
        for (start, end), digest in zip(ranges, right, strict=True)
        if piece_digest(os.pread(descriptor, end - start, start)) != digest
    ]


def differences(first: int, second: int, size: int) -> list[int]:
    """Return the first differing offset of each piece in which two files differ."""
    found = []
    for start, end in _ranges(size):
        one, other = (os.pread(file, end - start, start) for file in (first, second))
        if one != other:
            found.append(start + _first_difference(one, other))
    return found


def _ranges(size: int) -> list[Range]:
    return [(at, min(at + PIECE_SIZE, size)) for at in range(0, size, PIECE_SIZE)]


def _first_difference(one: bytes, other: bytes) -> int:
    low, high = 0, min(len(one), len(other))
    # The bytes before `low` are equal, those before `high` are not (or one is shorter).
    while low < high:
        middle = (low + high) // 2
        if one[: middle + 1] == other[: middle + 1]:
            low = middle + 1
        else:
            high = middle
    return low
