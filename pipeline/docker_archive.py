"""The archive that ``docker save`` writes, as an origin of an OCI image.

Invariant: the manifest that is made up for the archive depends only on the config and the stored
layers, so the same archive is the same image, with the same digest, everywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from typing import TYPE_CHECKING, Any, Final

from stowray.pipeline import media_types, strict_json
from stowray.pipeline.compress import MAGIC_SIZE, is_gzip, is_zstd
from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.documents import CONFIG_LIMIT, LAYERS_LIMIT, parse_config
from stowray.pipeline.errors import InvalidReferenceError, ManifestError, NotFoundError, escape
from stowray.pipeline.file_tree import read_small
from stowray.pipeline.oci_layout import checked
from stowray.pipeline.origin import Resolved
from stowray.pipeline.reference import Reference
from stowray.pipeline.strict_json import JSONError
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stowray.pipeline.file_tree import Extent, FileTree
    from stowray.pipeline.source import DiskImage, Source

MANIFEST_NAME: Final = "manifest.json"
_LIST_LIMIT: Final = 64 << 20
_BLOB = re.compile(r"blobs/sha256/([a-f0-9]{64})")
_KEYS: Final = ("Config", "Layers", "RepoTags")


@dataclass(frozen=True, slots=True)
class _Item:
    """One image of ``manifest.json``: names of members, and tags."""

    config: str
    layers: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Saved:
    """The chosen image: its made-up manifest, and which member holds which blob."""

    files: FileTree
    manifest: bytes
    digest: Digest
    members: dict[Digest, str]


class DockerArchiveOrigin:
    """Answers for one image of an archive; ``files`` gives the archive as it is at that moment."""

    def __init__(self, source: DiskImage, files: Callable[[], FileTree]) -> None:
        self._source = source
        self._files = files
        self._lock = threading.Lock()
        self._saved: _Saved | None = None

    def resolve(self, reference: Source, **_: Callable[[], object]) -> Resolved:
        """Return the made-up manifest of the image that the source names."""
        saved = self._load()
        found = Descriptor(media_types.OCI_MANIFEST, saved.digest, len(saved.manifest))
        return Resolved(found, saved.manifest, self._source.name)

    def manifest(
        self,
        reference: Source,
        digest: Digest,
        size: int | None = None,
        **_: Callable[[], object],
    ) -> bytes:
        """Return the manifest or config ``digest``, hashed."""
        saved = self._load()
        if digest == saved.digest:
            return checked(saved.manifest, digest, size)
        member = saved.members.get(digest)
        body = None if member is None else read_small(saved.files, member, CONFIG_LIMIT)
        if body is None:
            raise NotFoundError(digest, self._source.name)
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
        saved = self._load()
        member = saved.members.get(descriptor.digest)
        extent = None if member is None else saved.files.open(member, offset)
        if extent is None:
            raise NotFoundError(descriptor.digest, self._source.name)
        return extent

    def _load(self) -> _Saved:
        """Return the image, read anew when the archive is another one than the last time."""
        files = self._files()
        with self._lock:
            if self._saved is None or self._saved.files is not files:
                self._saved = self._read(files)
            return self._saved

    def _read(self, files: FileTree) -> _Saved:
        item = self._choose(self._items(files))
        body = read_small(files, item.config, CONFIG_LIMIT)
        if body is None:
            raise ManifestError(files.path, f"member {escape(item.config)} (a config) is missing")
        config_digest = Digest.of(body)
        diff_ids = parse_config(body, config_digest).diff_ids
        if len(item.layers) != len(diff_ids):
            raise ManifestError(
                files.path,
                f"{len(item.layers)} layers in {MANIFEST_NAME} "
                f"but {len(diff_ids)} diff IDs in the config",
            )
        members = {config_digest: item.config}
        layers = []
        for name, diff_id in zip(item.layers, diff_ids, strict=True):
            layer = _layer(files, name, diff_id)
            members[layer.digest] = name
            layers.append(layer)
        config = Descriptor(media_types.OCI_CONFIG, config_digest, len(body))
        manifest = _manifest(config, layers)
        return _Saved(files, manifest, Digest.of(manifest), members)

    def _items(self, files: FileTree) -> list[_Item]:
        """Return the images that ``manifest.json`` lists."""
        where = f"{files.path}/{MANIFEST_NAME}"
        body = read_small(files, MANIFEST_NAME, _LIST_LIMIT)
        if body is None:
            raise ManifestError(where, "missing: not an archive of docker save (1.10 or later)")
        try:
            value = strict_json.parse(body)
            if not isinstance(value, list):
                raise JSONError("not an array of images")
            return [_item(entry) for entry in value]
        except JSONError as error:
            raise ManifestError(where, str(error)) from None

    def _choose(self, items: Sequence[_Item]) -> _Item:
        """Return the image of the wanted tag or position (``@0``), or the only one."""
        wanted = self._source.image
        position = wanted.removeprefix("@")
        if wanted.startswith("@") and position.isascii() and position.isdecimal():
            if len(position) < 6 and int(position) < len(items):
                return items[int(position)]
            found = []
        elif wanted:
            canonical = _canonical(wanted)
            found = [item for item in items if canonical in map(_canonical, item.tags)]
        else:
            found = list(items)
        distinct = list(dict.fromkeys(found))
        if len(distinct) == 1:
            return distinct[0]
        tags = [escape(tag) for item in items for tag in item.tags][:20]
        listed = (
            f", which holds {', '.join(tags)}" if tags else f", which holds {len(items)} images"
        )
        if distinct:
            raise NotFoundError("one image", f"{self._source.name}{listed}; append :NAME or :@0")
        what = f"image {escape(wanted)}" if wanted else "an image"
        raise NotFoundError(what, f"{self._source.name}{listed}")


def _item(value: Any) -> _Item:
    if not isinstance(value, dict):
        raise JSONError("an image is not an object")
    strict_json.check_case(value, _KEYS)
    layers = strict_json.texts(value, "Layers")
    if len(layers) > LAYERS_LIMIT:
        raise JSONError(f"an image with more than {LAYERS_LIMIT} layers")
    config = strict_json.required_text(value, "Config")
    return _Item(config, layers, strict_json.texts(value, "RepoTags"))


def _canonical(tag: str) -> str:
    """Return a tag as Docker understands it; one that it would refuse stands for itself."""
    try:
        return Reference.parse(tag).canonical
    except InvalidReferenceError:
        return tag


def _layer(files: FileTree, name: str, diff_id: Digest) -> Descriptor:
    """Return the descriptor of a layer as it is stored."""
    extent = files.open(name)
    if extent is None:
        raise ManifestError(files.path, f"member {escape(name)} (a layer) is missing")
    with extent:
        head = extent.read(MAGIC_SIZE)
        if is_gzip(head):
            media_type = media_types.OCI_LAYER_GZIP
        elif is_zstd(head):
            media_type = media_types.OCI_LAYER_ZSTD
        else:
            # A plain layer's digest is its diff ID.
            return Descriptor(media_types.OCI_LAYER, diff_id, extent.size)
        digest = _named_digest(name) or _hash(head, extent)
        return Descriptor(media_type, digest, extent.size)


def _named_digest(name: str) -> Digest | None:
    """Return the digest that a member of Docker's newer layout bears as its name.

    Like a diff ID it is only a claim, which whoever takes the blob verifies: nothing is read twice.
    """
    match = _BLOB.fullmatch(name)
    return Digest(f"sha256:{match[1]}") if match else None


def _hash(head: bytes, extent: Extent) -> Digest:
    """Return the digest of a compressed layer of another tool's archive, which nothing names."""
    hasher = hashlib.sha256(head)
    while chunk := extent.read():
        hasher.update(chunk)
    return Digest(f"sha256:{hasher.hexdigest()}")


def _manifest(config: Descriptor, layers: Sequence[Descriptor]) -> bytes:
    """Return the bytes of the OCI manifest of these blobs."""
    document = {
        "schemaVersion": 2,
        "mediaType": media_types.OCI_MANIFEST,
        "config": config.to_dict(),
        "layers": [layer.to_dict() for layer in layers],
    }
    return json.dumps(document, separators=(",", ":")).encode("ascii")
