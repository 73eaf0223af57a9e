"""When the nodes of a run may ask a registry again, and which node has which part of its lines.

Invariant: called by one thread, with its own clock, so that no two nodes get the same part; what is
booked is never given back, and a host that nobody speaks of any more is forgotten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from stowray.pipeline.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

# Longer than any pause or line that is asked for in earnest.
LONGEST_SECONDS: Final = 300.0
KEPT: Final = 1024
LINES: Final = frozenset({"requests", "documents", "bytes"})


class RegistryLines:
    """Pauses and lines by host."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._now = monotonic
        self._pauses: dict[str, float] = {}
        self._free: dict[tuple[str, str], float] = {}

    def pause(self, host: str, seconds: float) -> None:
        """Let nobody ask ``host`` for that long."""
        self._forget()
        until = self._now() + min(seconds, LONGEST_SECONDS)
        self._pauses[host] = max(until, self._pauses.get(host, 0.0))

    def rest(self, host: str) -> float:
        """Return for how many seconds more ``host`` is to be left alone."""
        return max(0.0, self._pauses.get(host, 0.0) - self._now())

    def book(self, host: str, line: str, seconds: float) -> float:
        """Take the next ``seconds`` of a line; return in how many seconds they begin."""
        if line not in LINES or not 0 <= seconds <= LONGEST_SECONDS:
            raise UsageError("leases", f"no such part of a line: {line} {seconds}")
        self._forget()
        now = self._now()
        begin = max(now, self._free.get((host, line), 0.0))
        self._free[host, line] = begin + seconds
        return begin - now

    def _forget(self) -> None:
        if len(self._pauses) + len(self._free) < KEPT:
            return
        now = self._now()
        self._pauses = {host: until for host, until in self._pauses.items() if until > now}
        self._free = {line: until for line, until in self._free.items() if until > now}
