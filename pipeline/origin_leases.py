"""Who may read which bytes from the origin, so that no byte is read there twice.

Invariant: at any moment at most one node holds a lease on a byte. A lease ends when its holder is
done, gives it back, does not renew it in time, or dies; what a dead node had read and nobody else
is known to have is free again. The book is kept in memory by one owner: after that one's restart
holders declare their leases again, and until every lease of before has either been declared or run
out, nothing new is granted.

A holder counts its time from before it asked, the book from when it answered, so the holder always
stops first.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import field
from typing import TYPE_CHECKING, Final

from stowray.pipeline.errors import UsageError
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

DEFAULT_TTL_SECONDS: Final = 10.0
# Who has what is told to those who ask; more names than these help nobody.
_OWNER_LIMIT: Final = 8


@dataclass(frozen=True, slots=True)
class Granted:
    """The asker reads ``start`` to ``end`` from the origin and renews within ``seconds``."""

    start: int
    end: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Others read the byte asked for, or have it: get it from one of ``nodes``, up to ``end``.

    ``reading`` tells that it is still on its way; ask again after ``seconds`` if none of them gives
    it.
    """

    nodes: tuple[str, ...]
    end: int
    reading: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Later:
    """Nothing can be said before ``seconds`` have passed."""

    seconds: float


@dataclass(slots=True)
class _Range:
    """A part of a key: free, held (``holder``), or read (``owners``)."""

    start: int
    end: int
    holder: str = ""
    until: float = 0.0
    owners: tuple[str, ...] = ()
    # Who gets the rest of a slow holder's lease as soon as that one says how far it is.
    heir: str = ""

    def like(self, start: int, end: int) -> _Range:
        return _Range(start, end, self.holder, self.until, self.owners, self.heir)

    def says(self) -> tuple[str, float, tuple[str, ...], str]:
        return self.holder, self.until, self.owners, self.heir


@dataclass(slots=True)
class _Book:
    """The ranges of one key: without gaps from 0 to ``size``, in order."""

    size: int
    ranges: list[_Range] = field(default_factory=list)
    slow: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.ranges.append(_Range(0, self.size))

    def at(self, position: int) -> _Range:
        return self.ranges[bisect_right(self.ranges, position, key=lambda part: part.start) - 1]

    def cut(self, start: int, end: int) -> Iterator[_Range]:
        """Yield the ranges that together are ``start`` to ``end``, dividing those at its edges."""
        if start >= end:
            return
        for edge in (start, end):
            if 0 < edge < self.size:
                number = bisect_right(self.ranges, edge, key=lambda part: part.start) - 1
                part = self.ranges[number]
                if part.start < edge:
                    self.ranges.insert(number + 1, part.like(edge, part.end))
                    part.end = edge
        for part in list(self.ranges):
            if start <= part.start and part.end <= end and part.start < part.end:
                yield part

    def join(self) -> None:
        """Make one of neighbours that say the same."""
        joined = self.ranges[:1]
        for part in self.ranges[1:]:
            last = joined[-1]
            if last.says() == part.says():
                last.end = part.end
            else:
                joined.append(part)
        self.ranges = joined


