"""An arriving blob as its server sees it: how far it is, in whatever pieces it comes.

Invariant: what is said to be there belongs to one generation, the one that was opened; whoever
sends it asks ``is_void`` again afterwards. No question waits, and few cost more than a look
into mapped memory. The last byte of a blob in one piece is there only when all of it
was proven: who has received it has the right bytes. Stripes cannot wait for that, for two nodes may
each need the other's.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Final

from stowray.pipeline.fates import fate_of
from stowray.pipeline.files import translated
from stowray.pipeline.ingeststate import COMMITTED, GIVEN_UP, IngestState, boot_key
from stowray.pipeline.locks import try_lock, unlock
from stowray.pipeline.stripe_state import StripeState

if TYPE_CHECKING:
    from pathlib import Path

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.store import Store
    from stowray.pipeline.stripes import Stripe

_LOOK_AGAIN_SECONDS: Final = 0.05


class Arriving:
    """One generation of one blob on its way into a store; used by one thread at a time."""

    def __init__(self, directory: Path, state: IngestState, data: int, generation: int) -> None:
        self.generation = generation
        self.size = state.size
        self.data = data
        self.state = state
        self._directory = directory
        self._stripes: StripeState | None = None
        self._look_at = 0.0

    @classmethod
    def open(cls, store: Store, digest: Digest) -> Arriving | None:
        """Open what a writer of this host is writing, or has left; None when there is nothing."""
        directory = store.ingest_path(digest)
        with translated(directory, "look at an ingest"):
            state = IngestState.follow(directory / "state")
            if state is None:
                return None
            data = -1
            try:
                generation = state.generation
                if state.valid and state.boot == boot_key(store.boot):
                    data = os.open(
                        directory / f"data.{generation}",
                        os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                    )
                    return cls(directory, state, data, generation)
            except FileNotFoundError:
                return None  # just renamed into blobs/, or the next generation is being made
            finally:
                if data < 0:
                    state.close()
        return None

    def close(self) -> None:
        """Close the files; idempotent."""
        if self.data >= 0:
            os.close(self.data)
            self.data = -1
            self.state.close()
            if self._stripes is not None:
                self._stripes.close()
                self._stripes = None

    @property
    def is_void(self) -> bool:
        """Whether the bytes proved wrong or are gone: another generation has begun."""
        return self.state.generation != self.generation

    @property
    def is_committed(self) -> bool:
        """Whether the digest was proven; the data file is the blob then."""
        return self.state.status == COMMITTED and not self.is_void

    @property
    def is_given_up(self) -> bool:
        """Whether its writer got wrong bytes only and tries no more."""
        return self.state.status == GIVEN_UP

    def fate(self, generation: int) -> str:
        """Return what became of a generation of this ingest; see ``fates``."""
        return fate_of(self.state, generation)

    @property
    def prefix(self) -> int:
        """How many bytes from the start are there."""
        return min(self.state.prefix, self.size)

    def position(self, stripe: Stripe) -> int:
        """Return how many bytes of ``stripe`` may be sent."""
        if self.is_committed:
            return stripe.length
        position = stripe.position(self.prefix)
        if stripe.count == 1:
            return min(position, max(0, self.size - 1))
        shown = self._shown(stripe)
        if shown is not None:
            position = max(position, min(shown.position(stripe.index), stripe.length))
        return 0 if self.is_void else position

    def upstream(self, stripe: Stripe) -> str | None:
        """Return whom the stripe is read from; empty for the origin, None when that is not told."""
        shown = self._shown(stripe)
        return None if shown is None else shown.upstream(stripe.index)

    def writer_lives(self) -> bool:
        """Say whether somebody writes now; its sign of life is its lock on the state file."""
        if not try_lock(self.state.descriptor, shared=True):
            return True
        unlock(self.state.descriptor)
        return False

    def gives(self, stripe: Stripe) -> bool:
        """Tell whether bytes of such a stripe are given as they come.

        Not by a node that takes the blob in one piece because its stripes proved wrong: who still
        takes stripes may be who that one waits for.
        """
        if stripe.count == 1 or self.is_committed:
            return True
        shown = self._latest()
        return shown is None or not shown.is_whole

    def pace(self, stripe: Stripe) -> float:
        """Return what the node expects of one source; see :meth:`StripeState.pace`."""
        shown = self._shown(stripe)
        return 0.0 if shown is None else shown.pace

    def _shown(self, stripe: Stripe) -> StripeState | None:
        shown = self._latest()
        return shown if shown is not None and shown.divides(stripe) else None

    def _latest(self) -> StripeState | None:
        shown = self._stripes
        if shown is not None and shown.generation != self.generation:
            shown.close()
            shown = self._stripes = None
        if shown is None:
            # A blob that does not come in stripes never has the file.
            now = time.monotonic()
            if now < self._look_at:
                return None
            self._look_at = now + _LOOK_AGAIN_SECONDS
            shown = StripeState.follow(self._directory)
            if shown is None:
                return None
            if shown.generation != self.generation:
                shown.close()
                return None
            self._stripes = shown
        return shown
