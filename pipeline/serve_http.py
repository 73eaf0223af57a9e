"""The answers of the blob server: OCI distribution-spec, pull endpoints only.

Invariant: the event loop never waits for the disk; names and digests are parsed before anything is
looked up, and everything that is not answered is an error document of the spec.
"""

from __future__ import annotations

import asyncio
import os
import re
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from aiohttp import web

from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import (
    NotFoundError,
    StowrayError,
)
from stowray.pipeline.peer_paths import PREFIX
from stowray.pipeline.serve_body import Blob, Bodies
from stowray.pipeline.serve_catalogue import Catalogue, Document, Repository
from stowray.pipeline.serve_errors import (
    COMMON_HEADERS,
    RefusalError,
    json_answer,
    later,
    refusal_of,
    refused,
)
from stowray.pipeline.serve_limits import Served
from stowray.pipeline.serve_range import Part, UnsatisfiableRangeError, requested_part
from stowray.pipeline.serve_stripes import StripeAnswers

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import ThreadPoolExecutor

    from stowray.pipeline.clock import Clock
    from stowray.pipeline.serve_limits import ServeLimits
    from stowray.pipeline.store import Store

Value = TypeVar("Value")

_PATH = re.compile(r"/v2/(?P<repository>.+)/(?P<kind>manifests|blobs|tags)/(?P<target>[^/]+)")
# The spec's code for each kind of thing that is not here.
_UNKNOWN = {"manifests": "MANIFEST_UNKNOWN", "blobs": "BLOB_UNKNOWN", "tags": "NAME_UNKNOWN"}
# What a digest names never changes.
_FOR_EVER = {"Cache-Control": "max-age=31536000, immutable"}
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TAGS_LIMIT = 10_000
_HOLD_PAUSES = (0.01, 0.05)


