"""From a descriptor to a blob in the store, in a run over many nodes: peers first, then the origin.

Invariant: what source comes next is decided by ``source_choice`` alone, one choice per stripe; the
origin is read under a lease and a permit only; whatever source fails, reading goes on at the same
byte from the next one. One writer per blob, and nothing is committed before its digest is proven.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

from stowray.pipeline.copying import REPORT_SECONDS, Work
from stowray.pipeline.errors import CancelledError, DigestMismatchError, NodeError
from stowray.pipeline.fetch import TAKE_OVER_SECONDS, Fetched, places_of
from stowray.pipeline.registry import never
from stowray.pipeline.retry import wait
from stowray.pipeline.spread_blame import Inquiry
from stowray.pipeline.spread_claims import VoidError
from stowray.pipeline.spread_job import Job
from stowray.pipeline.spread_leases import stripe_key
from stowray.pipeline.spread_shared import OWNER_ERRORS
from stowray.pipeline.spread_stream import StripeStream
from stowray.pipeline.stripe_state import WHOLE
from stowray.pipeline.stripes import Stripe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stowray.pipeline.descriptor import Descriptor
    from stowray.pipeline.fetch import Fetcher
    from stowray.pipeline.ingest import Ingest
    from stowray.pipeline.origin import Origin, Place
    from stowray.pipeline.progress import Report
    from stowray.pipeline.settings import RegistrySettings
    from stowray.pipeline.source import Source
    from stowray.pipeline.spread import Part, Portion
    from stowray.pipeline.spread_shared import Shared
    from stowray.pipeline.store import Store

# So long may nobody write a blob that another node of the same store is to bring.
SHARED_SECONDS: Final = 120.0


class SpreadFetcher:
    """Fetches the blobs of one run into one store; thread-safe.

    ``part`` is this node's; what is not in it goes to ``fallback``. Images that are not reached by
    the same ways have a fetcher each, with ``origins`` and fallback of their own. Give all fetchers
    of a run the same ``shared``: it keeps the limits, and remembers who failed and what to expect.
    """

    def __init__(
        self,
        store: Store,
        origins: Sequence[Origin],
        settings: RegistrySettings,
        *,
        part: Part,
        shared: Shared,
        fallback: Fetcher,
    ) -> None:
        self._store = store
        self._origins = tuple(origins)
        self._settings = settings
        self._fallback = fallback
        self._shared = shared.at(part.addresses)
        self._clock = shared.clock
        self._shares_with = part.shares_with
        self._portions: dict[str, list[Portion]] = {}
        for portion in part.portions:
            self._portions.setdefault(portion.digest, []).append(portion)

    def fetch(
        self,
        reference: Source,
        descriptor: Descriptor,
        *,
        report: Report,
        cancelled: Callable[[], bool] = never,
        by_source: dict[str, int] | None = None,
    ) -> Fetched:
        """Bring the blob into the store and return how it came; idempotent.

        ``by_source`` and errors are those of :meth:`Fetcher.fetch`.
        """
        if self._shares_with:
            self._await_writer(descriptor, report, cancelled)
        portions = self._portions.get(str(descriptor.digest))
        download = None if portions is None else partial(self._download, portions)
        return self._fallback.fetch(
            reference,
            descriptor,
            report=report,
            cancelled=cancelled,
            download=download,
            by_source=by_source,
        )

    def _download(self, portions: Sequence[Portion], work: Work, ingest: Ingest) -> None:
        work.tell("downloading", ingest.offset)
        places = places_of(self._origins, work.reference)
        deadline = self._settings.deadline_seconds
        bringing = _Bringing(self._shared, work, ingest, portions, places, deadline)
        bringing.bring(Inquiry(bringing.job, self._store.blob_path(ingest.digest)))
        if work.by_source:
            work.source = max(work.by_source, key=lambda source: work.by_source[source])

    def _await_writer(
        self, descriptor: Descriptor, report: Report, cancelled: Callable[[], bool]
    ) -> None:
        """Wait for a blob that another node of this store brings."""
        from stowray.pipeline.arriving import Arriving

        digest, size = descriptor.digest, descriptor.size
        alive = self._clock.monotonic()
        while not self._store.has(digest, size):
            now = self._clock.monotonic()
            arriving = Arriving.open(self._store, digest)
            if arriving is not None:
                try:
                    if arriving.writer_lives():
                        alive = now
                    report("blob", str(digest), "downloading", arriving.prefix, size)
                finally:
                    arriving.close()
            if now - alive >= SHARED_SECONDS:
                raise NodeError(self._shares_with, f"does not bring {digest} into the shared store")
            wait(TAKE_OVER_SECONDS, self._clock, cancelled, str(digest))


class _Bringing:
    """One blob: the threads of its stripes, and what is done when the bytes prove wrong."""

    def __init__(
        self,
        shared: Shared,
        work: Work,
        ingest: Ingest,
        portions: Sequence[Portion],
        places: Sequence[Origin | Place],
        deadline_seconds: float,
    ) -> None:
        self._shared = shared
        self._work = work
        self._ingest = ingest
        self._portions = sorted(portions, key=lambda portion: portion.stripe.index)
        stripe = self._portions[0].stripe
        shown = ingest.show_stripes(stripe.count, stripe.unit)
        self.job = Job(shared, work, ingest, shown, places, deadline_seconds)
        self._errors: list[BaseException] = []
        self._running = 0

    def bring(self, inquiry: Inquiry) -> None:
        """Bring all bytes, prove and commit them."""
        try:
            self._bring(inquiry)
        except CancelledError:
            # The owner may be slow to answer, and whoever cancelled does not wait for that.
            threading.Thread(target=self._tell_lost, name="tell-lost", daemon=True).start()
            raise
        except BaseException:
            self._tell_lost()
            raise

    def _tell_lost(self) -> None:
        """Tell that the bytes of a blob that will not come are to be had here no more.

        Its unfinished file is served by nobody, and others would be sent here for it for ever.
        Another try of this node tells what it finds of them.
        """
        leases = self._shared.leases
        with suppress(*OWNER_ERRORS):
            for portion in self._portions:
                stripe = portion.stripe
                leases.lost(stripe_key(self.job.digest, stripe.index, stripe.count))

    def _bring(self, inquiry: Inquiry) -> None:
        while True:
            try:
                streams = self._receive(inquiry)
            except VoidError:
                inquiry.drop()
                self._errors.clear()
                self.job.go_on()
                continue
            points = inquiry.checkpoints()
            try:
                self._ingest.commit()
            except DigestMismatchError as error:
                inquiry.open(streams, error)
                if self.job.is_whole:
                    self._take_whole()
            else:
                inquiry.close(points)
                return

    def _take_whole(self) -> None:
        """Take the blob in one piece from now on, along the tree of its first stripe."""
        if len(self._portions) > 1:
            self._portions = [replace(self._portions[0], stripe=Stripe(self._ingest.size))]
            self.job.shown = self._ingest.show_stripes(1, WHOLE)

    def _receive(self, inquiry: Inquiry) -> list[StripeStream]:
        """Receive all bytes of one generation."""
        job = self.job
        streams = [
            StripeStream(job, portion, inquiry.sources(portion.sources))
            for portion in self._portions
        ]
        threads = [
            threading.Thread(target=self._run, args=(stream,), name="stripe", daemon=True)
            for stream in streams
        ]
        self._running = len(threads)
        try:
            for thread in threads:
                thread.start()
            self._supervise(streams)
        except BaseException:
            job.stop()
            raise
        finally:
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            for stream in streams:
                self._work.remarks += stream.choice.reports
        return streams

    def _run(self, stream: StripeStream) -> None:
        try:
            stream.run()
        except BaseException as error:  # noqa: BLE001 - raised where somebody waits for it
            with self.job.changed:
                self._errors.append(error)
        finally:
            with self.job.changed:
                self._running -= 1
                self.job.changed.notify_all()

    def _supervise(self, streams: Sequence[StripeStream]) -> None:
        """Wait for the stripes; renew their leases and tell how far the blob is meanwhile."""
        job, work = self.job, self._work
        shown = -1
        while True:
            with job.changed:
                job.changed.wait_for(lambda: self._errors or not self._running, REPORT_SECONDS)
                if self._errors:
                    raise self._errors[0]
                if not self._running:
                    return
            if work.cancelled():
                raise CancelledError(job.digest)
            now = job.now()
            for stream in streams:
                stream.renew(now)
            self._shared.pulse.beat()
            if self._ingest.offset != shown:
                shown = self._ingest.offset
                work.tell("downloading", shown)
