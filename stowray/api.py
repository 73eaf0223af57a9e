"""The Python API: resolve, pull, a handle on one resolved image, and pre-warming a cluster.

Examples::

    import stowray

    result = stowray.pull("debian:12")
    with stowray.resolve("debian:12") as image:
        print(image.digest, image.cache_key())
        print(image.snapshot().description)
    with stowray.prewarm(["debian:12"]) as job:
        print(job.result().exit_code, job.ready_nodes("debian:12"))
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from stowray.pipeline.digest import Digest
from stowray.pipeline.engine import LocalEngine, PullOptions, never
from stowray.pipeline.errors import UsageError
from stowray.pipeline.image import manifest_key
from stowray.pipeline.platform import Platform
from stowray.pipeline.progress import Progress
from stowray.pipeline.settings import Settings, load_settings
from stowray.pipeline.source import Source, parse_source
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stowray.job import Job, Run
    from stowray.pipeline import image as images
    from stowray.pipeline.leases import Lease
    from stowray.pipeline.prewarm_report import PrewarmReport
    from stowray.pipeline.progress import Event
    from stowray.pipeline.resolve import Policy
    from stowray.pipeline.result import PullResult


POLICIES = ("newer", "missing", "always", "never")


@dataclass(frozen=True, slots=True)
class CacheKey:
    """The two keys of an image: of its manifest for the platform, and of its layers' content."""

    manifest_key: str
    chain_id: str


@dataclass(frozen=True, slots=True)
class SnapshotHandle:
    """An unpacked image in the store; ``lowers`` are its overlay layers, the top one first."""

    chain_id: str
    description: str
    lowers: tuple[Path, ...]


class Image:
    """One resolution, kept: all calls speak of the same descriptor, however tags move meanwhile.

    Holds a lease on what it names until closed, so that nothing of it is collected.
    """

    def __init__(
        self,
        engine: LocalEngine,
        source: Source,
        image: images.Image,
        options: PullOptions,
        lease: Lease,
    ) -> None:
        self._engine = engine
        self._source = source
        self._image = image
        self._options = options
        self._lease = lease

    @property
    def reference(self) -> str:
        """Return the canonical reference that was resolved."""
        return self._source.canonical

    @property
    def digest(self) -> Digest:
        """Return the digest of the manifest for the platform."""
        return self._image.manifest_descriptor.digest

    @property
    def resolved(self) -> Digest:
        """Return the digest that the reference pointed to."""
        return self._image.resolved.digest

    @property
    def platform(self) -> Platform:
        """Return the platform of the image."""
        return self._image.platform

    def cache_key(self) -> CacheKey:
        """Return the keys under which a build cache may file this image."""
        return CacheKey(
            manifest_key(self._image.resolved.digest, self._image.platform),
            str(self._image.chain_id),
        )

    def config(self) -> tuple[Digest, bytes]:
        """Return the digest and the raw bytes of the image config."""
        return self._image.manifest.config.digest, self._image.config.raw

    def pull(self, cancelled: Callable[[], bool] = never) -> PullResult:
        """Fetch and unpack this very image; see :func:`pull`."""
        return self._engine.pull_image(self._source, self._image, self._options, cancelled)

    def snapshot(self, cancelled: Callable[[], bool] = never) -> SnapshotHandle:
        """Return the unpacked image, pulling what is missing first."""
        options = replace(self._options, unpack=True)
        self._engine.pull_image(self._source, self._image, options, cancelled)
        chain_id = self._image.chain_id
        return SnapshotHandle(
            chain_id=str(chain_id),
            description=f"pulled from {self.reference}",
            lowers=tuple(self._engine.snapshots.lowers(Digest(chain_id) if chain_id else None)),
        )

    def close(self) -> None:
        """Let the content go and end the engine behind this handle."""
        self._lease.close()
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()


def make_engine(
    settings: Settings, *, progress: Progress | None = None, fork_workers: bool = False
) -> LocalEngine:
    """Return the engine that ``settings.engine`` selects.

    ``auto`` is the in-process engine unless this node's session crew is warm (``stowray session``).
    """
    progress = progress or Progress(node=settings.node_name)
    if settings.engine == "local":
        return LocalEngine(settings, progress=progress, fork_workers=fork_workers)
    if settings.engine == "auto" and not _session_is_warm(settings):
        return LocalEngine(settings, progress=progress, fork_workers=fork_workers)
    from stowray.actors.engine import RayEngine

    return RayEngine(settings, progress=progress)


def _session_is_warm(settings: Settings) -> bool:
    from stowray.actors.session_state import is_warm

    return is_warm(settings)


def _settings(store: str | Path | None, overrides: dict[str, Any]) -> Settings:
    if store is not None:
        overrides = {**overrides, "store": str(store)}
    return load_settings(overrides=overrides)


