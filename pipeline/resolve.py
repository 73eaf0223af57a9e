"""From a reference to an image: which manifest, which config, which layers.

Invariant: a tag is asked for once per ``ttl_seconds`` and by one flight at a time, whoever waits;
neither errors nor cancellations are remembered; a digest is never asked for again when the store
holds it and this repository is on record as having served it. What is returned was hashed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from stowray.pipeline import image as images
from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.errors import ManifestError, NotFoundError, PlatformError
from stowray.pipeline.flight import SingleFlight
from stowray.pipeline.platform import select

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.fetch import Fetcher
    from stowray.pipeline.image import Descriptor, Image, ImageConfig, Index, Manifest
    from stowray.pipeline.origin import Origin, Resolved
    from stowray.pipeline.platform import Platform
    from stowray.pipeline.progress import Report
    from stowray.pipeline.reference import Reference
    from stowray.pipeline.store import Store

TTL_SECONDS = 5.0
Policy = Literal["missing", "always", "never", "newer"]


@dataclass(slots=True)
class Request:
    """One question to the resolver: what is asked, by whom, and how far it may go for the answer."""

    reference: Reference
    platform: Platform
    policy: Policy
    report: Report
    cancelled: Callable[[], bool]
    manifest_requests: int = 0


class Resolver:
    """Turns references into images; documents go through the store, so that each is read once."""

    def __init__(
        self,
        origin: Origin,
        store: Store,
        fetcher: Fetcher,
        *,
        ttl_seconds: float = TTL_SECONDS,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._origin = origin
        self._store = store
        self._fetcher = fetcher
        self._tags: SingleFlight[Resolved] = SingleFlight(ttl_seconds, clock)
        self._documents: SingleFlight[bytes] = SingleFlight(0.0, clock)

    def resolve(self, request: Request) -> Descriptor:
        """Return what the reference points to: media type, digest, size.

        Raises NotFoundError (policy ``never`` and not here, or the registry has it not) and what
        the origin raises.
        """
        known = self._known(request)
        if known is not None:
            return known
        if request.policy == "never":
            raise NotFoundError(str(request.reference.canonical), str(self._store.path))
        resolved = self._ask(request)
        descriptor = resolved.descriptor
        if resolved.body is not None:
            self._store.put_blob(descriptor.digest, resolved.body)
        if self._store.has(descriptor.digest, descriptor.size):
            self._store.confirm(descriptor.digest, request.reference.name)
        return descriptor

    def image(self, request: Request) -> Image:
        """Return the image for the wanted platform, fetching only documents that are not here.

        Raises PlatformError naming what is offered, ManifestError for a document that breaks its
        rules, and what :meth:`resolve` raises.
        """
        resolved = self.resolve(request)
        offered: list[str] = []
        for descriptor, manifest in self._manifests(request, resolved, offered, depth=0):
            config = self._config(request, manifest)
            image = images.Image(
                reference=request.reference,
                resolved=resolved,
                manifest_descriptor=descriptor,
                manifest=manifest,
                config=config,
                platform=config.platform,
            )
            if images.config_matches(config, request.platform):
                images.check_layers(manifest)
                images.check_counts(manifest, config)
                return image
            offered.append(str(config.platform))
        raise PlatformError(str(request.platform), ", ".join(dict.fromkeys(offered)))

    def index(self, request: Request) -> tuple[Descriptor, Index | Manifest]:
        """Return the document that the reference points to, whatever the platform."""
        resolved = self.resolve(request)
        return resolved, self._document(request, resolved)

    def _known(self, request: Request) -> Descriptor | None:
        """Return what the store's records answer without any network, if they may."""
        reference = request.reference
        if request.policy in ("missing", "never"):
            record = self._store.find_reference(reference.canonical, str(request.platform))
            if record is not None and self._store.has(record.resolved.digest, record.resolved.size):
                return record.resolved
        if reference.digest is None or request.policy == "always":
            return None
        if not self._store.has(reference.digest):
            return None
        if not self._store.confirmed(reference.digest, reference.name):
            return None
        body = self._store.read_blob(reference.digest, images.MANIFEST_LIMIT)
        return images.Descriptor(
            media_type=images.detect_media_type(body), digest=reference.digest, size=len(body)
        )

    def _ask(self, request: Request) -> Resolved:
        reference = request.reference
        if request.policy == "always":
            self._tags.forget(reference.canonical)

        def work(_abandoned: Callable[[], bool]) -> Resolved:
            resolved = self._origin.resolve(reference)
            request.manifest_requests += resolved.requests
            return resolved

        return self._tags.do(reference.canonical, work, request.cancelled)

    def _manifests(
        self, request: Request, descriptor: Descriptor, offered: list[str], depth: int
    ) -> Iterator[tuple[Descriptor, Manifest]]:
        """Yield the manifests that may serve the platform, best first, depth first."""
        if depth > images.INDEX_DEPTH_LIMIT:
            raise ManifestError(
                str(descriptor.digest),
                f"indexes are nested deeper than {images.INDEX_DEPTH_LIMIT}",
            )
        document = self._document(request, descriptor)
        if isinstance(document, images.Manifest):
            yield descriptor, document
            return
        offered += [
            str(entry.platform)
            for entry in document.manifests
            if entry.platform is not None and images.is_runnable(entry)
        ]
        for entry in select(document.manifests, request.platform):
            yield from self._manifests(request, entry, offered, depth + 1)

    def _document(self, request: Request, descriptor: Descriptor) -> Index | Manifest:
        body = self._read(request, descriptor)
        return images.parse_document(body, descriptor.media_type, descriptor.digest)

    def _read(self, request: Request, descriptor: Descriptor) -> bytes:
        """Return a manifest's or index's bytes, from the store or else from the origin."""
        digest = descriptor.digest
        reference = request.reference
        if self._store.has(digest, descriptor.size):
            return self._store.read_blob(digest, images.MANIFEST_LIMIT)
        if request.policy == "never":
            raise NotFoundError(str(digest), str(self._store.path))

        def work(_abandoned: Callable[[], bool]) -> bytes:
            request.report("manifest", str(digest), "downloading", 0, descriptor.size)
            body = self._origin.manifest(reference, descriptor)
            request.manifest_requests += 1
            self._store.put_blob(digest, body)
            self._store.confirm(digest, reference.name)
            request.report("manifest", str(digest), "done", len(body), len(body))
            return body

        return self._documents.do((reference.name, digest), work, request.cancelled)

    def _config(self, request: Request, manifest: Manifest) -> ImageConfig:
        descriptor = manifest.config
        images.check_config_descriptor(descriptor)
        if not self._store.has(descriptor.digest, descriptor.size):
            if request.policy == "never":
                raise NotFoundError(str(descriptor.digest), str(self._store.path))
            self._fetcher.fetch(
                request.reference, descriptor, report=request.report, cancelled=request.cancelled
            )
        body = self._store.read_blob(descriptor.digest, images.CONFIG_LIMIT)
        return images.parse_config(body, descriptor.digest)


def document_digests(image: Image) -> tuple[Digest, ...]:
    """Return the digests of the documents that lead to the image: index, manifest, config."""
    return tuple(
        dict.fromkeys(
            (image.resolved.digest, image.manifest_descriptor.digest, image.manifest.config.digest)
        )
    )
