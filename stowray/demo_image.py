"""A small image and a registry on loopback that serves it: what ``stowray demo`` pulls.

The registry answers only what a pull asks (distribution-spec, "Pull"), from memory.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from stowray.pipeline.platform import Platform

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = "stowray/demo"
TAG = "1"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
_EPOCH = 1_700_000_000


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _layer(entries: dict[str, bytes | str | None]) -> bytes:
    """Return a tar: bytes make a file, text a symlink, None a directory."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in entries.items():
            entry = tarfile.TarInfo(name)
            entry.mtime = _EPOCH
            if content is None:
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(entry)
            elif isinstance(content, str):
                entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, content, 0o777
                archive.addfile(entry)
            else:
                entry.size, entry.mode = len(content), 0o644
                archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def make_demo_image() -> tuple[str, dict[str, bytes]]:
    """Return the manifest's digest and all blobs by digest; three layers build on each other."""
    words = "\n".join(f"line {number} of a file that compresses" for number in range(40_000))
    tars = [
        _layer(
            {
                "etc": None,
                "etc/hostname": b"first\n",
                "usr": None,
                "usr/share": None,
                "usr/share/words": words.encode(),
                "srv": None,
                "srv/old": b"removed by the top layer\n",
            }
        ),
        _layer({"etc": None, "etc/hostname": b"stowed\n", "usr": None, "usr/words": "share/words"}),
        _layer({"srv": None, "srv/.wh.old": b"", "srv/README": b"Hello from the top layer.\n"}),
    ]
    blobs: dict[str, bytes] = {}
    layers = []
    for tar in tars:
        packed = gzip.compress(tar, 6, mtime=0)
        blobs[_digest(packed)] = packed
        layers.append({"mediaType": _LAYER, "digest": _digest(packed), "size": len(packed)})
    platform = Platform.host().normalized()
    config: dict[str, Any] = {
        "os": platform.os,
        "architecture": platform.architecture,
        "config": {"Cmd": ["cat", "/srv/README"]},
        "rootfs": {"type": "layers", "diff_ids": [_digest(tar) for tar in tars]},
    }
    if platform.variant:
        config["variant"] = platform.variant
    packed_config = json.dumps(config).encode()
    blobs[_digest(packed_config)] = packed_config
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": {
                "mediaType": _CONFIG,
                "digest": _digest(packed_config),
                "size": len(packed_config),
            },
            "layers": layers,
        }
    ).encode()
    blobs[_digest(manifest)] = manifest
    return _digest(manifest), blobs


@contextmanager
def serve_demo_image() -> Iterator[tuple[str, list[str]]]:
    """Serve the demo image on loopback; yield its reference and the list of requests so far."""
    manifest, blobs = make_demo_image()
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            requests.append(f"{self.command} {self.path}")
            name = self.path.rpartition("/")[2]
            digest = manifest if name == TAG else name
            data = b"{}" if self.path == "/v2/" else blobs.get(digest)
            self.send_response(200 if data is not None else 404)
            self.send_header("Content-Length", str(len(data or b"")))
            if "/manifests/" in self.path:
                self.send_header("Content-Type", _MANIFEST)
                self.send_header("Docker-Content-Digest", digest)
            self.end_headers()
            if body and data is not None:
                self.wfile.write(data)

        def log_message(self, *_arguments: object) -> None:
            """Say nothing: the demo counts requests itself."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}/{REPOSITORY}:{TAG}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
