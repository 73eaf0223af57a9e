"""Our own image builder: deterministic images in an OCI layout on disk.

Invariant: the same entries and options give the same bytes, hence the same digests, on any machine
with the same compressor. Nothing here is shared with the code under test.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.support.compressors import Compression, HashingSink
from tests.support.entries import Entry, write_tar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
REFERENCE_NAME = "org.opencontainers.image.ref.name"

Json = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """A layer blob of a layout, with what an image config needs to know of it."""

    descriptor: Json
    diff_id: str
    tar_size: int


class Layout:
    """An OCI image layout being filled; `tag` makes an image visible to peers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
        marker = path / "oci-layout"
        if not marker.exists():
            marker.write_text('{"imageLayoutVersion":"1.0.0"}')
        self._index = path / "index.json"
        if not self._index.exists():
            self._write_index([])

    def blob_path(self, digest: str) -> Path:
        return self.path / "blobs" / digest.replace(":", "/")

    def blob(self, digest: str) -> bytes:
        return self.blob_path(digest).read_bytes()

    def document(self, digest: str) -> Json:
        result: Json = json.loads(self.blob(digest))
        return result

    def add_blob(self, data: bytes, media_type: str) -> Json:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.blob_path(digest).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    def add_document(self, document: Json, media_type: str) -> Json:
        return self.add_blob(json.dumps(document, separators=(",", ":")).encode(), media_type)

    def add_layer(
        self,
        entries: Iterable[Entry],
        compression: Compression = "gzip-fast",
        *,
        docker: bool = False,
    ) -> Layer:
        temporary = self.path / "blobs" / f"new-{os.getpid()}"
        with temporary.open("wb") as out:
            sink = HashingSink(out, compression)
            write_tar(entries, sink)
            sink.finish()
        temporary.rename(self.blob_path(sink.digest))
        self._note_size(sink.digest, sink.tar_size)
        suffix = "" if compression == "none" else "zstd" if compression == "zstd" else "gzip"
        if docker:
            media_type = DOCKER_LAYER + (f".{suffix}" if suffix else "")
        else:
            media_type = OCI_LAYER + (f"+{suffix}" if suffix else "")
        descriptor = {"mediaType": media_type, "digest": sink.digest, "size": sink.size}
        return Layer(descriptor, sink.diff_id, sink.tar_size)

    def layer_sizes(self) -> dict[str, int]:
        """Uncompressed sizes by layer digest, kept beside the layout (peers ignore the file)."""
        path = self.path / "tar-sizes.json"
        sizes: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
        return sizes

    def _note_size(self, digest: str, tar_size: int) -> None:
        sizes = {**self.layer_sizes(), digest: tar_size}
        (self.path / "tar-sizes.json").write_text(json.dumps(sizes))

    def link_layer(self, source: Layout, descriptor: Json, diff_id: str) -> Layer:
        """Take a layer of another layout without copying it."""
        digest = descriptor["digest"]
        os.link(source.blob_path(digest), self.blob_path(digest))
        tar_size = source.layer_sizes()[digest]
        self._note_size(digest, tar_size)
        return Layer(descriptor, diff_id, tar_size)

    def add_image(
        self,
        layers: Sequence[Layer],
        *,
        platform: str = "linux/amd64",
        docker: bool = False,
        run: Mapping[str, Any] | None = None,
        **replaced: Any,
    ) -> Json:
        """Add config (`replaced` overrides its fields) and manifest; return its descriptor."""
        names = _platform(platform)
        config: Json = {
            "created": "2023-11-14T22:13:20Z",
            **names,
            "config": {
                "Cmd": ["/bin/sh"],
                "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
                **(run or {}),
            },
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
            "history": [{"created_by": f"layer {number}"} for number, _ in enumerate(layers)],
            **replaced,
        }
        media_type = DOCKER_MANIFEST if docker else OCI_MANIFEST
        manifest: Json = {
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": self.add_document(config, DOCKER_CONFIG if docker else OCI_CONFIG),
            "layers": [layer.descriptor for layer in layers],
        }
        return {**self.add_document(manifest, media_type), "platform": names}

    def add_attestation(self, subject: Json) -> Json:
        """Add a provenance entry as BuildKit does: unknown/unknown, in-toto layer."""
        statement = self.add_document(
            {"_type": "https://in-toto.io/Statement/v0.1"}, "application/vnd.in-toto+json"
        )
        config = self.add_document(
            {
                "architecture": "unknown",
                "os": "unknown",
                "rootfs": {"type": "layers", "diff_ids": [statement["digest"]]},
            },
            OCI_CONFIG,
        )
        manifest = self.add_document(
            {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "config": config,
                "layers": [statement],
            },
            OCI_MANIFEST,
        )
        return {
            **manifest,
            "annotations": {
                "vnd.docker.reference.digest": subject["digest"],
                "vnd.docker.reference.type": "attestation-manifest",
            },
            "platform": {"architecture": "unknown", "os": "unknown"},
        }

    def add_index(self, manifests: Sequence[Json], *, docker: bool = False) -> Json:
        media_type = DOCKER_INDEX if docker else OCI_INDEX
        document: Json = {"schemaVersion": 2, "mediaType": media_type, "manifests": list(manifests)}
        return self.add_document(document, media_type)

    def tag(self, name: str, descriptor: Json) -> None:
        entries = [
            entry for entry in self._entries() if entry["annotations"][REFERENCE_NAME] != name
        ]
        self._write_index([*entries, {**descriptor, "annotations": {REFERENCE_NAME: name}}])

    def tagged(self, name: str) -> Json:
        for entry in self._entries():
            if entry["annotations"][REFERENCE_NAME] == name:
                return {key: value for key, value in entry.items() if key != "annotations"}
        raise KeyError(f"{self.path} has no image {name}")

    @property
    def tags(self) -> list[str]:
        return [entry["annotations"][REFERENCE_NAME] for entry in self._entries()]

    def _entries(self) -> list[Json]:
        entries: list[Json] = json.loads(self._index.read_text())["manifests"]
        return entries

    def _write_index(self, entries: list[Json]) -> None:
        document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
        temporary = self._index.with_suffix(".new")
        temporary.write_text(json.dumps(document))
        temporary.replace(self._index)

    def children(self, descriptor: Json) -> list[Json]:
        """What a manifest or index names."""
        document = self.document(descriptor["digest"])
        if "manifests" in document:
            named: list[Json] = document["manifests"]
            return named
        return [document["config"], *document["layers"]]

    def image(self, descriptor: Json, platform: str = "linux/amd64") -> Json:
        """The manifest descriptor for a platform, through nested indexes."""
        if not is_index(descriptor):
            return descriptor
        for child in self.children(descriptor):
            if is_index(child):
                with contextlib.suppress(KeyError):
                    return self.image(child, platform)
            elif child.get("platform") == _platform(platform):
                return child
        raise KeyError(f"no image for {platform}")

    def content_size(self, descriptor: Json) -> int:
        """Bytes of the blobs (config and layers, each digest once) that a pull must fetch."""
        return sum({child["digest"]: child["size"] for child in self.children(descriptor)}.values())


def is_index(descriptor: Json) -> bool:
    return descriptor["mediaType"] in (OCI_INDEX, DOCKER_INDEX)


def is_manifest(descriptor: Json) -> bool:
    return descriptor["mediaType"] in (OCI_MANIFEST, DOCKER_MANIFEST)


def _platform(text: str) -> Json:
    parts = text.split("/")
    names = {"architecture": parts[1], "os": parts[0]}
    return {**names, "variant": parts[2]} if len(parts) > 2 else names
