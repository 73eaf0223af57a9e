"""What was learned about hosts that serve blobs, kept for later processes.

Invariant: a record only says what is worth trying first; whoever uses it still checks every answer,
so one that is old, wrong or lost costs a little time and nothing else. Records expire: networks
change. A store that cannot be written to learns for the process alone.
"""

from __future__ import annotations

import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.errors import StorageError
from stowray.pipeline.files import replace_file
from stowray.pipeline.recordfile import encode_record, read_record_file
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from pathlib import Path

NAME: Final = "hosts.json"
LIFE_SECONDS: Final = 6 * 3600.0
KEPT_LIMIT: Final = 256


@dataclass(frozen=True, slots=True)
class HostRecord:
    """How a host served blobs: ``connections`` to one blob paid, at that rate each.

    With one connection more of them do not help, or the host does not honour ranges.
    """

    connections: int
    bytes_per_second: int
    learned: float

    @property
    def serves_no_parts(self) -> bool:
        """Tell whether ranges are what the host does not honour."""
        return self.connections == 1 and self.bytes_per_second == 0


class HostRecords:
    """Records by host name in one file; thread-safe, read when the first is asked for."""

    def __init__(self, folder: Path, clock: Clock = SYSTEM_CLOCK) -> None:
        self._path = folder / NAME
        self._clock = clock
        self._lock = threading.Lock()
        self._records: dict[str, HostRecord] | None = None

    def find(self, host: str) -> HostRecord | None:
        """Return what is known of ``host``, None when nothing is or it is too old."""
        with self._lock:
            record = self._known().get(host)
        return record if record is not None and self._is_fresh(record) else None

    def learn(self, host: str, connections: int, bytes_per_second: int) -> None:
        """Remember what was found out now."""
        record = HostRecord(connections, bytes_per_second, self._clock.wall())
        with self._lock:
            # Other processes learn as well: what they wrote meanwhile is kept.
            known = {**self._known(), **self._read(), host: record}
            fresh = {name: one for name, one in known.items() if self._is_fresh(one)}
            newest = sorted(fresh.items(), key=lambda pair: pair[1].learned)[-KEPT_LIMIT:]
            self._records = dict(newest)
            payload = {"hosts": {name: asdict(one) for name, one in newest}}
            try:
                replace_file(self._path, encode_record(payload))
            except OSError:
                # A full or read-only disk: whoever writes blobs says so, this one need not.
                return

    def _is_fresh(self, record: HostRecord) -> bool:
        return 0 <= self._clock.wall() - record.learned < LIFE_SECONDS

    def _known(self) -> dict[str, HostRecord]:
        if self._records is None:
            self._records = self._read()
        return self._records

    def _read(self) -> dict[str, HostRecord]:
        try:
            payload = read_record_file(self._path)
        except StorageError:
            return {}
        hosts = (payload or {}).get("hosts")
        if not isinstance(hosts, dict):
            return {}
        found = {str(name): _record(entry) for name, entry in hosts.items()}
        return {name: record for name, record in found.items() if record is not None}


def _record(entry: Any) -> HostRecord | None:
    match entry:
        case {
            "connections": int(connections),
            "bytes_per_second": int(rate),
            "learned": int(learned) | float(learned),
        } if connections > 0 and rate >= 0:
            return HostRecord(connections, rate, float(learned))
        case _:
            return None
