"""How a pull grows: with the size of a layer, layers, files, pulls at once, connections.

    python -m bench.curves [--only size,layers,files,pulls,pulls-of-one,large-pulls,connections]
                           [--runs 3] [--largest MIB] [--most-files N] [--workdir DIR]
                           [--record FILE]

Whole processes, cold stores in memory, a `docker-registry` on loopback; medians. The record is
JSON, and a picture of each curve goes beside it.
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
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import images
from bench.picture import Curve, curves
from tests.support import entries
from tests.support.docker_registry import running
from tests.support.images import Layout
from tests.support.proxy import counting_proxy
from tests.support.push import Pusher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

MIB = 1 << 20
RATE = 20 * MIB
PROGRAM = [sys.executable, "-m", "stowray", "pull", "--engine", "local", "--progress", "none"]
Row = dict[str, float]


class Bench:
    """A registry and a place for stores; images come and go one by one, to save memory."""

    def __init__(self, folder: Path, host: str, runs: int) -> None:
        self.folder = folder
        self.host = host
        self.runs = runs

    def publish(self, name: str, make: Callable[[], Sequence[Iterable[entries.Entry]]]) -> None:
        """Push an image of the layers that ``make`` returns, made in a process of its own.

        The kernel counts what a process weighed before it became another program: this one must
        stay small for the peaks of those that it starts to be theirs.
        """
        child = os.fork()
        if child == 0:
            status = 1
            try:
                self._publish(name, make())
                status = 0
            finally:
                os._exit(status)
        if os.waitpid(child, 0)[1]:
            raise SystemExit(f"{name} could not be made")

    def _publish(self, name: str, layers: Sequence[Iterable[entries.Entry]]) -> None:
        layout = Layout(self.folder / "layout")
        made = layout.add_image([layout.add_layer(list(content)) for content in layers])
        with Pusher(self.host) as pusher:
            pusher.push(layout, made, f"curves/{name}", "1")
        shutil.rmtree(self.folder / "layout")

    def pull(self, name: str, *options: str, host: str = "") -> list[str]:
        return self.pull_all([name], *options, host=host)

    def pull_all(self, names: Iterable[str], *options: str, host: str = "") -> list[str]:
        place = ["--store", str(self.folder / "store")]
        images = (f"{host or self.host}/curves/{name}:1" for name in names)
        return [*PROGRAM, *place, *options, *images]

    def measure(self, *commands: list[str], config: str = "") -> Row:
        """Median wall and CPU seconds of commands run side by side, and the largest peak."""
        walls, cpus, peak = [], [], 0
        environment = dict(os.environ)
        if config:
            (self.folder / "settings.toml").write_text(config)
            environment["STOWRAY_CONFIG"] = str(self.folder / "settings.toml")
        for _ in range(self.runs):
            shutil.rmtree(self.folder / "store", ignore_errors=True)
            begun = time.perf_counter()
            started = [
                subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
                for command in commands
            ]
            cpu = 0.0
            for process in started:
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                if status:
                    raise SystemExit(f"a pull failed: {process.returncode}")
                cpu += usage.ru_utime + usage.ru_stime
                peak = max(peak, usage.ru_maxrss * 1024)
            walls.append(time.perf_counter() - begun)
            cpus.append(cpu)
        shutil.rmtree(self.folder / "store")
        return {
            "seconds": statistics.median(walls),
            "low": min(walls),
            "high": max(walls),
            "cpu": statistics.median(cpus),
            "peak": peak / MIB,
        }


def big_files(mebibytes: int) -> Iterator[entries.Entry]:
    """An eighth of noise, the rest text: what compresses to about a seventh."""
    chance = random.Random(mebibytes)
    text = b"some words of text that come again and again\n" * 20_400
    for number in range(mebibytes // 16):
        data = b"".join(chance.randbytes(MIB // 8) + text[: MIB - MIB // 8] for _ in range(16))
        yield entries.file(f"data/{number}", data)


def small_files(count: int, folder: str = "data") -> Iterator[entries.Entry]:
    data = random.Random(count).randbytes(512) * 2
    for number in range(count):
        if number % 100 == 0:
            yield entries.directory(f"{folder}/d{number // 100}")
        yield entries.file(f"{folder}/d{number // 100}/f{number}", data)


def _layers_of(content: Iterable[entries.Entry]) -> list[Iterable[entries.Entry]]:
    """One layer; a generator runs where it is used, so that its content is never here."""
    return [content]


def size(bench: Bench, arguments: argparse.Namespace) -> list[Row]:
    rows = []
    for mebibytes in (64, 256, 1024, 2048, 4096):
        if mebibytes <= arguments.largest:
            bench.publish(f"size{mebibytes}", partial(_layers_of, big_files(mebibytes)))
            row = bench.measure(bench.pull(f"size{mebibytes}"))
            rows.append({"x": mebibytes, "y": 1024 * row["seconds"] / mebibytes, **row})
    return rows


def layers(bench: Bench, _: argparse.Namespace) -> list[Row]:
    rows = []
    for count in (1, 10, 30, 60, 120):
        content = (small_files(20, f"l{number}") for number in range(count))
        bench.publish(f"layers{count}", partial(list, content))
        row = bench.measure(bench.pull(f"layers{count}"))
        rows.append({"x": count, "y": row["seconds"], **row})
    return rows


def files(bench: Bench, arguments: argparse.Namespace) -> list[Row]:
    rows = []
    for count in (1_000, 10_000, 100_000, 500_000):
        if count <= arguments.most_files:
            bench.publish(f"files{count}", partial(_layers_of, small_files(count)))
            row = bench.measure(bench.pull(f"files{count}"))
            rows.append({"x": count, "y": 1e6 * row["seconds"] / count, **row})
    return rows


def pulls(bench: Bench, _: argparse.Namespace) -> list[Row]:
    """Pulls of images so small that the starts of as many programs weigh most."""
    return overlapping(bench, 128, 1500)


def pulls_of_one(bench: Bench, _: argparse.Namespace) -> list[Row]:
    """The same pulls, asked for in one command."""
    return overlapping(bench, 128, 1500, in_one=True)


def large_pulls(bench: Bench, _: argparse.Namespace) -> list[Row]:
    """Pulls of images as large as those that are worth sharing."""
    return overlapping(bench, 1024, 6000)


def overlapping(bench: Bench, mebibytes: int, files: int, *, in_one: bool = False) -> list[Row]:
    """Pulls into one store at once; each image shares layers with its neighbours and all others."""
    most = 8

    def made(first: int, last: int) -> list[Iterable[entries.Entry]]:
        parts = (small_files(files, f"part{number}") for number in range(first, last + 1))
        return [big_files(mebibytes), *parts]

    for number in range(most):
        bench.publish(f"overlap{number}", partial(made, number, number + 1))
    rows = []
    for count in (1, 2, 4, 8):
        bench.publish(f"union{count}", partial(made, 0, count))
        once = bench.measure(bench.pull(f"union{count}"))
        names = [f"overlap{number}" for number in range(count)]
        commands = [bench.pull_all(names)] if in_one else [bench.pull(name) for name in names]
        row = bench.measure(*commands)
        rows.append(
            {"x": count, "y": row["seconds"] / once["seconds"], "union": once["seconds"]} | row
        )
    return rows


def connections(bench: Bench, _: argparse.Namespace) -> list[Row]:
    """One blob of noise behind a proxy that gives 20 MiB/s to each connection."""
    blob = 256
    chance = random.Random(1)
    noise = (entries.file(f"n{number}", chance.randbytes(MIB)) for number in range(blob))
    bench.publish("noise", partial(_layers_of, noise))
    rows = []
    for count in (1, 2, 4, 8):
        with counting_proxy(bench.host, bytes_per_second=RATE, per_connection=True) as proxy:
            config = f"[registry]\nrange_connections = {count}\nconnections = {max(count, 2)}\n"
            command = bench.pull("noise", "--no-unpack", host=proxy.host)
            row = bench.measure(command, config=config)
        rows.append({"x": count, "y": blob / row["seconds"] / (count * RATE / MIB), **row})
    return rows


CURVES: dict[str, tuple[Callable[[Bench, argparse.Namespace], list[Row]], str, str]] = {
    "size": (size, "MiB of one layer's tar", "seconds per GiB"),
    "layers": (layers, "layers of 20 small files", "seconds"),
    "files": (files, "files of 1 KiB in one layer", "microseconds per file"),
    "pulls": (pulls, "pulls at once into one store", "time / their union pulled once"),
    "pulls-of-one": (
        pulls_of_one,
        "pulls at once by one command",
        "time / their union pulled once",
    ),
    "large-pulls": (
        large_pulls,
        "pulls at once into one store, of larger images",
        "time / their union pulled once",
    ),
    "connections": (connections, "connections of 20 MiB/s each", "speed / their sum"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(CURVES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--largest", type=int, default=4096, metavar="MIB")
    parser.add_argument("--most-files", type=int, default=500_000, metavar="N")
    parser.add_argument("--workdir", type=Path, default=images.default_workdir())
    parser.add_argument("--record", type=Path, help="where the JSON record goes")
    arguments = parser.parse_args()
    folder = arguments.workdir / "curves"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # As installed programs lie there: compiled, and by whoever runs first if not.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    target: Path = arguments.record or arguments.workdir / "curves.json"
    record: dict[str, Any] = {"when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    for name in arguments.only.split(","):
        work, x_label, y_label = CURVES[name]
        with running(folder / "registry") as registry:
            rows = work(Bench(folder, registry.host, arguments.runs), arguments)
        shutil.rmtree(folder / "registry")
        record[name] = rows
        print(f"\n{name}: {y_label} by {x_label}")
        for row in rows:
            print(
                f"{row['x']:>8g} {row['y']:8.2f}   {row['seconds']:.2f} s "
                f"({row['low']:.2f}-{row['high']:.2f}), CPU {row['cpu']:.2f} s, "
                f"peak {row['peak']:.0f} MiB, load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
        line = [Curve("stowray", [(row["x"], row["y"]) for row in rows])]
        drawn = curves(f"Growth: {name}", record["when"], x_label, y_label, line)
        target.with_name(f"{target.stem}-{name}.svg").write_text(drawn)
        target.write_text(json.dumps(record, indent=1) + "\n")
    shutil.rmtree(folder)
    print(
        f"record: {target}; own peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB"
    )


if __name__ == "__main__":
    main()
