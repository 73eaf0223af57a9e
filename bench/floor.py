"""The least that must happen to a layer: receive, hash, inflate, hash again, `tar -x`.

No store, no proof kept, no whiteouts, no order: a number to compare with, not a contender.

    python -m bench.floor HOST REPOSITORY TAG DESTINATION
"""

from __future__ import annotations

import hashlib
import http.client
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from tests.support.images import DOCKER_INDEX, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST

CHUNK = 1 << 20
ACCEPT = f"{OCI_INDEX}, {OCI_MANIFEST}, {DOCKER_INDEX}, {DOCKER_MANIFEST}"


def get(connection: http.client.HTTPConnection, target: str) -> http.client.HTTPResponse:
    connection.request("GET", target, headers={"Accept": ACCEPT})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{target}: {response.status}")
    return response


def inflater(first: bytes) -> Any:
    if first.startswith(b"\x1f\x8b"):
        from isal import isal_zlib

        return isal_zlib.decompressobj(31)
    if first.startswith(b"\x28\xb5\x2f\xfd"):
        from backports import zstd

        return zstd.ZstdDecompressor()
    return None


def layer(host: str, repository: str, digest: str, target: Path) -> None:
    target.mkdir(parents=True)
    response = get(http.client.HTTPConnection(host), f"/v2/{repository}/blobs/{digest}")
    packed, plain = hashlib.sha256(), hashlib.sha256()
    command = ["tar", "-x", "--numeric-owner", "-p", "-C", str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as tar:
        if tar.stdin is None:
            raise SystemExit("tar has no input")
        inflate: Any = None
        first = True
        while data := response.read(CHUNK):
            packed.update(data)
            if first:
                inflate, first = inflater(data), False
            while data:
                out = data if inflate is None else inflate.decompress(data)
                plain.update(out)
                tar.stdin.write(out)
                # A gzip member that ends inside this piece is followed by the next one.
                data = inflate.unused_data if inflate is not None and inflate.eof else b""
                if data:
                    inflate = inflater(data)
    if digest != f"sha256:{packed.hexdigest()}":
        raise SystemExit(f"{digest}: other bytes came")


def main() -> None:
    host, repository, tag, destination = sys.argv[1:]
    document = json.load(get(http.client.HTTPConnection(host), f"/v2/{repository}/manifests/{tag}"))
    for entry in document.get("manifests", ()):
        if entry["platform"]["architecture"] == "amd64":
            connection = http.client.HTTPConnection(host)
            document = json.load(get(connection, f"/v2/{repository}/manifests/{entry['digest']}"))
            break
    pending = [(number, entry["digest"]) for number, entry in enumerate(document["layers"])]
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                if not pending:
                    return
                number, digest = pending.pop(0)
            layer(host, repository, digest, Path(destination) / str(number))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
