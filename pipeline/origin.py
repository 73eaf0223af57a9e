"""Where content comes from: one shape for registries, mirrors, peers and images on disk.

Invariant: what an origin hands over as a manifest was hashed; the bytes of a blob were not, and are
proven by whoever takes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.descriptor import Descriptor
    from stowray.pipeline.digest import Digest
    from stowray.pipeline.errors import StowrayError
    from stowray.pipeline.source import Source


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a reference names now; ``body`` is the hashed document when it came along."""

    descriptor: Descriptor
    body: bytes | None = None
    source: str = ""


class BlobStream(Protocol):
    """The bytes of one blob from ``offset`` on, not verified; to be closed on every path.

    ``source`` names the host or file that serves it. ``offset`` may be smaller than the one asked
    for (a server that knows no ranges): the reader discards up to where it wants to go on.
    """

    @property
    def offset(self) -> int:
        """Where the stream really starts."""

    @property
    def source(self) -> str:
        """Who serves it, for reports: a host or a path, without credentials."""

    def read(self, size: int = 1 << 20) -> bytes:
        """Return at most ``size`` bytes, ``b""`` at the end of what this source sends."""

    def close(self) -> None:
        """Free the connection or file; calling it twice is harmless."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *details: object) -> None: ...


class Place(Protocol):
    """One of several hosts that serve the same content; an origin may be made of such."""

    def open_blob(
        self,
        reference: Source,
        descriptor: Descriptor,
        offset: int = 0,
        *,
        cancelled: Callable[[], bool] | None = None,
    ) -> BlobStream:
        """Return the blob's bytes from this host; see :meth:`Origin.open_blob`."""

    def blame(self, error: StowrayError) -> None:
        """Take note that this host failed its reader, so that others are asked before it."""


class Origin(Protocol):
    """A place that images come from; every method may be called from several threads."""

    def resolve(
        self,
        reference: Source,
        *,
        asked: Callable[[], None] = ...,
        cancelled: Callable[[], bool] = ...,
    ) -> Resolved:
        """Return what ``reference`` names now, or raise ``NotFoundError``.

        ``asked`` is called with each request that this takes of a registry; a wait in it ends when
        ``cancelled()``.
        """

    def manifest(
        self,
        reference: Source,
        digest: Digest,
        size: int | None = None,
        *,
        asked: Callable[[], None] = ...,
        cancelled: Callable[[], bool] = ...,
    ) -> bytes:
        """Return the index, manifest or config ``digest`` of the repository, hashed."""

    def open_blob(
        self,
        reference: Source,
        descriptor: Descriptor,
        offset: int = 0,
        *,
        cancelled: Callable[[], bool] | None = None,
    ) -> BlobStream:
        """Return the blob's bytes from ``offset`` on; a wait in it ends when ``cancelled()``."""
