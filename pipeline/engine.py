"""The in-process engine: threads fetch, worker processes stage, one walk per pull.

Invariant: a pull that finds everything present touches neither network nor workers; pulls that run
at the same time share the pools and, through the store's locks, every blob and layer; whatever
ends a pull, nothing of it works on after the call has returned.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from stowray.pipeline.errors import ContentError, StowrayError
from stowray.pipeline.origins import Origins
from stowray.pipeline.plan import make_plan
from stowray.pipeline.platform import Platform
from stowray.pipeline.pull_record import (
    all_digests,
    record_image,
    report_present,
    stage_seconds,
)
from stowray.pipeline.resolve import Request
from stowray.pipeline.result import make_result
from stowray.pipeline.run import run_plan
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.store import Store
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from concurrent.futures import Future

    from stowray.pipeline.access import Access
    from stowray.pipeline.crew import Crew
    from stowray.pipeline.fetch import Fetcher
    from stowray.pipeline.image import Descriptor, Image
    from stowray.pipeline.leases import Lease
    from stowray.pipeline.plan import Plan, Step
    from stowray.pipeline.progress import Progress, Report
    from stowray.pipeline.quota import Quota
    from stowray.pipeline.resolve import Policy, Resolver
    from stowray.pipeline.result import PullResult
    from stowray.pipeline.run import Outcome
    from stowray.pipeline.settings import Settings
    from stowray.pipeline.source import Source


@dataclass(frozen=True, slots=True)
class PullOptions:
    """How one pull goes; ``platform`` None is this machine's."""

    platform: Platform | None = None
    policy: Policy = "newer"
    unpack: bool = True
    sync: bool = False


def never() -> bool:
    """Return False: the answer of a caller that does not cancel."""
    return False


