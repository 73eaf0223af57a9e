"""Manifests, indexes and configs, read from the exact bytes that their digest covers.

Invariant: a document is accepted only if every tool would see the same image in it
(CVE-2021-41190); whatever is wrong with it is one ``ManifestError``, never another exception.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from typing import TYPE_CHECKING, Any, Final

from stowray.pipeline import media_types, strict_json
from stowray.pipeline.descriptor import Descriptor, ImageConfig, Index, Manifest
from stowray.pipeline.digest import Digest, is_unsupported
from stowray.pipeline.errors import InvalidDigestError, ManifestError, PlatformError, escape
from stowray.pipeline.platform import Platform
from stowray.pipeline.strict_json import JSONError

if TYPE_CHECKING:
    from collections.abc import Sequence

MANIFEST_LIMIT: Final = 4 * 1024 * 1024
CONFIG_LIMIT: Final = 4 * 1024 * 1024
# An index may list indexes: how deep that is followed, and how many entries one may have.
INDEX_DEPTH_LIMIT: Final = 8
INDEX_ENTRIES_LIMIT: Final = 1000
LAYERS_LIMIT: Final = 1000
# The list of a layout is no index of one image but of all that were put there.
LAYOUT_ENTRIES_LIMIT: Final = 100_000

_INDEX: Final = "index"
_MANIFEST: Final = "manifest"
# Fields that make a document one kind or another (as ValidateUnambiguousManifestFormat has them).
_KIND_FIELDS: Final = frozenset({"config", "fsLayers", "history", "layers", "manifests"})
_ALLOWED: Final = {_INDEX: frozenset({"manifests"}), _MANIFEST: frozenset({"config", "layers"})}
_DOCUMENT_KEYS: Final = (
    *_KIND_FIELDS,
    "schemaVersion",
    "mediaType",
    "artifactType",
    "subject",
    "annotations",
)
_DESCRIPTOR_KEYS: Final = (
    "mediaType",
    "digest",
    "size",
    "urls",
    "annotations",
    "data",
    "artifactType",
    "platform",
)
_PLATFORM_KEYS: Final = ("architecture", "os", "os.version", "os.features", "variant")
_CONFIG_KEYS: Final = (*_PLATFORM_KEYS, "rootfs")
_ROOTFS_KEYS: Final = ("type", "diff_ids")
_SCHEMA_1: Final = (
    "a schema 1 manifest, which is no longer supported; push the image again with a current tool, "
    "or copy it with `skopeo copy --format v2s2`"
)


def parse_document(body: bytes, media_type: str, digest: Digest | str) -> Index | Manifest:
    """Return the index or manifest in ``body``, served as ``media_type`` (may be empty)."""
    _check_length(body, MANIFEST_LIMIT, digest)
    try:
        fields = strict_json.parse_object(body)
        kind, own_type = _classify(fields, media_types.bare(media_type))
        return _index(fields, own_type) if kind == _INDEX else _manifest(fields, own_type)
    except JSONError as error:
        raise ManifestError(str(digest), str(error)) from None


def parse_layout_index(body: bytes, where: str) -> tuple[Descriptor, ...]:
    """Return the entries of a layout's ``index.json``, which may list many images."""
    try:
        fields = strict_json.parse_object(body)
        _, own_type = _classify(fields, media_types.OCI_INDEX)
        return _index(fields, own_type, LAYOUT_ENTRIES_LIMIT).manifests
    except JSONError as error:
        raise ManifestError(where, str(error)) from None


def parse_config(body: bytes, digest: Digest | str) -> ImageConfig:
    """Return the image config in ``body``."""
    _check_length(body, CONFIG_LIMIT, digest)
    try:
        return _config(strict_json.parse_object(body), body)
    except JSONError as error:
        raise ManifestError(str(digest), f"config: {error}") from None


