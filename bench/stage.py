"""Staging one layer, diff ID included, beside `tar -x` and `sha256sum` of the same file.

    python -m bench.stage [--runs N] [--folder DIR] [NAME ...]

Each run of the two programs (side by side, as two processes) is followed by one of ours, so that
both see the same machine; medians are compared. Ours is timed inside a process that has its modules
loaded, as a worker has. Memory is what the stage adds to the peak of that process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.entries import Entry, directory, file, write_tar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
SPARE = 64 * MIB
PER_DIRECTORY = 200
WINDOW = 128 * MIB


@dataclass(frozen=True)
class Case:
    """A layer, and what its staging may cost (`wall` and `cpu` as multiples, `memory` in bytes)."""

    entries: Callable[[], Iterator[Entry]]
    wall: float | None = None
    cpu: float | None = None
    memory: int = SPARE
    zstd: bool = False


def sized_files(count: int, total: int) -> Iterator[Entry]:
    """Sizes as in real layers: many small files, and few that make most of the bytes."""
    chance = random.Random(4)
    weights = [chance.paretovariate(0.9) for _ in range(count)]
    scale = total / sum(weights)
    block = chance.randbytes(16 * MIB)
    for number, weight in enumerate(weights):
        if number % 15 == 0:
            yield directory(f"usr/lib/p{number // 150}/d{number // 15}")
        left = max(1, int(weight * scale))
        data = (block * (left // len(block) + 1))[:left]
        yield file(f"usr/lib/p{number // 150}/d{number // 15}/file-{number}", data)


def small_files(count: int) -> Iterator[Entry]:
    data = random.Random(4).randbytes(1024)
    for number in range(count):
        if number % 100 == 0:
            yield directory(f"data/d{number // 100}")
        yield file(f"data/d{number // 100}/f{number}", data)


def directories(count: int) -> Iterator[Entry]:
    for number in range(count):
        yield directory(f"d{number // 1000}/d{number}" if number % 1000 else f"d{number // 1000}")


DIRECTORIES = 300_000
CASES = {
    "large": Case(lambda: sized_files(15_000, 650_000_000), wall=1.7, cpu=2.0),
    "small": Case(lambda: small_files(200_000), wall=2.5),
    "directories": Case(
        lambda: directories(DIRECTORIES), memory=SPARE + PER_DIRECTORY * DIRECTORIES
    ),
    "zstd": Case(lambda: sized_files(3_000, 400_000_000), memory=SPARE + WINDOW, zstd=True),
}


def pack(case: Case, path: Path) -> None:
    with path.open("wb") as out:
        if not case.zstd:
            write_tar(case.entries(), out)
            return
        from backports import zstd

        # The largest window that a decoder takes unasked, all of which is used.
        parameter = zstd.CompressionParameter
        options = {
            parameter.compression_level: 1,
            parameter.window_log: WINDOW.bit_length() - 1,
            parameter.enable_long_distance_matching: 1,
        }
        with zstd.ZstdFile(out, "w", options=options) as packed:
            write_tar(case.entries(), packed)


def cpu(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


def peers(path: Path, target: Path) -> tuple[float, float]:
    """Wall and CPU seconds of `tar -x` and `sha256sum` at the same time."""
    target.mkdir()
    before = cpu(resource.getrusage(resource.RUSAGE_CHILDREN))
    begun = time.perf_counter()
    both = [
        subprocess.Popen(["tar", "-xp", "--numeric-owner", "-C", target, "-f", path]),
        subprocess.Popen(["sha256sum", path], stdout=subprocess.DEVNULL),
    ]
    if any(process.wait() for process in both):
        raise SystemExit("tar or sha256sum failed")
    wall = time.perf_counter() - begun
    used = cpu(resource.getrusage(resource.RUSAGE_CHILDREN)) - before
    shutil.rmtree(target)
    return wall, used


def alone(path: Path, target: Path) -> float:
    """Wall seconds of `tar -x` with the machine to itself, which is told but not a limit."""
    target.mkdir()
    begun = time.perf_counter()
    subprocess.run(["tar", "-xp", "--numeric-owner", "-C", target, "-f", path], check=True)
    wall = time.perf_counter() - begun
    shutil.rmtree(target)
    return wall


def ours(path: Path, target: Path) -> dict[str, float]:
    target.mkdir()
    command = [sys.executable, "-m", "bench.stage", "--child", str(path), str(target)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    shutil.rmtree(target)
    result: dict[str, float] = json.loads(said)
    return result


def child(path: str, target: str) -> None:
    """Stage as a worker does and print what it took."""
    import isal.igzip  # noqa: F401

    from stowray.pipeline.layer import stage_layer

    os.umask(0)
    sys.setswitchinterval(0.0005)
    descriptor = os.open(path, os.O_RDONLY)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")
    memory = _peak()
    used = cpu(resource.getrusage(resource.RUSAGE_SELF))
    begun = time.perf_counter()
    stage_layer(lambda: os.read(descriptor, 1 << 20), Path(target), privileged=os.geteuid() == 0)
    wall = time.perf_counter() - begun
    used = cpu(resource.getrusage(resource.RUSAGE_SELF)) - used
    print(json.dumps({"wall": wall, "cpu": used, "memory": _peak() - memory}))


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this kernel tells no peak of memory")


def measure(name: str, case: Case, folder: Path, runs: int) -> dict[str, Any]:
    path, target = folder / f"{name}.tar", folder / f"{name}.tree"
    pack(case, path)
    theirs: list[tuple[float, float]] = []
    mine: list[dict[str, float]] = []
    tar: list[float] = []
    compared = case.wall is not None
    for _ in range(runs if compared else 1):
        if compared:
            theirs.append(peers(path, target))
            tar.append(alone(path, target))
        mine.append(ours(path, target))
    path.unlink()
    row: dict[str, Any] = {"case": name, "runs": len(mine)}
    for key in ("wall", "cpu", "memory"):
        row[key] = statistics.median(run[key] for run in mine)
    if compared:
        row["tar_wall"], row["tar_cpu"] = map(statistics.median, zip(*theirs, strict=True))
        row["alone"] = statistics.median(tar)
    row |= {"wall_limit": case.wall, "cpu_limit": case.cpu, "memory_limit": case.memory}
    return row


def show(row: dict[str, Any]) -> str:
    def against(key: str) -> str:
        if f"tar_{key}" not in row:
            return f"{row[key]:6.2f} s" + " " * 24
        limit = row[f"{key}_limit"]
        ratio = row[key] / row[f"tar_{key}"]
        bound = f"(≤ {limit:.1f})" if limit else " " * 7
        return f"{row[key]:6.2f} s / {row[f'tar_{key}']:5.2f} s = {ratio:4.2f} {bound}"

    memory = f"{row['memory'] / MIB:5.0f} MiB (≤ {row['memory_limit'] / MIB:.0f})"
    if "alone" in row:
        memory += f"  tar alone {row['alone']:.2f} s"
    return f"{row['case']:12} wall {against('wall')}  CPU {against('cpu')}  peak +{memory}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(CASES), metavar="NAME")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="stowray-bench-") as folder:
        for name in options.names:
            row = measure(name, CASES[name], Path(folder), options.runs)
            print(show(row), flush=True)


if __name__ == "__main__":
    main()
