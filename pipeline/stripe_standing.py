"""How far stripes are on this node, as its store says when peers of a run ask.

Invariant: nothing is kept open but what is returned; a blob that nobody writes any more counts as
not begun, unless it was given up.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from stowray.pipeline.arriving import Arriving
from stowray.pipeline.errors import NotFoundError
from stowray.pipeline.fates import UNKNOWN
from stowray.pipeline.stripes import Stripe

if TYPE_CHECKING:
    import asyncio

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.store import Store

GIVEN_UP: Final = "given up"
NOTHING: Final[dict[str, object]] = {
    "have": 0,
    "upstream": None,
    "generation": 0,
    "complete": False,
    "given_up": False,
    "whole": False,
    "fate": UNKNOWN,
    "pace": 0.0,
}


def open_begun(store: Store, digest: Digest) -> Arriving | int | str | None:
    """Open the committed blob, else what a live writer is writing; see whether it was given up."""
    for _ in range(2):
        try:
            return store.open_blob(digest)
        except NotFoundError:
            arriving = Arriving.open(store, digest)
        if arriving is not None:
            # Its writer may still be about to leave.
            is_given_up = arriving.is_given_up
            if not is_given_up and arriving.writer_lives() and not arriving.is_committed:
                return arriving
            arriving.close()
            if is_given_up:
                return GIVEN_UP
        # Between the two questions it may have been committed: ask once more.
    return None


def close_unclaimed(future: asyncio.Future[Arriving | int | str | None]) -> None:
    """Close what was opened for clients who have left meanwhile."""
    if future.cancelled() or future.exception() is not None:
        return
    found = future.result()
    if isinstance(found, Arriving):
        found.close()
    elif isinstance(found, int):
        os.close(found)


def standing(
    store: Store, digest: Digest, division: tuple[int, int, int], generation: int
) -> dict[str, object]:
    """Return how far a stripe is on this node, and whom it is read from."""
    found = open_begun(store, digest)
    if not isinstance(found, Arriving | int):
        return {**NOTHING, "given_up": found is GIVEN_UP}
    if isinstance(found, Arriving):
        try:
            return standing_of(found, division, generation)
        finally:
            found.close()
    try:
        stripe = Stripe(os.fstat(found).st_size, *division)
    finally:
        os.close(found)
    return {**NOTHING, "have": stripe.length, "complete": True}


def standing_of(
    arriving: Arriving, division: tuple[int, int, int], generation: int
) -> dict[str, object]:
    """Return the same of a blob that is open: ``division`` is index, count and unit of a stripe."""
    stripe = Stripe(arriving.size, *division)
    return {
        "have": arriving.position(stripe),
        "upstream": arriving.upstream(stripe),
        "pace": arriving.pace(stripe),
        "generation": arriving.generation,
        "complete": arriving.is_committed,
        "given_up": False,
        "whole": not arriving.gives(stripe),
        "fate": arriving.fate(generation),
    }