def detect_media_type(body: bytes) -> str:
    """Return the media type that stored bytes have by themselves; empty if they are no manifest."""
    try:
        fields = strict_json.parse_object(body)
        named = media_types.bare(strict_json.text(fields, "mediaType"))
        version = fields.get("schemaVersion")
        if _is_schema_1(fields, named):
            signed = "signatures" in fields
            return media_types.DOCKER_SCHEMA_1_SIGNED if signed else media_types.DOCKER_SCHEMA_1
        if version not in (None, 2):
            return ""
        kind = _kind_of_type(named) or _kind_of_fields(fields)
        return _own_type(fields, named, "", kind) if kind else ""
    except JSONError:
        return ""


def check_image(manifest: Manifest, digest: Digest | str) -> None:
    """Raise unless this is an image whose layers can all be applied; asked before any fetch."""
    config_type = manifest.config.media_type.lower()
    if config_type not in media_types.CONFIG_TYPES:
        what = manifest.artifact_type or manifest.config.media_type
        raise ManifestError(
            str(digest), f"no container image but an artifact of type {escape(what)}"
        )
    check_layers(manifest, digest)


def check_layers(manifest: Manifest, digest: Digest | str = "manifest") -> None:
    """Raise for the first layer whose media type is not understood."""
    for layer in manifest.layers:
        if media_types.is_layer(layer.media_type):
            continue
        named = escape(layer.media_type)
        if media_types.is_encrypted(layer.media_type):
            raise ManifestError(
                str(digest), f"layer {layer.digest} is encrypted ({named}), which is not supported"
            )
        raise ManifestError(
            str(digest), f"layer {layer.digest} has the unsupported media type {named}"
        )


def check_diff_ids(manifest: Manifest, config: ImageConfig, digest: Digest | str) -> None:
    """Raise unless the config names exactly one diff ID for each layer."""
    layers, diff_ids = len(manifest.layers), len(config.diff_ids)
    if layers != diff_ids:
        raise ManifestError(
            str(digest), f"{layers} layers in the manifest but {diff_ids} diff IDs in the config"
        )


def check_platform(config: ImageConfig, wanted: Platform, *, explicit: bool = True) -> None:
    """Raise ``PlatformError`` unless the config's platform runs on ``wanted``.

    A config that names no platform is accepted only when the user named none either.
    """
    if not config.os and not config.architecture:
        if explicit:
            raise PlatformError(str(wanted), "an image that names no platform")
        return
    if not wanted.accepts(config.platform):
        raise PlatformError(str(wanted), str(config.platform))


def _check_length(body: bytes, limit: int, digest: Digest | str) -> None:
    if len(body) > limit:
        raise ManifestError(str(digest), f"longer than {limit} bytes")


def _is_schema_1(fields: dict[str, Any], named: str) -> bool:
    version = fields.get("schemaVersion")
    return (
        named in media_types.SCHEMA_1_TYPES
        or (type(version) is int and version == 1)
        or any(key.casefold() == "fslayers" for key in fields)
    )


def _classify(fields: dict[str, Any], served_as: str) -> tuple[str, str]:
    """Return kind and media type of a document; all that speaks about its kind must agree."""
    named = media_types.bare(strict_json.text(fields, "mediaType"))
    if served_as in media_types.SCHEMA_1_TYPES:
        raise JSONError(_SCHEMA_1)
    strict_json.check_case(fields, _DOCUMENT_KEYS)
    if _is_schema_1(fields, named) and not _kind_of_fields(fields):
        raise JSONError(_SCHEMA_1)
    version = fields.get("schemaVersion", 2)
    # Only 2 exists. Absent is let pass: the kind is known all the same, and every peer pulls it.
    if type(version) is not int or version != 2:
        raise JSONError("schemaVersion is not 2")
    if served_as not in media_types.UNSPECIFIC_TYPES and not _kind_of_type(served_as):
        raise JSONError(f"served as {escape(served_as[:100])}, which is no manifest or index")
    if named and not _kind_of_type(named):
        raise JSONError(f"mediaType {escape(named[:100])} is no manifest or index")
    kinds = {
        kind
        for kind in (_kind_of_type(served_as), _kind_of_type(named), _kind_of_fields(fields))
        if kind
    }
    if len(kinds) != 1:
        reason = "both an index and a manifest" if kinds else "neither an index nor a manifest"
        raise JSONError(f"ambiguous: {reason}" if kinds else reason)
    kind = kinds.pop()
    alien = sorted(_KIND_FIELDS.intersection(fields) - _ALLOWED[kind])
    if alien:
        raise JSONError(f"ambiguous: an {kind} with {', '.join(alien)}".replace("an m", "a m"))
    return kind, _own_type(fields, named, served_as, kind)


