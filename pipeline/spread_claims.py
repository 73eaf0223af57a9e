"""What sources of a run say of the bytes that they give, and what they find out of them later.

Invariant: plain values; two claims are one if generation and proof are.
"""

from __future__ import annotations

from typing import Final

from stowray.pipeline.values import dataclass


@dataclass(frozen=True, slots=True)
class Claim:
    """What a source says of the bytes that it gives: their generation, and if they are proven."""

    generation: int
    complete: bool


NO_CLAIM: Final = Claim(0, False)


class VoidError(Exception):
    """A source found its bytes wrong before this node could: those here are the same."""
