"""Stores for tests: other boots, killed writers, and the invariants that must hold afterwards."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import stat
import subprocess
import sys
import tarfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from stowray.pipeline.clock import Boot
from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.records import ReferenceRecord
from stowray.pipeline.references import record_path
from stowray.pipeline.snapshot import Snapshots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from stowray.pipeline.store import Store

ROOT = Path(__file__).parents[2]
FIRST_BOOT = Boot("00000000-0000-4000-8000-000000000001", "host-a")
NEXT_BOOT = Boot("00000000-0000-4000-8000-000000000002", "host-a")
OTHER_HOST = Boot("00000000-0000-4000-8000-000000000003", "host-b")
MANIFEST = "application/vnd.oci.image.manifest.v1+json"

PRELUDE = """
import hashlib, os, sys
from pathlib import Path
from stowray.pipeline.clock import Boot
from stowray.pipeline.digest import Digest
from stowray.pipeline.store import Store
def say(text):
    print(text, flush=True)
"""


def pattern(size: int, seed: int = 0) -> bytes:
    """Return ``size`` bytes that do not repeat and differ by seed."""
    return hashlib.shake_256(seed.to_bytes(8, "little")).digest(size)


def start(code: str, *arguments: object, failpoint: str = "") -> subprocess.Popen[str]:
    """Start a process that runs ``code`` after ``PRELUDE``, with pipes for its input and output."""
    environment = dict(os.environ)
    environment.pop("STOWRAY_FAILPOINT", None)
    if failpoint:
        environment["STOWRAY_FAILPOINT"] = failpoint
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )


def run(code: str, *arguments: object) -> str:
    """Run ``code`` in another process and return what it prints."""
    process = start(code, *arguments)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


def run_killed(code: str, *arguments: object, failpoint: str) -> None:
    """Run ``code`` in another process, which must die at ``failpoint``."""
    process = start(code, *arguments, failpoint=failpoint)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, f"{failpoint} not reached: {output}{errors}"


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a process that ``start`` made, and wait for its end."""
    process.kill()
    process.communicate(timeout=60)


def listen(process: subprocess.Popen[str], line: str) -> None:
    """Wait until the process says ``line``."""
    assert process.stdout is not None
    said = process.stdout.readline().strip()
    if said != line:
        process.kill()
        raise AssertionError(f"expected {line!r}, got {said!r}: {process.communicate()}")


def commit(store: Store, data: bytes, algorithm: str = "sha256") -> Digest:
    """Put ``data`` into the store by way of an ingest."""
    digest = Digest.of(data, algorithm)
    ingest = store.acquire(digest, len(data))
    assert ingest is not None
    with ingest:
        ingest.write(data[ingest.offset :])
        ingest.commit()
    return digest


def check_blobs(path: Path) -> set[str]:
    """Check that each visible blob is what its name says; return the digests."""
    found = set()
    for algorithm in ("sha256", "sha512"):
        for blob in (path / "blobs" / algorithm).iterdir():
            status = blob.lstat()
            assert stat.S_ISREG(status.st_mode), f"{blob} is not a regular file"
            assert status.st_mode & 0o777 == 0o444, f"{blob} has mode {status.st_mode:o}"
            actual = hashlib.new(algorithm, blob.read_bytes()).hexdigest()
            assert actual == blob.name, f"{blob} CONTAINS OTHER BYTES"
            found.add(f"{algorithm}:{actual}")
    return found


def leftovers(path: Path) -> list[str]:
    """Return what only unfinished work leaves behind."""
    folders = ("ingest", "trash", "leases", "quarantine")
    return [str(entry) for folder in folders for entry in (path / folder).iterdir()]


def record(
    manifest: Digest,
    reference: str = "docker.io/library/debian:latest",
    platform: str = "linux/amd64",
    *,
    config: Digest | None = None,
    layers: Iterable[Digest] = (),
    chain_id: str = "",
    pinned: bool = False,
    created: float = 1.0,
    size: int = 1,
) -> ReferenceRecord:
    """Return a reference record."""
    return ReferenceRecord(
        reference=reference,
        platform=platform,
        resolved=Descriptor(media_type=MANIFEST, digest=manifest, size=size),
        manifest=manifest,
        manifest_media_type=MANIFEST,
        manifest_size=size,
        config=config or manifest,
        layers=tuple(layers),
        chain_id=chain_id,
        unpacked=bool(chain_id),
        pinned=pinned,
        created=created,
    )


def tar(name: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = 1000
        archive.addfile(member, io.BytesIO(pattern(1000)))
    return buffer.getvalue()


def stow(store: Store, reference: str, *names: str, created: float = 1.0) -> ReferenceRecord:
    """Put an image of one layer per name into the store, with its snapshots."""
    snapshots = Snapshots(store)
    parent: Digest | None = None
    layers = []
    for name in names:
        data = tar(name)
        blob = commit(store, data)
        layers.append(blob)
        text = f"{parent} {blob}".encode()
        chain = blob if parent is None else Digest(f"sha256:{hashlib.sha256(text).hexdigest()}")

        @contextmanager
        def read(data: bytes = data) -> Iterator[Callable[[], bytes]]:
            parts = iter([data, b""])
            yield lambda: next(parts, b"")

        snapshots.commit(chain, parent, blob, blob, read)
        parent = chain
    config = commit(store, f"config of {reference}".encode())
    manifest = commit(store, f"manifest of {reference}".encode())
    known = record(
        manifest, reference, config=config, layers=layers, chain_id=str(parent), created=created
    )
    store.record_reference(known)
    os.utime(record_path(store, reference, known.platform), (created, created))
    return known
