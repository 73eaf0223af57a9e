"""Tar entries for test layers: written by hand or read from a real tree.

Invariant: the same entries give the same bytes on any machine.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

CHUNK = 1 << 20
EPOCH = 1_700_000_000


class Writer(Protocol):
    """What a tar is written to."""

    def write(self, data: bytes, /) -> object: ...


@dataclass(frozen=True)
class Entry:
    """One tar entry; `source` names a file on disk that holds the content instead of `data`."""

    name: str
    kind: bytes = tarfile.REGTYPE
    data: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: int | str = EPOCH
    linkname: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: Mapping[str, bytes] = field(default_factory=dict)
    source: Path | None = None


def file(name: str, data: bytes = b"", **options: Any) -> Entry:
    return Entry(name, data=data, **options)


def directory(name: str, mode: int = 0o755, **options: Any) -> Entry:
    return Entry(name, kind=tarfile.DIRTYPE, mode=mode, **options)


def symlink(name: str, target: str, **options: Any) -> Entry:
    return Entry(name, kind=tarfile.SYMTYPE, linkname=target, mode=0o777, **options)


def hardlink(name: str, target: str, **options: Any) -> Entry:
    return Entry(name, kind=tarfile.LNKTYPE, linkname=target, **options)


def whiteout(name: str) -> Entry:
    parent, _, base = name.rpartition("/")
    return Entry(f"{parent}/.wh.{base}" if parent else f".wh.{base}", mode=0o600)


def opaque(name: str) -> Entry:
    return Entry(f"{name}/.wh..wh..opq", mode=0o600)


def tree_entries(root: Path) -> Iterator[Entry]:
    """Every entry of a real tree in byte order: links, owners, nanoseconds, devices, xattrs."""
    first_names: dict[tuple[int, int], str] = {}
    yield _tree_entry(root, ".", first_names)
    for folder, folders, files in os.walk(os.fsencode(root)):
        folders.sort()
        here = Path(os.fsdecode(folder))
        for raw in sorted([*folders, *files]):
            path = here / os.fsdecode(raw)
            if not stat.S_ISSOCK(path.lstat().st_mode):
                yield _tree_entry(path, str(path.relative_to(root)), first_names)


def _tree_entry(path: Path, name: str, first_names: dict[tuple[int, int], str]) -> Entry:
    status = path.lstat()
    kinds = {
        stat.S_IFREG: tarfile.REGTYPE,
        stat.S_IFDIR: tarfile.DIRTYPE,
        stat.S_IFLNK: tarfile.SYMTYPE,
        stat.S_IFCHR: tarfile.CHRTYPE,
        stat.S_IFBLK: tarfile.BLKTYPE,
        stat.S_IFIFO: tarfile.FIFOTYPE,
    }
    kind = kinds[stat.S_IFMT(status.st_mode)]
    linkname = str(path.readlink()) if kind == tarfile.SYMTYPE else ""
    if kind != tarfile.DIRTYPE and status.st_nlink > 1:
        linked = first_names.setdefault((status.st_dev, status.st_ino), name)
        if linked != name:
            kind, linkname = tarfile.LNKTYPE, linked
    xattrs: dict[str, bytes] = {}
    with contextlib.suppress(OSError):
        for key in sorted(os.listxattr(path, follow_symlinks=False)):
            if key.startswith(("user.", "security.capability")):
                xattrs[key] = os.getxattr(path, key, follow_symlinks=False)
    seconds, nanoseconds = divmod(status.st_mtime_ns, 10**9)
    is_device = kind in (tarfile.CHRTYPE, tarfile.BLKTYPE)
    return Entry(
        name,
        kind,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        mtime=f"{seconds}.{nanoseconds:09d}" if nanoseconds else seconds,
        linkname=linkname,
        device=(os.major(status.st_rdev), os.minor(status.st_rdev)) if is_device else (0, 0),
        xattrs=xattrs,
        source=path if kind == tarfile.REGTYPE else None,
    )


def write_tar(entries: Iterable[Entry], out: Writer) -> None:
    """Write a POSIX (pax) tar; sub-second times, xattrs and long names become pax records."""
    for entry in entries:
        info = tarfile.TarInfo(entry.name)
        info.type = entry.kind
        info.mode, info.uid, info.gid = entry.mode, entry.uid, entry.gid
        info.linkname = entry.linkname
        info.devmajor, info.devminor = entry.device
        info.mtime = int(str(entry.mtime).partition(".")[0])
        headers = {f"SCHILY.xattr.{key}": _pax_text(value) for key, value in entry.xattrs.items()}
        if isinstance(entry.mtime, str):
            headers["mtime"] = entry.mtime
        info.pax_headers = headers
        if entry.kind == tarfile.REGTYPE:
            _write_file(entry, info, out)
        else:
            out.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
    out.write(bytes(10240))


def _pax_text(value: bytes) -> str:
    # tarfile encodes pax records as UTF-8 with surrogateescape: any bytes survive the round trip.
    return value.decode("utf-8", "surrogateescape")


def _write_file(entry: Entry, info: tarfile.TarInfo, out: Writer) -> None:
    with entry.source.open("rb") if entry.source else io.BytesIO(entry.data) as content:
        info.size = left = content.seek(0, os.SEEK_END)
        content.seek(0)
        out.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
        while left and (chunk := content.read(min(CHUNK, left))):
            out.write(chunk)
            left -= len(chunk)
        if left:
            raise RuntimeError(f"{entry.source} shrank while it was packed")
    out.write(bytes(-info.size % 512))
