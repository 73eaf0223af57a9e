"""The live page as numbered parts, so that a browser is sent what changed and nothing else.

Invariant: a part is markup that stands for itself; a reader who says which number it has seen gets
exactly what is newer, the longest unsent first, in portions of bounded size; what a slow reader
has missed costs no memory but the names of the parts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

# What one message carries at most, unless a single part is larger.
MESSAGE_BYTES: Final = 128 * 1024


@dataclass(slots=True)
class Batch:
    """One message's worth: ``version`` is what its reader may go on from."""

    version: int
    parts: dict[str, str] = field(default_factory=dict)


class Parts:
    """All parts as they are now; used by one thread."""

    def __init__(self) -> None:
        self.version = 0
        self._markup: dict[str, str] = {}
        self._versions: dict[str, int] = {}
        self._readers: list[Reader] = []

    def get(self, name: str) -> str:
        """Return a part's markup, empty before there is any."""
        return self._markup.get(name, "")

    def put(self, name: str, markup: str) -> None:
        """Set a part; the same markup again changes nothing."""
        if self._markup.get(name, "") == markup:
            return
        self.version += 1
        self._markup[name] = markup
        self._versions[name] = self.version
        for reader in self._readers:
            reader.dirty.setdefault(name)

    def reader(self, since: int) -> Reader:
        """Return a reader that has seen everything up to ``since``; ``leave`` it in the end."""
        newer = sorted(
            (number, name)
            for name, number in self._versions.items()
            # A number that was never given out is somebody's mistake: then all is new.
            if number > since or since > self.version
        )
        reader = Reader(self, dict.fromkeys(name for _, name in newer))
        self._readers.append(reader)
        return reader

    def leave(self, reader: Reader) -> None:
        """Forget a reader."""
        self._readers.remove(reader)

    def oldest(self, names: dict[str, None]) -> int:
        """Return the lowest number among parts."""
        return min(self._versions[name] for name in names)


class Reader:
    """Who is sent parts; ``dirty`` has the names of those that it has not got."""

    def __init__(self, parts: Parts, dirty: dict[str, None]) -> None:
        self._parts = parts
        self.dirty = dirty

    def take(self, limit: int = MESSAGE_BYTES) -> Batch | None:
        """Return the next portion, None when there is nothing new."""
        if not self.dirty:
            return None
        taken: dict[str, str] = {}
        size = 0
        for name in list(self.dirty):
            markup = self._parts.get(name)
            if taken and size + len(markup) > limit:
                break
            taken[name] = markup
            size += len(markup)
            del self.dirty[name]
        version = self._parts.oldest(self.dirty) - 1 if self.dirty else self._parts.version
        return Batch(version, taken)
