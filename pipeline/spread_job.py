"""One blob on its way to this node in a run: what its stripes have in common.

Invariant: whatever ends one stripe for good ends all of them; what they report is put together
under one lock.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from stowray.pipeline.errors import CancelledError
from stowray.pipeline.source_actions import ORIGIN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stowray.pipeline.copying import Work
    from stowray.pipeline.errors import StowrayError
    from stowray.pipeline.ingest import Ingest
    from stowray.pipeline.origin import Origin, Place
    from stowray.pipeline.spread_repair import Repair
    from stowray.pipeline.spread_shared import Shared
    from stowray.pipeline.stripe_state import StripeState


class Job:
    """See the module; the ``places`` of the origin are in the order in which they are asked."""

    def __init__(
        self,
        shared: Shared,
        work: Work,
        ingest: Ingest,
        shown: StripeState,
        places: Sequence[Origin | Place],
        deadline_seconds: float,
    ) -> None:
        self.shared = shared
        self.work = work
        self.ingest = ingest
        self.shown = shown
        self.places = list(places)
        self.deadline_seconds = deadline_seconds  # without a byte
        self.digest = str(work.descriptor.digest)
        # Of these nothing is taken: they sent bytes that may be wrong and said they are proven.
        self.distrusted: set[str] = set()
        # Nor of these generations: they were not proven, and may be where wrong ones came from.
        self.suspects: set[tuple[str, int]] = set()
        # These give nothing more: the origin has sent them wrong bytes again and again.
        self.given_up_by: set[str] = set()
        # The stripes proved wrong and nobody had proven them: it comes in one piece now.
        self.is_whole = False
        # What of an earlier generation's bytes is used again.
        self.repair: Repair | None = None
        # What the origin said when it was meant: nothing more is to be had there.
        self.hopeless: StowrayError | None = None
        self.last_error: StowrayError | None = None
        self.changed = threading.Condition()
        self._stopped = threading.Event()

    def now(self) -> float:
        """Return the time that source choices are told."""
        return self.shared.clock.monotonic()

    def stop(self) -> None:
        """End all stripes soon."""
        self._stopped.set()

    def go_on(self) -> None:
        """Let new stripes run after all of before have ended."""
        self._stopped.clear()

    def is_over(self) -> bool:
        """Tell whether the stripes are to end."""
        return self._stopped.is_set()

    def check(self) -> None:
        """Raise CancelledError when the stripes are to end."""
        if self._stopped.is_set():
            raise CancelledError(self.digest)

    def wait(self, seconds: float) -> None:
        """Wait; CancelledError as soon as the stripes are to end."""
        self._stopped.wait(max(0.0, seconds))
        self.check()

    def prefer_home(self) -> None:
        """Ask the registry itself before its mirrors: one of those may have wrong bytes."""
        if self.places:
            self.places.insert(0, self.places.pop())

    def count(self, source: str, received: int) -> None:
        """Count bytes that came."""
        work = self.work
        with self.changed:
            work.received += received
            work.by_source[source] = work.by_source.get(source, 0) + received

    def retry(self) -> None:
        """Count one more try."""
        with self.changed:
            self.work.retries.count += 1


def label(node: str) -> str:
    """Return how bytes from a node are called in results."""
    return f"peer:{node}" if node != ORIGIN else node
