"""What the layers of an image cost at the very least, each kind of work measured by itself.

    python -m bench.floor LAYOUT TAG FOLDER

The work: a copy over loopback into a file, SHA-256 of the stored bytes, inflating them (isal, or
zstd), SHA-256 of the tar, and `tar -x`. The floor in seconds is the sum of their CPU seconds
divided by the cores, or the longest single piece of work on the largest layer, whichever is more:
pieces run side by side, but none of them can be split. No start-up, no store, no proof, no
requests, no order of layers: a number to compare with, which nobody reaches.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.images import Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CHUNK = 1 << 20
OUT = 512 << 10


@dataclass(frozen=True)
class Floor:
    """CPU seconds of each kind of work over all layers, and what follows from them."""

    copy: float
    hash_stored: float
    inflate: float
    hash_tar: float
    extract: float
    longest: float
    cores: int

    @property
    def cpu_seconds(self) -> float:
        return self.copy + self.hash_stored + self.inflate + self.hash_tar + self.extract

    @property
    def seconds(self) -> float:
        return max(self.cpu_seconds / self.cores, self.longest)


def copy(source: Path, target: Path) -> float:
    """CPU seconds of both ends of a TCP connection and of the file written."""
    with socket.create_server(("127.0.0.1", 0)) as server, source.open("rb") as stored:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()

        def send() -> None:
            with sender:
                sender.sendfile(stored)

        begun = time.process_time()
        thread = threading.Thread(target=send)
        thread.start()
        buffer = memoryview(bytearray(CHUNK))
        with receiver, target.open("wb", buffering=0) as out:
            while count := receiver.recv_into(buffer):
                out.write(buffer[:count])
        thread.join()
        return time.process_time() - begun


def digest(path: Path) -> float:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        hashlib.sha256(data[:CHUNK]).digest()
        begun = time.process_time()
        hashlib.sha256(data).digest()
        return time.process_time() - begun


def inflate(path: Path, target: Path) -> float:
    """CPU seconds of the decompressor alone; the tar is written to `target` beside the clock."""
    with path.open("rb") as file:
        first = file.read(4)
        file.seek(0)
        spent = 0.0
        with target.open("wb", buffering=0) as out:
            read = _decoder(first, file)
            while True:
                begun = time.process_time()
                piece = read()
                spent += time.process_time() - begun
                if not piece:
                    return spent
                out.write(piece)


def _decoder(first: bytes, file: Any) -> Callable[[], bytes]:
    if first.startswith(b"\x1f\x8b"):
        from isal import igzip

        reader = igzip.IGzipFile(fileobj=file, mode="rb")  # type: ignore[no-untyped-call]
        return lambda: reader.read(OUT)
    if first == b"\x28\xb5\x2f\xfd":
        from backports import zstd

        opened = zstd.ZstdFile(file)
        return lambda: opened.read(OUT)
    return lambda: bytes(file.read(OUT))


def extract(tar: Path, target: Path) -> float:
    """CPU seconds of `tar -x`; several archives one behind the other are read through (-i)."""
    target.mkdir()
    before = _children()
    command = ["tar", "-xi", "--numeric-owner", "-p", "-C", str(target), "-f", str(tar)]
    # Devices and the like may fail where this is not root: that costs no less.
    subprocess.run(command, check=False, stderr=subprocess.DEVNULL)
    return _children() - before


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(blobs: Sequence[Path], folder: Path) -> Floor:
    largest = max(blobs, key=lambda path: path.stat().st_size)
    totals = dict.fromkeys(("copy", "hash_stored", "inflate", "hash_tar", "extract"), 0.0)
    longest = 0.0
    rest, tar = folder / "rest.tar", folder / "layer.tar"
    rest.touch()
    for blob in blobs:
        spent = {
            "copy": copy(blob, folder / "copy"),
            "hash_stored": digest(blob),
            "inflate": inflate(blob, tar),
            "hash_tar": digest(tar),
        }
        if blob is largest:
            spent["extract"] = extract(tar, folder / "largest")
            longest = max(spent.values())
        else:
            with rest.open("ab", buffering=0) as out, tar.open("rb") as one:
                shutil.copyfileobj(one, out, CHUNK)
        for kind, seconds in spent.items():
            totals[kind] += seconds
    totals["extract"] += extract(rest, folder / "rest")
    return Floor(**totals, longest=longest, cores=len(os.sched_getaffinity(0)))


def main() -> None:
    layout, tag, folder = Layout(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[3])
    folder.mkdir(exist_ok=True)
    layers = layout.document(layout.image(layout.tagged(tag))["digest"])["layers"]
    floor = measure([layout.blob_path(layer["digest"]) for layer in layers], folder)
    print(json.dumps({**asdict(floor), "cpu": floor.cpu_seconds, "seconds": floor.seconds}))


if __name__ == "__main__":
    main()
