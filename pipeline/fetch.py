"""From a descriptor to a blob in the store.

Invariant: one writer per blob; what others are writing is waited for and taken over when they die.
A body goes on where the last one ended, from the same source or the next; not one byte beyond the
descriptor's size is written; wrong bytes void the whole generation, get one fresh try, and are
never committed. A cancelled fetch keeps what it has.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.copying import Copier, Work
from stowray.pipeline.errors import (
    CancelledError,
    ContentError,
    DeadlineError,
    NodeError,
    NotFoundError,
    RegistryError,
    StorageError,
    StowrayError,
    UnauthorizedError,
    UnavailableError,
)
from stowray.pipeline.host_records import HostRecords
from stowray.pipeline.registry import never, policy, weight
from stowray.pipeline.retry import Retries, uniform, wait
from stowray.pipeline.settings import RegistrySettings
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stowray.pipeline.descriptor import Descriptor
    from stowray.pipeline.digest import Digest
    from stowray.pipeline.ingest import Ingest
    from stowray.pipeline.origin import Origin, Place
    from stowray.pipeline.progress import Report
    from stowray.pipeline.source import Source
    from stowray.pipeline.source_actions import Report as Remark
    from stowray.pipeline.store import Store

    Download = Callable[[Work, Ingest], None]

# Blobs up to this size are written down when they are whole: what shows a blob while it grows, and
# lets it be resumed, takes longer than the few of them do.
BARE_SIZE = 64 << 10
FIRST_LOOK_SECONDS = 0.005
TAKE_OVER_SECONDS = 0.1
WRONG_LIMIT = 2
SHORT_LIMIT = 1000
EARLIER_RUN = 0
# What one source may fail with while another one need not.
SOURCE_ERRORS = (NotFoundError, UnauthorizedError, RegistryError, NodeError, DeadlineError)

# Blobs that are the same everywhere: the empty JSON object of artifacts (image-spec, "guidance for
# an empty descriptor"), and the gzipped empty tar that Docker puts where a layer has no content.
KNOWN_BLOBS = {
    "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a": b"{}",
    "sha256:a3ed95caeb02ffe68cdd9fd84406680ae93d633cb16422d00e8a7c22955b46d4": bytes.fromhex(
        "1f8b080000096e8800ff621805a360148c5800080000ffff2eafb5ef00040000"
    ),
}


@dataclass(frozen=True, slots=True)
class Fetched:
    """How a blob came.

    ``source`` is ``store`` when no source was asked, else the last one, and in a run the one that
    gave most; ``fetched_bytes`` counts all that was received for it, also what had to be thrown
    away, and ``by_source`` who sent how much of that: a registry's host or ``peer:NODE``.
    ``remarks`` tell which nodes failed, were slow or lied.
    """

    digest: Digest
    source: str
    fetched_bytes: int = 0
    seconds: float = 0.0
    retries: int = 0
    by_source: Mapping[str, int] = field(default_factory=dict)
    remarks: tuple[Remark, ...] = ()


class Fetcher:
    """Fetches blobs into one store from a list of origins; thread-safe.

    Origins are tried in order: nearest first, the registry itself last.
    """

    def __init__(
        self,
        store: Store,
        origins: Sequence[Origin],
        settings: RegistrySettings | None = None,
        *,
        clock: Clock = SYSTEM_CLOCK,
        uniform: Callable[[float, float], float] = uniform,
    ) -> None:
        self._store = store
        self._origins = tuple(origins)
        self._settings = settings or RegistrySettings()
        self._copier = Copier(self._settings, HostRecords(store.path, clock), clock)
        # By digest, for those that were waiting for the one that failed.
        self._failures: dict[Digest, tuple[Source, StowrayError]] = {}
        self._clock = clock
        self._uniform = uniform

    def fetch(
        self,
        reference: Source,
        descriptor: Descriptor,
        *,
        report: Report,
        cancelled: Callable[[], bool] = never,
        origins: Sequence[Origin] | None = None,
        download: Download | None = None,
        by_source: dict[str, int] | None = None,
    ) -> Fetched:
        """Bring the blob into the store and return how it came; idempotent.

        ``origins`` replaces those of the fetcher for this blob, and ``download`` the way in which
        the ingest is filled and committed. In ``by_source`` is counted who sent how much, so that
        it is known of a fetch that fails as well.
        """
        begun = self._clock.monotonic()
        digest = descriptor.digest
        sources = places_of(self._origins if origins is None else origins, reference)
        work = Work(
            reference,
            descriptor,
            report,
            cancelled,
            Retries(str(digest), policy(self._settings), clock=self._clock, uniform=self._uniform),
            sources,
            list(sources),
            by_source={} if by_source is None else by_source,
        )
        source = self._bring(work, download or self._download)
        return Fetched(
            digest,
            source,
            work.received,
            self._clock.monotonic() - begun,
            work.retries.count,
            work.by_source,
            tuple(work.remarks),
        )

    def _bring(self, work: Work, download: Download) -> str:
        descriptor = work.descriptor
        work.failure = self._failures.get(descriptor.digest)
        work.tell("waiting", 0)
        if self._store.has(descriptor.digest, descriptor.size):
            work.tell("exists", descriptor.size)
            return "store"
        data = _known(descriptor)
        if data is not None:
            self._store.put_blob(descriptor.digest, data)
            self._store.confirm(descriptor.digest, work.reference.name)
            work.tell("done", descriptor.size)
            return "store"
        # In a run others want to see a small blob grow as well.
        bare = download == self._download and descriptor.size <= BARE_SIZE
        ingest = self._acquire(work, bare)
        ingest.repository = work.reference.name
        with ingest:
            if ingest.offset == descriptor.size and self._is_proven(ingest):
                status = "exists"
            else:
                try:
                    download(work, ingest)
                except CancelledError:
                    raise
                except StowrayError as error:
                    # Before the lock is free: who waits for it shall not try the same again.
                    self._failures[descriptor.digest] = (work.reference, error)
                    raise
                self._failures.pop(descriptor.digest, None)
                status = "done"
        if status == "exists":
            # Else that is on record since the commit.
            self._store.confirm(descriptor.digest, work.reference.name)
        work.tell(status, descriptor.size)
        return work.source or "store"

    def _acquire(self, work: Work, bare: bool) -> Ingest:
        """Become the blob's writer; while another one is at it, tell how far that one is."""
        descriptor = work.descriptor
        shown = -1
        pause = FIRST_LOOK_SECONDS
        while True:
            if work.cancelled():
                raise CancelledError(str(descriptor.digest))
            # With a writer that died the lock is free at once; with one that committed the
            # ingest comes back complete.
            ingest = self._store.acquire(descriptor.digest, descriptor.size, bare=bare)
            if ingest is not None:
                failed = self._failures.get(descriptor.digest)
                if failed is not None and failed is not work.failure and _concerns(work, *failed):
                    ingest.close()
                    raise failed[1]
                return ingest
            progress = self._arrived(descriptor.digest)
            if progress > shown:
                shown = progress
                work.tell("downloading" if progress else "waiting", progress)
            wait(pause, self._clock, work.cancelled, str(descriptor.digest))
            pause = min(2 * pause, TAKE_OVER_SECONDS)

    def _arrived(self, digest: Digest) -> int:
        """Return how much of the blob its writer has exposed."""
        from stowray.pipeline.ingeststate import IngestState

        state = IngestState.follow(self._store.ingest_path(digest) / "state")
        if state is None:
            return 0
        try:
            return state.prefix
        finally:
            state.close()

    def _is_proven(self, ingest: Ingest) -> bool:
        """Commit what is complete already; False when its bytes are wrong and were dropped."""
        try:
            ingest.commit()
        except ContentError:
            return False
        return True

    # -- download ---------------------------------------------------------------------------------

    def _download(self, work: Work, ingest: Ingest) -> None:
        if not work.origins:
            raise NotFoundError(str(work.descriptor.digest), "any source")
        work.tell("downloading", ingest.offset)
        if ingest.is_resumed:
            work.writers.add(EARLIER_RUN)
        errors: dict[int, StowrayError] = {}
        tired = 0
        while True:
            origin = work.origins[0]
            start = ingest.offset
            try:
                self._copier.take_part(work, ingest, origin)
                if ingest.offset == work.descriptor.size:
                    ingest.commit()
                    return
                self._count_short(work, ingest, start)
                tired = 0
            except CancelledError:
                raise
            except ContentError as error:
                errors[id(origin)] = error
                self._note_wrong(work, ingest, origin, error)
                tired = 0
            except SOURCE_ERRORS as error:
                errors[id(origin)] = error
                blame(origin, error)
                gained = ingest.offset - start
                work.retries.progressed(gained)
                if gained:
                    tired = 0
                if error.retryable:
                    # Each source once without a wait, at the byte where the last one stopped; and
                    # one that brought something before it broke off has nothing to recover from.
                    work.origins.append(work.origins.pop(0))
                    if gained >= work.retries.policy.least_progress:
                        work.retries.count += 1
                        work.tell("retrying", ingest.offset)
                    else:
                        tired += 1
                    if tired >= len(work.origins):
                        tired = 0
                        work.tell("retrying", ingest.offset)
                        self._pause(work, errors, error)
                else:
                    work.origins.pop(0)
                if not work.origins:
                    raise _weightiest(errors, work.sources, error) from None
                work.tell("downloading", ingest.offset)

    def _pause(self, work: Work, errors: dict[int, StowrayError], error: StowrayError) -> None:
        try:
            work.retries.pause(error, work.cancelled, weight=weight(error))
        except SOURCE_ERRORS as last:
            raise _weightiest(errors, work.sources, last) from None

    def _count_short(self, work: Work, ingest: Ingest, start: int) -> None:
        """Note an answer that ended properly before the blob did: legal for a 206."""
        gained = ingest.offset - start
        work.retries.progressed(gained)
        work.short = work.short + 1 if gained < work.retries.policy.progress_size else 0
        if gained == 0 or work.short > SHORT_LIMIT:
            work.tell("retrying", ingest.offset)
            error = UnavailableError(work.source, 0, "CUT", "the body ended early")
            work.retries.pause(error, work.cancelled)

    def _note_wrong(
        self, work: Work, ingest: Ingest, origin: Origin | Place, error: ContentError
    ) -> None:
        """Void the generation and choose who is to begin the next one at the first byte.

        The digest of the whole does not tell whose bytes were wrong: a source is only given up for
        them if they were all its own, and the registry itself is asked before anybody else.
        """
        work.retries.count += 1
        own = not work.opened or work.writers <= {id(origin)}
        if own:
            blame(origin, error)
        if work.opened:
            ingest.restart()
            work.writers.clear()
        # Else the answer was refused by its headers, which say nothing against what is here.
        home = work.sources[-1]
        if len(work.origins) == 1 or origin is home:
            work.wrong += own
            if work.wrong >= WRONG_LIMIT:
                raise error
        else:
            work.origins.remove(origin)
        if work.opened and home in work.origins:
            # The others stay, for the case that it cannot be reached.
            work.origins.remove(home)
            work.origins.insert(0, home)
        work.tell("retrying", ingest.offset)


