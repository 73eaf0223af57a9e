"""The answers of the blob server: OCI distribution-spec, pull endpoints only.

Invariant: the event loop never waits for the disk. A body that ends whole was proven: of a blob
that is still arriving the last bytes go out only after its digest was, and one that turns out wrong
cuts the connection, which no client can take for the end of a body.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar
from urllib.parse import quote

from aiohttp import web

from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import (
    CancelledError,
    InvalidDigestError,
    InvalidReferenceError,
    NotFoundError,
    StowrayError,
)
from stowray.pipeline.follower import Follower
from stowray.pipeline.ingest import GenerationChanged
from stowray.pipeline.serve_catalogue import Catalogue, Document, Repository
from stowray.pipeline.serve_limits import Served
from stowray.pipeline.serve_range import Part, UnsatisfiableRangeError, requested_part

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import ThreadPoolExecutor

    from stowray.pipeline.clock import Clock
    from stowray.pipeline.serve_limits import ServeLimits
    from stowray.pipeline.store import Store

Value = TypeVar("Value")

_PATH = re.compile(r"/v2/(?P<repository>.+)/(?P<kind>manifests|blobs|tags)/(?P<target>[^/]+)")
_VERSION = {"Docker-Distribution-Api-Version": "registry/2.0", "Server": "stowray"}
# The spec's code for each kind of thing that is not here.
_UNKNOWN = {"manifests": "MANIFEST_UNKNOWN", "blobs": "BLOB_UNKNOWN", "tags": "NAME_UNKNOWN"}
# What a digest names never changes.
_FOR_EVER = {"Cache-Control": "max-age=31536000, immutable"}
_SENDFILE_SIZE = 2 << 20
_READ_SIZE = 1 << 20
_SMALL = 64 << 10
_TAGS_LIMIT = 10_000
_HOLD_PAUSES = (0.01, 0.05)


class RefusalError(Exception):
    """An answer that is an error of the distribution-spec."""

    def __init__(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers or {}


@dataclass(slots=True)
class _Blob:
    """A blob that can be sent: committed (``descriptor``) or arriving (``descriptor`` < 0)."""

    digest: Digest
    size: int
    descriptor: int

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class _PartFollower(Follower):
    """A follower whose first byte is not the blob's."""

    def __init__(
        self,
        store: Store,
        blob: _Blob,
        start: int,
        cancelled: Callable[[], bool],
        grace_seconds: float,
    ) -> None:
        super().__init__(
            store, blob.digest, blob.size, cancelled=cancelled, grace_seconds=grace_seconds
        )
        # Counts as read: when the generation becomes void, so does the part.
        self._offset = start


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
        self._lookups = lookups
        self._pool = followers
        self._following = asyncio.Semaphore(limits.followers)
        self._held = 0

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; what is asked wrongly or is not here is an error document."""
        begun = self._clock.monotonic()
        response: web.StreamResponse | None = None
        try:
            try:
                response = await self._answer(request)
            except RefusalError as refusal:
                response = _refused(refusal)
            except StowrayError as error:
                response = _refused(_refusal(error))
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
            return _json({}, {})
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
        return _json({"name": repository.path, "tags": page}, headers)

    async def _answer_manifest(
        self, request: web.BaseRequest, repository: Repository, target: str
    ) -> web.StreamResponse:
        if ":" in target:
            digest, fixed = Digest(target), True
        else:
            digest, fixed = await self._do(self._catalogue.resolve, repository, target), False
        if await self._is_held(digest):
            blob = await self._open_begun(digest)
            blob.close()
        document: Document = await self._do(self._catalogue.manifest, repository, digest)
        headers = {
            **_VERSION,
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
            **_VERSION,
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
            await self._send(request, response, blob, part)
            return response
        finally:
            blob.close()

    # -- what is here, and what is on its way -----------------------------------------------------

    async def _open_begun(self, digest: Digest) -> _Blob:
        """Return a blob that is here or arriving; hold the request of one that is to come.

        Only with ``allowed`` it is known that a blob will come. NotFoundError otherwise.
        """
        blob = await self._do(self._open, digest)
        if blob is not None:
            return blob
        if self._allowed is None:
            raise NotFoundError(str(digest), "this mirror")
        if self._held >= self._limits.held:
            raise _later("too many requests wait for blobs that have not begun")
        self._held += 1
        try:
            pause, longest = _HOLD_PAUSES
            give_up = self._clock.monotonic() + self._limits.hold_seconds
            while blob is None:
                if self._clock.monotonic() >= give_up:
                    raise _later("the blob has not begun yet")
                await asyncio.sleep(pause)
                pause = min(longest, pause * 1.5)
                blob = await self._do(self._open, digest)
        finally:
            self._held -= 1
        return blob

    async def _is_held(self, digest: Digest) -> bool:
        return self._allowed is not None and self._allowed(digest)

    def _open(self, digest: Digest) -> _Blob | None:
        """Open what is committed, else look whether somebody is writing it."""
        for _ in range(2):
            try:
                descriptor = self._store.open_blob(digest)
            except NotFoundError:
                size = self._catalogue.growing(digest)
                if size is not None:
                    return _Blob(digest, size, -1)
                # Between the two questions it may have been committed: ask once more.
                continue
            return _Blob(digest, os.fstat(descriptor).st_size, descriptor)
        return None

    # -- bodies -----------------------------------------------------------------------------------

    async def _send(
        self, request: web.BaseRequest, response: web.StreamResponse, blob: _Blob, part: Part
    ) -> None:
        if request.method == "HEAD" or part.length == 0:
            await response.prepare(request)
        elif blob.descriptor >= 0:
            await self._send_committed(request, response, blob.descriptor, part)
        else:
            await self._send_growing(request, response, blob, part)
        await response.write_eof()

    async def _send_committed(
        self, request: web.BaseRequest, response: web.StreamResponse, descriptor: int, part: Part
    ) -> None:
        if part.length <= _SMALL:
            data = await self._do(os.pread, descriptor, part.length, part.start)
            await response.prepare(request)
            await self._deliver(request, response, data, part.length)
            return
        await response.prepare(request)
        loop = asyncio.get_running_loop()
        position, end = part.start, part.start + part.length
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            while position < end:
                transport = request.transport
                if transport is None:
                    raise ConnectionResetError("the client hung up")
                count = min(_SENDFILE_SIZE, end - position)
                try:
                    async with asyncio.timeout(self._limits.stall_seconds):
                        sent = await loop.sendfile(transport, file, position, count)
                except TimeoutError:
                    _cut(request)
                if sent == 0:
                    _cut(request)  # the file was cut short under us: the length was promised
                position += sent

    async def _send_growing(
        self, request: web.BaseRequest, response: web.StreamResponse, blob: _Blob, part: Part
    ) -> None:
        stop = threading.Event()
        await self._begin_following()
        follower = _PartFollower(
            self._store, blob, part.start, stop.is_set, self._limits.grace_seconds
        )
        reading: asyncio.Future[Any] | None = None
        try:
            await response.prepare(request)
            left = part.length
            ends_blob = part.start + part.length == blob.size
            while left:
                reading = self._in_pool(follower.read, min(_READ_SIZE, left))
                data = await asyncio.shield(reading)
                left -= len(data)
                if left == 0 and ends_blob:
                    reading = self._in_pool(follower.wait_proven)
                    await asyncio.shield(reading)
                await self._deliver(request, response, data, len(data) or 1)
        except (GenerationChanged, StowrayError):
            _cut(request)
        finally:
            stop.set()
            if reading is None or reading.done():
                self._end_following(follower)
            else:
                # Its thread is still in there, for as long as it takes to see `stop`.
                reading.add_done_callback(lambda done: self._end_following(follower, done))

    async def _begin_following(self) -> None:
        try:
            async with asyncio.timeout(self._limits.hold_seconds):
                await self._following.acquire()
        except TimeoutError:
            raise _later("too many blobs are followed at once") from None

    def _end_following(self, follower: Follower, done: asyncio.Future[Any] | None = None) -> None:
        if done is not None and not done.cancelled():
            done.exception()  # looked at: nobody is left to hear of it
        follower.close()
        self._following.release()

    async def _deliver(
        self, request: web.BaseRequest, response: web.StreamResponse, data: bytes, expected: int
    ) -> None:
        """Write ``data``; a client that does not take it in time is hung up on."""
        if len(data) < expected:
            _cut(request)
        try:
            async with asyncio.timeout(self._limits.stall_seconds):
                await response.write(data)
        except TimeoutError:
            _cut(request)

    # -- threads ----------------------------------------------------------------------------------

    async def _do(self, function: Callable[..., Value], *arguments: Any) -> Value:
        """Wait for the disk in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._lookups, function, *arguments)

    def _in_pool(self, function: Callable[..., Value], *arguments: Any) -> asyncio.Future[Value]:
        return asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)


