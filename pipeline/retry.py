"""When to try again, and how long to wait before.

Invariant: every series of attempts ends: by count, by deadline, or by cancellation. Progress starts
the count anew, so a long blob over a bad line is finished and a dead source is left. Waits have
full jitter, so that a fleet does not come back in step.
"""

from __future__ import annotations

import re
from dataclasses import field
from typing import TYPE_CHECKING

from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.errors import CancelledError
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.errors import StowrayError

# 421 wants another connection, 499 and 522 are proxies that lost the other side.
TRANSIENT_STATUSES = frozenset({408, 421, 425, 429, 499, 500, 502, 503, 504, 522})
RETRY_AFTER_LIMIT = 60.0
POLL_SECONDS = 0.1
# How much of the usual wait is enough before going on with what went well until now.
MOVING_SHARE = 0.1


def is_transient(status: int) -> bool:
    """Return whether another try may bring another answer."""
    return status in TRANSIENT_STATUSES or (status >= 500 and status not in (501, 505))


def retry_after(value: str | None, now: float) -> float | None:
    """Return the seconds that ``Retry-After`` asks for, capped; ``None`` for the usual wait.

    Both forms of RFC 9110, section 10.2.3; ``now`` is wall-clock time. What is past, zero or not
    well-formed asks for nothing.
    """
    if value is None:
        return None
    value = value.strip()
    if re.fullmatch(r"[0-9]+", value, re.ASCII):
        seconds = RETRY_AFTER_LIMIT if len(value) > 6 else float(value)
    else:
        # Here and not above: it takes longer to import than most waits are asked for.
        from email.utils import parsedate_to_datetime

        try:
            seconds = parsedate_to_datetime(value).timestamp() - now
        except (ValueError, OverflowError, TypeError, IndexError):
            return None
    return min(seconds, RETRY_AFTER_LIMIT) if seconds > 0 else None


def uniform(low: float, high: float) -> float:
    """Return a random number between the two."""
    import random

    return random.uniform(low, high)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How patient we are with one source; sizes in bytes.

    Who brought ``least_progress`` need not be waited for before the next attempt, and attempts that
    brought as much together do not count as failed; ``progress_size`` is what makes one well again.
    """

    attempts: int = 6
    base_seconds: float = 0.25
    longest_seconds: float = 20.0
    progress_size: int = 1 << 20
    least_progress: int = 64 << 10
    deadline_seconds: float = 900.0


@dataclass(slots=True)
class Retries:
    """The attempts at one thing; ``count`` is how many failed in all."""

    what: str
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    clock: Clock = SYSTEM_CLOCK
    uniform: Callable[[float, float], float] = uniform
    count: int = 0
    _row: int = 0
    _gained: int = 0
    _since: float | None = None
    _is_moving: bool = False

    def progressed(self, size: int) -> None:
        """Note that an attempt brought ``size`` new bytes before it ended."""
        # A connection that is reset loses what was on its way: often most of a short answer.
        self._gained += size
        if self._gained >= self.policy.least_progress:
            self._row = self._gained = 0
            self._since = None
            self._is_moving = True

    def pause(
        self,
        error: StowrayError,
        cancelled: Callable[[], bool] | None = None,
        *,
        weight: int = 1,
    ) -> None:
        """Wait before the next attempt, or raise ``error`` when there is none.

        ``weight`` makes a failure that rarely passes by itself count for several.
        """
        self.count += 1
        now = self.clock.monotonic()
        if self._since is None:
            self._since = now
        row = self._row
        self._row += weight
        if not error.retryable or self._row >= self.policy.attempts:
            raise error
        if now - self._since >= self.policy.deadline_seconds:
            raise error
        limit = min(self.policy.longest_seconds, self.policy.base_seconds * 2**row)
        if self._is_moving:
            # The first failure of a source that has brought something up to now.
            self._is_moving = False
            limit *= MOVING_SHARE
        wait(self.uniform(0.0, limit), self.clock, cancelled, self.what)


def wait(
    seconds: float,
    clock: Clock = SYSTEM_CLOCK,
    cancelled: Callable[[], bool] | None = None,
    what: str = "wait",
) -> None:
    """Wait; raise CancelledError soon after ``cancelled()`` says so."""
    end = clock.monotonic() + seconds
    while True:
        if cancelled is not None and cancelled():
            raise CancelledError(what)
        left = end - clock.monotonic()
        if left <= 0:
            return
        clock.sleep(min(left, POLL_SECONDS))
