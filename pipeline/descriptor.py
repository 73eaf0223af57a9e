"""The values that an image is made of: descriptors, index, manifest and config.

Invariant: values are immutable, know nothing of network or disk, and travel between processes as
plain data (``to_dict``, ``from_dict``) or pickled.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from typing import Any

from stowray.pipeline.digest import Digest
from stowray.pipeline.platform import Platform
from stowray.pipeline.values import dataclass


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A blob by media type, digest and size; the value passed between all stages."""

    media_type: str
    digest: Digest
    size: int
    platform: Platform | None = None
    annotations: tuple[tuple[str, str], ...] = ()
    urls: tuple[str, ...] = ()
    data: bytes | None = None
    artifact_type: str = ""

    def annotation(self, key: str) -> str | None:
        """Return the annotation ``key``, if it is there."""
        return dict(self.annotations).get(key)

    def to_dict(self) -> dict[str, Any]:
        """Return what is set as plain values, keyed as in OCI documents."""
        fields: dict[str, Any] = {
            "mediaType": self.media_type,
            "digest": str(self.digest),
            "size": self.size,
        }
        if self.platform is not None:
            fields["platform"] = self.platform.to_dict()
        if self.annotations:
            fields["annotations"] = dict(self.annotations)
        if self.urls:
            fields["urls"] = list(self.urls)
        if self.data is not None:
            fields["data"] = b64encode(self.data).decode("ascii")
        if self.artifact_type:
            fields["artifactType"] = self.artifact_type
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Descriptor:
        """Return the descriptor that ``to_dict`` described."""
        platform, data = fields.get("platform"), fields.get("data")
        return cls(
            media_type=str(fields["mediaType"]),
            digest=Digest(fields["digest"]),
            size=int(fields["size"]),
            platform=None if platform is None else Platform.from_dict(platform),
            annotations=tuple(fields.get("annotations", {}).items()),
            urls=tuple(fields.get("urls", ())),
            data=None if data is None else b64decode(data),
            artifact_type=str(fields.get("artifactType", "")),
        )


@dataclass(frozen=True, slots=True)
class Index:
    """A list of manifests, usually one per platform."""

    manifests: tuple[Descriptor, ...]
    media_type: str
    annotations: tuple[tuple[str, str], ...] = ()
    # Digests of entries that are well formed but of an algorithm that cannot be verified here:
    # they can never be selected, and an error can say so.
    unsupported: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """One platform's config and layers, base layer first."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    media_type: str
    annotations: tuple[tuple[str, str], ...] = ()
    artifact_type: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {
            "config": self.config.to_dict(),
            "layers": [layer.to_dict() for layer in self.layers],
            "mediaType": self.media_type,
            "annotations": dict(self.annotations),
            "artifactType": self.artifact_type,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Manifest:
        """Return the manifest that ``to_dict`` described."""
        return cls(
            config=Descriptor.from_dict(fields["config"]),
            layers=tuple(Descriptor.from_dict(layer) for layer in fields["layers"]),
            media_type=str(fields["mediaType"]),
            annotations=tuple(fields["annotations"].items()),
            artifact_type=str(fields["artifactType"]),
        )


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """What an image says about itself; ``raw`` are the exact bytes that its digest covers.

    Only what decides platform and layers is interpreted. User, environment, labels and the like
    stay verbatim in ``raw``.
    """

    os: str
    architecture: str
    variant: str
    os_version: str
    os_features: tuple[str, ...]
    diff_ids: tuple[Digest, ...]
    raw: bytes

    @property
    def platform(self) -> Platform:
        """The platform that the config names; its parts may be empty."""
        return Platform(self.os, self.architecture, self.variant, self.os_version, self.os_features)

    def document(self) -> dict[str, Any]:
        """Return the whole config, parsed anew."""
        document: dict[str, Any] = json.loads(self.raw)
        return document

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {
            "platform": self.platform.to_dict(),
            "diffIds": [str(diff_id) for diff_id in self.diff_ids],
            "raw": self.raw.decode("utf-8"),
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ImageConfig:
        """Return the config that ``to_dict`` described."""
        platform = Platform.from_dict(fields["platform"])
        return cls(
            os=platform.os,
            architecture=platform.architecture,
            variant=platform.variant,
            os_version=platform.os_version,
            os_features=platform.os_features,
            diff_ids=tuple(Digest(diff_id) for diff_id in fields["diffIds"]),
            raw=str(fields["raw"]).encode("utf-8"),
        )