class OriginLeases:
    """The book of one run; called by one thread.

    A *key* is whatever all nodes of the run divide alike: a digest, or a stripe of it.
    ``monotonic`` gives seconds. With ``restarted`` the book waits for declarations first.
    """

    def __init__(
        self,
        monotonic: Callable[[], float],
        *,
        ttl_seconds: float = DEFAULT_TTL_SECONDS,
        restarted: bool = False,
    ) -> None:
        self._now = monotonic
        self._ttl = ttl_seconds
        self._books: dict[str, _Book] = {}
        self._quiet_until = monotonic() + ttl_seconds if restarted else 0.0
        self.granted_bytes = 0

    def ask(
        self,
        node: str,
        key: str,
        size: int,
        start: int,
        end: int | None = None,
        *,
        failed: Collection[str] = (),
        slow: Collection[str] = (),
    ) -> Granted | Elsewhere | Later:
        """Answer who gets the byte at ``start`` from the origin, and how far from there.

        ``failed`` are nodes that the asker could not get it from. What they have read is read again
        when nobody else has it; what one of them still reads is waited for. When the holder is one
        of the ``slow``, the asker becomes its heir: the rest passes to it when the holder next says
        how far it is, and the holder is told to stop. That happens to a node once, else two slow
        ones would hand a lease to and fro.
        """
        book = self._book(key, size)
        stop = size if end is None else min(end, size)
        if not 0 <= start < stop:
            raise UsageError(key, f"no bytes from {start} to {stop} of {size}")
        now = self._now()
        if slow and node not in book.slow:
            _inherit(book, node, start, slow)
        part = book.at(start)
        if part.holder and part.until > now and part.holder != node:
            return Elsewhere((part.holder,), part.end, True, part.until - now)
        helpful = tuple(owner for owner in part.owners if owner != node and owner not in failed)
        if part.end < size and book.at(part.end).holder == node and set(helpful) <= set(slow):
            # The heir of a slow holder does not wait for it: it reads again the little by which it
            # was behind.
            failed = (*failed, *helpful)
            helpful = ()
        if helpful and not part.holder:
            return Elsewhere(helpful, part.end, False, self._ttl)
        if now < self._quiet_until and part.holder != node:
            return Later(self._quiet_until - now)
        stop = self._reach(book, node, start, stop, failed, now)
        for piece in book.cut(start, stop):
            if piece.holder != node or piece.until <= now:
                self.granted_bytes += piece.end - piece.start
            self._hold(piece, node)
        book.join()
        return Granted(start, stop, self._ttl)

    def progress(self, node: str, key: str, position: int) -> float:
        """Take note that ``node`` has read its lease up to ``position``, and renew the rest.

        Return for how many seconds; 0 when it holds nothing from there on: it must stop reading. A
        lease that ran out and that nobody else got meanwhile is renewed as well.
        """
        book = self._books.get(key)
        if book is None:
            return 0.0
        seconds = 0.0
        for start, end, heir in [
            (part.start, part.end, part.heir) for part in book.ranges if part.holder == node
        ]:
            for piece in book.cut(start, min(end, position)):
                _give(piece, node)
            for piece in book.cut(max(start, position), end):
                if heir:
                    self._hold(piece, heir)
                else:
                    piece.until = self._now() + self._ttl
                    seconds = self._ttl
        book.join()
        return seconds

    def release(self, node: str, key: str) -> None:
        """Free what ``node`` still holds of ``key``; what it has read stays its own."""
        book = self._books.get(key)
        if book is None:
            return
        for part in book.ranges:
            if part.holder == node:
                part.holder, part.until, part.heir = "", 0.0, ""
        book.join()

    def has(self, node: str, key: str, size: int, start: int = 0, end: int | None = None) -> None:
        """Take note that ``node`` has these bytes, wherever from."""
        book = self._book(key, size)
        for part in book.cut(start, size if end is None else min(end, size)):
            if part.holder == node or not part.holder or part.until <= self._now():
                _give(part, node)
        book.join()

    def lost(self, node: str, key: str) -> None:
        """Take note that ``node`` has nothing of ``key``: its bytes were wrong or are gone."""
        book = self._books.get(key)
        if book is not None:
            _strike(book, node)

    def node_died(self, node: str) -> None:
        """End all that ``node`` holds and has."""
        for book in self._books.values():
            _strike(book, node)

    def declare(self, node: str, key: str, size: int, start: int, end: int) -> float:
        """Enter again a lease of before a restart; return its seconds, 0 when another has it.

        Only what is free is entered, and the whole range or nothing.
        """
        book = self._book(key, size)
        now = self._now()
        stop = min(end, size)
        if not 0 <= start < stop or now >= self._quiet_until:
            return 0.0
        for part in book.ranges:
            if part.start < stop and part.end > start and part.holder not in ("", node):
                return 0.0
        for piece in book.cut(start, stop):
            self._hold(piece, node)
        book.join()
        return self._ttl

    def holder(self, key: str, position: int) -> str:
        """Return who holds the byte now; empty when nobody does."""
        book = self._books.get(key)
        if book is None:
            return ""
        part = book.at(position)
        return part.holder if part.until > self._now() else ""

    def _book(self, key: str, size: int) -> _Book:
        book = self._books.get(key)
        if book is None:
            book = self._books[key] = _Book(size)
        if book.size != size:
            raise UsageError(key, f"has {book.size} bytes in this run, not {size}")
        return book

    def _hold(self, part: _Range, node: str) -> None:
        part.holder, part.until = node, self._now() + self._ttl
        part.owners, part.heir = (), ""

    def _reach(
        self,
        book: _Book,
        node: str,
        start: int,
        stop: int,
        failed: Collection[str],
        now: float,
    ) -> int:
        """Return how far from ``start`` the bytes are nobody's that could give them."""
        at = start
        while at < stop:
            part = book.at(at)
            others = part.holder and part.until > now and part.holder != node
            owned = not part.holder and any(
                owner != node and owner not in failed for owner in part.owners
            )
            if others or owned or (now < self._quiet_until and part.holder != node):
                break
            at = min(part.end, stop)
        return at


def _give(part: _Range, node: str) -> None:
    """Note ``node`` as one that has the range."""
    owners = part.owners if node in part.owners else (*part.owners, node)
    part.holder, part.until, part.heir = "", 0.0, ""
    part.owners = owners[-_OWNER_LIMIT:]


def _inherit(book: _Book, node: str, start: int, slow: Collection[str]) -> None:
    """Make ``node`` the heir of what slow holders still have to read from ``start`` on."""
    for part in book.ranges:
        eligible = part.holder in slow and part.holder not in book.slow
        if eligible and not part.heir and part.end > start:
            part.heir = node
    book.slow.update(part.holder for part in book.ranges if part.heir)


def _strike(book: _Book, node: str) -> None:
    for part in book.ranges:
        if part.holder == node:
            part.holder, part.until, part.heir = "", 0.0, ""
        if node == part.heir:
            part.heir = ""
        if node in part.owners:
            part.owners = tuple(owner for owner in part.owners if owner != node)
    book.join()
