"""Pre-warm four Ray nodes on this machine and measure what a cluster is promised.

    python -m bench.prewarm [--runs N] [--image NAME] [--record FILE] [SCENARIO…]

A real `docker-registry` stands behind a proxy that throttles, and notes each byte range of a blob
that it sends. Each run is the `stowray prewarm` command, on a cluster that stays, into stores of
its own in memory. A time is from the first byte of a blob that the origin sent, with the actors up,
until the last node that is counted told that its image is ready.

once       origin bytes over the image's size, and what was sent twice
throttled  the time of four nodes over that of one, the origin throttled
killed     the same, one of the four killed when 40 % were sent; what was sent twice
corrupt    one node holds a blob with wrong bytes in it and serves it to the others
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support import docker_registry
from tests.support.catalogue import Catalogue
from tests.support.command import PROGRAM
from tests.support.origin import Origin, Span, origin, overlaps
from tests.support.push import Pusher
from tests.support.ray_cluster import RayCluster, ray_cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NODES = ("n0", "n1", "n2", "n3")
VICTIM = "n2"
LIAR = "n3"
RATE = 10 << 20
KILL_AT = 0.4
RUN_SECONDS = 600.0
SCENARIOS = ("once", "throttled", "killed", "corrupt")


@dataclass
class Run:
    """One run: seconds are None where nothing was timed; spans are of the first and last byte."""

    scenario: str
    nodes: int
    status: int = 0
    seconds: float | None = None
    command_seconds: float = 0.0
    origin_bytes: int = 0
    image_bytes: int = 0
    sent_twice: int = 0
    twice_though_held: int = 0
    states: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    load: float = 0.0


class Bench:
    """The parts that stay: registry, proxy, cluster, image."""

    def __init__(
        self,
        folder: Path,
        cluster: RayCluster,
        proxy: Origin,
        reference: str,
        sizes: dict[str, int],
    ) -> None:
        self.folder = folder
        self.cluster = cluster
        self.proxy = proxy
        self.reference = reference
        self.sizes = sizes
        self.runs = 0

    def run(
        self,
        scenario: str,
        nodes: Sequence[str] = NODES,
        *,
        rate: int | None = None,
        stores: Path | None = None,
        meanwhile: Callable[[Path], dict[str, list[Span]]] | None = None,
        counted: Sequence[str] | None = None,
    ) -> Run:
        """Pre-warm `nodes`; `meanwhile` runs beside it and returns what survivors held."""
        self.runs += 1
        stores = stores or self.folder / f"stores-{self.runs}"
        report_path = self.folder / f"report-{self.runs}.json"
        self.proxy.reset()
        self.proxy.throttle(rate)
        found = Run(scenario, len(nodes), load=os.getloadavg()[0])
        ready: dict[str, float] = {}
        begun = time.monotonic()
        process = subprocess.Popen(
            [
                *(str(PROGRAM), "--progress", "json", "--address", self.cluster.address),
                *("--store", str(stores / "{node}"), "prewarm", "--report", str(report_path)),
                *(word for node in nodes for word in ("--nodes", node)),
                self.reference,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**_plain_environment(self.folder), **self.cluster.environment},
        )
        held: dict[str, list[Span]] = {}
        beside = threading.Thread(
            target=lambda: held.update(meanwhile(stores) if meanwhile else {})
        )
        beside.start()
        errors = []
        for line in process.stderr or ():
            if not line.startswith("{"):
                errors.append(line)
                continue
            event = json.loads(line)
            if event["kind"] == "image" and event["status"] in ("done", "exists"):
                ready.setdefault(event["node"], time.monotonic())
        found.status = process.wait()
        found.command_seconds = time.monotonic() - begun
        beside.join()
        if not report_path.exists():
            raise SystemExit(
                f"{scenario}: exit {found.status}, no report:\n{''.join(errors)[-3000:]}"
            )
        report = json.loads(report_path.read_text())
        found.states = {node["name"]: node["state"] for node in report["nodes"]}
        found.remarks = sorted(
            {f"{remark['kind']}: {remark['source']}" for remark in report["remarks"]}
        )
        timed = [ready[node] for node in counted or nodes if node in ready]
        if timed and self.proxy.first_byte:
            found.seconds = max(timed) - self.proxy.first_byte
        found.origin_bytes = self.proxy.blob_bytes
        found.image_bytes = sum(self.sizes.values())
        repeats = self.proxy.sent_twice()
        found.sent_twice = sum(end - start for spans in repeats.values() for start, end in spans)
        found.twice_though_held = sum(
            _common(spans, held.get(digest, [])) for digest, spans in repeats.items()
        )
        print(json.dumps(asdict(found)), flush=True)
        return found

    def drop_stores(self) -> None:
        """Free the memory of all runs so far."""
        for path in self.folder.glob("stores-*"):
            shutil.rmtree(path)

    # -- scenarios --------------------------------------------------------------------------------

    def once(self) -> list[Run]:
        """Four nodes, the origin as fast as it is."""
        return [self.run("once")]

    def throttled(self) -> list[Run]:
        """One node alone, then four, from a slow origin."""
        return [
            self.run("alone", NODES[:1], rate=RATE),
            self.run("throttled", rate=RATE),
        ]

    def killed(self) -> list[Run]:
        """Four nodes from a slow origin, of which one dies."""
        others = [name for name in NODES if name != VICTIM]

        def kill(stores: Path) -> dict[str, list[Span]]:
            self.proxy.wait_sent(int(KILL_AT * sum(self.sizes.values())), RUN_SECONDS)
            held = {
                digest: [span for name in others for span in _data_spans(stores / name, digest)]
                for digest in self.sizes
            }
            self.cluster.kill(VICTIM)
            return held

        found = self.run("killed", rate=RATE, meanwhile=kill, counted=others)
        self.cluster.add(VICTIM)
        return [found]

    def corrupt(self) -> list[Run]:
        """One node has the image, with a byte of its largest blob flipped, and serves it."""
        stores = self.folder / f"stores-corrupt-{self.runs}"
        self.run("prepare", [LIAR], stores=stores)
        digest = max(self.sizes, key=lambda name: self.sizes[name])
        blob = stores / LIAR / "blobs" / "sha256" / digest.partition(":")[2]
        blob.chmod(0o644)
        with blob.open("r+b") as file:
            file.seek(self.sizes[digest] // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 0xFF]))
        blob.chmod(0o444)
        return [self.run("corrupt", stores=stores)]


def _plain_environment(folder: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    home = folder / "home"
    home.mkdir(exist_ok=True)
    return {**kept, "HOME": str(home), "XDG_RUNTIME_DIR": str(home), "PYTHONUNBUFFERED": "1"}


def _data_spans(store: Path, digest: str) -> list[Span]:
    """Return which bytes of a blob a store holds, committed or arriving (to a page)."""
    name = digest.partition(":")[2]
    committed = store / "blobs" / "sha256" / name
    if committed.exists():
        return [(0, committed.stat().st_size)]
    spans: list[Span] = []
    for path in (store / "ingest").rglob("data*"):
        if name not in str(path):
            continue
        with path.open("rb") as file:
            at, size = 0, os.fstat(file.fileno()).st_size
            while at < size:
                try:
                    start = os.lseek(file.fileno(), at, os.SEEK_DATA)
                except OSError:
                    break
                at = os.lseek(file.fileno(), start, os.SEEK_HOLE)
                spans.append((start, at))
    return spans


def _common(first: list[Span], second: list[Span]) -> int:
    """Return how many bytes lie both in spans of `first` and of `second`."""
    joined: list[Span] = []
    for start, end in sorted(second):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return sum(end - start for start, end in overlaps([*first, *joined]))


def summarise(runs: list[Run]) -> list[str]:
    """Return the lines of the result, medians of the runs of each scenario."""
    by: dict[str, list[Run]] = {}
    for run in runs:
        by.setdefault(run.scenario, []).append(run)
    alone = statistics.median(run.seconds or 0.0 for run in by["alone"]) if "alone" in by else 0.0
    lines = []
    for scenario, found in by.items():
        times = [run.seconds for run in found if run.seconds is not None]
        middle = statistics.median(times) if times else 0.0
        origin_share = statistics.median(run.origin_bytes / run.image_bytes for run in found)
        cells = [
            f"{scenario:10}",
            f"{middle:.1f} s ({min(times, default=0):.1f}-{max(times, default=0):.1f})",
            f"{middle / alone:.2f} x alone"
            if alone and scenario in ("throttled", "killed")
            else "",
            f"origin/image {origin_share:.4f}",
            f"sent twice {max(run.sent_twice for run in found)}",
            f"of it held by others {max(run.twice_though_held for run in found)}",
            f"exit {sorted({run.status for run in found})}",
            "; ".join(sorted({remark for run in found for remark in run.remarks}))[:200],
        ]
        lines.append(" | ".join(cells))
    return lines


def main() -> int:
    """Run the scenarios that were asked for, in turn, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", default=list(SCENARIOS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--image", default="site", help="of tests/support/catalogue.py")
    parser.add_argument("--record", type=Path, help="write the record here (JSON)")
    options = parser.parse_args()
    unknown = set(options.scenarios) - set(SCENARIOS)
    if unknown:
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    layout = Catalogue().layout(options.image)
    manifest = layout.image(layout.tagged(options.image))
    document = layout.document(manifest["digest"])
    sizes = {entry["digest"]: entry["size"] for entry in (document["config"], *document["layers"])}
    memory = Path("/dev/shm")
    runs: list[Run] = []
    with tempfile.TemporaryDirectory(
        prefix="stowray-prewarm-", dir=memory if memory.is_dir() else None
    ) as name:
        folder = Path(name)
        with (
            docker_registry.running(folder / "registry") as registry,
            origin(registry.host) as proxy,
            ray_cluster(folder, NODES) as cluster,
        ):
            with Pusher(registry.host) as pusher:
                pusher.push(layout, manifest, f"bench/{options.image}", "1")
            reference = f"{proxy.host}/bench/{options.image}:1"
            bench = Bench(folder, cluster, proxy, reference, sizes)
            for number in range(options.runs):
                for scenario in options.scenarios:
                    runs += getattr(bench, scenario)()
                    bench.drop_stores()
                print(f"round {number + 1} of {options.runs}", file=sys.stderr)
    lines = summarise(runs)
    print("\n".join(lines))
    if options.record:
        record: dict[str, Any] = {
            "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
            ).stdout.strip(),
            "kernel": os.uname().release,
            "processors": os.cpu_count(),
            "image": {"name": options.image, "bytes": sum(sizes.values())},
            "rate": RATE,
            "runs": [asdict(run) for run in runs],
            "summary": lines,
        }
        options.record.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
