"""What a bad network costs: faults survived, bytes fetched twice, broken and throttled connections.

    python -m bench.network [faults] [broken] [breaking] [ranges]

The registry and what stands before it are in this process; the pulls that are timed or killed are
`stowray` commands of their own.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
from tests.support.proxy import CountingProxy, counting_proxy
from tests.support.registry import FakeRegistry, Fault, compact, digest_of

MIB = 1 << 20
PROGRAM = [sys.executable, "-m", "stowray", "--engine", "local", "--progress", "none"]
SEED = 11


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
        for how in ("connection", "kill", "kill, 4 connections"):
            lost = []
            for _ in range(runs):
                points = sorted(chance.sample(range(len(data)), 10))
                with (
                    folder() as place,
                    # As fast as a good line, so that what is under way is not much.
                    counting_proxy(fake.host, bytes_per_second=60 * MIB) as proxy,
                ):
                    lost.append(_break(Path(place), proxy, name, how, points, len(data)))
            shown = ", ".join(f"{one / MIB:.2f}" for one in lost)
            print(f"broken at 10 points ({how}): MiB over the blob's size, 10 breaks: {shown}")


def _break(
    here: Path, proxy: CountingProxy, name: str, how: str, points: list[int], size: int
) -> int:
    stowray = Stowray(here / "store", here)
    with Store.open(here / "store") as store:
        if "4" in how:
            HostRecords(store.path).learn(proxy.host, 4, 15 * MIB)
    run = command(here, proxy.host, name)
    proxy.reset()
    process = subprocess.Popen(run, env=stowray.environment(), stdout=subprocess.PIPE)
    for point in points:
        proxy.wait_served(point)
        if how == "connection":
            proxy.cut()
            continue
        process.send_signal(signal.SIGKILL)
        process.communicate()
        process = subprocess.Popen(run, env=stowray.environment(), stdout=subprocess.PIPE)
    process.communicate()
    if process.returncode:
        raise SystemExit("the pull failed")
    return proxy.served - size


# -- connections that break ------------------------------------------------------------------------


def breaking(runs: int = 3) -> None:
    """A registry that breaks every connection after 8 MiB, beside one that does not."""
    data = noise(256 * MIB)
    times: dict[str, list[float]] = {}
    with folder() as place, FakeRegistry() as fake:
        name = publish(fake, data)
        for _ in range(runs):
            for how in ("whole", "fin", "reset"):
                fake.clear_faults()
                # A reset throws away what is still in the sockets' buffers: not faster than a line
                # of 2 Gbit/s, or all of it is.
                pace = (256 * 1024, 0.001)
                fault = Fault(trickle=pace)
                if how != "whole":
                    fault = Fault(cut=how, after=8 * MIB, trickle=pace)
                fake.fault("/blobs/", Fault(), fault, repeat=True)
                seconds, result = pull(Path(place), fake.host, name)
                times.setdefault(how, []).append(seconds)
                times.setdefault(f"{how} bytes", []).append(float(str(result["fetched_bytes"])))
    whole = statistics.median(times["whole"])
    for how in ("fin", "reset"):
        median = statistics.median(times[how])
        print(
            f"256 MiB, every connection breaks after 8 MiB ({how}): {median:.2f} s against "
            f"{whole:.2f} s: {median / whole:.2f} times; "
            f"{statistics.median(times[f'{how} bytes']) / len(data):.3f} of the size received"
        )


# -- ranges ----------------------------------------------------------------------------------------


def ranges(size: int = 1024 * MIB) -> None:
    """1 GiB at 20 MiB/s per connection, and without a limit, ranges on and off."""
    data = noise(size)
    with folder() as place, FakeRegistry() as fake:
        here = Path(place)
        name = publish(fake, data)
        off = "[registry]\nrange_connections = 1\n"
        limit = 20 * MIB
        with counting_proxy(fake.host, bytes_per_second=limit, per_connection=True) as proxy:
            alone, _ = pull(here, proxy.host, name, off)
            first, _ = pull(here, proxy.host, name)
            print(
                f"1 GiB at 20 MiB/s per connection: {alone:.1f} s without ranges, {first:.1f} s "
                f"with ({alone / first:.2f} times as fast), nothing known of the host"
            )
            (here / "store").mkdir()
            shutil.rmtree(here / "store")
            with Store.open(here / "store") as store:
                HostRecords(store.path).learn(proxy.host, 4, limit)
            again, _ = pull(here, proxy.host, name)
            print(f"  known from an earlier run: {again:.1f} s ({alone / again:.2f} times)")
        with counting_proxy(fake.host, bytes_per_second=limit) as proxy:
            alone, _ = pull(here, proxy.host, name, off)
            shared, _ = pull(here, proxy.host, name)
            print(f"  20 MiB/s for all together: {alone:.1f} s without, {shared:.1f} s with")
        free = [pull(here, fake.host, name, off)[0] for _ in range(3)]
        tried = [pull(here, fake.host, name)[0] for _ in range(3)]
        print(
            f"  no limit: {statistics.median(free):.2f} s without, "
            f"{statistics.median(tried):.2f} s with"
        )


def main() -> None:
    wanted = sys.argv[1:] or ["faults", "broken", "breaking", "ranges"]
    kinds = {"faults": faults, "broken": broken, "breaking": breaking, "ranges": ranges}
    for name in wanted:
        kinds[name]()


if __name__ == "__main__":
    main()
