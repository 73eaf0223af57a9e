"""A fixed number of like actors; the least busy gets the next task, a dead one is replaced.

Invariant: a member that was lost is replaced once, however many of its tasks report the loss; a
task is counted from the moment a member was chosen for it until it ends.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Actor = TypeVar("Actor")


@dataclass(slots=True, eq=False)
class Member(Generic[Actor]):
    """One actor of a pool; ``name`` changes with each replacement."""

    place: int
    name: str
    actor: Actor
    tasks: int = 0


class Pool(Generic[Actor]):
    """The members; ``start(name)`` makes an actor at once, ``end(actor)`` kills one."""

    def __init__(
        self,
        name: str,
        size: int,
        start: Callable[[str], Actor],
        end: Callable[[Actor], None],
    ) -> None:
        self.name = name
        self.size = max(1, size)
        self._start = start
        self._end = end
        self._lock = threading.Lock()
        self._made = 0
        self._closed = False
        self._members = [self._make(place) for place in range(self.size)]

    def take(self) -> Member[Actor]:
        """Return the member with the fewest tasks, counting one more on it."""
        with self._lock:
            member = min(self._members, key=lambda member: member.tasks)
            member.tasks += 1
            return member

    def give_back(self, member: Member[Actor], *, is_lost: bool = False) -> None:
        """Count one task less on ``member``; one that was lost makes room for a new actor."""
        with self._lock:
            member.tasks -= 1
            if not is_lost or self._closed or self._members[member.place] is not member:
                return
            self._members[member.place] = self._make(member.place)
        # It may live yet, cut off or wedged: two of them must not work in one place.
        self._end(member.actor)

    def members(self) -> list[Member[Actor]]:
        """Return the present members."""
        with self._lock:
            return list(self._members)

    def close(self) -> None:
        """End all members."""
        with self._lock:
            self._closed = True
            members = list(self._members)
        for member in members:
            self._end(member.actor)

    def _make(self, place: int) -> Member[Actor]:
        self._made += 1
        name = f"{self.name}/{self._made}"
        return Member(place, name, self._start(name))
