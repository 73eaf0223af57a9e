"""The definition, as simply as it can be said: layers applied one after another in memory.

Within a layer whiteouts and opaque markers act on what the layers below left, and all other entries
in the order of the tar; the last one wins. Nothing here is shared with the code under test.
"""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.support.judge import Node

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from tests.support.entries import Entry

KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.DIRTYPE: "directory",
    tarfile.SYMTYPE: "symlink",
    tarfile.CHRTYPE: "character device",
    tarfile.BLKTYPE: "block device",
    tarfile.FIFOTYPE: "fifo",
}


class RefusedError(Exception):
    """The layer cannot be applied."""


@dataclass(eq=False)
class Inode:
    kind: str
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    data: bytes = b""
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = field(default_factory=dict)
    names: dict[bytes, Name] = field(default_factory=dict)


@dataclass
class Name:
    """A directory entry; ``layer`` is the last one that had something to say here or below."""

    inode: Inode
    layer: int


class Sequential:
    """One directory that layers are applied to."""

    def __init__(self) -> None:
        self.root = Inode("directory")
        self.layer = -1

    def apply(self, entries: Iterable[Entry]) -> None:
        self.layer += 1
        for entry in entries:
            self._entry(entry)
        self.root.names.pop(b".wh..wh.plnk", None)

    def _entry(self, entry: Entry) -> None:
        parts = _split(entry.name)
        if not parts:
            if entry.kind != tarfile.DIRTYPE:
                raise RefusedError("root")
            _describe(self.root, entry)
            return
        *parents, base = parts
        if base.startswith(b".wh..wh.") and base != b".wh..wh..opq":
            return
        if any(part.startswith(b".wh..wh.") for part in parents) and (
            parents != [b".wh..wh.plnk"] or entry.kind not in (tarfile.REGTYPE, tarfile.LNKTYPE)
        ):
            return
        if base == b".wh..wh..opq":
            self._strip(self._make(parents))
        elif base.startswith(b".wh."):
            self._whiteout(parents, base[4:])
        elif entry.kind == tarfile.LNKTYPE:
            self._link(self._make(parents), base, entry)
        else:
            self._put(self._make(parents), base, entry)

    def _whiteout(self, parents: list[bytes], base: bytes) -> None:
        if base in (b"", b".", b".."):
            raise RefusedError("whiteout of no name")
        here = self._find(self._resolve(parents))
        if here is None:
            return
        name = here.names.get(base)
        if name is None:
            return
        if name.layer < self.layer:
            del here.names[base]
        elif name.inode.kind == "directory":
            self._strip(name.inode)

    def _strip(self, directory: Inode) -> None:
        for base, name in list(directory.names.items()):
            if name.layer < self.layer:
                del directory.names[base]
            elif name.inode.kind == "directory":
                self._strip(name.inode)

    def _put(self, here: Inode, base: bytes, entry: Entry) -> None:
        old = here.names.get(base)
        kind = KINDS[entry.kind]
        if kind == "character device" and entry.device == (0, 0):
            raise RefusedError("whiteout device")
        if kind == "directory" and old is not None and old.inode.kind == "directory":
            old.layer = self.layer
            _describe(old.inode, entry)
            return
        inode = Inode(kind, data=entry.data, target=entry.linkname.encode(), device=entry.device)
        _describe(inode, entry)
        here.names[base] = Name(inode, self.layer)

    def _link(self, here: Inode, base: bytes, entry: Entry) -> None:
        target = _split(entry.linkname)
        if not target:
            raise RefusedError("link to the root")
        *parents, name = target
        there = self._find(self._resolve(parents))
        if there is here and name == base:
            raise RefusedError("link to itself")
        found = there.names.get(name) if there is not None else None
        if found is None or there is None or found.inode.kind == "directory":
            raise RefusedError("link to nothing or to a directory")
        here.names.pop(base, None)
        if there is not self.root and all(inode is not there for inode, _ in self._directories()):
            raise RefusedError("link to what it replaces")
        here.names[base] = Name(found.inode, self.layer)

    def _directories(self) -> Iterator[tuple[Inode, bytes]]:
        pending = [(self.root, b"")]
        while pending:
            here, path = pending.pop()
            yield here, path
            for base, name in here.names.items():
                if name.inode.kind == "directory":
                    pending.append((name.inode, path + b"/" + base))

    def _resolve(self, parts: Sequence[bytes]) -> list[bytes]:
        """The real path of a directory; what does not exist is taken as it is written."""
        pending = list(parts)[::-1]
        real: list[bytes] = []
        followed = 0
        while pending:
            part = pending.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                real = real[:-1]
                continue
            here = self._find(real)
            name = here.names.get(part) if here is not None else None
            if name is None or name.inode.kind != "symlink":
                real.append(part)
                continue
            followed += 1
            if followed > 40:
                raise RefusedError("too many symlinks")
            if name.inode.target.startswith(b"/"):
                real = []
            pending += name.inode.target.split(b"/")[::-1]
        return real

    def _find(self, real: Sequence[bytes]) -> Inode | None:
        here = self.root
        for part in real:
            name = here.names.get(part)
            if name is None or name.inode.kind != "directory":
                return None
            here = name.inode
        return here

    def _make(self, parents: list[bytes]) -> Inode:
        here = self.root
        for part in self._resolve(parents):
            name = here.names.get(part)
            if name is None or name.inode.kind != "directory":
                name = here.names[part] = Name(Inode("directory"), self.layer)
            name.layer = self.layer
            here = name.inode
        return here

    def tree(self) -> dict[bytes, Node]:
        """Return the tree in the records that trees are compared by."""
        found: list[tuple[bytes, Inode]] = [(b".", self.root)]
        groups: dict[int, list[bytes]] = {}
        for here, path in self._directories():
            for base, name in here.names.items():
                full = (path + b"/" + base)[1:]
                found.append((full, name.inode))
                if name.inode.kind != "directory":
                    groups.setdefault(id(name.inode), []).append(full)
        return {path: _node(inode, groups.get(id(inode), [])) for path, inode in found}


def _split(name: str) -> list[bytes]:
    parts = list(name.encode("utf-8", "surrogateescape").split(b"/"))
    parts = [part for part in parts if part not in (b"", b".")]
    if b".." in parts:
        raise RefusedError("..")
    return parts


def _describe(inode: Inode, entry: Entry) -> None:
    inode.mode, inode.uid, inode.gid = entry.mode, entry.uid, entry.gid
    seconds, _, fraction = str(entry.mtime).partition(".")
    inode.mtime_ns = int(seconds) * 10**9 + int(fraction.ljust(9, "0") or "0")
    inode.xattrs = dict(entry.xattrs)


def _node(inode: Inode, names: list[bytes]) -> Node:
    is_file = inode.kind == "file"
    return Node(
        kind=inode.kind,
        mode="0777" if inode.kind == "symlink" else f"{inode.mode:04o}",
        uid=inode.uid,
        gid=inode.gid,
        size=len(inode.data) if is_file else 0,
        mtime_ns=inode.mtime_ns,
        target=inode.target if inode.kind == "symlink" else b"",
        links=tuple(sorted(names)) if len(names) > 1 else (),
        xattrs=tuple(sorted(inode.xattrs.items())),
        device=inode.device if "device" in inode.kind else (0, 0),
        content=hashlib.sha256(inode.data).hexdigest() if is_file else "",
    )
