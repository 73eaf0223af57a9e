"""Pull each image with each contender, in turn, and print who took how long.

    python -m bench.compare [--images a,b] [--contenders a,b] [--runs 5] [--workdir DIR]
                            [--record FILE] [--raised]

All stores and the registry are below the working directory (default: in memory), the registry on
loopback. Contenders alternate, so that a slow moment of the machine hits all of them. The record is
JSON with every sample in it; a picture of the ratios goes beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import goals, images
from bench.contenders import Contender, Source, contenders, remove
from bench.runner import RunError, Sample, Summary, summarise
from tests.support import peers
from tests.support.docker_registry import running
from tests.support.push import Pusher

RAISED = "STOWRAY_BENCH_RAISED"
BASELINE = "skopeo+umoci"


def main() -> None:
    arguments = _arguments()
    if arguments.raised and RAISED not in os.environ:
        sys.exit(_run_raised())
    workdir: Path = arguments.workdir
    runs_folder = workdir / "runs"
    shutil.rmtree(runs_folder, ignore_errors=True)
    runs_folder.mkdir(parents=True)
    _compile()
    chosen = _chosen(arguments.contenders)
    names = arguments.images.split(",")
    _heading(workdir)
    record: dict[str, Any] = {"machine": _machine(workdir), "images": {}}
    everything: goals.Results = {}
    with ExitStack() as stack:
        registry = stack.enter_context(running(runs_folder / "registry"))
        sources = _push(workdir, names, registry.host)
        for contender in chosen:
            stack.enter_context(contender.daemon(runs_folder))
        for name in names:
            results = _compare(sources[name], chosen, runs_folder, arguments.runs)
            everything[name] = results
            about = images.about(workdir, name)
            record["images"][name] = {
                "about": asdict(about),
                "contenders": {key: asdict(summary) for key, summary in results.items()},
            }
            _table(about, results, chosen)
    print("\nover all images:")
    for line in goals.table(everything):
        print(line)
    machine = record["machine"]
    target = arguments.record or workdir / "record.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    subtitle = (
        f"{machine['stowray']}, {machine['cpu']}, {machine['cores']} cores, {machine['when']}"
    )
    target.with_suffix(".svg").write_text(goals.picture(everything, subtitle))
    print(f"record: {target}, picture: {target.with_suffix('.svg')}")
    shutil.rmtree(runs_folder, ignore_errors=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", default=",".join(images.STANDARD), help=f"of {', '.join(images.IMAGES)}"
    )
    parser.add_argument("--contenders", default="", help="names; default: all that can run here")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workdir", type=Path, default=images.default_workdir())
    parser.add_argument("--record", type=Path, help="where the JSON record goes")
    parser.add_argument(
        "--raised",
        action="store_true",
        help="run everything, peers too, before whatever else the machine has to do (as root)",
    )
    return parser.parse_args()


def _run_raised() -> int:
    """Run this command again in a session of its own, to which the scheduler gives preference."""
    # A session is one group for the scheduler (sched(7), autogroup): niceness counts within it.
    command = [sys.executable, "-m", "bench.compare", *sys.argv[1:]]
    environment = {**os.environ, RAISED: "1"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    Path(f"/proc/{process.pid}/autogroup").write_text("-20")
    return process.wait()


def _compile() -> None:
    """Have what is measured lie there compiled, as it does where it is installed."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    import stowray

    folder = str(Path(stowray.__file__).parent)
    command = [sys.executable, "-m", "compileall", "-q", folder, str(Path(__file__).parent)]
    subprocess.run(command, check=True)


def _chosen(names: str) -> list[Contender]:
    known = {contender.name: contender for contender in contenders()}
    chosen = [known[name] for name in names.split(",")] if names else list(known.values())
    able = []
    for contender in chosen:
        absent = contender.missing()
        if absent:
            print(f"{contender.name}: left out, not installed: {', '.join(absent)}")
        else:
            able.append(contender)
    return able


def _push(workdir: Path, names: list[str], host: str) -> dict[str, Source]:
    sources = {}
    with Pusher(host) as pusher:
        for name in names:
            layout_name, tag, twin = images.IMAGES[name]
            layout = images.catalogue(workdir).layout(layout_name)
            pusher.push(layout, layout.tagged(tag), f"bench/{tag}", "1")
            pusher.push(layout, layout.tagged(twin), f"bench/{twin}", "1")
            sources[name] = Source(host, f"bench/{tag}", f"bench/{twin}", layout.path, tag)
    return sources


def _compare(
    source: Source, chosen: list[Contender], folder: Path, runs: int
) -> dict[str, Summary]:
    samples: dict[str, list[Sample]] = {contender.name: [] for contender in chosen}
    failed: set[str] = set()
    for run in range(runs):
        # Another order each time: nobody always runs after the same neighbour.
        for contender in chosen[run % len(chosen) :] + chosen[: run % len(chosen)]:
            if contender.name in failed:
                continue
            # Never a place that was used before: a session remembers the stores it has seen.
            place = folder / f"{contender.name}-{Path(source.repository).name}-{run}"
            place.mkdir()
            try:
                samples[contender.name].append(contender.run(source, place))
            except RunError as error:
                failed.add(contender.name)
                command, status, output = error.args
                print(
                    f"{contender.name} failed on {source.repository}: {command}: {status}\n{output}"
                )
            finally:
                remove(place)
    return {
        name: summarise(taken) for name, taken in samples.items() if taken and name not in failed
    }


def _heading(workdir: Path) -> None:
    machine = _machine(workdir)
    print(
        f"{machine['cpu']}, {machine['cores']} cores, kernel {machine['kernel']}, {machine['when']}"
    )
    print(f"stowray {machine['stowray']}, Python {machine['python']}, load {machine['load']}")
    for name, version in machine["peers"].items():
        print(f"{name}: {version}")


def _machine(workdir: Path) -> dict[str, Any]:
    from stowray import __version__

    model = "?"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "stowray": f"{__version__} ({described.stdout.strip() or 'no checkout'})",
        "peers": peers.versions(),
        "load": round(os.getloadavg()[0], 2),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "memory_folder": str(workdir).startswith("/dev/shm"),
    }


def _table(about: images.About, results: dict[str, Summary], chosen: list[Contender]) -> None:
    mebibyte = 1 << 20
    print(
        f"\n{about.name}: {about.layers} layers, {about.compressed / mebibyte:.0f} MiB compressed,"
        f" {about.unpacked_tar / mebibyte:.0f} MiB of tar"
    )
    print(f"{'':16}{'median s':>9}{'low':>7}{'high':>7}{'CPU s':>7}{'RSS MiB':>9}{'ratio':>7}")
    baseline = results.get(BASELINE)
    for contender in chosen:
        summary = results.get(contender.name)
        if summary is None:
            continue
        ratio = f"{summary.median / baseline.median:.2f}" if baseline else "-"
        print(
            f"{contender.name:16}{summary.median:>9.2f}{summary.low:>7.2f}{summary.high:>7.2f}"
            f"{summary.cpu_seconds:>7.2f}{summary.rss / mebibyte:>9.0f}{ratio:>7}  {contender.note}"
        )


if __name__ == "__main__":
    main()
