"""Where an image comes from: a registry, or a file or directory on this machine.

Invariant: every source has one canonical text, the same for all spellings, that parses to itself.
"""

from __future__ import annotations

import os
from typing import Any, Final

from stowray.pipeline.errors import InvalidReferenceError
from stowray.pipeline.reference import Reference
from stowray.pipeline.values import dataclass

OCI: Final = "oci"
OCI_ARCHIVE: Final = "oci-archive"
DOCKER_ARCHIVE: Final = "docker-archive"
KINDS: Final = (OCI, OCI_ARCHIVE, DOCKER_ARCHIVE)


@dataclass(frozen=True, slots=True)
class DiskImage:
    """An image in an OCI layout or in an archive; ``path`` is absolute, ``image`` may be empty."""

    kind: str
    path: str
    image: str = ""

    @property
    def name(self) -> str:
        """The source without the image's name in it: ``oci:/srv/layout``."""
        return f"{self.kind}:{self.path}"

    @property
    def canonical(self) -> str:
        """The one text of this source."""
        return f"{self.name}:{self.image}" if self.image else self.name

    @property
    def familiar(self) -> str:
        """The same as ``canonical``: a path has no shorter form that holds everywhere."""
        return self.canonical

    @property
    def registry(self) -> str:
        """The kind, in the place of a host for reports."""
        return self.kind

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {"kind": self.kind, "path": self.path, "image": self.image}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> DiskImage:
        """Return the source that ``to_dict`` described."""
        return cls(str(fields["kind"]), str(fields["path"]), str(fields["image"]))

    def __str__(self) -> str:
        return self.canonical


Source = Reference | DiskImage


def parse_source(text: str) -> Source:
    """Return what ``text`` names; the prefixes of on-disk images win over repository names."""
    kind, colon, rest = text.partition(":")
    if not colon or kind not in KINDS:
        return Reference.parse(text)
    # As in skopeo the path ends at the first colon, because image names have colons of their own.
    path, _, image = rest.partition(":")
    if not path:
        raise InvalidReferenceError(text[:200], f"a path is missing: {kind}:PATH[:NAME]")
    if "\0" in rest:
        raise InvalidReferenceError(text[:200], "a path has no NUL character")
    try:
        rest.encode()
    except UnicodeEncodeError as error:
        raise InvalidReferenceError(text[:200], "the path of an image must be UTF-8") from error
    path = os.path.abspath(path)
    if ":" in path:
        raise InvalidReferenceError(
            text[:200], f"the path {path!r} has a ':', which ends a path here"
        )
    return DiskImage(kind, path, image)


def source_from_dict(fields: dict[str, Any]) -> Source:
    """Return the source that ``to_dict`` of either kind described."""
    return DiskImage.from_dict(fields) if "kind" in fields else Reference.from_dict(fields)
