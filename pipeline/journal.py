"""The journal of an ingest: which prefixes were hashed to what, and what lies beyond them.

Invariant: a checkpoint is believed only after the file's bytes hash to it again, and an island (a
range that was written beyond the prefix) only on the boot that wrote it and until the digest of the
whole is known; so a journal that a crash cut short or damaged can only make a resume shorter, never
wrong.
"""

from __future__ import annotations

import os
from dataclasses import field
from typing import TYPE_CHECKING

from stowray.pipeline.files import read_regular, replace_file, write_all
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    import hashlib
    from pathlib import Path

    from stowray.pipeline.clock import Boot
    from stowray.pipeline.digest import Digest

VERSION = 1
_LIMIT = 64 << 20
_READ_SIZE = 1 << 20
# Of items, and of the bytes of one: boot IDs, host names, digests.
_LONGEST = 1024


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The digest of the first ``offset`` bytes of a generation's data."""

    generation: int
    offset: int
    digest: bytes


@dataclass(slots=True)
class History:
    """What a journal says about its last generation."""

    generation: int = 0
    boot: tuple[str, str] = ("", "")
    checkpoints: list[Checkpoint] = field(default_factory=list)
    islands: list[tuple[int, int]] = field(default_factory=list)

    def beyond(self, offset: int, end: int) -> list[tuple[int, int]]:
        """Return the islands behind ``offset``, sorted and joined; none of it is beyond ``end``."""
        joined: list[tuple[int, int]] = []
        for start, stop in sorted(self.islands):
            first = joined[-1][1] if joined else offset
            if stop <= first or stop > end:
                continue
            if joined and start <= first:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((max(start, first), stop))
        return joined

    def until(self, offset: int) -> list[Checkpoint]:
        """Return the checkpoints that lie within the first ``offset`` bytes."""
        return [point for point in self.checkpoints if point.offset <= offset]

    def last(self, offset: int) -> int:
        """Return where the last checkpoint within ``offset`` bytes is."""
        return max((point.offset for point in self.until(offset)), default=0)


class Journal:
    """An append-only msgpack file: a header per generation, then its checkpoints."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def read(self) -> History:
        """Return what can be read of the last generation; damage ends the reading."""
        import msgpack

        history = History()
        try:
            data = read_regular(self._path, _LIMIT)
        except FileNotFoundError:
            return history
        # Without bounds of their own a damaged length has as much memory asked for as it says.
        unpacker = msgpack.Unpacker(
            max_buffer_size=_LIMIT + 1,
            max_array_len=_LONGEST,
            max_str_len=_LONGEST,
            max_bin_len=_LONGEST,
            max_map_len=0,
            max_ext_len=0,
        )
        unpacker.feed(data)
        try:
            for item in unpacker:
                if not _take(history, item):
                    break
        except (ValueError, msgpack.UnpackException):
            # A torn or damaged tail: what was read before it still has to prove itself.
            return history
        return history

    def rewrite(
        self,
        generation: int,
        boot: Boot,
        checkpoints: list[Checkpoint],
        islands: list[tuple[int, int]],
    ) -> None:
        """Begin the journal anew with a header and what is still true."""
        import msgpack

        self.close()
        header = ["generation", VERSION, generation, boot.boot_id, boot.host]
        points = [["checkpoint", generation, point.offset, point.digest] for point in checkpoints]
        ranges = [["island", generation, start, end] for start, end in islands]
        items = [header, *points, *ranges]
        replace_file(self._path, b"".join(msgpack.packb(item) for item in items))
        self._descriptor = os.open(
            self._path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        )

    def append_checkpoint(self, point: Checkpoint) -> None:
        """Add one checkpoint."""
        import msgpack

        item = ["checkpoint", point.generation, point.offset, point.digest]
        write_all(self._descriptor, msgpack.packb(item))

    def append_island(self, generation: int, start: int, end: int) -> None:
        """Note that a range beyond the prefix was written."""
        import msgpack

        write_all(self._descriptor, msgpack.packb(["island", generation, start, end]))

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def prove_prefix(
    descriptor: int, digest: Digest, checkpoints: list[Checkpoint], exposed: int, *, tail: bool
) -> tuple[int, hashlib._Hash]:
    """Hash a partial again; return how much of it is as it was written, and the hash of that.

    Without ``tail`` what lies beyond the last checkpoint is not believed.
    """
    hasher = digest.hasher()
    proven, proven_hasher = 0, digest.hasher()
    for point in checkpoints:
        if point.offset > exposed:
            break
        _hash_range(descriptor, hasher, proven, point.offset)
        if hasher.digest() != point.digest:
            return proven, proven_hasher
        proven, proven_hasher = point.offset, hasher.copy()
    if tail:
        proven += _hash_range(descriptor, hasher, proven, exposed)
        return proven, hasher
    return proven, proven_hasher


def _hash_range(descriptor: int, hasher: hashlib._Hash, start: int, end: int) -> int:
    """Add a range of a file to ``hasher``; return how many bytes it really had."""
    at = start
    while at < end:
        part = os.pread(descriptor, min(_READ_SIZE, end - at), at)
        if not part:
            break
        hasher.update(part)
        at += len(part)
    return at - start


def _take(history: History, item: object) -> bool:
    """Add one journal item to ``history``; False when it is not one of ours."""
    match item:
        case ["generation", int(version), int(generation), str(boot_id), str(host)]:
            if version != VERSION:
                return False
            history.generation = generation
            history.boot = (boot_id, host)
            history.checkpoints = []
            history.islands = []
            return True
        case ["checkpoint", int(generation), int(offset), bytes(digest)]:
            previous = history.checkpoints[-1].offset if history.checkpoints else 0
            if generation != history.generation or offset <= previous:
                return False
            history.checkpoints.append(Checkpoint(generation, offset, digest))
            return True
        case ["island", int(generation), int(start), int(end)]:
            if generation != history.generation or not 0 <= start < end:
                return False
            history.islands.append((start, end))
            return True
        case _:
            return False