def _kind_of_type(media_type: str) -> str:
    if media_type in media_types.INDEX_TYPES:
        return _INDEX
    return _MANIFEST if media_type in media_types.MANIFEST_TYPES else ""


def _kind_of_fields(fields: dict[str, Any]) -> str:
    """Return the kind that the fields alone make the document."""
    if "manifests" in fields:
        return _INDEX
    return _MANIFEST if "layers" in fields or "config" in fields else ""


def _own_type(fields: dict[str, Any], named: str, served_as: str, kind: str) -> str:
    """Return the document's media type: its own word, the server's, or what its parts are."""
    if named:
        return named
    if _kind_of_type(served_as) == kind:
        return served_as
    config = fields.get("config")
    if kind == _MANIFEST and isinstance(config, dict):
        if config.get("mediaType") == media_types.DOCKER_CONFIG:
            return media_types.DOCKER_MANIFEST
        return media_types.OCI_MANIFEST
    return media_types.OCI_INDEX if kind == _INDEX else media_types.OCI_MANIFEST


def _index(fields: dict[str, Any], media_type: str, limit: int = INDEX_ENTRIES_LIMIT) -> Index:
    if fields.get("manifests") is None:
        raise JSONError("manifests is missing")
    entries = strict_json.array(fields, "manifests")
    if len(entries) > limit:
        raise JSONError(f"an index with more than {limit} entries")
    _subject(fields)
    manifests: list[Descriptor] = []
    unsupported: list[str] = []
    for position, entry in enumerate(entries):
        what = f"manifests[{position}]"
        text = entry.get("digest") if isinstance(entry, dict) else None
        if isinstance(text, str) and is_unsupported(text):
            unsupported.append(text)
            continue
        manifests.append(_descriptor(entry, what))
    annotations = strict_json.text_pairs(fields, "annotations")
    return Index(tuple(manifests), media_type, annotations, tuple(unsupported))


def _manifest(fields: dict[str, Any], media_type: str) -> Manifest:
    if "layers" not in fields:
        raise JSONError("layers is missing")
    # Go writes a list that nobody made as null: BuildKit does for an image of labels only.
    layers = strict_json.array(fields, "layers")
    if len(layers) > LAYERS_LIMIT:
        raise JSONError(f"a manifest with more than {LAYERS_LIMIT} layers")
    _subject(fields)
    return Manifest(
        config=_descriptor(fields.get("config"), "config"),
        layers=tuple(
            _descriptor(layer, f"layers[{position}]") for position, layer in enumerate(layers)
        ),
        media_type=media_type,
        annotations=strict_json.text_pairs(fields, "annotations"),
        artifact_type=strict_json.text(fields, "artifactType"),
    )


def _subject(fields: dict[str, Any]) -> None:
    """Check the subject, which nobody here follows, because the schema makes it a descriptor."""
    subject = fields.get("subject")
    if subject is not None:
        _descriptor(subject, "subject")


