"""The in-process engine: threads fetch, worker processes stage, one walk per pull.

Invariant: a pull that finds everything present touches neither network nor workers; pulls that run
at the same time share the pools and, through the store's locks, every blob and layer; whatever
ends a pull, nothing of it works on after the call has returned.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stowray.pipeline.errors import StowrayError
from stowray.pipeline.plan import make_plan
from stowray.pipeline.platform import Platform
from stowray.pipeline.resolve import Request, Resolver, document_digests
from stowray.pipeline.result import LayerResult, PullResult
from stowray.pipeline.run import run_plan
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.store import ReferenceRecord, Store

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from stowray.pipeline.crew import LocalCrew
    from stowray.pipeline.disk_images import DiskImage
    from stowray.pipeline.fetch import Fetcher
    from stowray.pipeline.image import Image
    from stowray.pipeline.origin import Origin
    from stowray.pipeline.plan import Plan, Step
    from stowray.pipeline.progress import Progress, Report
    from stowray.pipeline.reference import Reference
    from stowray.pipeline.resolve import Policy
    from stowray.pipeline.run import Outcome
    from stowray.pipeline.settings import Settings


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
        fork_workers: bool = False,
    ) -> None:
        self.settings = settings
        self.progress = progress
        self.store = store or Store.open(settings.store_path())
        self.snapshots = Snapshots(self.store)
        self._fork_workers = fork_workers
        self._lock = threading.Lock()
        self._crew: LocalCrew | None = None
        self._sides: dict[str, tuple[Fetcher, Resolver]] = {}
        self._registry: Origin | None = None

    def close(self) -> None:
        """End threads, workers and connections."""
        with self._lock:
            crew, self._crew = self._crew, None
            registry, self._registry = self._registry, None
            self._sides.clear()
        if crew is not None:
            crew.close()
        close = getattr(registry, "close", None)
        if close is not None:
            close()

    def image(
        self,
        source: Reference | DiskImage,
        options: PullOptions,
        cancelled: Callable[[], bool] = never,
    ) -> Image:
        """Resolve ``source`` for the wanted platform, fetching documents only."""
        return self._resolve(source, options, cancelled)[0]

    def plan(
        self,
        source: Reference | DiskImage,
        options: PullOptions,
        cancelled: Callable[[], bool] = never,
    ) -> tuple[Image, Plan]:
        """Return the image and what a pull would do."""
        image = self.image(source, options, cancelled)
        return image, self._plan(image, options)

    def pull(
        self,
        source: Reference | DiskImage,
        options: PullOptions,
        cancelled: Callable[[], bool] = never,
    ) -> PullResult:
        """Bring ``source`` into the store, verified, and unpack it unless told not to.

        Raises a StowrayError of the class that contract and exit code name; what was fetched by
        then is kept for the next run, and nothing unproven is visible.
        """
        reference = source.canonical
        report = self.progress.reporter(reference)
        begun = time.perf_counter()
        try:
            with self.store.lease(f"pull {reference}") as lease:
                image, requests = self._resolve(source, options, cancelled)
                resolved = time.perf_counter()
                lease.add(digests=_all_digests(image), chain_ids=image.chain_ids)
                plan = self._plan(image, options)
                _report_present(report, plan)
                outcomes = self._carry_out(source, image, plan, report, cancelled)
                self.store.record_reference(_record(source, image, options, self.store))
        except StowrayError as error:
            self.progress.fail_open(reference, str(error))
            report("image", reference, "failed", error=str(error))
            raise
        if options.sync:
            self.store.sync()
        ended = time.perf_counter()
        report("image", reference, "done")
        return self._result(
            image, plan, outcomes, requests, resolved - begun, ended - begun, reference
        )

    def _resolve(
        self,
        source: Reference | DiskImage,
        options: PullOptions,
        cancelled: Callable[[], bool],
    ) -> tuple[Image, int]:
        report = self.progress.reporter(source.canonical)
        request = Request(
            reference=source,
            platform=self._platform(options),
            policy=options.policy,
            report=report,
            cancelled=cancelled,
        )
        report("resolve", source.canonical, "resolving")
        if self._fork_workers and options.unpack:
            # While this process has a single thread: the resolver and the fetchers start more.
            self._get_crew().start_early()
        image = self._get_resolver(source).image(request)
        report("resolve", source.canonical, "resolved")
        return image, request.manifest_requests

    def _platform(self, options: PullOptions) -> Platform:
        if options.platform is not None:
            return options.platform
        if self.settings.resolve.platform:
            return Platform.parse(self.settings.resolve.platform)
        return Platform.host()

    def _plan(self, image: Image, options: PullOptions) -> Plan:
        return make_plan(
            image,
            has_blob=self.store.has,
            has_chain=self.snapshots.has,
            unpack=options.unpack,
        )

    def _carry_out(
        self,
        source: Reference | DiskImage,
        image: Image,
        plan: Plan,
        report: Report,
        cancelled: Callable[[], bool],
    ) -> dict[str, Outcome]:
        if plan.is_complete:
            return {}
        crew = self._get_crew()
        fetcher = self._get_fetcher(source)

        def submit(step: Step, stop: Callable[[], bool]) -> Future[Outcome]:
            return crew.submit(step, image, fetcher, report, stop)

        return run_plan(plan, submit, cancelled)

    def _get_crew(self) -> LocalCrew:
        from stowray.pipeline.crew import LocalCrew

        with self._lock:
            if self._crew is None:
                self._crew = LocalCrew(
                    self.settings, self.store, fork_workers=self._fork_workers
                )
            return self._crew

    def _get_resolver(self, source: Reference | DiskImage) -> Resolver:
        return self._get_side(source)[1]

    def _get_fetcher(self, source: Reference | DiskImage) -> Fetcher:
        return self._get_side(source)[0]

    def _get_side(self, source: Reference | DiskImage) -> tuple[Fetcher, Resolver]:
        """Return the fetcher and resolver for where ``source`` comes from."""
        from stowray.pipeline.disk_images import DiskImage
        from stowray.pipeline.fetch import Fetcher

        key = source.canonical if isinstance(source, DiskImage) else ""
        with self._lock:
            side = self._sides.get(key)
            if side is None:
                origin: Origin = source if isinstance(source, DiskImage) else self._get_registry()
                fetcher = Fetcher(self.store, [origin], self.settings.registry)
                resolver = Resolver(
                    origin,
                    self.store,
                    fetcher,
                    ttl_seconds=self.settings.resolve.ttl_seconds,
                )
                side = self._sides[key] = (fetcher, resolver)
            return side

    def _get_registry(self) -> Origin:
        from stowray.pipeline.registry import Registry

        if self._registry is None:
            self._registry = Registry(self.settings.registry)
        return self._registry

    def _result(
        self,
        image: Image,
        plan: Plan,
        outcomes: dict[str, Outcome],
        requests: int,
        resolve_seconds: float,
        total_seconds: float,
        reference: str,
    ) -> PullResult:
        layers = tuple(_layer_result(plan, outcomes, index) for index in range(len(plan.layers)))
        fetches = [outcomes[step.id] for step in plan.steps if step.kind == "fetch"]
        return PullResult(
            reference=reference,
            digest=str(image.manifest_descriptor.digest),
            resolved=str(image.resolved.digest),
            platform=str(image.platform),
            config=str(image.manifest.config.digest),
            chain_id=str(image.chain_id),
            layers=layers,
            fetched_bytes=sum(outcome.fetched_bytes for outcome in fetches),
            manifest_requests=requests,
            seconds={
                "resolve": resolve_seconds,
                "fetch": max((outcome.seconds for outcome in fetches), default=0.0),
                "apply": max((layer.apply_seconds for layer in layers), default=0.0),
                "total": total_seconds,
            },
            engine=self.name,
            node=self.settings.node_name,
        )


def _all_digests(image: Image) -> tuple[str, ...]:
    return (
        *map(str, document_digests(image)),
        *(str(layer.digest) for layer in image.layers),
    )


def _report_present(report: Report, plan: Plan) -> None:
    for layer in plan.layers:
        size = layer.descriptor.size
        if layer.blob_present:
            report("blob", str(layer.descriptor.digest), "exists", size, size)
        if layer.committed:
            report("commit", str(layer.chain_id), "exists")


def _record(
    source: Reference | DiskImage, image: Image, options: PullOptions, store: Store
) -> ReferenceRecord:
    known = store.find_reference(source.canonical, str(image.platform))
    return ReferenceRecord(
        reference=source.canonical,
        platform=str(image.platform),
        resolved=image.resolved,
        manifest=image.manifest_descriptor.digest,
        manifest_media_type=image.manifest_descriptor.media_type,
        manifest_size=image.manifest_descriptor.size,
        config=image.manifest.config.digest,
        layers=tuple(layer.digest for layer in image.layers),
        chain_id=str(image.chain_id),
        unpacked=options.unpack or (known is not None and known.unpacked),
        pinned=known is not None and known.pinned,
        created=time.time(),
    )


def _layer_result(plan: Plan, outcomes: dict[str, Outcome], index: int) -> LayerResult:
    layer = plan.layers[index]
    fetch = outcomes.get(f"fetch:{layer.descriptor.digest}")
    stage = outcomes.get(f"stage:{layer.diff_id}")
    commit = outcomes.get(f"commit:{layer.chain_id}")
    return LayerResult(
        digest=str(layer.descriptor.digest),
        diff_id=str(layer.diff_id),
        chain_id=str(layer.chain_id),
        size=layer.descriptor.size,
        unpacked_size=stage.unpacked_size if stage else 0,
        source=fetch.source if fetch else "store",
        fetched_bytes=fetch.fetched_bytes if fetch else 0,
        fetch_seconds=fetch.seconds if fetch else 0.0,
        apply_seconds=(stage.seconds if stage else 0.0) + (commit.seconds if commit else 0.0),
    )
