"""What a store may answer as a registry: which repository has which tag, manifest and blob.

Invariant: content is given out under a repository's name only when that repository served or
confirmed it (``sources``), or when an image of that repository which is here or being pulled
consists of it. What one registry has is never passed off as another's: without a registry's name a
tag that two of them understand differently is not answered.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from stowray.pipeline.documents import MANIFEST_LIMIT, detect_media_type
from stowray.pipeline.errors import (
    InvalidDigestError,
    InvalidReferenceError,
    NotFoundError,
)
from stowray.pipeline.ingeststate import COMMITTED, IngestState
from stowray.pipeline.leases import leases
from stowray.pipeline.locks import try_lock, unlock
from stowray.pipeline.reference import (
    DEFAULT_REGISTRY,
    DEFAULT_WIRE_HOST,
    LEGACY_REGISTRY,
    OFFICIAL_PREFIX,
    Reference,
)
from stowray.pipeline.references import MARKER, last_used
from stowray.pipeline.source import parse_source
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.records import ReferenceRecord
    from stowray.pipeline.store import Store


@dataclass(frozen=True, slots=True)
class Repository:
    """The repository that a request names; ``registry`` empty is any registry that has it."""

    registry: str
    path: str

    @classmethod
    def parse(cls, path: str, namespace: str | None) -> Repository:
        """Return the repository of ``/v2/PATH/…?ns=NAMESPACE``, or ``InvalidReferenceError``."""
        registry = namespace or ""
        if registry in (LEGACY_REGISTRY, DEFAULT_WIRE_HOST):
            registry = DEFAULT_REGISTRY
        # Any registry will do for the grammar of the path.
        fields = {"registry": registry or DEFAULT_REGISTRY, "repository": path}
        Reference.from_dict({**fields, "tag": "latest", "digest": None})
        return cls(registry, path)

    def is_called(self, name: str) -> bool:
        """Tell whether ``name`` (``registry/repository``) is this repository."""
        registry, slash, repository = name.partition("/")
        if not slash or registry.endswith(":"):
            return False  # an image on disk: `oci:/srv/layout`
        if self.registry:
            return registry == self.registry and repository == self.path
        if repository == self.path or name == self.path:
            return True
        # `debian` is what people call docker.io/library/debian.
        return registry == DEFAULT_REGISTRY and repository == OFFICIAL_PREFIX + self.path


@dataclass(frozen=True, slots=True)
class Document:
    """A manifest or index with its exact bytes."""

    digest: Digest
    media_type: str
    body: bytes


@dataclass(frozen=True, slots=True)
class _Entry:
    """A reference record with its reference read, and when it was last pulled."""

    reference: Reference
    record: ReferenceRecord
    used: float


class Catalogue:
    """Answers from one store's records; thread-safe, blocking.

    With ``allowed`` the digests that it approves are answered whatever repository is named, and no
    others.
    """

    def __init__(self, store: Store, allowed: Callable[[Digest], bool] | None = None) -> None:
        self._store = store
        self._allowed = allowed
        self._lock = threading.Lock()
        self._entries: list[_Entry] = []
        self._identity: tuple[int, ...] = ()

    def resolve(self, repository: Repository, tag: str) -> Digest:
        """Return what ``tag`` points to, as of the last pull; NotFoundError."""
        newest: dict[str, _Entry] = {}
        for entry in self._load():
            reference = entry.reference
            if (
                reference.tag == tag
                and reference.digest is None
                and repository.is_called(reference.name)
                and (
                    reference.name not in newest
                    # Platforms of one tag may have been pulled at different times.
                    or entry.used > newest[reference.name].used
                )
            ):
                newest[reference.name] = entry
        digests = {entry.record.resolved.digest for entry in newest.values()}
        if len(digests) > 1:
            names = ", ".join(sorted(newest))
            what = f"one {repository.path}:{tag} (it differs between {names}: choose with ?ns=)"
            raise NotFoundError(what, "this mirror")
        for digest in digests:
            if self._allowed is None or self._allowed(digest):
                return digest
        raise NotFoundError(f"{repository.path}:{tag}", "this mirror")

    def manifest(self, repository: Repository, digest: Digest) -> Document:
        """Return a manifest or index by its digest; NotFoundError."""
        if not self.has(repository, digest):
            raise NotFoundError(str(digest), "this mirror")
        descriptor = self._store.open_blob(digest)
        try:
            size = os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
        # A layer is not read to find out that it is no manifest.
        body = b"" if size > MANIFEST_LIMIT else self._store.read_blob(digest, MANIFEST_LIMIT)
        media_type = self._recorded_type(digest) or detect_media_type(body)
        if not media_type:
            raise NotFoundError(f"manifest {digest}", "this mirror")
        return Document(digest, media_type, body)

    def tags(self, repository: Repository) -> list[str]:
        """Return the repository's tags in order; NotFoundError when nothing of it is here."""
        entries = [entry for entry in self._load() if repository.is_called(entry.reference.name)]
        if not entries:
            raise NotFoundError(f"repository {repository.path}", "this mirror")
        return sorted(
            {
                entry.reference.tag
                for entry in entries
                if entry.reference.tag is not None
                and entry.reference.digest is None
                and (self._allowed is None or self._allowed(entry.record.resolved.digest))
            }
        )

    def has(self, repository: Repository, digest: Digest) -> bool:
        """Tell whether ``digest`` may be given out as content of ``repository``."""
        if self._allowed is not None:
            return self._allowed(digest)
        names = self._store.blob_record(digest).repositories
        if any(repository.is_called(name) for name in names):
            return True
        # A layer that was here for another image was not asked for again when this one was pulled.
        for entry in self._load():
            if repository.is_called(entry.reference.name) and digest in entry.record.digests:
                return True
        return self._is_being_pulled(repository, digest)

    def growing(self, digest: Digest) -> int | None:
        """Return the size of a blob that a live writer is writing, or None."""
        state = IngestState.follow(self._store.ingest_path(digest) / "state")
        if state is None:
            return None
        try:
            if not state.valid or state.status == COMMITTED:
                return None
            # The writer's sign of life is its lock on this file; see ``follower``.
            if try_lock(state.descriptor, shared=True):
                unlock(state.descriptor)
                return None
            return state.size
        finally:
            state.close()

    def _is_being_pulled(self, repository: Repository, digest: Digest) -> bool:
        """Tell whether a running pull of the repository holds a lease on the digest."""
        for lease in leases(self._store):
            source = lease.holder.partition(" ")[2]
            if digest in lease.digests and source:
                try:
                    name = parse_source(source).name
                except (InvalidReferenceError, InvalidDigestError):
                    continue  # held for something else than an image
                if repository.is_called(name):
                    return True
        return False

    def _recorded_type(self, digest: Digest) -> str:
        """Return the media type under which an index or manifest was served to us, if recorded."""
        for entry in self._load():
            record = entry.record
            if record.resolved.digest == digest:
                return record.resolved.media_type
            if record.manifest == digest:
                return record.manifest_media_type
        return ""

    def _load(self) -> list[_Entry]:
        """Return the records of images from registries, read anew when one was written."""
        identity = self._look()
        with self._lock:
            if identity and identity == self._identity:
                return self._entries
        entries = []
        for record in self._store.references():
            try:
                reference = parse_source(record.reference)
            except InvalidReferenceError:
                continue  # written by a version that read references otherwise
            if isinstance(reference, Reference):
                used = last_used(self._store, record)[0]
                entries.append(_Entry(reference, record, used))
        with self._lock:
            self._entries, self._identity = entries, identity
        return entries

    def _look(self) -> tuple[int, ...]:
        """Return what changes with each change of the records; empty while one is under way.

        ``index.json`` is replaced after each change of a record and before its end is marked, and
        is looked at here before the records are read: a stale list is never kept under a new name.
        """
        if os.path.lexists(self._store.path / "refs" / MARKER):
            return ()
        try:
            status = (self._store.path / "index.json").lstat()
        except FileNotFoundError:
            return ()
        return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