def _cut(request: web.BaseRequest) -> NoReturn:
    """Hang up in the middle of a body, without the proper end that a client would believe."""
    if request.transport is not None:
        request.transport.abort()
    raise ConnectionResetError("cut off")


def _is_known(request: web.BaseRequest, etag: str) -> bool:
    """Tell whether the client has what ``etag`` stands for (If-None-Match compares weakly)."""
    asked = request.headers.get("If-None-Match", "")
    return any(part.strip().removeprefix("W/") in (etag, "*") for part in asked.split(","))


def _json(document: object, headers: dict[str, str], status: int = 200) -> web.Response:
    body = json.dumps(document, separators=(",", ":")).encode()
    return web.Response(
        status=status,
        body=body,
        headers={**_VERSION, "Content-Type": "application/json", **headers},
    )


def _refused(refusal: RefusalError) -> web.Response:
    error = {"code": refusal.code, "message": refusal.message}
    return _json({"errors": [error]}, refusal.headers, refusal.status)


def _later(reason: str) -> RefusalError:
    return RefusalError(503, "UNAVAILABLE", reason, {"Retry-After": "1"})


def _refusal(error: StowrayError) -> RefusalError:
    """Return what an error of the store means to a client; paths of this machine stay here."""
    if isinstance(error, InvalidDigestError):
        return RefusalError(400, "DIGEST_INVALID", error.reason)
    if isinstance(error, InvalidReferenceError):
        return RefusalError(400, "NAME_INVALID", error.reason)
    if isinstance(error, CancelledError):
        return _later("the server is stopping")
    return RefusalError(500, "UNKNOWN", f"the store cannot answer ({type(error).__name__})")
