"""What a layer that was staged alone assumed about the layers below, in JSON values.

Invariant: the notes name every directory whose being, or attributes, depend on what lies below, and
every name that must not be a symlink there; a layer without notes is the same on any chain. Their
size grows with the number of directories, not with the length of their paths.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from stowray.pipeline.staged_tree import IMPLIED, Directory, StagedTree

if TYPE_CHECKING:
    from collections.abc import Iterator

# The entry that can only be applied when what lies below is known.
BELOW: Final = "below"
# Rows ``[row of the parent or -1, name, kind]``, parents first; undecodable bytes as surrogates.
NAMES: Final = "names"

# Kinds of names. On the way to others only:
PLAIN: Final = ""
# Passed through; no symlink may stand there below (nor at any of the following).
WALKED: Final = "walked"
# A directory without an entry of its own: it takes the attributes of the directory below.
IMPLIED_DIRECTORY: Final = "implied"
# A directory that only holds whiteouts: it is only there if there is a directory below.
WHITEOUTS: Final = "whiteouts"


class Name(NamedTuple):
    """One noted name; ``parent`` is the number of an earlier one, -1 for the root."""

    parent: int
    name: bytes
    kind: str


def below_notes(entry: bytes) -> dict[str, Any]:
    """Return the notes of a layer that must be staged above its chain because of ``entry``."""
    return {BELOW: os.fsdecode(entry)}


def make_notes(tree: StagedTree, phantoms: set[int]) -> dict[str, Any]:
    """Return the notes of a finished tree; ``phantoms`` are the ids that were so at the end."""
    rows = _Rows()
    standing = {id(directory) for directory in tree.bottom_up()} if tree.assumed else set()
    for directory in tree.assumed:
        kind = WALKED
        if id(directory) in standing and directory.state == IMPLIED and directory.inherits:
            kind = WHITEOUTS if id(directory) in phantoms else IMPLIED_DIRECTORY
        rows.add_directory(directory, kind)
    for path in sorted(tree.walked):
        rows.add_path(path.split(b"/"))
    return {NAMES: rows.rows} if rows.rows else {}


def read_names(notes: dict[str, Any]) -> Iterator[Name]:
    """Yield the noted names, parents first."""
    for parent, name, kind in notes.get(NAMES, ()):
        yield Name(parent, os.fsencode(name), kind)


class _Rows:
    """Numbers names; what is noted twice is one row, and says the more of the two."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        self._numbers: dict[tuple[int, bytes], int] = {}
        self._directories: dict[int, int] = {}

    def add_directory(self, directory: Directory, kind: str) -> None:
        """Note a directory; it may have been removed since."""
        missing: list[Directory] = []
        here = directory
        while here.parent is not None and id(here) not in self._directories:
            missing.append(here)
            here = here.parent
        number = self._directories.get(id(here), -1)
        for child in reversed(missing):
            number = self._directories[id(child)] = self._number(number, child.name)
        self._raise(number, kind)

    def add_path(self, parts: list[bytes]) -> None:
        """Note a name that was passed through."""
        number = -1
        for part in parts:
            number = self._number(number, part)
        self._raise(number, WALKED)

    def _number(self, parent: int, name: bytes) -> int:
        number = self._numbers.setdefault((parent, name), len(self.rows))
        if number == len(self.rows):
            self.rows.append([parent, os.fsdecode(name), PLAIN])
        return number

    def _raise(self, number: int, kind: str) -> None:
        if self.rows[number][2] in (PLAIN, WALKED):
            self.rows[number][2] = kind
