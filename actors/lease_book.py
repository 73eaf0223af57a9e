"""The books of who may read what from the origin, for all runs that one process keeps them for.

Invariant: one thread calls this; what is asked and answered is plain data. After a restart of the
process the books are empty and say so: their ``epoch`` is another one, holders declare what they
hold, and until then nothing new is granted (``origin_leases``).
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stowray.pipeline.errors import UsageError
from stowray.pipeline.origin_leases import OriginLeases
from stowray.pipeline.registry_lines import RegistryLines
from stowray.pipeline.registry_permits import RegistryPermits
from stowray.pipeline.spread_leases import permit_to_wire, to_wire

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True, slots=True)
class _Book:
    leases: OriginLeases
    permits: RegistryPermits
    lines: RegistryLines
    addresses: dict[str, str] = field(default_factory=dict)


class LeaseBooks:
    """The books by run."""

    def __init__(self, *, restarted: bool, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.epoch = secrets.token_hex(8)
        self._restarted = restarted
        self._now = monotonic
        self._books: dict[str, _Book] = {}

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``{epoch, answer}`` to one question of a node.

        ``request`` has the ``run``, its ``connections`` to the origin, the ``node`` that asks with
        its ``address``, the ``question`` (a method of ``Leases``) and its arguments ``about``.
        """
        book = self._book(str(request["run"]), int(request["connections"]))
        node = str(request["node"])
        if request["address"]:
            book.addresses[node] = str(request["address"])
        answer = _QUESTIONS.get(str(request["question"]))
        if answer is None:
            raise UsageError("leases", f"no such question: {request['question']}")
        return {"epoch": self.epoch, "answer": answer(book, node, request["about"])}

    def tell(self, run: str, connections: int, addresses: Mapping[str, str]) -> str:
        """Take note of where nodes serve their peers; return the epoch."""
        self._book(run, connections).addresses.update(addresses)
        return self.epoch

    def node_died(self, run: str, node: str) -> None:
        """End all that a dead node held and had."""
        book = self._books.get(run)
        if book is not None:
            book.leases.node_died(node)
            book.permits.node_died(node)
            book.addresses.pop(node, None)

    def _book(self, run: str, connections: int) -> _Book:
        book = self._books.get(run)
        if book is None:
            book = self._books[run] = _Book(
                OriginLeases(self._now, restarted=self._restarted),
                RegistryPermits(self._now, connections, restarted=self._restarted),
                RegistryLines(self._now),
            )
        return book


def _ask(book: _Book, node: str, about: list[Any]) -> object:
    key, size, start, end, failed, slow = about
    return to_wire(book.leases.ask(node, key, size, start, end, failed=failed, slow=slow))


_QUESTIONS: dict[str, Callable[[_Book, str, list[Any]], object]] = {
    "ask": _ask,
    "progress": lambda book, node, about: book.leases.progress(node, *about),
    "release": lambda book, node, about: book.leases.release(node, *about),
    "has": lambda book, node, about: book.leases.has(node, *about),
    "lost": lambda book, node, about: book.leases.lost(node, *about),
    "declare": lambda book, node, about: book.leases.declare(node, *about),
    "permit": lambda book, node, about: permit_to_wire(book.permits.ask(node, *about)),
    "declare_permit": lambda book, node, about: permit_to_wire(book.permits.declare(node, *about)),
    "give_back": lambda book, node, about: book.permits.give_back(node, *about),
    "pause": lambda book, node, about: book.permits.pause(*about),
    "pause_host": lambda book, node, about: book.lines.pause(*about),
    "rest": lambda book, node, about: book.lines.rest(*about),
    "book": lambda book, node, about: book.lines.book(*about),
    "address": lambda book, node, about: book.addresses.get(about[0], ""),
}
