"""The bodies of the blob server: committed blobs by the kernel, arriving ones as they grow.

Invariant: the length was promised, so that a body either has exactly that or the connection is cut,
which no client takes for its end. The last bytes of a blob that is still arriving go out only after
its digest was proven: who has received all of it has the right bytes.
"""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from stowray.pipeline.errors import StowrayError
from stowray.pipeline.follower import Follower
from stowray.pipeline.ingest_home import GenerationChanged
from stowray.pipeline.serve_errors import later
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import ThreadPoolExecutor
    from io import FileIO

    from aiohttp import web

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.serve_limits import ServeLimits
    from stowray.pipeline.serve_range import Part
    from stowray.pipeline.store import Store

Value = TypeVar("Value")

_SENDFILE_SIZE = 2 << 20
_READ_SIZE = 1 << 20
_SMALL = 64 << 10


@dataclass(slots=True)
class Blob:
    """A blob that can be sent: committed (``descriptor``) or arriving (``descriptor`` < 0)."""

    digest: Digest
    size: int
    descriptor: int

    def close(self) -> None:
        """Close what is open; idempotent."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class _PartFollower(Follower):
    """A follower whose first byte is not the blob's."""

    def __init__(
        self,
        store: Store,
        blob: Blob,
        start: int,
        cancelled: Callable[[], bool],
        grace_seconds: float,
    ) -> None:
        super().__init__(
            store, blob.digest, blob.size, cancelled=cancelled, grace_seconds=grace_seconds
        )
        # Counts as read: when the generation becomes void, so does the part.
        self._offset = start


class Bodies:
    """Sends parts of blobs; the disk is waited for in threads."""

    def __init__(
        self,
        store: Store,
        limits: ServeLimits,
        lookups: ThreadPoolExecutor,
        followers: ThreadPoolExecutor,
    ) -> None:
        """Send from ``store``; ``followers`` has a thread for each of ``limits.followers``."""
        self._store = store
        self._limits = limits
        self._lookups = lookups
        self._followers = followers
        self._following = asyncio.Semaphore(limits.followers)

    async def send(
        self, request: web.BaseRequest, response: web.StreamResponse, blob: Blob, part: Part
    ) -> None:
        """Send the head and ``part`` of ``blob``, or cut the connection."""
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
            data = await self._in_pool(self._lookups, os.pread, descriptor, part.length, part.start)
            await response.prepare(request)
            await self._deliver(request, response, data, part.length)
            return
        await response.prepare(request)
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            end = part.start + part.length
            await send_range(request, file, part.start, end, self._limits.stall_seconds)

    async def _send_growing(
        self, request: web.BaseRequest, response: web.StreamResponse, blob: Blob, part: Part
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
                reading = self._in_pool(self._followers, follower.read, min(_READ_SIZE, left))
                data = await asyncio.shield(reading)
                left -= len(data)
                if left == 0 and ends_blob:
                    reading = self._in_pool(self._followers, follower.wait_proven)
                    await asyncio.shield(reading)
                await self._deliver(request, response, data, len(data) or 1)
        except (GenerationChanged, StowrayError):
            cut(request)
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
            raise later("too many blobs are followed at once") from None

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
            cut(request)
        try:
            async with asyncio.timeout(self._limits.stall_seconds):
                await response.write(data)
        except TimeoutError:
            cut(request)

    def _in_pool(
        self, pool: ThreadPoolExecutor, function: Callable[..., Value], *arguments: Any
    ) -> asyncio.Future[Value]:
        return asyncio.get_running_loop().run_in_executor(pool, function, *arguments)


async def send_range(
    request: web.BaseRequest, file: FileIO, start: int, end: int, stall_seconds: float
) -> None:
    """Let the kernel send ``start`` to ``end`` of a file, or cut the connection."""
    loop = asyncio.get_running_loop()
    position = start
    while position < end:
        transport = request.transport
        if transport is None:
            raise ConnectionResetError("the client hung up")
        count = min(_SENDFILE_SIZE, end - position)
        try:
            async with asyncio.timeout(stall_seconds):
                sent = await loop.sendfile(transport, file, position, count)
        except TimeoutError:
            cut(request)
        if sent == 0:
            cut(request)  # the file was cut short under us: the length was promised
        position += sent


def cut(request: web.BaseRequest) -> NoReturn:
    """Hang up in the middle of a body, without the proper end that a client would believe."""
    if request.transport is not None:
        request.transport.abort()
    raise ConnectionResetError("cut off")