def _options(
    platform: str | Platform | None, policy: Policy, *, unpack: bool, sync: bool
) -> PullOptions:
    if isinstance(platform, str):
        platform = Platform.parse(platform)
    if policy not in POLICIES:
        raise UsageError("policy", f"{policy!r} is none of {', '.join(POLICIES)}")
    return PullOptions(platform=platform, policy=policy, unpack=unpack, sync=sync)


def pull(
    reference: str,
    *,
    store: str | Path | None = None,
    platform: str | Platform | None = None,
    policy: Policy = "newer",
    unpack: bool = True,
    sync: bool = False,
    watch: Callable[[Sequence[Event]], None] | None = None,
    cancelled: Callable[[], bool] = never,
    **settings: Any,
) -> PullResult:
    """Bring an image into the store, verified and unpacked, and return what was done.

    ``settings`` are the command line's options by name (``engine``, ``authfile``, ``plain_http``,
    …); ``watch`` gets progress events, ``cancelled`` is polled. Raises a
    :class:`~stowray.StowrayError` of the class that tells what the caller can do.
    """
    source = parse_source(reference)
    configured = _settings(store, settings)
    progress = Progress(node=configured.node_name)
    if watch is not None:
        progress.watch(watch)
    engine = make_engine(configured, progress=progress)
    try:
        return engine.pull(source, _options(platform, policy, unpack=unpack, sync=sync), cancelled)
    finally:
        engine.close()
        progress.close()


def resolve(
    reference: str,
    *,
    store: str | Path | None = None,
    platform: str | Platform | None = None,
    policy: Policy = "newer",
    cancelled: Callable[[], bool] = never,
    **settings: Any,
) -> Image:
    """Resolve a reference once and return a handle on the image, to be closed after use."""
    source = parse_source(reference)
    configured = _settings(store, settings)
    engine = make_engine(configured)
    options = _options(platform, policy, unpack=True, sync=False)
    try:
        image, lease = engine.hold_image(source, options, cancelled)
    except BaseException:
        engine.close()
        raise
    return Image(engine, source, image, options, lease)


def prewarm(
    references: str | Sequence[str] = (),
    *,
    file: str | Path | None = None,
    lock: str | Path | None = None,
    watch: bool = False,
    store: str | Path | None = None,
    platforms: Sequence[str] = (),
    plan: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Job:
    """Bring images to all nodes of the Ray that this program is in, or can reach; return a handle.

    ``file`` is a plan file, ``references`` are added to its images; ``plan`` has further keys of
    one, which win over the file's (``{"nodes.labels": {"zone": "a"}, "limits.fan_out": 2}``).
    ``platforms`` says for which platforms ``references`` are wanted; without it each node gets its
    own. ``lock`` names a lock file, written and honoured; ``watch`` goes on and warms nodes that
    join until the job is cancelled. ``settings`` are the command line's options by name
    (``address``, ``authfile``, ``plain_http``, …).

    Inside a Ray job or task no other Ray is started. Raises UsageError at once for a plan that
    cannot be carried out; what happens later is told by :meth:`~stowray.job.Job.result`.
    """
    from stowray.job import Job

    progress = Progress()
    run = _prewarm_run(references, file, lock, watch, store, platforms, plan, settings, progress)
    return Job(run, progress)


def status(
    references: str | Sequence[str] = (),
    *,
    file: str | Path | None = None,
    lock: str | Path | None = None,
    repair: bool = False,
    store: str | Path | None = None,
    platforms: Sequence[str] = (),
    plan: Mapping[str, Any] | None = None,
    **settings: Any,
) -> PrewarmReport:
    """Return what is on each node, checked on disk; ``repair`` brings what is missing.

    The arguments are those of :func:`prewarm`.
    """
    progress = Progress()
    run = _prewarm_run(references, file, lock, False, store, platforms, plan, settings, progress)
    try:
        return run.status(repair, never)
    finally:
        run.close()
        progress.close()


def _prewarm_run(
    references: str | Sequence[str],
    file: str | Path | None,
    lock: str | Path | None,
    watch: bool,
    store: str | Path | None,
    platforms: Sequence[str],
    plan: Mapping[str, Any] | None,
    settings: dict[str, Any],
    progress: Progress,
) -> Run:
    from stowray.job import make_run
    from stowray.pipeline.prewarm_plan_file import load_plan, wishes

    names = [references] if isinstance(references, str) else references
    path = Path(file) if file is not None else None
    wanted = load_plan(path, references=wishes(names, platforms), overrides=plan)
    lock_path = Path(lock) if lock is not None else wanted.lock_path(path)
    return make_run(
        wanted, _settings(store, settings), progress=progress, lock=lock_path, watch=watch
    )
