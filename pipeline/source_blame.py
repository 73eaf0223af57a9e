"""Whom wrong bytes are charged to, when they went through several hands.

Invariant: nobody is charged for what it passed on: who has found its own bytes wrong, or has the
same wrong ones, is passed over, and the charge goes to the hop behind which they were right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stowray.pipeline.fates import ABANDONED, PROVEN, UNKNOWN, WRONG
from stowray.pipeline.source_actions import ORIGIN
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Hop:
    """One through whose hands a wrong byte went: a node, or the origin.

    ``claimed``: it said that the bytes were proven when it sent them. ``fate``: what became of them
    there since (``fates``). ``told``: its digest of all bytes up to a checkpoint behind the wrong
    one; empty when it does not say.
    """

    node: str
    claimed: bool = False
    fate: str = UNKNOWN
    told: bytes = b""


def find_liar(right: bytes, hops: Iterable[Hop]) -> str | None:
    """Return who is to blame; None when that is not known.

    ``hops`` go from the one that gave the byte upwards: its source, that one's source. ``right`` is
    the digest up to the checkpoint in a proven copy. The first hop whose bytes were right sent
    others than it had; one that had the same wrong ones is passed over.
    """
    for hop in hops:
        if hop.node == ORIGIN or hop.claimed or hop.fate == PROVEN:
            return hop.node
        if hop.told and hop.told == right:
            return hop.node
        if not hop.told and hop.fate not in (WRONG, ABANDONED):
            return None
    return None
