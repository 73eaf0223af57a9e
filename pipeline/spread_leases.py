"""What a node asks the owner of a run's leases, whoever that is and however far away.

Invariant: the holder of a lease counts its time from before it asked, so that it stops before the
owner gives the bytes to somebody else; answers cross processes as plain tuples.

A node whose question is not answered (``NodeError``, ``DeadlineError``) goes on with what it has
until that ends: peers need no lease.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Protocol

from stowray.pipeline.errors import UsageError
from stowray.pipeline.origin_leases import Elsewhere, Granted, Later

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from stowray.pipeline.origin_leases import OriginLeases
    from stowray.pipeline.registry_permits import RegistryPermits

Answer = Granted | Elsewhere | Later


class Leases(Protocol):
    """The owner of the leases as one node sees it; thread-safe.

    ``key`` names a stripe (:func:`stripe_key`), ``size`` is its length, and positions count from
    its start. Seconds are from before the question.
    """

    def ask(
        self,
        key: str,
        size: int,
        start: int,
        end: int | None = None,
        *,
        failed: Collection[str] = (),
        slow: Collection[str] = (),
    ) -> Answer:
        """Ask for ``start`` to ``end`` of the origin; see :meth:`OriginLeases.ask`."""

    def progress(self, key: str, position: int) -> float:
        """Tell how far the lease was read and renew the rest; 0: stop reading."""

    def release(self, key: str) -> None:
        """Give back what is left of the lease."""

    def has(self, key: str, size: int, start: int = 0, end: int | None = None) -> None:
        """Tell that this node has these bytes, so that others get them here."""

    def lost(self, key: str) -> None:
        """Tell that this node has nothing of ``key``: its bytes were wrong."""

    def declare(self, key: str, size: int, start: int, end: int) -> float:
        """Claim a lease of before a restart of the owner; seconds, 0 when it cannot be had."""

    def permit(self, purpose: str) -> float | Later:
        """Ask for, or renew, one connection to the registry: for how many seconds, or when next."""

    def give_back(self, purpose: str) -> None:
        """End a permit, or the wait for one."""

    def pause(self, seconds: float) -> None:
        """Tell that the registry said that this is too much: no new permits for ``seconds``."""

    def address(self, node: str) -> str:
        """Return where ``node`` serves its peers (``HOST:PORT``); empty when that is not known.

        For nodes that are no sources in the part: those that hold a lease, or whose children were
        asked whom they read from.
        """


def stripe_key(digest: str, index: int, count: int) -> str:
    """Return under which name all nodes of a run lease a stripe."""
    return f"{digest}#{index}/{count}"


def to_wire(answer: Answer) -> tuple[Any, ...]:
    """Return the answer as a plain tuple."""
    if isinstance(answer, Granted):
        return ("granted", answer.start, answer.end, answer.seconds)
    if isinstance(answer, Elsewhere):
        return ("elsewhere", list(answer.nodes), answer.end, answer.reading, answer.seconds)
    return ("later", answer.seconds)


def permit_to_wire(answer: float | Later) -> float:
    """Return seconds of a permit as they are, and those until the next question negated."""
    return -answer.seconds if isinstance(answer, Later) else answer


def permit_from_wire(seconds: float) -> float | Later:
    """Return the answer that :func:`permit_to_wire` described."""
    return seconds if seconds > 0 else Later(-seconds)


def from_wire(fields: Sequence[Any]) -> Answer:
    """Return the answer that :func:`to_wire` described."""
    match list(fields):
        case ["granted", start, end, seconds]:
            return Granted(int(start), int(end), float(seconds))
        case ["elsewhere", nodes, end, reading, seconds]:
            names = tuple(str(node) for node in nodes)
            return Elsewhere(names, int(end), bool(reading), float(seconds))
        case ["later", seconds]:
            return Later(float(seconds))
    raise UsageError("lease", f"no answer of an owner of leases: {str(fields)[:80]}")


class LocalLeases:
    """Leases whose owner is in this process; those of other nodes share its lock."""

    def __init__(
        self,
        leases: OriginLeases,
        permits: RegistryPermits,
        node: str,
        *,
        addresses: Mapping[str, str] | None = None,
        lock: threading.Lock | None = None,
    ) -> None:
        self._leases = leases
        self._permits = permits
        self._node = node
        self._addresses = addresses if addresses is not None else {}
        self._lock = lock or threading.Lock()

    def of(self, node: str) -> LocalLeases:
        """Return the same owner as ``node`` sees it."""
        return LocalLeases(
            self._leases, self._permits, node, addresses=self._addresses, lock=self._lock
        )

    def do(self, work: Callable[[OriginLeases, RegistryPermits], object]) -> None:
        """Call ``work`` with both books while nobody else uses them."""
        with self._lock:
            work(self._leases, self._permits)

    def ask(
        self,
        key: str,
        size: int,
        start: int,
        end: int | None = None,
        *,
        failed: Collection[str] = (),
        slow: Collection[str] = (),
    ) -> Answer:
        """See :class:`Leases`."""
        with self._lock:
            return self._leases.ask(self._node, key, size, start, end, failed=failed, slow=slow)

    def progress(self, key: str, position: int) -> float:
        """See :class:`Leases`."""
        with self._lock:
            return self._leases.progress(self._node, key, position)

    def release(self, key: str) -> None:
        """See :class:`Leases`."""
        with self._lock:
            self._leases.release(self._node, key)

    def has(self, key: str, size: int, start: int = 0, end: int | None = None) -> None:
        """See :class:`Leases`."""
        with self._lock:
            self._leases.has(self._node, key, size, start, end)

    def lost(self, key: str) -> None:
        """See :class:`Leases`."""
        with self._lock:
            self._leases.lost(self._node, key)

    def declare(self, key: str, size: int, start: int, end: int) -> float:
        """See :class:`Leases`."""
        with self._lock:
            return self._leases.declare(self._node, key, size, start, end)

    def permit(self, purpose: str) -> float | Later:
        """See :class:`Leases`."""
        with self._lock:
            return self._permits.ask(self._node, purpose)

    def give_back(self, purpose: str) -> None:
        """See :class:`Leases`."""
        with self._lock:
            self._permits.give_back(self._node, purpose)

    def pause(self, seconds: float) -> None:
        """See :class:`Leases`."""
        with self._lock:
            self._permits.pause(seconds)

    def address(self, node: str) -> str:
        """See :class:`Leases`."""
        return self._addresses.get(node, "")
