"""An OCI image layout on disk, in a directory or an archive, as an origin.

Invariant: the name picks exactly one image or index; of several that fit nothing is picked.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from stowray.pipeline import media_types, strict_json
from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.documents import MANIFEST_LIMIT, parse_layout_index
from stowray.pipeline.errors import (
    DigestMismatchError,
    ManifestError,
    NotFoundError,
    SizeMismatchError,
    escape,
)
from stowray.pipeline.file_tree import read_small
from stowray.pipeline.origin import Resolved
from stowray.pipeline.platform import is_image
from stowray.pipeline.strict_json import JSONError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stowray.pipeline.file_tree import Extent, FileTree
    from stowray.pipeline.source import DiskImage, Source

REFERENCE_NAME: Final = "org.opencontainers.image.ref.name"
# What containerd and BuildKit write beside it: the whole reference.
CONTAINERD_NAME: Final = "io.containerd.image.name"
LAYOUT_VERSION: Final = "1.0.0"
_MARKER_LIMIT: Final = 64 << 10
_INDEX_LIMIT: Final = 64 << 20


class LayoutOrigin:
    """Answers for one image of a layout; ``files`` gives the layout as it is at that moment."""

    def __init__(self, source: DiskImage, files: Callable[[], FileTree]) -> None:
        self._source = source
        self._files = files

    def resolve(self, reference: Source, **_: Callable[[], object]) -> Resolved:
        """Return the entry of ``index.json`` that the source names."""
        entries = self._choose(self._index(self._files()))
        if len(entries) == 1:
            return Resolved(entries[0], entries[0].data, self._source.name)
        # Several platforms of one name, each listed by itself: together they are an index.
        body = _index_of(entries)
        found = Descriptor(media_types.OCI_INDEX, Digest.of(body), len(body))
        return Resolved(found, body, self._source.name)

    def manifest(
        self,
        reference: Source,
        digest: Digest,
        size: int | None = None,
        **_: Callable[[], object],
    ) -> bytes:
        """Return the document ``digest``, hashed."""
        files = self._files()
        body = read_small(files, _blob_name(digest), MANIFEST_LIMIT)
        if body is None:
            resolved = self.resolve(reference)
            if resolved.body is None or resolved.descriptor.digest != digest:
                raise NotFoundError(digest, self._source.name)
            body = resolved.body
        return checked(body, digest, size)

    def open_blob(
        self,
        reference: Source,
        descriptor: Descriptor,
        offset: int = 0,
        *,
        cancelled: Callable[[], bool] | None = None,
    ) -> Extent:
        """Return the blob's bytes from ``offset`` on, not verified."""
        extent = self._files().open(_blob_name(descriptor.digest), offset)
        if extent is None:
            raise NotFoundError(descriptor.digest, self._source.name)
        return extent

    def _index(self, files: FileTree) -> tuple[Descriptor, ...]:
        """Return the entries of ``index.json`` that may be images."""
        self._check_marker(files)
        where = f"{files.path}/index.json"
        body = read_small(files, "index.json", _INDEX_LIMIT)
        if body is None:
            raise ManifestError(where, "missing: not a complete OCI image layout")
        return tuple(entry for entry in parse_layout_index(body, where) if is_image(entry))

    def _check_marker(self, files: FileTree) -> None:
        where = f"{files.path}/oci-layout"
        body = read_small(files, "oci-layout", _MARKER_LIMIT)
        if body is None:
            raise ManifestError(where, "missing: not an OCI image layout")
        try:
            version = strict_json.text(strict_json.parse_object(body), "imageLayoutVersion")
        except JSONError as error:
            raise ManifestError(where, str(error)) from None
        # image-layout.md: the version changes only with an incompatible change of the layout.
        if version.partition(".")[0] != LAYOUT_VERSION.partition(".")[0]:
            raise ManifestError(where, f"layout version {escape(version[:40])} is not supported")

    def _choose(self, entries: Sequence[Descriptor]) -> list[Descriptor]:
        """Return the entry of the wanted name, or the entries that are its platforms."""
        wanted = self._source.image
        named = [entry for entry in entries if not wanted or wanted in _names(entry)]
        distinct = list({entry.digest: entry for entry in named}.values())
        if not distinct:
            what = f"image {escape(wanted)}" if wanted else "an image"
            raise NotFoundError(what, f"{self._source.name}{_listed(entries)}")
        if len(distinct) > 1:
            platforms = {entry.platform for entry in distinct}
            names = {entry.annotation(REFERENCE_NAME) for entry in distinct}
            if None in platforms or len(platforms) < len(distinct) or len(names) > 1:
                raise NotFoundError(
                    f"one image{' named ' + escape(wanted) if wanted else ''}",
                    f"{self._source.name}{_listed(distinct)}; append :NAME to choose",
                )
        return distinct


def checked(body: bytes, digest: Digest, size: int | None) -> bytes:
    """Return ``body`` if it is what was asked for, or raise."""
    if size is not None and len(body) != size:
        raise SizeMismatchError(digest, size, len(body))
    if not digest.matches(body):
        raise DigestMismatchError(digest, digest, Digest.of(body, digest.algorithm))
    return body


def _blob_name(digest: Digest) -> str:
    return f"blobs/{digest.algorithm}/{digest.encoded}"


def _names(entry: Descriptor) -> list[str | None]:
    return [entry.annotation(REFERENCE_NAME), entry.annotation(CONTAINERD_NAME)]


def _listed(entries: Sequence[Descriptor]) -> str:
    """Return the names that a layout holds, as the end of a sentence."""
    names = dict.fromkeys(name for entry in entries for name in _names(entry)[:1] if name)
    shown = ", ".join(escape(name) for name in list(names)[:20])
    return f", which holds {shown}" if shown else f", which holds {len(entries)} without a name"


def _index_of(entries: Sequence[Descriptor]) -> bytes:
    """Return the bytes of an index of ``entries``: the same for the same entries."""
    manifests = []
    for entry in entries:
        fields = {"mediaType": entry.media_type, "digest": str(entry.digest), "size": entry.size}
        if entry.platform is not None:
            fields["platform"] = entry.platform.to_document()
        manifests.append(fields)
    document = {
        "schemaVersion": 2,
        "mediaType": media_types.OCI_INDEX,
        "manifests": manifests,
    }
    return json.dumps(document, separators=(",", ":")).encode("utf-8")
