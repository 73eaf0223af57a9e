"""Run a contender's processes and say what they cost.

Invariant: a sample is whole processes: wall clock from first start to last exit, CPU seconds and
peak resident size of each process with all its descendants, as `wait4` and /proc tell them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Sample:
    """One run: `rss` is the largest resident size of any one of its processes, in bytes.

    The kernel counts what a process had before `exec` too, so this runner's own size is the least.
    """

    seconds: float
    cpu_seconds: float
    rss: int


class RunError(Exception):
    """A measured command failed; fields ``(command, status, output)``."""


def measure(
    commands: Sequence[Sequence[str]],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    daemons: Sequence[int] = (),
) -> Sample:
    """Run the commands one after the other; CPU of the `daemons` (process ids) counts too."""
    before = [_daemon_cpu(pid) for pid in daemons]
    cpu, rss = 0.0, 0
    start = time.perf_counter()
    for command in commands:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
            )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        cpu += usage.ru_utime + usage.ru_stime
        rss = max(rss, usage.ru_maxrss * 1024)
        if process.returncode:
            raise RunError(" ".join(command), process.returncode, log.read_text()[-2000:])
    seconds = time.perf_counter() - start
    for pid, spent in zip(daemons, before, strict=True):
        cpu += _daemon_cpu(pid) - spent
        rss = max(rss, _daemon_rss(pid))
    return Sample(seconds, cpu, rss)


def _daemon_cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS  # utime, stime, cutime, cstime


def _daemon_rss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


@dataclass(frozen=True)
class Summary:
    """Runs of one contender on one image."""

    median: float
    low: float
    high: float
    cpu_seconds: float
    rss: int
    runs: int
    samples: tuple[float, ...] = ()


def summarise(samples: Sequence[Sample]) -> Summary:
    times = [sample.seconds for sample in samples]
    return Summary(
        median=statistics.median(times),
        low=min(times),
        high=max(times),
        cpu_seconds=statistics.median(sample.cpu_seconds for sample in samples),
        rss=max(sample.rss for sample in samples),
        runs=len(samples),
        samples=tuple(times),
    )
