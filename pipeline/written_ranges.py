"""Which bytes of a growing blob are written, when several threads write parts of it.

Invariant: a byte is claimed by one thread only; the prefix is the contiguous part that has been
written from the start on and never shrinks; *islands* are the ranges behind it. Offsets are in
bytes; ranges are half open.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class WrittenRanges:
    """The written and claimed ranges of one generation; safe from several threads."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._prefix = 0
        self._islands: list[tuple[int, int]] = []  # written or being written beyond the prefix
        self._done: set[tuple[int, int]] = set()

    @property
    def prefix(self) -> int:
        """How many bytes from the start are written."""
        return self._prefix

    @property
    def is_empty(self) -> bool:
        """Return whether nothing is written or being written."""
        return self._prefix == 0 and not self._islands

    def reset(self, prefix: int, islands: Sequence[tuple[int, int]] = ()) -> None:
        """Begin with what is there already; the islands are sorted and do not touch each other."""
        with self._guard:
            self._prefix = prefix
            self._islands = list(islands)
            self._done = set(islands)
            self._grow()

    def claim(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the parts of a range that nobody has written or is writing, and claim them."""
        with self._guard:
            parts: list[tuple[int, int]] = []
            at = max(start, self._prefix)
            for left, right in self._islands:
                if left >= end:
                    break
                if left > at:
                    parts.append((at, left))
                at = max(at, right)
            if at < end:
                parts.append((at, end))
            for part in parts:
                self._islands.insert(bisect_left(self._islands, part), part)
            return parts

    def give_back(self, part: tuple[int, int]) -> None:
        """Let others write a part that was claimed and has not been written."""
        with self._guard:
            self._islands.remove(part)

    def note(self, part: tuple[int, int], expose: Callable[[int], None]) -> bool:
        """Take note of a written part; return whether the prefix goes beyond its start now.

        ``expose`` is given the prefix before anybody else can move it.
        """
        with self._guard:
            self._done.add(part)
            self._grow()
            expose(self._prefix)
            return self._prefix > part[0]

    def gap(self, start: int, end: int, *, written: bool = False) -> tuple[int, int] | None:
        """Return the first part of a range that nobody has written yet, None when all is there.

        What a thread is writing just now counts as there, except with ``written``.
        """
        with self._guard:
            at = max(start, self._prefix)
            for left, right in self._islands:
                if written and (left, right) not in self._done:
                    continue
                if left > at:
                    return (at, min(left, end)) if at < end else None
                at = max(at, right)
            return (at, end) if at < end else None

    def _grow(self) -> None:
        while self._islands and self._islands[0] in self._done:
            if self._islands[0][0] != self._prefix:
                break
            part = self._islands.pop(0)
            self._done.discard(part)
            self._prefix = part[1]
