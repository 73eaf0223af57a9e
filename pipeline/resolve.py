"""From a reference to an image: which manifest, which config, which layers.

Invariant: a tag is asked for once per ``ttl_seconds`` and by one flight at a time, whoever waits;
neither errors nor cancellations are remembered; a digest is never asked for again when the store
holds it and this repository is on record as having served it. What is returned was hashed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stowray.pipeline import image as images
from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.errors import ManifestError, NotFoundError, PlatformError
from stowray.pipeline.flight import SingleFlight
from stowray.pipeline.platform import Platform, is_image, select
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.fetch import Fetcher
    from stowray.pipeline.image import Descriptor, Image, ImageConfig, Index, Manifest
    from stowray.pipeline.origin import Origin, Resolved
    from stowray.pipeline.progress import Report
    from stowray.pipeline.source import Source
    from stowray.pipeline.store import Store

TTL_SECONDS = 5.0
Policy = Literal["missing", "always", "never", "newer"]


@dataclass(slots=True)
class Request:
    """One question to the resolver, and how far it may go for the answer."""

    reference: Source
    platform: Platform
    strict: bool
    policy: Policy
    report: Report
    cancelled: Callable[[], bool]
    manifest_requests: int = 0

    def count(self) -> None:
        """Take note of one request for a manifest, whatever came of it."""
        self.manifest_requests += 1


class Resolver:
    """Turns references into images; documents go through the store, so that each is read once.

    ``connect`` gives the origin and the fetcher; it is called only when the store has no answer,
    so that an image that is here costs neither connections nor the import of what makes them.
    """

    def __init__(
        self,
        connect: Callable[[], tuple[Origin, Fetcher]],
        store: Store,
        *,
        ttl_seconds: float = TTL_SECONDS,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._connect = connect
        self._store = store
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

    def is_known(self, request: Request) -> bool:
        """Return whether :meth:`resolve` will answer from the store, with no network."""
        return self._known(request) is not None

    def image(self, request: Request) -> Image:
        """Return the image for the wanted platform, fetching only documents that are not here.

        Raises PlatformError naming what is offered, ManifestError for a document that breaks its
        rules, and what :meth:`resolve` raises.
        """
        resolved = self.resolve(request)
        offered: list[str] = []
        for path, manifest in self._manifests(request, (resolved,), offered):
            image = self._image(request, path, manifest, request.platform)
            # Else the index has said what it is, as other tools hear it: many a config has the
            # platform of the machine that it was built on, or no variant.
            if path[-1].platform is not None or _runs_on(image.config, request):
                return image
            offered.append(str(image.platform))
        raise PlatformError(str(request.platform), ", ".join(dict.fromkeys(offered)))

    def keep_documents(self, request: Request, image: Image) -> None:
        """Bring what leads to the image here again, where a collection took it.

        Asked once the caller's lease names it: until then a collector may have seen no need for
        documents that were here before.
        """
        for descriptor in (image.resolved, *image.indexes, image.manifest_descriptor):
            self._read(request, descriptor)

    def images(self, request: Request) -> list[Image]:
        """Return the image of every platform that the reference offers, in document order."""
        resolved = self.resolve(request)
        return [
            self._image(request, path, manifest, platform)
            for path, manifest, platform in self._all_manifests(request, (resolved,), None)
        ]

    def _image(
        self,
        request: Request,
        path: Sequence[Descriptor],
        manifest: Manifest,
        platform: Platform,
    ) -> Image:
        """Return the image of ``manifest``, to which the documents of ``path`` led.

        ``platform`` is for a config that names none, where no index does.
        """
        descriptor = path[-1]
        images.check_image(manifest, descriptor.digest)
        config = self._config(request, manifest)
        image = images.Image(
            reference=request.reference,
            resolved=path[0],
            manifest_descriptor=descriptor,
            manifest=manifest,
            config=config,
            platform=_platform(descriptor.platform, config) or platform,
            indexes=tuple(path[1:-1]),
        )
        image.check()
        return image

    def _all_manifests(
        self, request: Request, path: tuple[Descriptor, ...], platform: Platform | None
    ) -> Iterator[tuple[tuple[Descriptor, ...], Manifest, Platform]]:
        document = self._open(request, path[-1], len(path) - 1)
        if isinstance(document, images.Manifest):
            yield path, document, platform or request.platform
            return
        for entry in document.manifests:
            if is_image(entry):
                yield from self._all_manifests(request, (*path, entry), entry.platform)

    def _known(self, request: Request) -> Descriptor | None:
        """Return what the store's records answer without any network, if they may."""
        reference = request.reference
        if request.policy in ("missing", "never"):
            recorded = self._recorded(request)
            if recorded is not None and self._store.has(recorded.digest, recorded.size):
                return recorded
        digest = getattr(reference, "digest", None)
        if digest is None or request.policy == "always":
            return None
        if not self._store.has(digest) or not self._store.confirmed(digest, reference.name):
            return None
        try:
            body = self._store.read_blob(digest, images.MANIFEST_LIMIT)
        except NotFoundError:
            return None  # damaged since it was proven, and put aside now
        return images.Descriptor(
            media_type=images.detect_media_type(body), digest=digest, size=len(body)
        )

    def _recorded(self, request: Request) -> Descriptor | None:
        """Return what the reference pointed to when it was last pulled for this platform."""
        canonical = request.reference.canonical
        record = self._store.find_reference(canonical, str(request.platform))
        if record is not None:
            return record.resolved
        # An image for a lesser platform (386 on amd64) is on record under its own name.
        for record in self._store.references():
            if record.reference == canonical and request.platform.accepts(
                Platform.parse(record.platform), strict=request.strict
            ):
                return record.resolved
        return None

    def _ask(self, request: Request) -> Resolved:
        reference = request.reference
        if request.policy == "always":
            self._tags.forget(reference.canonical)

        def work(abandoned: Callable[[], bool]) -> Resolved:
            origin = self._connect()[0]
            return origin.resolve(reference, asked=request.count, cancelled=abandoned)

        return self._tags.do(reference.canonical, work, request.cancelled)

    def _manifests(
        self, request: Request, path: tuple[Descriptor, ...], offered: list[str]
    ) -> Iterator[tuple[tuple[Descriptor, ...], Manifest]]:
        """Yield the manifests that may serve the platform, best first, depth first.

        With each come the documents that lead to it, from the first of ``path`` to its own.
        """
        document = self._open(request, path[-1], len(path) - 1)
        if isinstance(document, images.Manifest):
            yield path, document
            return
        offered += [
            str(entry.platform)
            for entry in document.manifests
            if entry.platform is not None and is_image(entry)
        ]
        for entry in select(document.manifests, request.platform, strict=request.strict):
            yield from self._manifests(request, (*path, entry), offered)

    def _open(self, request: Request, descriptor: Descriptor, depth: int) -> Index | Manifest:
        """Return the parsed document, ``depth`` indexes below the reference."""
        if depth > images.INDEX_DEPTH_LIMIT:
            raise ManifestError(
                str(descriptor.digest),
                f"indexes are nested deeper than {images.INDEX_DEPTH_LIMIT}",
            )
        body = self._read(request, descriptor)
        return images.parse_document(body, descriptor.media_type, descriptor.digest)

    def _read(self, request: Request, descriptor: Descriptor) -> bytes:
        """Return a manifest's or index's bytes, from the store or else from the origin."""
        digest = descriptor.digest
        reference = request.reference
        body = self._stored(descriptor, images.MANIFEST_LIMIT)
        if body is not None:
            return body
        if request.policy == "never":
            raise NotFoundError(str(digest), str(self._store.path))

        def work(abandoned: Callable[[], bool]) -> bytes:
            request.report("manifest", str(digest), "downloading", 0, descriptor.size)
            body = self._connect()[0].manifest(
                reference, digest, descriptor.size, asked=request.count, cancelled=abandoned
            )
            self._store.put_blob(digest, body)
            self._store.confirm(digest, reference.name)
            request.report("manifest", str(digest), "done", len(body), len(body))
            return body

        return self._documents.do((reference.name, digest), work, request.cancelled)

    def _config(self, request: Request, manifest: Manifest) -> ImageConfig:
        descriptor = manifest.config
        if descriptor.size > images.CONFIG_LIMIT:
            raise ManifestError(
                str(descriptor.digest),
                f"a config of {descriptor.size} bytes is over the limit of {images.CONFIG_LIMIT}",
            )
        body = self._stored(descriptor, images.CONFIG_LIMIT)
        if body is None:
            if request.policy == "never":
                raise NotFoundError(str(descriptor.digest), str(self._store.path))
            self._connect()[1].fetch(
                request.reference, descriptor, report=request.report, cancelled=request.cancelled
            )
            body = self._store.read_blob(descriptor.digest, images.CONFIG_LIMIT)
        return images.parse_config(body, descriptor.digest)

    def _stored(self, descriptor: Descriptor, limit: int) -> bytes | None:
        """Return a document that is here, None when it is not or was damaged and put aside."""
        if not self._store.has(descriptor.digest, descriptor.size):
            return None
        try:
            return self._store.read_blob(descriptor.digest, limit)
        except NotFoundError:
            return None


def _platform(entry: Platform | None, config: ImageConfig) -> Platform | None:
    """Return the image's platform: the config's, unless its index's entry says something else."""
    own = config.platform.normalized() if config.os else None
    if entry is None:
        return own
    told = entry.normalized()
    if own is not None and (own.os, own.architecture, own.variant) == (
        told.os,
        told.architecture,
        told.variant,
    ):
        return own
    return told


def _runs_on(config: ImageConfig, request: Request) -> bool:
    if not config.os and not config.architecture:
        # A config that names no platform gives nothing to choose by (image-spec makes both
        # REQUIRED, old images lack them): it is what the reference points to.
        return True
    return request.platform.accepts(config.platform, strict=request.strict)


def document_digests(image: Image) -> tuple[Digest, ...]:
    """Return the digests of the documents that lead to the image: indexes, manifest, config."""
    documents = (
        image.resolved,
        *image.indexes,
        image.manifest_descriptor,
        image.manifest.config,
    )
    return tuple(dict.fromkeys(document.digest for document in documents))