class LocalEngine:
    """Pulls images into one store with the means of this process and its workers."""

    name = "local"

    def __init__(
        self,
        settings: Settings,
        *,
        progress: Progress,
        store: Store | None = None,
        crew: Crew | None = None,
        fork_workers: bool = False,
        environment: Mapping[str, str] | None = None,
        access: Access | None = None,
    ) -> None:
        """Take what is given and make the rest when it is needed.

        ``environment`` and ``access``: see :class:`Origins`, by default this process's own and
        none. ``crew`` carries out the steps of plans, by default threads and processes of
        this machine.
        """
        self.settings = settings
        self.progress = progress
        self.store = store or Store.open(settings.store_path())
        self.snapshots = Snapshots(self.store)
        self.on_begin: Callable[[], None] | None = None
        self.on_warning: Callable[[str], None] | None = None
        # Whether the process ends with this engine, so that nobody need see to what ends with it.
        self.is_last = False
        self._warned: set[str] = set()
        self._begun = False
        self._fork_workers = fork_workers
        self._lock = threading.Lock()
        self._crew: Crew | None = crew
        self.origins = Origins(
            settings,
            self.store,
            os.environ if environment is None else environment,
            self._warn,
            access,
        )

    def close(self) -> None:
        """End threads, workers and connections."""
        with self._lock:
            crew, self._crew = self._crew, None
        if crew is not None:
            crew.close()
        self.origins.close()

    def resolve(
        self,
        source: Source,
        options: PullOptions,
        cancelled: Callable[[], bool] = never,
    ) -> Descriptor:
        """Return what ``source`` points to, an index or a manifest, fetching at most that."""
        with self._reported(source):
            request, resolver = self._request(source, options, cancelled)
            descriptor = resolver.resolve(request)
            request.report("resolve", source.canonical, "resolved")
            return descriptor

    def image(
        self,
        source: Source,
        options: PullOptions,
        cancelled: Callable[[], bool] = never,
    ) -> Image:
        """Resolve ``source`` for the wanted platform, fetching documents only."""
        with self._reported(source):
            return self._resolve(source, options, cancelled)[0]

    def plan(
        self,
        source: Source,
        options: PullOptions,
        cancelled: Callable[[], bool] = never,
    ) -> tuple[Image, Plan]:
        """Return the image and what a pull would do."""
        image = self.image(source, options, cancelled)
        return image, self._plan(image, options)

    def quota(self, source: Source) -> Quota | None:
        """Return how many requests the registry of ``source`` still allows, if it told us."""
        return self.origins.quota(source)

    def hold_image(
        self,
        source: Source,
        options: PullOptions,
        cancelled: Callable[[], bool] = never,
    ) -> tuple[Image, Lease]:
        """Resolve ``source`` and return the image with a lease on all that it names."""
        lease = self.store.lease(f"image {source.canonical}")
        try:
            image = self.image(source, options, cancelled)
            lease.add(digests=all_digests(image), chain_ids=image.chain_ids)
        except BaseException:
            lease.close()
            raise
        return image, lease

    def pull(
        self,
        source: Source,
        options: PullOptions,
        cancelled: Callable[[], bool] = never,
    ) -> PullResult:
        """Bring ``source`` into the store, verified, and unpack it unless told not to.

        Raises a StowrayError of the class that contract and exit code name; what was fetched by
        then is kept for the next run, and nothing unproven is visible.
        """
        with self._reported(source), self.store.lease(f"pull {source.canonical}") as lease:
            begun = time.perf_counter()
            image, requests = self._resolve(source, options, cancelled)
            seconds = time.perf_counter() - begun
            lease.add(digests=all_digests(image), chain_ids=image.chain_ids)
            return self._pull(source, image, options, cancelled, requests, seconds)

    def pull_image(
        self,
        source: Source,
        image: Image,
        options: PullOptions,
        cancelled: Callable[[], bool] = never,
    ) -> PullResult:
        """Pull an image that was resolved before; whoever calls holds a lease on it."""
        with self._reported(source):
            return self._pull(source, image, options, cancelled, 0, 0.0)

    def pull_all_platforms(
        self, source: Source, options: PullOptions, cancelled: Callable[[], bool] = never
    ) -> list[PullResult]:
        """Bring the content of every platform that ``source`` offers into the store."""
        options = replace(options, unpack=False)
        with self._reported(source), self.store.lease(f"pull {source.canonical}") as lease:
            begun = time.perf_counter()
            request, resolver = self._request(source, options, cancelled)
            found = resolver.images(request)
            seconds = time.perf_counter() - begun
            results: list[PullResult] = []
            for image in found:
                lease.add(digests=all_digests(image), chain_ids=())
                requests = 0 if results else request.manifest_requests
                results.append(
                    self._pull(source, image, options, cancelled, requests, seconds, beside=True)
                )
            return results

    def _pull(
        self,
        source: Source,
        image: Image,
        options: PullOptions,
        cancelled: Callable[[], bool],
        requests: int,
        resolve_seconds: float,
        *,
        beside: bool = False,
    ) -> PullResult:
        begun = time.perf_counter()
        report = self.progress.reporter(source.canonical)
        self._keep_documents(source, image, options, cancelled)
        plan = self._plan(image, options)
        report_present(report, plan)
        try:
            outcomes = self._carry_out(source, image, plan, report, cancelled)
        except ContentError:
            # A blob that was here may have been damaged since it was proven; the layers that fail
            # to come out of it are not the registry's fault, and fetching it again mends them.
            if not self._put_damaged_aside(plan):
                raise
            plan = self._plan(image, options)
            outcomes = self._carry_out(source, image, plan, report, cancelled)
        record_image(self.store, source, image, unpacked=options.unpack, beside=beside)
        if options.sync:
            self.store.sync()
        seconds = stage_seconds(plan, outcomes, resolve_seconds, time.perf_counter() - begun)
        report("image", source.canonical, "done")
        return make_result(
            source.canonical,
            image,
            plan,
            outcomes,
            unpacked={
                layer.chain_id: self.snapshots.get(layer.chain_id).unpacked_size
                for layer in plan.layers
                if layer.committed
            },
            requests=requests,
            seconds=seconds,
            engine=self.name,
            node=self.settings.node_name,
        )

    def _keep_documents(
        self,
        source: Source,
        image: Image,
        options: PullOptions,
        cancelled: Callable[[], bool],
    ) -> None:
        """Fetch documents again that were collected before the lease could name them."""
        documents = (image.resolved, *image.indexes, image.manifest_descriptor)
        if not all(self.store.has(document.digest, document.size) for document in documents):
            request, resolver = self._request(source, options, cancelled)
            resolver.keep_documents(request, image)

    @contextmanager
    def _reported(self, source: Source) -> Iterator[None]:
        """End all that was reported of ``source`` as failed when the block fails."""
        try:
            yield
        except StowrayError as error:
            self.progress.fail_open(source.canonical, str(error))
            self.progress.record(
                source.canonical, "image", source.canonical, "failed", error=str(error)
            )
            raise

    def fetcher(self, source: Source) -> Fetcher:
        """Return the fetcher for where ``source`` comes from."""
        return self.origins.side(source)[1]

    def begin(self) -> None:
        """Start the workers and then whatever else wants to know that there is work to do.

        Forking is only sound while this process has a single thread, and resolver, fetchers and
        display start more: so the workers come first.
        """
        if self._begun:
            return
        self._begun = True
        if self._fork_workers:
            self._get_crew().start_early()
        if self.on_begin is not None:
            self.on_begin()

    def _resolve(
        self, source: Source, options: PullOptions, cancelled: Callable[[], bool]
    ) -> tuple[Image, int]:
        request, resolver = self._request(source, options, cancelled)
        image = resolver.image(request)
        request.report("resolve", source.canonical, "resolved")
        return image, request.manifest_requests

    def _request(
        self, source: Source, options: PullOptions, cancelled: Callable[[], bool]
    ) -> tuple[Request, Resolver]:
        report = self.progress.reporter(source.canonical)
        request = Request(
            reference=source,
            platform=self.platform(options),
            strict=self.settings.resolve.strict_platform,
            policy=options.policy,
            report=report,
            cancelled=cancelled,
        )
        resolver = self.origins.resolver(source)
        report("resolve", source.canonical, "resolving")
        if not resolver.is_known(request):
            self.begin()
        return request, resolver

    def platform(self, options: PullOptions) -> Platform:
        """Return the platform that a pull with ``options`` asks for."""
        if options.platform is not None:
            return options.platform.normalized()
        if self.settings.resolve.platform:
            return Platform.parse(self.settings.resolve.platform).normalized()
        return Platform.host().normalized()

    def _plan(self, image: Image, options: PullOptions) -> Plan:
        return make_plan(
            image,
            has_blob=self.store.has,
            has_chain=self.snapshots.has,
            unpack=options.unpack,
        )

    def _carry_out(
        self,
        source: Source,
        image: Image,
        plan: Plan,
        report: Report,
        cancelled: Callable[[], bool],
    ) -> dict[str, Outcome]:
        if plan.is_complete:
            return {}
        self.begin()
        crew = self._get_crew()
        fetcher = self.fetcher(source)

        def submit(step: Step, cancelled: Callable[[], bool]) -> Future[Outcome]:
            return crew.submit(step, image, fetcher, report, cancelled)

        return run_plan(plan, submit, cancelled, commits_in_order=crew.commits_in_order)

    def _warn(self, text: str) -> None:
        with self._lock:
            is_new = text not in self._warned
            self._warned.add(text)
        if is_new and self.on_warning is not None:
            self.on_warning(text)

    def _put_damaged_aside(self, plan: Plan) -> bool:
        """Re-hash the blobs that a plan found present; return whether one was not what it said."""
        present = {layer.descriptor.digest for layer in plan.layers if layer.blob_present}
        return not all(self.store.prove(digest) for digest in present)

    def _get_crew(self) -> Crew:
        with self._lock:
            if self._crew is None:
                from stowray.pipeline.crew import LocalCrew

                self._crew = LocalCrew(self.settings, self.store, fork_workers=self._fork_workers)
            return self._crew