class Answers:
    """Answers requests for one store; a callable for aiohttp's low-level server."""

    def __init__(
        self,
        store: Store,
        *,
        authorize: Callable[[str | None], bool] | None,
        allowed: Callable[[Digest], bool] | None,
        clock: Clock,
        limits: ServeLimits,
        report: Callable[[Served], None] | None,
        metrics: Callable[[], str] | None,
        lookups: ThreadPoolExecutor,
        followers: ThreadPoolExecutor,
    ) -> None:
        """Answer from ``store``; ``lookups`` and ``followers`` are where the disk is waited for."""
        self._store = store
        self._catalogue = Catalogue(store, allowed)
        self._authorize = authorize
        self._allowed = allowed
        self._clock = clock
        self._limits = limits
        self._report = report
        self._metrics = metrics
        self._lookups = lookups
        self._bodies = Bodies(store, limits, lookups, followers)
        self._held = 0
        self._peers: StripeAnswers | None = None
        if allowed is not None:
            self._peers = StripeAnswers(store, allowed, clock=clock, limits=limits, lookups=lookups)

    def close(self) -> None:
        """Close what is kept open between requests."""
        if self._peers is not None:
            self._peers.close()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; what is asked wrongly or is not here is an error document."""
        begun = self._clock.monotonic()
        response: web.StreamResponse | None = None
        try:
            try:
                response = await self._answer(request)
            except RefusalError as refusal:
                response = refused(refusal)
            except StowrayError as error:
                response = refused(refusal_of(error))
        finally:
            if self._report is not None:
                self._report(
                    Served(
                        method=request.method,
                        path=request.path,
                        status=response.status if response is not None else 0,
                        length=(response.content_length or 0) if response is not None else 0,
                        complete=response is not None,
                        seconds=self._clock.monotonic() - begun,
                    )
                )
        return response

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if self._authorize is not None and not self._authorize(
            request.headers.get("Authorization")
        ):
            challenge = {"WWW-Authenticate": 'Basic realm="stowray"'}
            raise RefusalError(401, "UNAUTHORIZED", "authentication required", challenge)
        if request.method not in ("GET", "HEAD"):
            allow = {"Allow": "GET, HEAD"}
            raise RefusalError(405, "UNSUPPORTED", "this registry is read-only", allow)
        if request.path in ("/v2", "/v2/"):
            return json_answer({}, {})
        if self._metrics is not None and request.path == "/metrics":
            figures = await self._do(self._metrics)
            return web.Response(text=figures, headers={"Content-Type": METRICS_TYPE})
        if self._peers is not None and request.path.startswith(PREFIX):
            return await self._peers.answer(request)
        match = _PATH.fullmatch(request.path)
        if match is None:
            raise RefusalError(404, "NOT_FOUND", "no such endpoint")
        repository = Repository.parse(match["repository"], request.query.get("ns"))
        kind, target = match["kind"], match["target"]
        try:
            if kind == "blobs":
                return await self._answer_blob(request, repository, Digest(target))
            if kind == "manifests":
                return await self._answer_manifest(request, repository, target)
            if target == "list":
                return await self._answer_tags(request, repository)
        except NotFoundError as error:
            raise RefusalError(404, _UNKNOWN[kind], f"{error.what} is not here") from error
        raise RefusalError(404, "NOT_FOUND", "no such endpoint")

    async def _answer_tags(
        self, request: web.BaseRequest, repository: Repository
    ) -> web.StreamResponse:
        tags = await self._do(self._catalogue.tags, repository)
        last = request.query.get("last")
        if last is not None:
            tags = [tag for tag in tags if tag > last]
        text = request.query.get("n", "")
        wanted = int(text) if text.isascii() and text.isdecimal() and len(text) < 7 else _TAGS_LIMIT
        headers = {}
        page = tags[: min(wanted, _TAGS_LIMIT)]
        if page and len(page) < len(tags):
            query = f"n={len(page)}&last={page[-1]}"
            if "ns" in request.query:
                query += f"&ns={quote(request.query['ns'], safe='')}"
            link = f"/v2/{repository.path}/tags/list?{query}"
            headers["Link"] = f'<{link}>; rel="next"'
        return json_answer({"name": repository.path, "tags": page}, headers)

    async def _answer_manifest(
        self, request: web.BaseRequest, repository: Repository, target: str
    ) -> web.StreamResponse:
        if ":" in target:
            digest, fixed = Digest(target), True
        else:
            digest, fixed = await self._do(self._catalogue.resolve, repository, target), False
        if self._allowed is not None and self._allowed(digest):
            blob = await self._open_begun(digest)
            blob.close()
        document: Document = await self._do(self._catalogue.manifest, repository, digest)
        headers = {
            **COMMON_HEADERS,
            "Docker-Content-Digest": str(digest),
            "ETag": f'"{digest}"',
            **(_FOR_EVER if fixed else {}),
        }
        if _is_known(request, headers["ETag"]):
            return web.Response(status=304, headers=headers)
        headers["Content-Type"] = document.media_type
        return web.Response(body=document.body, headers=headers)

    async def _answer_blob(
        self, request: web.BaseRequest, repository: Repository, digest: Digest
    ) -> web.StreamResponse:
        if not await self._do(self._catalogue.has, repository, digest):
            raise NotFoundError(str(digest), "this mirror")
        etag = f'"{digest}"'
        headers = {
            **COMMON_HEADERS,
            **_FOR_EVER,
            "Docker-Content-Digest": str(digest),
            "ETag": etag,
            "Accept-Ranges": "bytes",
        }
        if _is_known(request, etag):
            return web.Response(status=304, headers=headers)
        blob = await self._open_begun(digest)
        try:
            status, part = 200, Part(0, blob.size)
            if request.method == "GET":
                try:
                    asked = requested_part(
                        request.headers.get("Range"),
                        request.headers.get("If-Range"),
                        etag,
                        blob.size,
                    )
                except UnsatisfiableRangeError:
                    where = {"Content-Range": f"bytes */{blob.size}"}
                    raise RefusalError(416, "RANGE_INVALID", "no such bytes", where) from None
                if asked is not None:
                    status, part = 206, asked
                    headers["Content-Range"] = part.content_range(blob.size)
            headers["Content-Type"] = "application/octet-stream"
            response = web.StreamResponse(status=status, headers=headers)
            response.content_length = part.length
            await self._bodies.send(request, response, blob, part)
            return response
        finally:
            blob.close()

    # -- what is here, and what is on its way -----------------------------------------------------

    async def _open_begun(self, digest: Digest) -> Blob:
        """Return a blob that is here or arriving; hold the request of one that is to come.

        Only with ``allowed`` it is known that a blob will come. NotFoundError otherwise.
        """
        blob = await self._open_now(digest)
        if blob is not None:
            return blob
        if self._allowed is None:
            raise NotFoundError(str(digest), "this mirror")
        if self._held >= self._limits.held:
            raise later("too many requests wait for blobs that have not begun")
        self._held += 1
        try:
            pause, longest = _HOLD_PAUSES
            give_up = self._clock.monotonic() + self._limits.hold_seconds
            while blob is None:
                if self._clock.monotonic() >= give_up:
                    raise later("the blob has not begun yet")
                await asyncio.sleep(pause)
                pause = min(longest, pause * 1.5)
                blob = await self._open_now(digest)
        finally:
            self._held -= 1
        return blob

    async def _open_now(self, digest: Digest) -> Blob | None:
        opening = asyncio.get_running_loop().run_in_executor(self._lookups, self._open, digest)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unclaimed)
            raise

    def _open(self, digest: Digest) -> Blob | None:
        """Open what is committed, else look whether somebody is writing it."""
        for _ in range(2):
            try:
                descriptor = self._store.open_blob(digest)
            except NotFoundError:
                size = self._catalogue.growing(digest)
                if size is not None:
                    return Blob(digest, size, -1)
                # Between the two questions it may have been committed: ask once more.
                continue
            return Blob(digest, os.fstat(descriptor).st_size, descriptor)
        return None

    async def _do(self, function: Callable[..., Value], *arguments: Any) -> Value:
        """Wait for the disk in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._lookups, function, *arguments)


def _close_unclaimed(future: asyncio.Future[Blob | None]) -> None:
    """Close a blob that was opened for a client who has left meanwhile."""
    if not future.cancelled() and future.exception() is None:
        blob = future.result()
        if blob is not None:
            blob.close()


def _is_known(request: web.BaseRequest, etag: str) -> bool:
    """Tell whether the client has what ``etag`` stands for (If-None-Match compares weakly)."""
    asked = request.headers.get("If-None-Match", "")
    return any(part.strip().removeprefix("W/") in (etag, "*") for part in asked.split(","))