def _descriptor(value: Any, what: str) -> Descriptor:
    """Return the descriptor in a document; ``what`` says where it stands."""
    if not isinstance(value, dict):
        raise JSONError(f"{what} is not a descriptor")
    try:
        strict_json.check_case(value, _DESCRIPTOR_KEYS)
        media_type = strict_json.required_text(value, "mediaType")
        if not media_types.is_media_type(media_type):
            raise JSONError("mediaType is not written as TYPE/SUBTYPE")
        digest = Digest(strict_json.required_text(value, "digest"))
        size = strict_json.size(value, "size")
        platform = strict_json.mapping(value, "platform")
        return Descriptor(
            media_type=media_type,
            digest=digest,
            size=size,
            platform=None if platform is None else _platform(platform),
            annotations=strict_json.text_pairs(value, "annotations"),
            urls=strict_json.texts(value, "urls"),
            data=_data(value, digest, size),
            artifact_type=strict_json.text(value, "artifactType"),
        )
    except (JSONError, InvalidDigestError) as error:
        reason = str(error) if isinstance(error, JSONError) else f"digest: {error.reason}"
        raise JSONError(f"{what}: {reason}") from None


def _data(fields: dict[str, Any], digest: Digest, size: int) -> bytes | None:
    """Return the embedded content if it is what the descriptor promises, else None."""
    encoded = fields.get("data")
    if encoded is None:
        return None
    try:
        data = b64decode(strict_json.text(fields, "data"), validate=True)
    except (binascii.Error, ValueError):
        raise JSONError("data is not base64") from None
    return data if len(data) == size and digest.matches(data) else None


def _platform(fields: dict[str, Any]) -> Platform | None:
    """Return an entry's platform; two names that are empty or not there are none, as in Go."""
    strict_json.check_case(fields, _PLATFORM_KEYS)
    if not strict_json.text(fields, "os") and not strict_json.text(fields, "architecture"):
        return None
    return Platform(
        os=strict_json.required_text(fields, "os"),
        architecture=strict_json.required_text(fields, "architecture"),
        variant=strict_json.text(fields, "variant"),
        os_version=strict_json.text(fields, "os.version"),
        os_features=strict_json.texts(fields, "os.features"),
    )


def _config(fields: dict[str, Any], raw: bytes) -> ImageConfig:
    strict_json.check_case(fields, _CONFIG_KEYS)
    rootfs = strict_json.mapping(fields, "rootfs")
    if rootfs is None:
        raise JSONError("rootfs is missing")
    strict_json.check_case(rootfs, _ROOTFS_KEYS)
    kind = strict_json.required_text(rootfs, "type")
    # image-spec config.md: "MUST generate an error if they encounter an unknown value".
    if kind != "layers":
        raise JSONError(f"rootfs.type {kind[:64]!r} is unknown")
    strict_json.array(fields, "history")
    _check_process(strict_json.mapping(fields, "config") or {})
    return ImageConfig(
        os=strict_json.text(fields, "os"),
        architecture=strict_json.text(fields, "architecture"),
        variant=strict_json.text(fields, "variant"),
        os_version=strict_json.text(fields, "os.version"),
        os_features=strict_json.texts(fields, "os.features"),
        diff_ids=_diff_ids(strict_json.texts(rootfs, "diff_ids")),
        raw=raw,
    )


def _diff_ids(texts: Sequence[str]) -> tuple[Digest, ...]:
    try:
        return tuple(Digest(text) for text in texts)
    except InvalidDigestError as error:
        raise JSONError(f"rootfs.diff_ids: {error.reason}") from None


def _check_process(fields: dict[str, Any]) -> None:
    """Check the types, not the values, of what starts a container: a bundle relies on them."""
    for key in ("User", "WorkingDir", "StopSignal"):
        strict_json.text(fields, key)
    for key in ("Env", "Entrypoint", "Cmd"):
        strict_json.texts(fields, key)
    for key in ("ExposedPorts", "Volumes"):
        strict_json.mapping(fields, key)
    strict_json.text_pairs(fields, "Labels")
