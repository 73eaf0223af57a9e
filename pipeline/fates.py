"""What became of the bytes that a server has sent: proven, proven wrong, or nothing yet.

Invariant: an answer is about one generation of one blob, and stays right when the ingest is long
gone: its state is kept mapped. Whoever passed wrong bytes on can so be told from who made them: it
has found them wrong itself.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from stowray.pipeline.ingeststate import COMMITTED, GIVEN_UP, IngestState

if TYPE_CHECKING:
    from stowray.pipeline.digest import Digest

GROWING: Final = "growing"
PROVEN: Final = "proven"
# The node found the bytes wrong itself; or it did so often, and fetches the blob no more.
WRONG: Final = "wrong"
ABANDONED: Final = "given up"
UNKNOWN: Final = "unknown"
# Of more ingests of one blob, one after the other, than these only the last are remembered.
_LIMIT: Final = 4


def fate_of(state: IngestState, generation: int) -> str:
    """Return what became of a generation as far as ``state`` tells."""
    if state.condemned >= generation > 0:
        return ABANDONED if state.status == GIVEN_UP else WRONG
    if state.generation != generation:
        return UNKNOWN
    return PROVEN if state.status == COMMITTED else GROWING


class Fates:
    """The ingests that one server has sent bytes of; used by one thread."""

    def __init__(self) -> None:
        self._states: dict[Digest, list[IngestState]] = {}

    def note(self, digest: Digest, state: IngestState) -> None:
        """Remember the ingest of ``state``, which the caller may close."""
        known = self._states.setdefault(digest, [])
        inode = os.fstat(state.descriptor).st_ino
        if any(os.fstat(one.descriptor).st_ino == inode for one in known):
            return
        known.append(IngestState(os.dup(state.descriptor)))
        if len(known) > _LIMIT:
            known.pop(0).close()

    def of(self, digest: Digest, generation: int) -> str:
        """Return what became of ``generation``; of bytes that were proven when sent it is 0."""
        for state in reversed(self._states.get(digest, [])):
            fate = fate_of(state, generation)
            if fate != UNKNOWN:
                return fate
        return UNKNOWN

    def close(self) -> None:
        """Forget everything."""
        for states in self._states.values():
            for state in states:
                state.close()
        self._states.clear()
