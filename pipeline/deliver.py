"""Handing an image in the store to another tool: containerd, podman, docker or an archive.

Invariant: the image bears its reference as its name there, and its digest where the tool keeps one;
delivering twice leaves what delivering once did; a file is the old one or the whole new one.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stowray.pipeline.deliver_archive import ImageArchive
from stowray.pipeline.errors import InvalidReferenceError, StorageError, UsageError
from stowray.pipeline.files import TEMPORARY, storage_error
from stowray.pipeline.reference import Reference
from stowray.pipeline.source import OCI_ARCHIVE, DiskImage, parse_source
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.image import Image
    from stowray.pipeline.store import Store

CONTAINERD: Final = "containerd"
PODMAN: Final = "podman"
DOCKER: Final = "docker"
TARGETS: Final = (CONTAINERD, PODMAN, DOCKER)
DEADLINE_SECONDS: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Target:
    """Where images are delivered to; ``path`` and ``name`` are of an archive."""

    kind: str
    path: str = ""
    name: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.path}" if self.path else self.kind


@dataclass(frozen=True, slots=True)
class Delivered:
    """What is there now; ``present`` says that it was there before."""

    target: str
    name: str
    digest: str
    present: bool


def parse_target(text: str) -> Target:
    """Return what ``--to`` names, or raise UsageError."""
    if text in TARGETS:
        return Target(text)
    kind, colon, rest = text.partition(":")
    if kind != OCI_ARCHIVE or not colon:
        wanted = f"{', '.join(TARGETS)} or {OCI_ARCHIVE}:FILE"
        raise UsageError("--to", f"{text[:80]!r} is none of {wanted}")
    try:
        source = parse_source(text)
    except InvalidReferenceError as error:
        raise UsageError("--to", error.reason) from error
    if not isinstance(source, DiskImage) or rest.partition(":")[0].endswith("/"):
        raise UsageError("--to", f"{rest[:80]!r} is not a file's name")
    return Target(OCI_ARCHIVE, source.path, source.image)


def image_name(image: Image, name: str | None, target: Target) -> str:
    """Return the name that ``image`` gets at ``target``: ``name``, else its reference.

    An image on disk has the name that it was asked for there, if that is a reference. Only in an
    archive it may have none.
    """
    if name:
        return Reference.parse(name).canonical
    if target.name:
        return target.name
    source = image.reference
    if isinstance(source, Reference):
        return source.canonical
    if source.image and not source.image.startswith("@"):
        if target.kind == OCI_ARCHIVE:
            return source.image
        try:
            return Reference.parse(source.image).canonical
        except InvalidReferenceError as error:
            raise UsageError("--name", f"needed, {error}") from error
    if target.kind == OCI_ARCHIVE:
        return ""
    raise UsageError("--name", f"needed: {source.canonical} has no name of its own")


def deliver(
    store: Store,
    image: Image,
    target: Target,
    *,
    name: str | None = None,
    cancelled: Callable[[], bool],
    seconds: float = DEADLINE_SECONDS,
) -> Delivered:
    """Hand ``image``, whose content is in ``store``, to ``target``; the caller holds a lease.

    Raises NodeError (the tool is missing or does not answer), StorageError, DeadlineError,
    CancelledError, UsageError.
    """
    named = image_name(image, name, target)
    if target.kind == OCI_ARCHIVE:
        # The list beside it makes the file one that older dockers load too.
        archive = ImageArchive(store, image, named, docker=True)
        archive.check()
        write_file(archive, Path(target.path), cancelled)
        return Delivered(str(target), named, str(archive.root.digest), present=False)
    from stowray.pipeline import deliver_tools

    hand_over = {
        CONTAINERD: deliver_tools.to_containerd,
        PODMAN: deliver_tools.to_podman,
        DOCKER: deliver_tools.to_docker,
    }[target.kind]
    digest, present = hand_over(store, image, named, seconds, cancelled)
    return Delivered(str(target), named, str(digest), present=present)


def write_file(archive: ImageArchive, path: Path, cancelled: Callable[[], bool]) -> None:
    """Put the archive at ``path`` in one step."""
    # What a link leads to is replaced, not the link; a device or fifo must not become a file.
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise UsageError(str(path), "is no regular file: name the archive's file")
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        # For the user and as the user's umask wants it, as any file that a program makes.
        descriptor = os.open(temporary, flags, 0o666)
        try:
            archive.write(descriptor, cancelled)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, FileNotFoundError):
            raise StorageError(str(path), "its directory does not exist") from error
        raise storage_error(error, path, "write the archive") from error
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
