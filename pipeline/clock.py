"""Time and identity of the running kernel, injected wherever a test must be able to change them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Clock:
    """Monotonic seconds for deadlines and TTLs, wall seconds for records, and a sleep."""

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep


SYSTEM_CLOCK = Clock()


@dataclass(frozen=True, slots=True)
class Boot:
    """Which boot of which host wrote something; unsynced data is trusted only while both hold."""

    boot_id: str
    host: str

    @classmethod
    def read(cls) -> Boot:
        """Return the identity of the running kernel (random(4), ``boot_id``)."""
        try:
            boot_id = BOOT_ID.read_text(encoding="ascii").strip()
        except OSError:
            # Without a boot ID nothing can be trusted across processes: an ID that equals no other.
            boot_id = f"unknown-{time.time_ns()}"
        return cls(boot_id=boot_id, host=os.uname().nodename)


def boot_time_ns() -> int:
    """Return nanoseconds since boot, suspend included: one scale for all processes of a host."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
