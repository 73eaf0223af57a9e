"""The lock file of a pre-warm run: which digest each reference named.

Invariant: a lock file is read whole and well formed or refused; writing the same content twice
gives the same bytes, so that it can be kept under version control. It is TOML, made to be read by
people.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any, Final

from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import (
    InvalidDigestError,
    InvalidPlatformError,
    InvalidReferenceError,
    UsageError,
)
from stowray.pipeline.platform import Platform
from stowray.pipeline.reference import Reference
from stowray.pipeline.toml_text import parse_toml
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

VERSION: Final = 1
_LIMIT: Final = 16 << 20
_HEAD: Final = """\
# What each reference named; `stowray prewarm --lock` honours it.
# Delete an entry to have it resolved anew.
"""


@dataclass(frozen=True, slots=True)
class LockedImage:
    """A reference, the digest it named, and the manifest of each platform, by its text."""

    reference: Reference
    digest: Digest
    media_type: str = ""
    size: int = 0
    manifests: Mapping[str, Digest] = field(default_factory=dict)

    @property
    def pinned(self) -> Reference:
        """The reference with its digest."""
        return self.reference.with_digest(self.digest)


@dataclass(frozen=True, slots=True)
class LockFile:
    """All locked images by canonical reference; ``created`` is UTC as in RFC 3339."""

    images: Mapping[str, LockedImage]
    tool: str = ""
    created: str = ""

    def find(self, reference: Reference) -> LockedImage | None:
        """Return what ``reference`` is locked to."""
        return self.images.get(reference.canonical)


@dataclass(frozen=True, slots=True)
class Drift:
    """A difference between the lock and what the registry says now.

    ``platform`` is empty when the reference itself moved; ``now`` is empty when it is gone.
    """

    reference: str
    platform: str
    locked: str
    now: str

    def __str__(self) -> str:
        what = f"{self.reference} ({self.platform})" if self.platform else self.reference
        return f"{what}: locked {self.locked or 'not at all'}, now {self.now or 'gone'}"


def lock(images: Iterable[LockedImage], *, tool: str, created: str) -> LockFile:
    """Return the lock file of ``images``."""
    return LockFile({image.reference.canonical: image for image in images}, tool, created)


def drift(locked: LockFile, now: Iterable[LockedImage]) -> tuple[Drift, ...]:
    """Return what is no longer as it was locked, of the images that are in the lock.

    Platforms are compared where both sides name them: a run that needs fewer has not drifted.
    """
    found: list[Drift] = []
    present = {image.reference.canonical: image for image in now}
    for canonical, old in sorted(locked.images.items()):
        new = present.get(canonical)
        if new is None or new.digest != old.digest:
            found.append(Drift(canonical, "", old.digest, new.digest if new else ""))
        for platform, digest in sorted(old.manifests.items()) if new else ():
            current = new.manifests.get(platform, digest) if new else digest
            if current != digest:
                found.append(Drift(canonical, platform, digest, current))
    return tuple(found)


def encode_lock(content: LockFile) -> str:
    """Return the text of a lock file."""
    import json

    # A TOML basic string is a JSON string, apart from DEL, which no value here can have.
    def quote(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)

    lines = [_HEAD, f"version = {VERSION}", f"tool = {quote(content.tool)}"]
    lines.append(f"created = {quote(content.created)}")
    for canonical, image in sorted(content.images.items()):
        lines += ["", "[[images]]", f"reference = {quote(canonical)}"]
        lines.append(f"digest = {quote(image.digest)}")
        if image.media_type or image.size:
            lines += [f"media_type = {quote(image.media_type)}", f"size = {image.size}"]
        if image.manifests:
            lines.append("[images.manifests]")
            lines += [
                f"{quote(platform)} = {quote(digest)}"
                for platform, digest in sorted(image.manifests.items())
            ]
    return "\n".join(lines) + "\n"


def decode_lock(text: str, origin: str) -> LockFile:
    """Return the lock file of a text; UsageError naming ``origin`` and the key."""
    document = parse_toml(text, origin)
    version = document.get("version")
    if version != VERSION:
        raise UsageError(origin, f"version is {version!r}, and only {VERSION} is known here")
    entries = document.get("images", [])
    if not isinstance(entries, list):
        raise UsageError(origin, "images must be a list of tables")
    images: dict[str, LockedImage] = {}
    for number, entry in enumerate(entries):
        image = _image(entry, f"images[{number}]", origin)
        if image.reference.canonical in images:
            raise UsageError(origin, f"images[{number}] names a reference for the second time")
        images[image.reference.canonical] = image
    tool, created = document.get("tool", ""), document.get("created", "")
    if not isinstance(tool, str) or not isinstance(created, str):
        raise UsageError(origin, "tool and created must be strings")
    return LockFile(images, tool, created)


def read_lock(path: Path) -> LockFile | None:
    """Return the lock file at ``path``; None when there is none yet."""
    from stowray.pipeline.files import read_given

    try:
        text = read_given(path, _LIMIT).decode("utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(str(path), f"cannot read the lock file: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(str(path), f"not a TOML file: {error}") from error
    return decode_lock(text, str(path))


def write_lock(path: Path, content: LockFile) -> None:
    """Put a lock file at ``path`` in one step."""
    from stowray.pipeline.files import replace_file, translated

    with translated(path, "write the lock file"):
        # A link stays one: the file may live in a repository.
        replace_file(path.resolve(), encode_lock(content).encode("utf-8"), mode=0o644)


def _image(entry: object, key: str, origin: str) -> LockedImage:
    if not isinstance(entry, dict):
        raise UsageError(origin, f"{key} must be a table")
    try:
        reference = Reference.parse(_text(entry, "reference", key, origin))
        digest = Digest(_text(entry, "digest", key, origin))
        manifests = {
            str(Platform.parse(platform)): Digest(_text(entry["manifests"], platform, key, origin))
            for platform in _manifests(entry, key, origin)
        }
    except (InvalidReferenceError, InvalidDigestError, InvalidPlatformError) as error:
        raise UsageError(origin, f"{key}: {error}") from error
    size = entry.get("size", 0)
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise UsageError(origin, f"{key}.size must be a whole number, not negative")
    media_type = entry.get("media_type", "")
    if not isinstance(media_type, str):
        raise UsageError(origin, f"{key}.media_type must be a string")
    return LockedImage(reference, digest, media_type, size, manifests)


def _manifests(entry: Mapping[str, Any], key: str, origin: str) -> Mapping[str, Any]:
    manifests = entry.get("manifests", {})
    if not isinstance(manifests, dict):
        raise UsageError(origin, f"{key}.manifests must be a table")
    return manifests


def _text(table: Mapping[str, Any], name: str, key: str, origin: str) -> str:
    value = table.get(name)
    if not isinstance(value, str):
        raise UsageError(origin, f"{key}.{name} must be a string")
    return value
