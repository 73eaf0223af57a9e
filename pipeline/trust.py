"""Which writings survived: the rule that replaces an fsync per file.

Invariant: what a stamp belongs to is trusted only while the kernel that wrote it still runs on the
same host (then the page cache has it), or when a ``syncfs`` began after the stamp and succeeded.
Everything else is proven again by its digest before use. A power cut costs a re-hash, never a
corrupt image.
"""

from __future__ import annotations

import hashlib
import os
import threading
from typing import TYPE_CHECKING, Any

from stowray.pipeline.clock import Boot, boot_time_ns
from stowray.pipeline.files import replace_file, storage_error, translated
from stowray.pipeline.recordfile import decode_record, encode_record, read_limited
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Stamp:
    """When, on one boot of one host, the bytes that a record speaks of were complete."""

    boot_id: str
    host: str
    at_ns: int

    def payload(self) -> dict[str, Any]:
        """Return the stamp as JSON values."""
        return {"boot_id": self.boot_id, "host": self.host, "at_ns": self.at_ns}

    @classmethod
    def parse(cls, value: object) -> Stamp | None:
        """Return the stamp that ``payload`` made, or None for anything else."""
        if not isinstance(value, dict):
            return None
        boot_id, host, at_ns = value.get("boot_id"), value.get("host"), value.get("at_ns")
        if isinstance(boot_id, str) and isinstance(host, str) and type(at_ns) is int:
            return cls(boot_id, host, at_ns)
        return None


@dataclass(frozen=True, slots=True)
class _Mark:
    """What is known of one boot: durable up to one moment, suspect up to another."""

    durable_ns: int = -1
    suspect_ns: int = -1


class Trust:
    """Gives stamps and judges them; the marks of each boot lie in ``directory``."""

    def __init__(
        self, directory: Path, boot: Boot, now_ns: Callable[[], int] = boot_time_ns
    ) -> None:
        self._directory = directory
        self.boot = boot
        self._now_ns = now_ns
        self._marks: dict[tuple[str, str], _Mark] = {}
        self._guard = threading.Lock()

    def stamp(self) -> Stamp:
        """Return a stamp for what has been written and named until now."""
        return Stamp(self.boot.boot_id, self.boot.host, self._now_ns())

    def trusts(self, stamp: Stamp | None) -> bool:
        """Say whether what bears ``stamp`` is as it was written, without looking at it."""
        if stamp is None:
            return False
        mark = self._mark(stamp.boot_id, stamp.host)
        if stamp.at_ns <= mark.suspect_ns:
            return False
        if (stamp.boot_id, stamp.host) == (self.boot.boot_id, self.boot.host):
            return True
        return stamp.at_ns <= mark.durable_ns

    def is_durable(self, stamp: Stamp | None) -> bool:
        """Say whether what bears ``stamp`` outlives a power cut."""
        if stamp is None:
            return False
        mark = self._mark(stamp.boot_id, stamp.host)
        return mark.suspect_ns < stamp.at_ns <= mark.durable_ns

    def is_suspect(self, stamp: Stamp) -> bool:
        """Say whether the disk failed while it wrote what bears ``stamp``."""
        return stamp.at_ns <= self._mark(stamp.boot_id, stamp.host).suspect_ns

    def sync(self, descriptor: int) -> None:
        """Bring the whole file system to the disk and mark what was stamped before as durable.

        ``descriptor`` was opened before the first write: syncfs(2) reports the writeback errors
        that happened since then (Linux 5.8). After such an error nothing stamped so far is trusted.
        """
        begun = self._now_ns()
        own = (self.boot.boot_id, self.boot.host)
        try:
            _syncfs(descriptor)
        except OSError as error:
            mark = self._read(*own)
            self._write(own, _Mark(mark.durable_ns, max(mark.suspect_ns, self._now_ns())))
            raise storage_error(error, self._directory.parent, "bring the store to disk") from error
        mark = self._read(*own)
        self._write(own, _Mark(max(mark.durable_ns, begun), mark.suspect_ns))

    def prune(self, used: Iterable[tuple[str, str]]) -> int:
        """Remove the marks of this host's earlier boots that no record in use bears a stamp of.

        ``used`` are ``(boot_id, host)`` of all stamps there are. Nothing can be stamped on an
        earlier boot any more; other hosts look after their own. Returns how many marks there were.
        """
        own = (self.boot.boot_id, self.boot.host)
        kept = {self._path(*pair) for pair in {*used, own}}
        removed = 0
        for path in self.marks():
            payload = _content(path)
            if path not in kept and payload is not None and payload.get("host") == own[1]:
                with translated(path, "forget an earlier boot"):
                    path.unlink(missing_ok=True)
                removed += 1
        return removed

    def marks(self) -> list[Path]:
        """Return the files of all marks."""
        with translated(self._directory, "list what is durable"):
            return sorted(path for path in self._directory.iterdir() if path.suffix == ".json")

    def is_own(self, path: Path) -> bool:
        """Say whether a mark is that of this boot, which the next ``sync`` writes anew."""
        return path == self._path(self.boot.boot_id, self.boot.host)

    def _mark(self, boot_id: str, host: str) -> _Mark:
        with self._guard:
            mark = self._marks.get((boot_id, host))
            if mark is None:
                mark = self._marks[boot_id, host] = self._read(boot_id, host)
            return mark

    def _path(self, boot_id: str, host: str) -> Path:
        name = hashlib.sha256(f"{boot_id}\0{host}".encode()).hexdigest()[:32]
        return self._directory / f"{name}.json"

    def _read(self, boot_id: str, host: str) -> _Mark:
        data = read_limited(self._path(boot_id, host))
        if data is None:
            return _Mark()
        payload = decode_record(data)
        if payload is None:
            # It may have said that the disk failed.
            return _Mark(suspect_ns=self._now_ns())
        if (payload.get("boot_id"), payload.get("host")) != (boot_id, host):
            return _Mark()
        durable, suspect = payload.get("durable_ns"), payload.get("suspect_ns")
        if type(durable) is not int or type(suspect) is not int:
            return _Mark()
        return _Mark(durable, suspect)

    def _write(self, own: tuple[str, str], mark: _Mark) -> None:
        boot_id, host = own
        path = self._path(boot_id, host)
        payload = {
            "boot_id": boot_id,
            "host": host,
            "durable_ns": mark.durable_ns,
            "suspect_ns": mark.suspect_ns,
        }
        with translated(path, "record what is durable"):
            # The mark is written after the syncfs, so it needs an fsync of its own.
            replace_file(path, encode_record(payload), durable=True)
        with self._guard:
            self._marks[own] = mark


def _content(path: Path) -> dict[str, Any] | None:
    data = read_limited(path)
    return None if data is None else decode_record(data)


def _syncfs(descriptor: int) -> None:
    """Call syncfs(2), which the standard library does not have."""
    import ctypes

    library = ctypes.CDLL(None, use_errno=True)
    if library.syncfs(ctypes.c_int(descriptor)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
