"""The images of a pre-warm run: each resolved once for the whole cluster, pinned, and locked.

Invariant: all nodes of a run get what a reference named when it was first asked for, or what the
lock file says; a reference that cannot be resolved fails alone, and only for nodes that join it is
asked for anew.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import stowray
from stowray.actors import cluster
from stowray.actors.wire import options_to_dict, origin_environment, settings_to_dict
from stowray.pipeline import lock_file
from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.engine import PullOptions
from stowray.pipeline.errors import NotFoundError, StowrayError, from_wire
from stowray.pipeline.image import Image
from stowray.pipeline.lock_file import LockedImage, LockFile
from stowray.pipeline.platform import Platform
from stowray.pipeline.prewarm_survey import PlannedImage
from stowray.pipeline.progress import Event
from stowray.pipeline.quota import Quota

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from stowray.pipeline.prewarm_plan import ImageWish
    from stowray.pipeline.progress import Progress
    from stowray.pipeline.reference import Reference
    from stowray.pipeline.settings import Settings

TRIES = 3
AT_ONCE = 16
RESTART_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class RunImage:
    """A resolved image as it travels: the image, its documents, and what a node is asked of it."""

    reference: Reference
    image: Image
    documents: dict[str, bytes]
    planned: PlannedImage

    @property
    def about(self) -> dict[str, Any]:
        """Return what ``NodeRun.survey`` and ``NodeRun.presence`` want to know."""
        return {
            "reference": self.planned.reference,
            "digest": self.planned.digest,
            "resolved": self.planned.resolved,
            "platform": self.planned.platform,
            "blobs": dict(self.planned.blobs),
            "chains": [layer.chain_id for layer in self.planned.layers],
        }


class RunImages:
    """Resolves the references of a run through its ResolverActor.

    ``node`` is the name of the node that the actor is on; ``quota`` what registries told of theirs.
    """

    def __init__(
        self,
        resolver: Any,
        settings: Settings,
        progress: Progress,
        *,
        locked: LockFile | None = None,
    ) -> None:
        self.node = ""
        self.requests = 0
        self.quota: dict[str, Quota] = {}
        self._resolver = resolver
        self._settings = settings
        self._progress = progress
        self._locked = locked
        self._found: dict[tuple[str, str], RunImage | StowrayError] = {}
        self._tags: dict[str, Descriptor] = {}
        self._at_once = asyncio.Semaphore(AT_ONCE)
        self._turns: dict[str, asyncio.Lock] = {}

    def all(self) -> list[RunImage]:
        """Return all that were resolved, in order."""
        return [found for found in self._found.values() if isinstance(found, RunImage)]

    def forget_failures(self) -> set[str]:
        """Have what could not be resolved asked for again; return these references.

        A registry that was down, or an image that was not there yet, may be there by now.
        """
        failed = {key for key, found in self._found.items() if not isinstance(found, RunImage)}
        for key in failed:
            del self._found[key]
        return {canonical for canonical, _ in failed}

    async def get(self, wish: ImageWish, node_platform: Platform) -> RunImage | StowrayError | None:
        """Return the image that a node of that platform gets, or why there is none.

        None when it is to get none. Asks each reference once for each platform.
        """
        platform = wish.for_node(node_platform)
        if platform is None:
            return None
        key = (wish.reference.canonical, str(platform))
        async with self._turns.setdefault(key[0], asyncio.Lock()):
            if key not in self._found:
                async with self._at_once:
                    self._found[key] = await self._resolve(wish.reference, platform)
        return self._found[key]

    async def _resolve(self, reference: Reference, platform: Platform) -> RunImage | StowrayError:
        canonical = reference.canonical
        report = self._progress.reporter(canonical)
        report("resolve", canonical, "resolving")
        try:
            reply = await self._ask("resolve", self._pinned(reference), platform)
        except StowrayError as error:
            report("resolve", canonical, "failed", error=str(error))
            return error
        self.requests += int(reply["requests"])
        if reply["quota"] is not None:
            self.quota[reference.registry] = Quota(**reply["quota"])
        report("resolve", canonical, "resolved")
        # Whatever digest it was pinned to meanwhile, the image bears the name that was asked for.
        image = replace(Image.from_dict(reply["image"]), reference=reference)
        self._tags.setdefault(canonical, image.resolved)
        planned = PlannedImage.of(canonical, image)
        return RunImage(reference, image, reply["documents"], planned)

    def _pinned(self, reference: Reference) -> Reference:
        """Return the reference with the digest that it has in this run already, or in the lock."""
        known = self._tags.get(reference.canonical)
        if known is not None:
            return reference.with_digest(known.digest)
        locked = self._locked.find(reference) if self._locked is not None else None
        return reference if locked is None else locked.pinned

    async def _ask(
        self, method: str, reference: Reference, platform: Platform, policy: str = ""
    ) -> dict[str, Any]:
        settings = replace(self._settings, node=self.node or self._settings.node)
        options = PullOptions(
            platform=platform,
            policy=policy or self._settings.resolve.policy,  # type: ignore[arg-type]
        )
        request = {
            "run": secrets.token_hex(8),
            "store": str(settings.store_path()),
            "node": settings.node_name,
            "source": reference.to_dict(),
            "options": options_to_dict(options),
            "settings": settings_to_dict(settings),
            "environment": origin_environment(os.environ),
        }
        for tried in range(1, TRIES + 1):
            try:
                call = getattr(self._resolver, method).remote(request)
                reply: dict[str, Any] = await cluster.ask(call, "resolver")
                break
            except StowrayError as error:
                if not cluster.is_lost(error) or tried == TRIES:
                    raise
                # Ray takes a moment to start it again.
                await asyncio.sleep(RESTART_SECONDS)
        for event in reply.get("events", ()):
            self._progress.merge(Event.from_dict(event))
        if "error" in reply:
            raise from_wire(*reply["error"])
        return reply

    # -- lock -------------------------------------------------------------------------------------

    def locked_images(self) -> list[LockedImage]:
        """Return what the references named in this run."""
        found: dict[str, LockedImage] = {}
        for run_image in self.all():
            canonical = run_image.reference.canonical
            resolved = run_image.image.resolved
            known = found.get(canonical)
            manifests = dict(known.manifests) if known is not None else {}
            manifests[run_image.planned.platform] = Digest(run_image.planned.digest)
            found[canonical] = LockedImage(
                run_image.reference, resolved.digest, resolved.media_type, resolved.size, manifests
            )
        return list(found.values())

    def write_lock(self, path: Path) -> None:
        """Bring the lock file up to date; what it says of other references and platforms stays."""
        entries = dict(self._locked.images) if self._locked is not None else {}
        before = dict(entries)
        for image in self.locked_images():
            known = entries.get(image.reference.canonical)
            if known is not None and known.digest == image.digest:
                image = replace(image, manifests={**known.manifests, **image.manifests})
            entries[image.reference.canonical] = image
        if entries == before:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        content = lock_file.lock(
            entries.values(),
            tool=f"stowray {stowray.__version__}",
            created=now.replace("+00:00", "Z"),
        )
        lock_file.write_lock(path, content)

    async def drift(self) -> tuple[tuple[lock_file.Drift, ...], list[str]]:
        """Return what tags name another digest by now, and sentences about those not known."""
        used = [image for image in self.locked_images() if image.reference.digest is None]
        looked = await asyncio.gather(*(self._look(image) for image in used))
        now: list[LockedImage] = []
        untold: list[str] = []
        compared: list[LockedImage] = []
        for image, found in zip(used, looked, strict=True):
            if isinstance(found, Descriptor):
                now.append(replace(image, digest=found.digest))
            elif not isinstance(found, NotFoundError):
                untold.append(
                    f"{image.reference.familiar}: not known whether it still names the same "
                    f"({found})"
                )
                continue
            compared.append(image)
        return lock_file.drift(_lock_of(compared), now), untold

    async def _look(self, image: LockedImage) -> Descriptor | StowrayError:
        platform = Platform.parse(next(iter(image.manifests)))
        try:
            async with self._at_once:
                reply = await self._ask("look", image.reference, platform, "always")
        except StowrayError as error:
            return error
        self.requests += 1
        return Descriptor.from_dict(reply["descriptor"])


def _lock_of(images: Iterable[LockedImage]) -> LockFile:
    return lock_file.lock(images, tool="", created="")
