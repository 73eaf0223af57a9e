"""An image in the store as one tar: an OCI image layout, readable as `docker save`'s if wanted.

Invariant: the same image under the same name makes the same bytes, everywhere and at any time; each
blob in it is the stored one, proven before and byte for byte.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from stowray.pipeline import media_types
from stowray.pipeline.documents import MANIFEST_LIMIT, parse_document
from stowray.pipeline.errors import CancelledError, NotFoundError, StorageError
from stowray.pipeline.files import write_all
from stowray.pipeline.layout import LAYOUT_FILE, REF_NAME
from stowray.pipeline.oci_layout import CONTAINERD_NAME
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.image import Descriptor, Image
    from stowray.pipeline.store import Store

_BLOCK = 512
_RECORD = 20 * _BLOCK
_COPY_SIZE = 4 << 20


@dataclass(frozen=True, slots=True)
class ImageArchive:
    """What of an image goes out, and under which name.

    With ``whole`` the archive's entry is what the reference resolved to, so that an index keeps its
    digest although other platforms' images are missing; else it is the platform's own manifest.
    ``docker`` adds the list that `docker load` reads.
    """

    store: Store
    image: Image
    name: str = ""
    whole: bool = False
    docker: bool = False

    @property
    def root(self) -> Descriptor:
        """The descriptor that the archive's index names."""
        return self.image.resolved if self.whole else self.image.manifest_descriptor

    def blobs(self) -> list[Descriptor]:
        """Return what the archive consists of, documents first, each digest once."""
        found: dict[Digest, Descriptor] = {}
        if self.whole:
            self._add_indexes(self.image.resolved, found)
        manifest = self.image.manifest
        for descriptor in (self.image.manifest_descriptor, manifest.config, *manifest.layers):
            found.setdefault(descriptor.digest, descriptor)
        return list(found.values())

    def index(self) -> bytes:
        """Return the archive's ``index.json``."""
        root = self.root
        entry: dict[str, Any] = {
            "mediaType": root.media_type,
            "digest": str(root.digest),
            "size": root.size,
        }
        if self.name:
            # containerd goes by the first, podman by the second. The second's grammar (image-spec
            # annotations.md) forbids some references; podman takes them all the same.
            entry["annotations"] = {CONTAINERD_NAME: self.name, REF_NAME: self.name}
        if root.media_type not in media_types.INDEX_TYPES:
            entry["platform"] = self.image.platform.to_document()
        return _compact(
            {"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": [entry]}
        )

    def docker_list(self) -> bytes:
        """Return the ``manifest.json`` of `docker save`, which names members of this archive."""
        manifest = self.image.manifest
        # A reference by digest is no tag: Docker refuses it there.
        tags = [self.name] if self.name and "@" not in self.name else []
        return _compact(
            [
                {
                    "Config": member_name(manifest.config.digest),
                    "RepoTags": tags,
                    "Layers": [member_name(layer.digest) for layer in manifest.layers],
                }
            ]
        )

    def write(self, descriptor: int, cancelled: Callable[[], bool]) -> int:
        """Write the archive to an open file or pipe; return its size. OSError is the caller's."""
        written = 0
        documents = {"oci-layout": LAYOUT_FILE, "index.json": self.index()}
        if self.docker:
            documents["manifest.json"] = self.docker_list()
        for name, data in documents.items():
            block = _header(name, len(data)) + data + bytes(-len(data) % _BLOCK)
            write_all(descriptor, block)
            written += len(block)
        for directory in self._directories():
            block = _header(directory, 0, directory=True)
            write_all(descriptor, block)
            written += len(block)
        for blob in self.blobs():
            header = _header(member_name(blob.digest), blob.size)
            write_all(descriptor, header)
            self._copy(blob, descriptor, cancelled)
            padding = bytes(-blob.size % _BLOCK)
            write_all(descriptor, padding)
            written += len(header) + blob.size + len(padding)
        written += 2 * _BLOCK
        ending = bytes(2 * _BLOCK + -written % _RECORD)
        write_all(descriptor, ending)
        return written - 2 * _BLOCK + len(ending)

    def _add_indexes(self, descriptor: Descriptor, found: dict[Digest, Descriptor]) -> None:
        """Collect ``descriptor`` and the indexes below it that are here."""
        if descriptor.media_type not in media_types.INDEX_TYPES or descriptor.digest in found:
            return
        found[descriptor.digest] = descriptor
        body = self.store.read_blob(descriptor.digest, MANIFEST_LIMIT)
        document = parse_document(body, descriptor.media_type, descriptor.digest)
        for child in getattr(document, "manifests", ()):
            if child.media_type in media_types.INDEX_TYPES and self.store.has(
                child.digest, child.size
            ):
                self._add_indexes(child, found)

    def _directories(self) -> Iterator[str]:
        yield "blobs"
        for algorithm in sorted({blob.digest.algorithm for blob in self.blobs()}):
            yield f"blobs/{algorithm}"

    def _copy(self, blob: Descriptor, target: int, cancelled: Callable[[], bool]) -> None:
        """Let the kernel copy one blob."""
        source = self.store.open_blob(blob.digest)
        try:
            position = 0
            while position < blob.size:
                if cancelled():
                    raise CancelledError("the delivery")
                count = min(_COPY_SIZE, blob.size - position)
                sent = os.sendfile(target, source, position, count)
                if sent == 0:
                    reason = f"{blob.digest} was cut short: run `stowray verify --repair`"
                    raise StorageError(str(self.store.path), reason)
                position += sent
        finally:
            os.close(source)

    def check(self) -> None:
        """Raise NotFoundError unless all blobs are here, proven and of the promised size."""
        for blob in self.blobs():
            if not self.store.has(blob.digest, blob.size):
                raise NotFoundError(str(blob.digest), str(self.store.path))


def member_name(digest: Digest) -> str:
    """Return where a blob lies in an image layout."""
    return f"blobs/{digest.algorithm}/{digest.encoded}"


def _compact(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _header(name: str, size: int, *, directory: bool = False) -> bytes:
    """Return a tar header that says nothing of this machine or of now."""
    import tarfile

    entry = tarfile.TarInfo(name)
    entry.size = size
    entry.type = tarfile.DIRTYPE if directory else tarfile.REGTYPE
    entry.mode = 0o755 if directory else 0o444
    # GNU's form holds what ustar's cannot: members of 8 GiB, names of a sha512.
    return entry.tobuf(tarfile.GNU_FORMAT)
