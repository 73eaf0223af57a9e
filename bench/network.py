"""What a bad network costs: faults survived, bytes fetched twice, broken and throttled connections.

    python -m bench.network [--record FILE] [faults] [broken] [breaking] [ranges] [lines]

The registry and what stands before it are in this process; the pulls that are timed or killed are
`stowray` commands of their own. Each figure is a median; the record has every run.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import StowrayError
from stowray.pipeline.fetch import Fetcher
from stowray.pipeline.host_records import HostRecords
from stowray.pipeline.reference import Reference
from stowray.pipeline.registry import Registry
from stowray.pipeline.settings import RegistrySettings
from stowray.pipeline.store import Store
from tests.support.command import Stowray
from tests.support.network_peers import limiting_nginx
from tests.support.proxy import CountingProxy, counting_proxy
from tests.support.registry import FakeRegistry, Fault, compact, digest_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MIB = 1 << 20
PROGRAM = [sys.executable, "-m", "stowray", "--engine", "local", "--progress", "none"]
SEED = 11


# What was measured: name -> runs.
RECORD: dict[str, object] = {}


def median(name: str, runs: list[float]) -> float:
    """Keep the runs for the record and return their median."""
    RECORD[name] = [round(run, 3) for run in runs]
    RECORD[f"{name.partition(':')[0]}: when, load"] = [
        time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        round(os.getloadavg()[0], 1),
    ]
    return statistics.median(runs)


def noise(size: int) -> bytes:
    """Return bytes that no compressor makes smaller."""
    chance = random.Random(SEED)
    return b"".join(chance.randbytes(MIB) for _ in range(size // MIB))


def folder() -> tempfile.TemporaryDirectory[str]:
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(
        prefix="stowray-network-", dir=memory if memory.is_dir() else None
    )


def publish(registry: FakeRegistry, data: bytes) -> str:
    """Add an image whose one layer is `data` (not unpacked by these pulls)."""
    config = compact(
        {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [digest_of(data)]},
        }
    )
    manifest = compact(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": registry.add_blob(config),
                "size": len(config),
            },
            "layers": [
                {
                    "mediaType": "application/vnd.oci.image.layer.v1.tar",
                    "digest": registry.add_blob(data),
                    "size": len(data),
                }
            ],
        }
    )
    registry.add_manifest("bench/blob", manifest, tag="1")
    return "bench/blob:1"


def command(here: Path, host: str, name: str, settings: str = "") -> list[str]:
    config = here / "settings.toml"
    config.write_text(settings)
    return [*PROGRAM, "pull", "--json", "--no-unpack", "--config", str(config), f"{host}/{name}"]


def pull(here: Path, host: str, name: str, settings: str = "") -> tuple[float, dict[str, object]]:
    """Pull into a cold store; return the seconds and the result."""
    stowray = Stowray(here / "store", here)
    begun = time.monotonic()
    done = subprocess.run(
        command(here, host, name, settings),
        env=stowray.environment(),
        capture_output=True,
        check=False,
    )
    seconds = time.monotonic() - begun
    if done.returncode:
        raise SystemExit(done.stderr.decode())
    shutil.rmtree(here / "store")
    return seconds, json.loads(done.stdout)


# -- faults ----------------------------------------------------------------------------------------


def random_fault(chance: random.Random, size: int) -> Fault:
    at = chance.randrange(size)
    return chance.choice(
        [
            Fault(cut="reset", after=at),
            Fault(cut="fin", after=at),
            Fault(cut="reset", after=-1),
            Fault(status=chance.choice([408, 429, 500, 502, 503, 504])),
            Fault(status=429, headers=(("Retry-After", "0"),)),
            Fault(stall=at),
            Fault(trickle=(1, 0.2)),
            Fault(hang=True),
            Fault(corrupt=at),
            Fault(ignore_range=True),
            Fault(shift_range=1),
            Fault(short_range=at + 1),
            Fault(multipart=True),
            Fault(no_total=True),
            Fault(length="chunked"),
            Fault(length="none"),
            Fault(length="none", cut="fin", after=at),
            Fault(encoding="gzip"),
            Fault(remove=("Content-Range",)),
        ]
    )


def faults(count: int = 200) -> None:
    """One to three random faults per blob; each blob has to come, and come right."""
    chance = random.Random(SEED)
    size = MIB
    tried = survived = blobs = retries = 0
    settings = RegistrySettings(stall_timeout_seconds=1.0, connect_timeout_seconds=1.0, attempts=8)
    begun = time.monotonic()
    with folder() as place, FakeRegistry() as fake, Store.open(Path(place) / "store") as store:
        registry = Registry(settings, environment={})
        fetcher = Fetcher(store, [registry], settings)
        reference = Reference.parse(f"{fake.host}/bench/blob:1")
        while tried < count:
            data = chance.randbytes(size)
            blob = Descriptor("application/octet-stream", Digest(fake.add_blob(data)), size)
            some = [random_fault(chance, size) for _ in range(chance.randint(1, 3))]
            # Wrong bytes get one fresh try, and no more: that is meant to be an error.
            wrong = [fault for fault in some if fault.corrupt is not None]
            some = [fault for fault in some if fault not in wrong[1:]]
            fake.fault("/blobs/", *some)
            try:
                fetched = fetcher.fetch(reference, blob, report=lambda *_, **__: None)
            except StowrayError as error:
                print(f"  lost: {some}: {error}")
            else:
                survived += len(some)
                retries += fetched.retries
            tried += len(some)
            blobs += 1
            fake.clear_faults()
            if store.has(blob.digest) and store.blob_path(blob.digest).read_bytes() != data:
                raise SystemExit("WRONG BYTES IN THE STORE")
        registry.close()
    RECORD["faults: survived, tried"] = [survived, tried]
    print(
        f"faults: {survived} of {tried} survived ({blobs} blobs, {retries} retries, "
        f"{time.monotonic() - begun:.0f} s)"
    )


# -- ten breaks ------------------------------------------------------------------------------------


def broken(runs: int = 3) -> None:
    """A blob broken at ten random points: by its connections, and by the death of the client."""
    data = noise(96 * MIB)
    chance = random.Random(SEED + 1)
    with FakeRegistry() as fake:
        name = publish(fake, data)
        for how in ("connection", "kill", "kill, 8 connections"):
            lost: list[float] = []
            sent: list[float] = []
            in_all: list[float] = []
            for _ in range(runs):
                points = sorted(chance.sample(range(len(data)), 10))
                with (
                    folder() as place,
                    # As fast as a good line, so that what is under way is not much.
                    counting_proxy(fake.host, bytes_per_second=60 * MIB) as proxy,
                ):
                    if how == "connection":
                        in_all.append(_cut(Path(place), proxy, name, points, len(data)) / MIB / 10)
                        continue
                    breaks = _kill(Path(place), proxy, name, how, points, data)
                    lost += [received / MIB for received, _ in breaks]
                    sent += [after / MIB for _, after in breaks]
            if how == "connection":
                each = median(f"broken: {how}, MiB twice a break", in_all)
                print(f"96 MiB broken at 10 points ({how}): {each:.2f} MiB a break came twice")
                continue
            each = median(f"broken: {how}, MiB received twice, each kill", lost)
            more = median(f"broken: {how}, MiB sent twice, each kill", sent)
            print(
                f"96 MiB broken at 10 points ({how}): received twice: median {each:.2f}, worst "
                f"{max(lost):.2f} MiB; sent twice, also to nobody: {more:.2f}, {max(sent):.2f}"
            )


def _start(
    here: Path, proxy: CountingProxy, name: str, known: int = 0
) -> Callable[[], subprocess.Popen[bytes]]:
    stowray = Stowray(here / "store", here)
    if known:
        with Store.open(here / "store") as store:
            HostRecords(store.path).learn(proxy.host, known, known * MIB)
    run = command(here, proxy.host, name)
    proxy.reset()
    return lambda: subprocess.Popen(run, env=stowray.environment(), stdout=subprocess.PIPE)


def _cut(here: Path, proxy: CountingProxy, name: str, points: list[int], size: int) -> int:
    """Cut all connections at each point; return how many bytes were sent twice."""
    process = _start(here, proxy, name)()
    for point in points:
        proxy.wait_served(point)
        proxy.cut()
    process.communicate()
    if process.returncode:
        raise SystemExit("the pull failed")
    return proxy.served - size


def _kill(
    here: Path, proxy: CountingProxy, name: str, how: str, points: list[int], data: bytes
) -> list[tuple[int, int]]:
    """Kill the client at each point; return what came twice for each kill.

    First what the client had received when it was stopped and the next one asks for again, then
    what was sent to it in all: a line goes on for a moment when nobody is there any more.
    """
    start = _start(here, proxy, name, 8 if "8" in how else 0)
    digest = Digest(digest_of(data))
    before = there = 0
    breaks = []
    for point in points:
        process = start()
        if not proxy.wait_served(point):
            raise SystemExit("the pull does not get on")
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        # The proxy counts when it has sent; what comes meanwhile is held against the client.
        time.sleep(0.002)
        received = proxy.served - _unsent(proxy.host)
        process.kill()
        process.communicate()
        while _unsent(proxy.host, any_state=True):
            time.sleep(0.01)
        sent = proxy.served
        kept = _kept(here / "store", digest, len(data))
        gained = kept - there
        breaks.append((received - before - gained, sent - before - gained))
        before, there = sent, kept
    process = start()
    process.communicate()
    if process.returncode:
        raise SystemExit("the pull failed")
    # Bytes of documents are a few hundred.
    if proxy.served - len(data) - sum(after for _, after in breaks) > 64 * 1024:
        raise SystemExit(f"bytes that no kill explains: {proxy.served - len(data)}, {breaks}")
    return breaks


def _unsent(host: str, *, any_state: bool = False) -> int:
    """Return how many bytes of a server on this machine lie in its own kernel buffers.

    With ``any_state`` how many of its connections there are.
    """
    port = f":{int(host.rpartition(':')[2]):04X}"
    found = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        # proc(5): local address, remote address, state (01 is established), queues to and from.
        if fields[1].endswith(port) and fields[3] in ("01", "08"):
            found += 1 if any_state else int(fields[4].partition(":")[0], 16)
    return found


def _kept(path: Path, digest: Digest, size: int) -> int:
    """Return how much of a blob the next writer will find."""
    with Store.open(path) as store:
        ingest = store.acquire(digest, size)
        if ingest is None:
            raise SystemExit("the dead have a lock")
        with ingest:
            missing = at = 0
            while (gap := ingest.gap(at, size)) is not None:
                missing += gap[1] - gap[0]
                at = gap[1]
            return size - missing


# -- connections that break ------------------------------------------------------------------------


def breaking(runs: int = 5) -> None:
    """A registry that breaks every connection after 8 MiB, beside one that does not."""
    data = noise(256 * MIB)
    # A reset throws away what is still in the sockets' buffers: all of it is lost at a server that
    # writes as fast as it can, and less at one on a line of 2 Gbit/s.
    paces = {"at 2 Gbit/s": (256 * 1024, 0.001), "as fast as it can": None}
    with folder() as place, FakeRegistry() as fake:
        name = publish(fake, data)
        for shown, pace in paces.items():
            times: dict[str, list[float]] = {"whole": [], "fin": [], "reset": []}
            received: dict[str, list[float]] = {"whole": [], "fin": [], "reset": []}
            for _ in range(runs):
                for how in times:
                    fake.clear_faults()
                    fault = Fault(trickle=pace)
                    if how != "whole":
                        fault = Fault(cut=how, after=8 * MIB, trickle=pace)
                    fake.fault("/blobs/", Fault(), fault, repeat=True)
                    seconds, result = pull(Path(place), fake.host, name)
                    times[how].append(seconds)
                    received[how].append(float(str(result["fetched_bytes"])) / len(data))
            whole = median(f"breaking: whole, {shown}, s", times["whole"])
            for how in ("fin", "reset"):
                taken = median(f"breaking: {how}, {shown}, s", times[how])
                size = median(f"breaking: {how}, {shown}, bytes/size", received[how])
                print(
                    f"256 MiB {shown}, every connection breaks after 8 MiB ({how}): {taken:.2f} s "
                    f"against {whole:.2f} s: {taken / whole:.2f} times; {size:.3f} of the size"
                )


# -- ranges ----------------------------------------------------------------------------------------

LIMIT = 20 * MIB
LANES = 8
OFF = "[registry]\nrange_connections = 1\n"


def _timed(here: Path, host: str, name: str, settings: str = "", known: int = 0) -> float:
    if known:
        with Store.open(here / "store") as store:
            HostRecords(store.path).learn(host, known, LIMIT)
    return pull(here, host, name, settings)[0]


@contextlib.contextmanager
def _limited(front: str, here: Path, upstream: str) -> Iterator[str]:
    """Give 20 MiB/s to each connection; the address to ask instead of ``upstream``."""
    if front == "nginx":
        with limiting_nginx(here / "nginx", upstream, LIMIT) as program:
            yield program.host
        shutil.rmtree(here / "nginx")
    else:
        with counting_proxy(upstream, bytes_per_second=LIMIT, per_connection=True) as proxy:
            yield proxy.host


def ranges(runs: int = 3, fronts: Sequence[str] = ("proxy", "nginx")) -> None:
    """20 MiB/s per connection: how much of their sum 8 connections bring, start included."""
    for size in (256, 1024):
        data = noise(size * MIB)
        with folder() as place, FakeRegistry() as fake:
            here = Path(place)
            name = publish(fake, data)
            for front in fronts:
                with _limited(front, here, fake.host) as host:
                    for how, known in (("fresh", 0), ("known", LANES)):
                        taken = median(
                            f"ranges: {size} MiB, {front}, {how}, s",
                            [_timed(here, host, name, known=known) for _ in range(runs)],
                        )
                        share = size * MIB / taken / (LANES * LIMIT)
                        print(
                            f"{size} MiB at 20 MiB/s per connection ({front}, {how} host): "
                            f"{taken:.2f} s, {share:.2f} of the sum of {LANES}, load {load()}",
                            flush=True,
                        )


def lines(runs: int = 3) -> None:
    """Where more connections bring nothing: one line for all, and no limit; ranges on and off."""
    with folder() as place, FakeRegistry() as fake:
        here = Path(place)
        name = publish(fake, noise(256 * MIB))
        with counting_proxy(fake.host, bytes_per_second=LIMIT) as proxy:
            # What a line needs is arithmetic: once is enough.
            alone = median("lines: 256 MiB, shared, off, s", [_timed(here, proxy.host, name, OFF)])
            taken = median(
                "lines: 256 MiB, shared, on, s",
                [_timed(here, proxy.host, name) for _ in range(runs)],
            )
        print(
            f"256 MiB at 20 MiB/s for all together: {alone:.2f} s without ranges, {taken:.2f} s "
            f"with ({taken / alone:.3f}), load {load()}"
        )
    with folder() as place, FakeRegistry() as fake:
        here = Path(place)
        name = publish(fake, noise(1024 * MIB))
        times: dict[str, list[float]] = {"off": [], "on": []}
        for _ in range(runs):
            # Turn by turn: a machine is not always as fast.
            times["off"].append(_timed(here, fake.host, name, OFF))
            times["on"].append(_timed(here, fake.host, name))
        free, tried = (median(f"lines: 1 GiB, no limit, {how}, s", times[how]) for how in times)
        print(
            f"1 GiB without a limit: {free:.2f} s without ranges, {tried:.2f} s with "
            f"({tried / free:.2f}), load {load()}"
        )


def load() -> str:
    return f"{os.getloadavg()[0]:.0f}"


def main() -> None:
    wanted = sys.argv[1:]
    record = None
    if wanted[:1] == ["--record"]:
        record, wanted = Path(wanted[1]), wanted[2:]
    kinds = {
        "faults": faults,
        "broken": broken,
        "breaking": breaking,
        "ranges": ranges,
        "lines": lines,
    }
    for name in wanted or kinds:
        kinds[name]()
    if record is not None:
        kept = json.loads(record.read_text()) if record.exists() else {}
        record.write_text(json.dumps(kept | RECORD, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
