"""What an earlier writer left of a blob, and how much of it is still believed.

Invariant: on the boot that wrote them all bytes that were noted count, for the page cache has them;
on another one only what a checkpoint of the journal proves.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from stowray.pipeline.journal import prove_prefix
from stowray.pipeline.stripe_state import are_within
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    import hashlib

    from stowray.pipeline.clock import Boot
    from stowray.pipeline.digest import Digest
    from stowray.pipeline.journal import History


@dataclass(frozen=True, slots=True)
class Rest:
    """The contiguous bytes that are ``kept``, the hash of them, and ranges further on.

    ``lacks_shown``: followers may have seen bytes that are not among them.
    """

    kept: int
    hasher: hashlib._Hash
    islands: list[tuple[int, int]]
    lacks_shown: bool


def find_rest(
    data: int,
    digest: Digest,
    size: int,
    exposed: int,
    shown: list[tuple[int, int]],
    history: History,
    boot: Boot,
) -> Rest:
    """Prove what the open file ``data`` holds of a blob of ``size`` bytes.

    ``exposed`` is the prefix that followers could read, ``shown`` the ranges of stripes.
    """
    same_boot = history.boot == (boot.boot_id, boot.host)
    kept, hasher = prove_prefix(data, digest, history.checkpoints, exposed, tail=same_boot)
    # Islands may lack from the disk after a crash, and bytes that are wrong make doubtful
    # whatever the same hand wrote.
    islands: list[tuple[int, int]] = []
    if same_boot and kept == exposed:
        islands = history.beyond(kept, min(size, os.fstat(data).st_size))
    lacks_shown = kept < exposed or not are_within(shown, [(0, kept), *islands])
    return Rest(kept, hasher, islands, lacks_shown)
