"""Reads from the origin in a run: what a lease allows, one exchange per permit.

Invariant: nothing is asked of the origin without a lease on those very bytes and a permit for one
connection; when a lease is lost, reading stops. What the ingest has already is not asked for.
Answers are checked as those of any pull (``registry``).
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from stowray.pipeline.copying import BUFFER_SIZE, reader
from stowray.pipeline.errors import CancelledError, ContentError, UnavailableError
from stowray.pipeline.fetch import SOURCE_ERRORS, blame
from stowray.pipeline.lane_choice import Ranged
from stowray.pipeline.source_actions import ORIGIN
from stowray.pipeline.spread_shared import OWNER_ERRORS
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.pipeline.errors import StowrayError
    from stowray.pipeline.origin import BlobStream
    from stowray.pipeline.source_actions import Action
    from stowray.pipeline.spread_job import Job
    from stowray.pipeline.spread_permits import Permit
    from stowray.pipeline.spread_stream import StripeStream

RENEW_SECONDS: Final = 1.0
# When a lease ended in the line for a permit.
_PERMIT_SECONDS: Final = 0.5
_TOO_MANY: Final = 429
_TOO_MANY_SECONDS: Final = 5.0
# So often in a row each place may fail under one lease, before others get their turn.
_TRIES: Final = 3
_FIRST_WAIT: Final = 0.25


@dataclass(slots=True)
class Lease:
    """Positions of a stripe that this node alone reads from the origin, until it is renewed."""

    start: int
    end: int
    until: float
    renewed: float = 0.0
    permit: Permit | None = None

    def is_lost(self, now: float) -> bool:
        """Tell whether others may read it by now."""
        return now >= self.until


class OriginReader:
    """Reads one stripe from the origin, whenever there is a lease for it."""

    def __init__(self, job: Job, stream: StripeStream) -> None:
        self._job = job
        self._stream = stream
        self._leases = job.shared.leases
        self._permits = job.shared.permits
        self._places = list(job.places)
        self.failures = 0  # how often in a row it was left
        # Renewals come from another thread: none may reach the owner after what it renews ended.
        self._renewing = threading.Lock()

    def read(self, lease: Lease) -> Action | None:
        """Read what ``lease`` allows and return what the choice wants then."""
        stream, choice = self._stream, self._stream.choice
        lease.renewed = self._job.now()
        stream.lease = lease
        try:
            if not self._get_permit(lease):
                return choice.later(self._job.now(), _PERMIT_SECONDS)
            choice.granted(self._job.now(), lease.end)
            stream.tell(ORIGIN)
            return stream.settle(self._read(lease))
        finally:
            with self._renewing:
                stream.lease = None
            self._give_back(lease)
            with suppress(*OWNER_ERRORS):
                self._leases.progress(stream.key, choice.position)
                self._leases.release(stream.key)

    def renew(self, now: float) -> None:
        """Renew the lease and the permit if it is time to; called by another thread."""
        stream = self._stream
        lease = stream.lease
        if lease is None or lease.is_lost(now) or now - lease.renewed < RENEW_SECONDS:
            return
        lease.renewed = now
        position = stream.choice.position
        if position >= lease.end:
            return
        with self._renewing, suppress(*OWNER_ERRORS):
            if stream.lease is not lease:
                return
            seconds = self._leases.progress(stream.key, position)
            if not seconds:
                # Perhaps the owner has begun anew and knows of no lease.
                length = stream.stripe.length
                seconds = self._leases.declare(stream.key, length, position, lease.end)
            lease.until = now + seconds
            if seconds and lease.permit is not None:
                self._permits.renew(lease.permit)

    # -- permits ----------------------------------------------------------------------------------

    def _get_permit(self, lease: Lease) -> bool:
        """Wait for a connection; False when the lease ends before."""
        job = self._job

        def is_over() -> bool:
            job.check()
            return lease.is_lost(job.now())

        lease.permit = self._permits.get(self._stream.key, is_over)
        return lease.permit is not None

    def _give_back(self, lease: Lease) -> None:
        with self._renewing:
            permit, lease.permit = lease.permit, None
        if permit is not None:
            self._permits.give_back(permit)

    # -- exchanges --------------------------------------------------------------------------------

    def _read(self, lease: Lease) -> Action | None:
        job, stream, choice = self._job, self._stream, self._stream.choice
        failures = 0
        while choice.position < lease.end and not lease.is_lost(job.now()):
            start, end = next(stream.stripe.ranges(choice.position, lease.end))
            gap = job.ingest.gap(start, end)
            if gap is None or gap[0] > start:
                action = stream.skip((end if gap is None else gap[0]) - start)
                if action is not None or choice.done:
                    return action
                continue
            if lease.permit is None and not self._get_permit(lease):
                break
            before = choice.position
            try:
                action = self._exchange(lease, *gap)
            except CancelledError:
                job.check()
                break  # the lease was lost
            except (*SOURCE_ERRORS, ContentError) as error:
                gained = choice.position - before
                failures = 0 if gained >= job.work.retries.policy.progress_size else failures + 1
                self._blame(error)
                if job.hopeless is not None and not stream.has_peers:
                    raise
                if failures >= _TRIES * len(self._places) or job.hopeless is not None:
                    self.failures += 1
                    return choice.failed(job.now(), str(error))
                if failures and failures % len(self._places) == 0:
                    job.wait(job.work.retries.uniform(0.5, 1.0) * _FIRST_WAIT * 2**failures)
            else:
                failures = self.failures = 0
                if action is not None or choice.done:
                    return action
            # Others may have waited for a connection longer than this stripe will.
            self._give_back(lease)
        return choice.lease_lost(job.now())

    def _exchange(self, lease: Lease, start: int, end: int) -> Action | None:
        """Read ``start`` to ``end`` of the blob, perhaps less of it, with one request.

        A host that knows no ranges sends the rest of the blob anyway: the stripe's later parts are
        taken from it as well, else each would cost the blob from its start.
        """
        job, stream = self._job, self._stream

        def is_over() -> bool:
            return job.is_over() or lease.is_lost(job.now())

        answer, goes_on = self._open(start, end, is_over)
        with answer:
            read_into = reader(answer)
            at = answer.offset
            if at > start:
                raise UnavailableError(answer.source, 0, "RANGE", "answered a later part")
            buffer = memoryview(bytearray(BUFFER_SIZE))
            action: Action | None = None
            while at < end:
                job.check()
                # From a host that knows no ranges what is here already comes again.
                room = (start if at < start else end) - at
                count = read_into(buffer[: min(BUFFER_SIZE, room)])
                if count == 0:
                    if at <= start:
                        raise UnavailableError(answer.source, 0, "CUT", "the body ended early")
                    return None
                job.count(answer.source, count)
                if at >= start:
                    action = stream.take(buffer[:count], ORIGIN)
                at += count
                if stream.choice.done or lease.is_lost(job.now()):
                    return action
                if at == end and goes_on and action is None:
                    start, end = self._next_gap(lease) or (start, end)
            # Past the end of the body's framing, so that the connection is free again. Whether
            # what came is the blob is for its digest to tell. A lease that ends now, while the
            # last piece is paid for, takes nothing back of what the choice wants next.
            with suppress(UnavailableError, CancelledError):
                read_into(buffer[:1])
            return action

    def _next_gap(self, lease: Lease) -> tuple[int, int] | None:
        """Return what comes next in the stripe if it is not here; None at the lease's end."""
        stream = self._stream
        position = stream.choice.position
        if position >= lease.end:
            return None
        start, end = next(stream.stripe.ranges(position, lease.end))
        gap = self._job.ingest.gap(start, end)
        return gap if gap is not None and gap[0] == start else None

    def _open(self, start: int, end: int, is_over: Callable[[], bool]) -> tuple[BlobStream, bool]:
        """Return an answer, and whether it goes on behind ``end``."""
        place, work = self._places[0], self._job.work
        if end < work.descriptor.size and isinstance(place, Ranged):
            part = place.open_range(work.reference, work.descriptor, start, end, is_over)
            if part is not None:
                return part, False
        blob = place.open_blob(work.reference, work.descriptor, start, cancelled=is_over)
        return blob, end < work.descriptor.size

    def _blame(self, error: StowrayError) -> None:
        """Take note of an exchange that failed, and put the next place first."""
        job, place = self._job, self._places[0]
        job.retry()
        job.last_error = error
        blame(place, error)
        if isinstance(error, UnavailableError) and error.status == _TOO_MANY:
            with suppress(*OWNER_ERRORS):
                self._leases.pause(_TOO_MANY_SECONDS)
        if error.retryable:
            self._places.append(self._places.pop(0))
        elif len(self._places) > 1:
            self._places.pop(0)
        else:
            job.hopeless = error
