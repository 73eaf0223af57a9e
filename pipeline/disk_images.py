"""Images on this machine's disk as origins: ``oci:``, ``oci-archive:`` and ``docker-archive:``.

Invariant: an archive is read in place at any offset; only a compressed one is first unpacked into a
file without a name. What is at the path is looked at again for each answer.
"""

from __future__ import annotations

import os
import stat
import threading
from typing import TYPE_CHECKING

from stowray.pipeline.source import DOCKER_ARCHIVE, OCI, DiskImage, parse_source

if TYPE_CHECKING:
    from stowray.pipeline.file_tree import FileTree
    from stowray.pipeline.origin import Origin

__all__ = ["DiskImage", "open_disk_image", "parse_source"]

# Archives are too large for a /tmp in memory (file-hierarchy(7), "Temporary files").
_LARGE_TEMPORARY = "/var/tmp"


def open_disk_image(source: DiskImage) -> Origin:
    """Return the origin that answers for ``source``; files are opened when it is first asked."""
    if source.kind == DOCKER_ARCHIVE:
        from stowray.pipeline.docker_archive import DockerArchiveOrigin

        return DockerArchiveOrigin(source, _Archive(source.path))
    from stowray.pipeline.oci_layout import LayoutOrigin

    if source.kind == OCI:
        from stowray.pipeline.file_tree import DirectoryTree

        return LayoutOrigin(source, lambda: DirectoryTree(source.path))
    return LayoutOrigin(source, _Archive(source.path))


class _Archive:
    """Gives the tree of the archive at a path, indexed once for as long as it is the same file."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._identity: tuple[int, ...] = ()
        self._tree: FileTree | None = None

    def __call__(self) -> FileTree:
        from stowray.pipeline.errors import StorageError
        from stowray.pipeline.file_tree import ArchiveTree, unreadable

        with self._lock:
            try:
                descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError as error:
                raise unreadable(self._path, error) from None
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode):
                    raise StorageError(self._path, "not a regular file")
                identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
                if self._tree is None or identity != self._identity:
                    plain = _plain(self._path, descriptor)
                    self._tree, self._identity = ArchiveTree(self._path, plain), identity
                return self._tree
            finally:
                os.close(descriptor)


def _plain(path: str, descriptor: int) -> int:
    """Return a new descriptor of the archive's uncompressed bytes."""
    from stowray.pipeline.compress import MAGIC_SIZE, decompress, is_gzip, is_zstd
    from stowray.pipeline.errors import LayerError, ManifestError, StorageError
    from stowray.pipeline.file_tree import Extent, unreadable

    try:
        head = os.pread(descriptor, MAGIC_SIZE, 0)
        if not (is_gzip(head) or is_zstd(head)):
            return os.dup(descriptor)
        compressed = Extent(os.dup(descriptor), 0, os.fstat(descriptor).st_size, path)
    except OSError as error:
        raise unreadable(path, error) from None
    with compressed:
        try:
            spool = _temporary()
            try:
                chunks = decompress(compressed.read)
                while chunk := chunks():
                    _write(spool, chunk)
                return os.dup(spool)
            finally:
                os.close(spool)
        except LayerError as error:
            raise ManifestError(path, f"the archive {error.reason}") from None
        except OSError as error:
            reason = f"cannot unpack {path}: {error.strerror} (choose another place with TMPDIR)"
            raise StorageError(_temporary_directory(), reason) from None


def _temporary_directory() -> str:
    return os.environ.get("TMPDIR") or _LARGE_TEMPORARY


def _temporary() -> int:
    """Return a descriptor of a new file without a name."""
    import tempfile

    with tempfile.TemporaryFile(dir=_temporary_directory(), buffering=0) as spool:
        return os.dup(spool.fileno())


def _write(descriptor: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view) :]
