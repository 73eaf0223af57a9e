"""The OCI twin of a Docker image's manifest, for tools that read layouts by OCI types alone.

skopeo and umoci take no Docker media types from an OCI layout. Both formats describe the same
config and layers (image-spec, media-types.md, "Compatibility Matrix"), so that only types change:
the twin names the same blobs by the same digests. It is derived, like ``index.json``; what was
resolved, recorded and pulled stays the manifest that the registry gave.
"""

from __future__ import annotations

import json
from typing import Any

from stowray.pipeline import strict_json
from stowray.pipeline.media_types import (
    DOCKER_CONFIG,
    DOCKER_FOREIGN,
    DOCKER_LAYER,
    OCI_CONFIG,
    OCI_FOREIGN,
    OCI_LAYER,
    OCI_MANIFEST,
)

_TYPES = {DOCKER_CONFIG: OCI_CONFIG}
for _docker, _oci in ((DOCKER_LAYER, OCI_LAYER), (DOCKER_FOREIGN, OCI_FOREIGN)):
    _TYPES[_docker] = _oci
    _TYPES[f"{_docker}.gzip"] = f"{_oci}+gzip"
    _TYPES[f"{_docker}.zstd"] = f"{_oci}+zstd"


def oci_twin(body: bytes, media_type: str) -> bytes | None:
    """Return the manifest ``body`` with OCI media types; None when it has no others.

    The same body gives the same twin. ``body`` is a manifest that was parsed before.
    """
    document = strict_json.parse_object(body)
    layers = document["layers"] or []  # null in Go's way
    twin: dict[str, Any] = {
        **document,
        "mediaType": OCI_MANIFEST,
        "config": _translated(document["config"]),
        "layers": [_translated(layer) for layer in layers],
    }
    same_parts = twin["config"] == document["config"] and twin["layers"] == layers
    if media_type == OCI_MANIFEST and same_parts:
        return None
    return json.dumps(twin, separators=(",", ":")).encode()


def _translated(descriptor: dict[str, Any]) -> dict[str, Any]:
    media_type = str(descriptor["mediaType"])
    return {**descriptor, "mediaType": _TYPES.get(media_type.lower(), media_type)}
