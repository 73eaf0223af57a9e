"""Stowray stows container images onto machines: verified, ready-to-run root filesystems.

The names below are imported when they are first used, so that ``import stowray`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from stowray.api import CacheKey, Image, SnapshotHandle, prewarm, pull, resolve, status
    from stowray.job import Job
    from stowray.pipeline.errors import (
        CancelledError,
        ContentError,
        DeadlineError,
        DigestMismatchError,
        InvalidDigestError,
        InvalidPlatformError,
        InvalidReferenceError,
        LayerError,
        ManifestError,
        NodeError,
        NotFoundError,
        PlatformError,
        RegistryError,
        SizeMismatchError,
        StorageError,
        StowrayError,
        UnauthorizedError,
        UnavailableError,
        UsageError,
    )
    from stowray.pipeline.platform import Platform
    from stowray.pipeline.prewarm_report import PrewarmReport
    from stowray.pipeline.progress import Event
    from stowray.pipeline.reference import Reference
    from stowray.pipeline.result import LayerResult, PullResult
    from stowray.pipeline.store import Store

__all__ = [
    "CacheKey",
    "CancelledError",
    "ContentError",
    "DeadlineError",
    "DigestMismatchError",
    "Event",
    "Image",
    "InvalidDigestError",
    "InvalidPlatformError",
    "InvalidReferenceError",
    "Job",
    "LayerError",
    "LayerResult",
    "ManifestError",
    "NodeError",
    "NotFoundError",
    "Platform",
    "PlatformError",
    "PrewarmReport",
    "PullResult",
    "Reference",
    "RegistryError",
    "SizeMismatchError",
    "SnapshotHandle",
    "StorageError",
    "Store",
    "StowrayError",
    "UnauthorizedError",
    "UnavailableError",
    "UsageError",
    "__version__",
    "prewarm",
    "pull",
    "resolve",
    "status",
]

_ELSEWHERE = {
    "Store": "stowray.pipeline.store",
    "Platform": "stowray.pipeline.platform",
    "Reference": "stowray.pipeline.reference",
    "Event": "stowray.pipeline.progress",
    "PullResult": "stowray.pipeline.result",
    "LayerResult": "stowray.pipeline.result",
    "Job": "stowray.job",
    "PrewarmReport": "stowray.pipeline.prewarm_report",
}
_API = ("CacheKey", "Image", "SnapshotHandle", "prewarm", "pull", "resolve", "status")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'stowray' has no attribute {name!r}")
    import importlib

    home = "stowray.api" if name in _API else _ELSEWHERE.get(name, "stowray.pipeline.errors")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
