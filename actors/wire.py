"""Values as plain data and back: what passes through Ray holds no object of ours.

Invariant: a dictionary that travels can be read by every version with the same protocol number, and
unpickling it runs no code of an image's or a registry's choosing.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from stowray.pipeline.engine import PullOptions
from stowray.pipeline.image import CONFIG_LIMIT, MANIFEST_LIMIT
from stowray.pipeline.platform import Platform
from stowray.pipeline.resolve import document_digests
from stowray.pipeline.settings import (
    RegistrySettings,
    ResolveSettings,
    Settings,
    UnpackSettings,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stowray.pipeline.image import Image
    from stowray.pipeline.store import Store

_SECTIONS = {
    "resolve": ResolveSettings,
    "registry": RegistrySettings,
    "unpack": UnpackSettings,
}


# What our own code reads, and what credential helpers need.
_ORIGIN_NAMES = frozenset(
    {
        "HOME",
        "USER",
        "LOGNAME",
        "PATH",
        "LANG",
        "DBUS_SESSION_BUS_ADDRESS",
        "GNUPGHOME",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "NO_PROXY",
        "REQUEST_METHOD",
        "REQUESTS_CA_BUNDLE",
        "CURL_CA_BUNDLE",
    }
)
_ORIGIN_PREFIXES = (
    "XDG_",
    "DOCKER_",
    "REGISTRY_",
    "CONTAINERS_",
    "SSL_",
    "PASSWORD_STORE_",
    "AWS_",
    "AZURE_",
    "CLOUDSDK_",
    "GOOGLE_",
)


def settings_to_dict(settings: Settings) -> dict[str, Any]:
    """Return all settings as plain values."""
    return asdict(settings)


def settings_from_dict(fields: Mapping[str, Any]) -> Settings:
    """Return the settings that :func:`settings_to_dict` described."""
    values = _listed(fields)
    for name, kind in _SECTIONS.items():
        values[name] = kind(**_listed(values[name]))
    return Settings(**values)


def _listed(fields: Mapping[str, Any]) -> dict[str, Any]:
    # Some of the ways that settings travel on know no tuples.
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }


def origin_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that decide how registries are reached and who one is to them.

    The actors of a session were started from another shell; a pull must find the credentials,
    their helpers and the proxies of the driver. It travels as a method argument only.
    """
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.upper() in _ORIGIN_NAMES or name.upper().startswith(_ORIGIN_PREFIXES)
    }


def options_to_dict(options: PullOptions) -> dict[str, Any]:
    """Return the options as plain values."""
    platform = options.platform
    return {
        "platform": None if platform is None else platform.to_dict(),
        "policy": options.policy,
        "unpack": options.unpack,
        "sync": options.sync,
    }


def options_from_dict(fields: Mapping[str, Any]) -> PullOptions:
    """Return the options that :func:`options_to_dict` described."""
    platform = fields["platform"]
    return PullOptions(
        platform=None if platform is None else Platform.from_dict(platform),
        policy=fields["policy"],
        unpack=bool(fields["unpack"]),
        sync=bool(fields["sync"]),
    )


def documents_of(store: Store, image: Image) -> dict[str, bytes]:
    """Return the documents that lead to ``image``, for a node that may not have them."""
    limit = max(MANIFEST_LIMIT, CONFIG_LIMIT)
    return {str(digest): store.read_blob(digest, limit) for digest in document_digests(image)}
