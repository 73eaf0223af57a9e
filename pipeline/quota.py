"""How many requests a registry still allows, by its own word.

Docker Hub counts manifests per address or account and tells with each of them how many are left:
``RateLimit-Remaining: 76;w=21600`` beside ``RateLimit-Limit: 100;w=21600``. Invariant: what is not
well-formed is no quota, and a quota slows down and warns but never refuses: the registry does that.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from stowray.pipeline.response import Response

LOW_FRACTION = 0.1
LONGEST_GAP_SECONDS = 2.0

_VALUE = re.compile(r"([0-9]{1,9})(?:\s*,\s*[^;]*)?((?:\s*;\s*[a-z]+=[^;,]*)*)\s*", re.ASCII)
_WINDOW = re.compile(r";\s*w=([0-9]{1,9})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Quota:
    """``remaining`` of ``limit`` requests in ``window_seconds``; None for what is not told."""

    remaining: int
    limit: int | None = None
    window_seconds: int | None = None

    @property
    def is_low(self) -> bool:
        """Tell whether requests should be spared now."""
        limit = self.limit if self.limit is not None else 100
        return self.remaining <= limit * LOW_FRACTION

    @property
    def gap_seconds(self) -> float:
        """Return how long to wait between two requests: longer, the fewer are left."""
        if not self.is_low:
            return 0.0
        limit = max(1, self.limit if self.limit is not None else 100)
        share = 1.0 - self.remaining / max(1.0, limit * LOW_FRACTION)
        longest = LONGEST_GAP_SECONDS
        if self.window_seconds is not None:
            longest = min(longest, self.window_seconds / limit)
        return max(0.0, share) * longest

    def to_dict(self) -> dict[str, int | None]:
        """Return plain data."""
        return {
            "remaining": self.remaining,
            "limit": self.limit,
            "window_seconds": self.window_seconds,
        }

    def __str__(self) -> str:
        of = f" of {self.limit}" if self.limit is not None else ""
        window = self.window_seconds
        hours = f" in {window / 3600:g} h" if window else ""
        return f"{self.remaining}{of} requests are left{hours}"


def read_quota(response: Response) -> Quota | None:
    """Return what the headers of an answer tell, None for nothing."""
    remaining = _number(response.header("RateLimit-Remaining"))
    if remaining is None:
        return None
    limit = _number(response.header("RateLimit-Limit"))
    window = remaining[1] if remaining[1] is not None else (limit[1] if limit else None)
    return Quota(remaining[0], limit[0] if limit else None, window)


def _number(value: str | None) -> tuple[int, int | None] | None:
    match = _VALUE.fullmatch((value or "").strip())
    if match is None:
        return None
    window = _WINDOW.search(match[2] or "")
    return int(match[1]), int(window[1]) if window else None
