"""Random layers that get in each other's way: four names, three levels, every kind of entry."""

from __future__ import annotations

import tarfile
from typing import TYPE_CHECKING

from tests.support.entries import Entry, directory, file, hardlink, opaque, symlink, whiteout

if TYPE_CHECKING:
    import random

TARGETS = ["a", "/b", "../c", "a/b", "/c/d", ".", "..", "b/../a", "/nope/../c", "d/../../b"]


def random_layers(source: random.Random) -> list[list[Entry]]:
    """Return one to four layers of one to six entries."""
    return [
        [random_entry(source) for _ in range(source.randint(1, 6))]
        for _ in range(source.randint(1, 4))
    ]


def random_path(source: random.Random) -> str:
    return "/".join(source.choice("abcd") for _ in range(source.choice([1, 1, 2, 2, 3])))


def random_entry(source: random.Random) -> Entry:
    """Return an entry of a random kind at a random place."""
    choice = source.choice
    path, kind = random_path(source), source.random()
    uid, mtime = choice([0, 0, 7]), choice([1000, 2000, "3000.5"])
    if kind < 0.25:
        mode = choice([0o644, 0o4755, 0o400])
        return file(path, choice([b"", b"x", b"yy"]), mode=mode, uid=uid, mtime=mtime)
    if kind < 0.45:
        xattrs = choice([{}, {}, {"user.k": b"1"}])
        mode = choice([0o755, 0o700, 0o555, 0])
        return directory(path, mode, xattrs=xattrs, uid=uid, mtime=mtime)
    if kind < 0.6:
        return symlink(path, choice(TARGETS), uid=uid, mtime=mtime)
    if kind < 0.72:
        return hardlink(path, random_path(source))
    if kind < 0.88:
        return whiteout(path)
    if kind < 0.94:
        return opaque(path)
    if kind < 0.95:
        return Entry(".wh..wh..opq")
    if kind < 0.97:
        return directory("./", choice([0o711, 0o755]), uid=uid, mtime=mtime)
    return Entry(path, kind=tarfile.FIFOTYPE, uid=uid, mtime=mtime)
