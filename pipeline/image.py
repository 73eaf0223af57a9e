"""Images: all that is known of one reference for one platform, and the names derived from it.

Invariant: an ``Image`` that passed ``check`` is complete: its layers are of types that can be
applied, and each has exactly one diff ID.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from stowray.pipeline.descriptor import Descriptor, ImageConfig, Index, Manifest
from stowray.pipeline.digest import Digest
from stowray.pipeline.documents import (
    CONFIG_LIMIT,
    INDEX_DEPTH_LIMIT,
    INDEX_ENTRIES_LIMIT,
    LAYERS_LIMIT,
    MANIFEST_LIMIT,
    check_diff_ids,
    check_image,
    check_layers,
    check_platform,
    detect_media_type,
    parse_config,
    parse_document,
)
from stowray.pipeline.media_types import (
    ACCEPT,
    DOCKER_CONFIG,
    DOCKER_INDEX,
    DOCKER_LAYER,
    DOCKER_MANIFEST,
    INDEX_TYPES,
    MANIFEST_TYPES,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    OCI_MANIFEST,
    is_layer,
    layer_compression,
)
from stowray.pipeline.platform import Platform
from stowray.pipeline.source import Source, source_from_dict
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "ACCEPT",
    "CONFIG_LIMIT",
    "DOCKER_CONFIG",
    "DOCKER_INDEX",
    "DOCKER_LAYER",
    "DOCKER_MANIFEST",
    "INDEX_DEPTH_LIMIT",
    "INDEX_ENTRIES_LIMIT",
    "INDEX_TYPES",
    "LAYERS_LIMIT",
    "MANIFEST_LIMIT",
    "MANIFEST_TYPES",
    "OCI_CONFIG",
    "OCI_INDEX",
    "OCI_LAYER",
    "OCI_LAYER_GZIP",
    "OCI_LAYER_ZSTD",
    "OCI_MANIFEST",
    "Descriptor",
    "Image",
    "ImageConfig",
    "Index",
    "Manifest",
    "chain_ids",
    "check_diff_ids",
    "check_image",
    "check_layers",
    "check_platform",
    "detect_media_type",
    "is_layer",
    "layer_compression",
    "manifest_key",
    "parse_config",
    "parse_document",
]


def chain_ids(diff_ids: Iterable[str]) -> tuple[Digest, ...]:
    """Return the chain ID of every prefix of ``diff_ids``, base layer first.

    image-spec config.md: ChainID(L0|…|Ln) = SHA256(ChainID(L0|…|Ln-1) + " " + DiffID(Ln)).
    """
    chain: list[Digest] = []
    for diff_id in diff_ids:
        layer = Digest(diff_id)
        # Always SHA-256 above the base, whatever the algorithms of the parts.
        chain.append(Digest.of(f"{chain[-1]} {layer}".encode("ascii")) if chain else layer)
    return tuple(chain)


def manifest_key(digest: str, platform: Platform) -> str:
    """Return the key of what ``digest`` is on ``platform``: the SHA-256 of a fixed JSON text."""
    fields: dict[str, Any] = {
        "Digest": str(digest),
        "OS": platform.os,
        "Arch": platform.architecture,
    }
    if platform.variant:
        fields["Variant"] = platform.variant
    if platform.os_version:
        fields["OSVersion"] = platform.os_version
    if platform.os_features:
        fields["OSFeatures"] = list(platform.os_features)
    return Digest.of(json.dumps(fields, separators=(",", ":")).encode("ascii"))


@dataclass(frozen=True, slots=True)
class Image:
    """A reference resolved for one platform: where it came from, its documents and its layers."""

    reference: Source
    resolved: Descriptor
    manifest_descriptor: Descriptor
    manifest: Manifest
    config: ImageConfig
    platform: Platform
    # The indexes between what the reference resolved to and the manifest, outermost first.
    indexes: tuple[Descriptor, ...] = ()

    @property
    def layers(self) -> tuple[Descriptor, ...]:
        """The layers' descriptors, base layer first."""
        return self.manifest.layers

    @property
    def diff_ids(self) -> tuple[Digest, ...]:
        """The digests of the layers' uncompressed tars, base layer first."""
        return self.config.diff_ids

    @property
    def chain_ids(self) -> tuple[Digest, ...]:
        """The chain ID of every layer, base layer first."""
        return chain_ids(self.config.diff_ids)

    @property
    def chain_id(self) -> str:
        """The chain ID of all layers; empty for an image without layers."""
        chain = self.chain_ids
        return chain[-1] if chain else ""

    @property
    def size(self) -> int:
        """The bytes of manifest, config and distinct layers as they are stored."""
        blobs = {blob.digest: blob.size for blob in (self.manifest.config, *self.layers)}
        return self.manifest_descriptor.size + sum(blobs.values())

    def key(self) -> str:
        """Return the ``manifest_key`` of this image."""
        return manifest_key(self.resolved.digest, self.platform)

    def check(self) -> None:
        """Raise ``ManifestError`` unless this is an image whose layers can be applied."""
        digest = self.manifest_descriptor.digest
        check_image(self.manifest, digest)
        check_diff_ids(self.manifest, self.config, digest)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values (JSON, MessagePack)."""
        return {
            "reference": self.reference.to_dict(),
            "resolved": self.resolved.to_dict(),
            "descriptor": self.manifest_descriptor.to_dict(),
            "manifest": self.manifest.to_dict(),
            "config": self.config.to_dict(),
            "platform": self.platform.to_dict(),
            "indexes": [index.to_dict() for index in self.indexes],
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Image:
        """Return the image that ``to_dict`` described."""
        return cls(
            reference=source_from_dict(fields["reference"]),
            resolved=Descriptor.from_dict(fields["resolved"]),
            manifest_descriptor=Descriptor.from_dict(fields["descriptor"]),
            manifest=Manifest.from_dict(fields["manifest"]),
            config=ImageConfig.from_dict(fields["config"]),
            platform=Platform.from_dict(fields["platform"]),
            indexes=tuple(Descriptor.from_dict(index) for index in fields["indexes"]),
        )
