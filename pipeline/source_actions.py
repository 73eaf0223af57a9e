"""What a source choice says is to be done, and with what patience it does.

Invariant: plain values; ``source_choice`` makes them and whoever reads bytes carries them out.
"""

from __future__ import annotations

from typing import Final

from stowray.pipeline.values import dataclass

# No node has an empty name.
ORIGIN: Final = ""


@dataclass(frozen=True, slots=True)
class Patience:
    """For how long, in seconds, what is put up with.

    A source is left after ``silence`` without a byte and ``answer`` without an answer; that may
    only mean busy, and counts as failed when it has gone on for ``deaf``. It is slow when it gives
    less than ``slow_fraction`` of the expected rate, or less than ``least_rate`` bytes per second,
    for ``slow``. One that waits for its own source is left after ``starved``.
    Who failed is passed over for ``avoid``, twice as long each time. ``tries`` is how often the
    origin may fail without a byte in between. ``margin`` bytes are on their way or in buffers: two
    nodes that are equally far may seem to differ by so much.
    """

    silence: float = 1.0
    answer: float = 1.0
    slow: float = 2.0
    slow_fraction: float = 0.35
    least_rate: float = 1024.0
    starved: float = 8.0
    avoid: float = 5.0
    deaf: float = 8.0
    tries: int = 6
    margin: int = 16 << 20


@dataclass(frozen=True, slots=True)
class Fetch:
    """Read from ``source`` (``ORIGIN`` or a node) from ``position`` on; leave the one before."""

    source: str
    position: int


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask ``source`` how far it is and whom it reads from; keep reading meanwhile."""

    source: str


@dataclass(frozen=True, slots=True)
class AskLease:
    """Ask the owner of the leases for the origin from ``position`` on.

    ``failed`` gave nothing or wrong bytes, ``slow`` give too little.
    """

    position: int
    failed: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pause:
    """There is nobody to ask now: stop reading, call ``tick`` at ``until``."""

    until: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Neither nodes nor origin have helped."""

    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """Something that a source did, for the log and the final report."""

    source: str
    kind: str
    position: int
    detail: str = ""


Action = Fetch | Probe | AskLease | Pause | GiveUp
