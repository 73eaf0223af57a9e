"""How much a blob server takes on, and what it tells of each request."""

from __future__ import annotations

from stowray.pipeline.values import dataclass


@dataclass(frozen=True, slots=True)
class ServeLimits:
    """Bounds of one server; seconds and counts.

    ``hold_seconds`` stays below what clients wait for the head of an answer. A client must take
    2 MiB within ``stall_seconds``.
    """

    connections: int = 256
    followers: int = 32
    lookups: int = 8
    held: int = 256
    hold_seconds: float = 20.0
    stall_seconds: float = 120.0
    header_seconds: float = 20.0
    keepalive_seconds: float = 60.0
    grace_seconds: float = 10.0
    header_bytes: int = 8190
    headers: int = 64


# In a run each stripe of each blob is a request, most of which wait: they cost little.
RUN_LIMITS = ServeLimits(connections=4096, held=4096)


@dataclass(frozen=True, slots=True)
class Served:
    """One answered request: ``length`` is of the body, ``complete`` says whether all of it went.

    ``path`` is as the client sent it, decoded and without its query: escape it before it is shown.
    """

    method: str
    path: str
    status: int
    length: int
    complete: bool
    seconds: float
