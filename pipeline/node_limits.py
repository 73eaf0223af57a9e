"""What all processes of a node together ask of a host, kept in files of their store.

Permits are locked files, one per connection, so that they are free again however their holder ends;
pauses and rates are points in time (monotonic, which all processes of a boot share) in one record
per host. Invariant: processes with the same limit never have more permits out than that, nobody
waits for a process that is stopped (Ctrl-Z), and who waits longest is served first, as a rule.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import time
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from stowray.pipeline.clock import Boot
from stowray.pipeline.files import translated
from stowray.pipeline.locks import open_lock, try_lock, unlock
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Kind = Literal["blobs", "documents"]
Line = Literal["requests", "documents", "bytes"]

# The boot, then when the host may be asked again and when each line is free.
_RECORD: Final = struct.Struct("=16s4d")
_PLACES: Final[dict[str, int]] = {"rest": 0, "requests": 1, "documents": 2, "bytes": 3}
_PID: Final = struct.Struct("=q")
# What is further away was not written by us: no pause and no line is that long.
FURTHEST_SECONDS: Final = 300.0
# A record is locked for some microseconds, unless its holder was stopped just then.
LOCK_SECONDS: Final = 1.0
KEPT_HOSTS: Final = 64


@dataclass(slots=True)
class _Host:
    """The open files of one host in this process."""

    folder: Path
    slots: dict[str, int] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    waiting: dict[Kind, int] = field(default_factory=lambda: {"blobs": 0, "documents": 0})

    @property
    def is_idle(self) -> bool:
        return not self.held and not any(self.waiting.values())


class NodeLimits:
    """The limits of hosts below ``folder``; thread-safe, and any number of processes share it."""

    def __init__(
        self, folder: Path, *, monotonic: Callable[[], float] = time.monotonic, boot_id: str = ""
    ) -> None:
        self._folder = folder
        self._now = monotonic
        boot = boot_id or Boot.read().boot_id
        self._boot = hashlib.sha256(boot.encode()).digest()[:16]
        self._lock = threading.Lock()
        self._hosts: dict[str, _Host] = {}

    def close(self) -> None:
        """Close all files; permits that are still out end with it."""
        with self._lock:
            hosts, self._hosts = self._hosts, {}
            for known in hosts.values():
                for descriptor in known.slots.values():
                    # A process that was forked meanwhile has the same open file.
                    unlock(descriptor)
                    os.close(descriptor)

    # -- permits ----------------------------------------------------------------------------------

    def permit(self, host: str, kind: Kind, limit: int) -> Callable[[], None] | None:
        """Return what gives a permit back, None when all ``limit`` of them are out."""
        with self._lock, translated(self._folder, "limit connections"):
            known = self._host(host)
            for number in range(limit):
                name = f"{kind}.{number}"
                if name in known.held:
                    continue
                descriptor = self._open(known, name)
                if try_lock(descriptor):
                    os.pwrite(descriptor, _PID.pack(os.getpid()), 0)
                    known.held.add(name)
                    return lambda: self._give_back(host, name)
            return None

    def _give_back(self, host: str, name: str) -> None:
        with self._lock:
            known = self._hosts.get(host)
            if known is not None and name in known.held:
                known.held.discard(name)
                unlock(known.slots[name])

    def free(self, host: str, kind: Kind, limit: int) -> int:
        """Return how many permits nobody has; none while another process waits for one."""
        with self._lock, translated(self._folder, "limit connections"):
            known = self._host(host)
            if self._is_waited_for(known, kind):
                return 0
            return sum(self._is_free(known, f"{kind}.{number}") for number in range(limit))

    def is_stopped(self, host: str, kind: Kind, limit: int) -> bool:
        """Return whether a permit is held by a process that was stopped, and so not used."""
        with self._lock, translated(self._folder, "limit connections"):
            known = self._host(host)
            for name in (f"{kind}.{number}" for number in range(limit)):
                if name in known.held or self._is_free(known, name):
                    continue
                data = os.pread(self._open(known, name), _PID.size, 0)
                if len(data) == _PID.size and _is_stopped(_PID.unpack(data)[0]):
                    return True
            return False

    @contextmanager
    def waiting(self, host: str, kind: Kind) -> Iterator[None]:
        """Let others know, for as long as the block lasts, that somebody waits for a permit."""
        with self._lock, translated(self._folder, "limit connections"):
            known = self._host(host)
            known.waiting[kind] += 1
            if known.waiting[kind] == 1:
                # Shared, so that any number can wait; whoever looks tries for it alone.
                try_lock(self._open(known, f"{kind}.queue"), shared=True)
        try:
            yield
        finally:
            with self._lock:
                known.waiting[kind] -= 1
                if known.waiting[kind] == 0 and known is self._hosts.get(host):
                    unlock(known.slots[f"{kind}.queue"])

    def is_waited_for(self, host: str, kind: Kind) -> bool:
        """Return whether somebody waits for a permit."""
        with self._lock, translated(self._folder, "limit connections"):
            return self._is_waited_for(self._host(host), kind)

    def _is_waited_for(self, known: _Host, kind: Kind) -> bool:
        descriptor = self._open(known, f"{kind}.look")
        if not try_lock(descriptor):
            return True
        unlock(descriptor)
        return False

    def _is_free(self, known: _Host, name: str) -> bool:
        if name in known.held:
            return False
        descriptor = self._open(known, name)
        if not try_lock(descriptor):
            return False
        unlock(descriptor)
        return True

    # -- pauses and rates -------------------------------------------------------------------------

    def pause(self, host: str, seconds: float) -> None:
        """Let nobody ask ``host`` for that long."""
        with self._record(host) as times:
            times[0] = max(times[0], self._now() + seconds)

    def rest(self, host: str) -> float:
        """Return for how many seconds more ``host`` is to be left alone."""
        with self._lock, translated(self._folder, "limit requests"):
            times = self._read(self._open(self._host(host), "pace"))
        return max(0.0, times[0] - self._now())

    def book(self, host: str, line: Line, seconds: float) -> float:
        """Take the next ``seconds`` of a line; return in how many seconds they begin."""
        with self._record(host) as times:
            now = self._now()
            begin = max(now, times[_PLACES[line]])
            times[_PLACES[line]] = begin + seconds
        return begin - now

    @contextmanager
    def _record(self, host: str) -> Iterator[list[float]]:
        with self._lock, translated(self._folder, "limit requests"):
            descriptor = self._open(self._host(host), "pace")
            give_up = time.monotonic() + LOCK_SECONDS
            while not (is_locked := try_lock(descriptor)) and time.monotonic() < give_up:
                time.sleep(0.0002)
            try:
                times = self._read(descriptor)
                yield times
                os.pwrite(descriptor, _RECORD.pack(self._boot, *times), 0)
            finally:
                if is_locked:
                    unlock(descriptor)

    def _read(self, descriptor: int) -> list[float]:
        data = os.pread(descriptor, _RECORD.size, 0)
        if len(data) != _RECORD.size:
            return [0.0] * len(_PLACES)
        boot, *times = _RECORD.unpack(data)
        furthest = self._now() + FURTHEST_SECONDS
        if boot != self._boot or not all(0 <= one <= furthest for one in times):
            return [0.0] * len(_PLACES)
        return times

    # -- files ------------------------------------------------------------------------------------

    def _host(self, host: str) -> _Host:
        known = self._hosts.get(host)
        if known is None:
            self._forget_idle()
            folder = self._folder / hashlib.sha256(host.encode()).hexdigest()[:32]
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            known = self._hosts[host] = _Host(folder)
        return known

    def _forget_idle(self) -> None:
        """Close the files of hosts that nothing is asked of now, when there are many."""
        if len(self._hosts) < KEPT_HOSTS:
            return
        for host in [host for host, known in self._hosts.items() if known.is_idle]:
            for descriptor in self._hosts.pop(host).slots.values():
                os.close(descriptor)

    def _open(self, known: _Host, name: str) -> int:
        descriptor = known.slots.get(name)
        if descriptor is None:
            # Whoever looks for those that wait needs an open file of its own: a lock belongs to it.
            file = name.replace("look", "queue")
            descriptor = known.slots[name] = open_lock(known.folder / file)
        return descriptor


def _is_stopped(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    # proc(5): the name may hold parentheses; the state follows the last one.
    return text.rpartition(")")[2].split()[:1] in (["T"], ["t"])
