"""A fixed number of like actors; the least busy gets the next task, a dead one is replaced.

Invariant: a member whose process has ended gets no task, whether it was busy or idle when it ended,
and is replaced once; a task is counted from the moment a member was chosen for it until it ends.
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

    name: str
    actor: Actor
    tasks: int = 0
    is_lost: bool = False

    def lose(self) -> None:
        """Note that the process has ended; called from whatever thread learns of it."""
        self.is_lost = True


class Pool(Generic[Actor]):
    """The members; ``start(name)`` makes an actor at once, ``end(actor)`` kills one.

    ``watch(actor, lose)`` calls ``lose`` when the actor's process has ended. A ``lazy`` pool has no
    members before they are asked for.
    """

    def __init__(
        self,
        name: str,
        size: int,
        *,
        start: Callable[[str], Actor],
        end: Callable[[Actor], None],
        watch: Callable[[Actor, Callable[[], None]], None],
        lazy: bool = False,
    ) -> None:
        self.name = name
        self.size = max(1, size)
        self._start = start
        self._end = end
        self._watch = watch
        self._lock = threading.Lock()
        self._made = 0
        self._closed = False
        self._members: list[Member[Actor]] = []
        if not lazy:
            self._replace_lost()

    def take(self) -> Member[Actor]:
        """Return the living member with the fewest tasks, counting one more on it."""
        with self._lock:
            self._replace_lost()
            member = min(self._members, key=lambda member: member.tasks)
            member.tasks += 1
            return member

    def give_back(self, member: Member[Actor], *, is_lost: bool = False) -> None:
        """Count one task less on ``member``; one that was lost makes room for a new actor."""
        with self._lock:
            member.tasks -= 1
            if is_lost:
                member.lose()
                self._replace_lost()

    def members(self) -> list[Member[Actor]]:
        """Return the present members."""
        with self._lock:
            self._replace_lost()
            return list(self._members)

    def present(self) -> list[Member[Actor]]:
        """Return the members that were made and not lost; makes none."""
        with self._lock:
            return [member for member in self._members if not (member.is_lost or self._closed)]

    def close(self) -> None:
        """End all members."""
        with self._lock:
            self._closed = True
            members = list(self._members)
        for member in members:
            self._end(member.actor)

    def _replace_lost(self) -> None:
        if self._closed:
            return
        for place, member in enumerate(self._members):
            if member.is_lost:
                # It may live yet, only out of reach: two must not work in one place.
                self._end(member.actor)
                self._members[place] = self._make()
        while len(self._members) < self.size:
            self._members.append(self._make())

    def _make(self) -> Member[Actor]:
        self._made += 1
        name = f"{self.name}/{self._made}"
        member = Member(name, self._start(name))
        self._watch(member.actor, member.lose)
        return member
