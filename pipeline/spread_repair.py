"""Bytes that proved wrong as a whole, most of which are right: what of them is used again.

Invariant: nothing of them counts as proven; they are written into the next generation like any
other bytes, and its digest decides.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Final

from stowray.pipeline.pieces import PIECE_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stowray.pipeline.ingest import Ingest

Range = tuple[int, int]

# So often a difference that was found is tried as the only one.
_GUESS_LIMIT: Final = 4


class Repair:
    """Fills an empty generation of ``ingest`` from the bytes of the one before; closes nothing.

    It ``guesses`` where nobody told which of them are wrong.
    """

    def __init__(self, ingest: Ingest, *, guesses: bool) -> None:
        self.guesses = guesses
        self._ingest = ingest
        self._tried = 0
        self._checked: set[int] = set()
        self._lock = threading.Lock()

    def keep(self, wrong: Sequence[Range]) -> None:
        """Take over everything but the ranges that are known as wrong, which are in order."""
        at = 0
        for start, end in (*wrong, (self._ingest.size, self._ingest.size)):
            self._copy(at, start)
            at = end

    def compare(self, start: int, end: int) -> bool:
        """Look at bytes that came anew; return whether all others have been filled in from before.

        Nobody knows which bytes are wrong. As soon as a piece has come that differs from what was
        there, that piece may be the only one: if the others together with those that came have the
        blob's digest, nothing more need come.
        """
        ingest = self._ingest
        first, last = start // PIECE_SIZE, (end - 1) // PIECE_SIZE
        found = False
        for number in range(first, last + 1):
            begin, stop = number * PIECE_SIZE, min((number + 1) * PIECE_SIZE, ingest.size)
            if number in self._checked or ingest.gap(begin, stop, written=True) is not None:
                continue
            self._checked.add(number)
            if ingest.read(begin, stop - begin) != self._old(begin, stop - begin):
                found = True
        if not found:
            return False
        with self._lock:
            if self._tried >= _GUESS_LIMIT or ingest.gap(0, ingest.size) is None:
                return False
            self._tried += 1
            if not self._is_right():
                return False
            self._copy(0, ingest.size)
            return True

    def _is_right(self) -> bool:
        """Hash what has come, and for the rest what was there before."""
        ingest = self._ingest
        hasher = ingest.digest.hasher()
        at = 0
        while at < ingest.size:
            end = min(at + PIECE_SIZE, ingest.size)
            gap = ingest.gap(at, end, written=True)
            if gap is None:
                hasher.update(ingest.read(at, end - at))
            elif gap[0] > at:
                end = gap[0]
                hasher.update(ingest.read(at, end - at))
            else:
                end = gap[1]
                hasher.update(self._old(at, end - at))
            at = end
        return f"{ingest.digest.algorithm}:{hasher.hexdigest()}" == ingest.digest

    def _copy(self, start: int, end: int) -> None:
        for at in range(start, end, PIECE_SIZE):
            data = self._old(at, min(PIECE_SIZE, end - at))
            self._ingest.write_at(at, data)

    def _old(self, start: int, length: int) -> bytes:
        return os.pread(self._ingest.wrong_data, length, start)
