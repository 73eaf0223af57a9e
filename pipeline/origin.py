"""Where bytes come from, as the rest sees it: a registry, a peer, or an image on disk.

Invariant: an origin hands out bytes and says what they claim to be; that they are right is proven
by whoever stores them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from types import TracebackType

    from stowray.pipeline.descriptor import Descriptor
    from stowray.pipeline.digest import Digest
    from stowray.pipeline.source import Source


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a reference points to now, and its verified body when that came with the answer."""

    descriptor: Descriptor
    body: bytes | None = None


class BlobStream(Protocol):
    """The bytes of one blob from ``offset`` on; closed by whoever opened it."""

    @property
    def offset(self) -> int:
        """Where the stream really starts: not always where it was asked to."""

    @property
    def source(self) -> str:
        """Who serves it, for reports: a host or a path, without credentials."""

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes; none at the end."""

    def close(self) -> None:
        """Give back the connection or descriptor; may be called twice."""

    def __enter__(self) -> BlobStream:
        """Return the stream itself."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the stream."""


class Origin(Protocol):
    """Three questions that every source of images answers; safe to ask from several threads."""

    def resolve(self, reference: Source) -> Resolved:
        """Return what ``reference`` points to, or raise ``NotFoundError``."""

    def manifest(self, reference: Source, digest: Digest, size: int | None = None) -> bytes:
        """Return the verified document ``digest``: a manifest or index."""

    def open_blob(self, reference: Source, descriptor: Descriptor, offset: int = 0) -> BlobStream:
        """Return the unverified bytes of a blob, from ``offset`` on if the source can."""