def _known(descriptor: Descriptor) -> bytes | None:
    """Return the blob if no source is needed for it: well-known, empty, or in the descriptor."""
    candidates = (KNOWN_BLOBS.get(descriptor.digest), descriptor.data, b"")
    for data in candidates:
        if data is not None and len(data) == descriptor.size and descriptor.digest.matches(data):
            return data
    return None


def places_of(origins: Sequence[Origin], reference: Source) -> tuple[Origin | Place, ...]:
    """Return all that can be asked for blobs of ``reference``: mirrors each by itself.

    An origin that has several places for it names them by ``places``, nearest first, at last the
    home; readers go from one to the next in the middle of a blob, and the last one's word counts.
    """
    found: list[Origin | Place] = []
    for origin in origins:
        # By its method: isinstance() of a protocol costs as much as a small blob's system calls.
        places: Callable[[Source], Sequence[Place]] | None = getattr(origin, "places", None)
        found += [origin] if places is None else places(reference)
    return tuple(found)


def _concerns(work: Work, other: Source, error: StowrayError) -> bool:
    """Return whether what failed for ``other`` would fail for this reference as well."""
    if other.name == work.reference.name or isinstance(error, StorageError):
        return True
    if isinstance(error, NotFoundError | UnauthorizedError):
        # Another repository may have it, or be open to this login.
        return False
    registry = getattr(other, "registry", None)
    return registry is not None and registry == getattr(work.reference, "registry", None)


def blame(source: Origin | Place, error: StowrayError) -> None:
    """Tell a source that knows others what it did, for the blobs that come after this one."""
    tell = getattr(source, "blame", None)
    if tell is not None:
        tell(error)


def _weightiest(
    errors: dict[int, StowrayError], sources: Sequence[Origin | Place], last: StowrayError
) -> StowrayError:
    """Return the error of the registry itself, which says more than that of a mirror."""
    return errors.get(id(sources[-1]), last) if sources else last
