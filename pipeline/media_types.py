"""Media types of the images that are understood, and what each says.

Invariant: a media type that is not in these tables is never guessed at; such a layer is an error.
"""

from __future__ import annotations

import re
from typing import Final

OCI_INDEX: Final = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG: Final = "application/vnd.oci.image.config.v1+json"
OCI_LAYER: Final = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP: Final = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_ZSTD: Final = "application/vnd.oci.image.layer.v1.tar+zstd"
OCI_FOREIGN: Final = "application/vnd.oci.image.layer.nondistributable.v1.tar"
DOCKER_INDEX: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG: Final = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER: Final = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_FOREIGN: Final = "application/vnd.docker.image.rootfs.foreign.diff.tar"
DOCKER_SCHEMA_1: Final = "application/vnd.docker.distribution.manifest.v1+json"
DOCKER_SCHEMA_1_SIGNED: Final = "application/vnd.docker.distribution.manifest.v1+prettyjws"

INDEX_TYPES: Final = frozenset({OCI_INDEX, DOCKER_INDEX})
MANIFEST_TYPES: Final = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
SCHEMA_1_TYPES: Final = frozenset({DOCKER_SCHEMA_1, DOCKER_SCHEMA_1_SIGNED})
# What a registry names when it does not know: the body decides.
UNSPECIFIC_TYPES: Final = frozenset(
    {"", "application/json", "text/plain", "application/octet-stream", "binary/octet-stream"}
)
# Early registries and builders lost the config's type; Docker takes these for images too
# (distribution issues 1621 and 1622).
CONFIG_TYPES: Final = frozenset(
    {OCI_CONFIG, DOCKER_CONFIG, "application/octet-stream", "application/json", "text/html"}
)

# Every value that may be sent to a registry as Accept, most wanted first.
ACCEPT: Final = (OCI_INDEX, OCI_MANIFEST, DOCKER_INDEX, DOCKER_MANIFEST)

_LAYERS: Final = {
    OCI_LAYER: "",
    OCI_LAYER_GZIP: "gzip",
    OCI_LAYER_ZSTD: "zstd",
    OCI_FOREIGN: "",
    f"{OCI_FOREIGN}+gzip": "gzip",
    f"{OCI_FOREIGN}+zstd": "zstd",
    DOCKER_LAYER: "",
    f"{DOCKER_LAYER}.gzip": "gzip",
    f"{DOCKER_LAYER}.zstd": "zstd",
    DOCKER_FOREIGN: "",
    f"{DOCKER_FOREIGN}.gzip": "gzip",
    f"{DOCKER_FOREIGN}.zstd": "zstd",
}

# RFC 6838, section 4.2: type and subtype of at most 127 characters each.
_NAME = r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}"
_MEDIA_TYPE = re.compile(rf"{_NAME}/{_NAME}")


def is_media_type(text: str) -> bool:
    """Tell whether ``text`` is written as a media type without parameters."""
    return _MEDIA_TYPE.fullmatch(text) is not None


def bare(header: str | None) -> str:
    """Return a Content-Type as a comparable media type: lower-case, no parameters, may be empty."""
    return (header or "").partition(";")[0].strip().lower()


def is_layer(media_type: str) -> bool:
    """Tell whether blobs of this type are layers that can be applied."""
    return media_type.lower() in _LAYERS


def layer_compression(media_type: str) -> str | None:
    """Return ``gzip``, ``zstd`` or an empty string (plain tar) as the type says; None if no layer.

    Only information: the bytes decide, because containerd and podman go by the magic number too.
    """
    return _LAYERS.get(media_type.lower())


def is_encrypted(media_type: str) -> bool:
    """Tell whether this is a layer encrypted by ocicrypt."""
    return media_type.lower().endswith("+encrypted")
