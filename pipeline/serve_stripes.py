"""What peers of one run ask each other for: stripes, how far they are, and what was hashed.

    GET /stowray/v1/stripes/DIGEST/INDEX/COUNT/UNIT?from=POSITION   bytes, as they come
    GET /stowray/v1/have/DIGEST/INDEX/COUNT/UNIT?of=GENERATION      {have, upstream, fate, …}
    GET /stowray/v1/checkpoints/DIGEST                              what ``find_liar`` compares
    GET /stowray/v1/pieces/DIGEST                                   where a copy differs, see there

Invariant: only digests of the run are spoken of. A request for a blob that has not begun is held,
and one for bytes that are still to come holds neither a thread nor a place of anybody. When the
bytes turn out to be void the connection is cut, which no client takes for the end; what became of
them (``fates``) is told for as long as the server lives. A blob that comes in one piece, as its
stripes proved wrong, gives no stripes before it is proven (409).
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import field
from typing import TYPE_CHECKING, Any, TypeVar

from aiohttp import web

from stowray.pipeline.arriving import Arriving
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import StowrayError
from stowray.pipeline.fates import UNKNOWN, Fates
from stowray.pipeline.peer_paths import ABOUT_PATH, STRIPE_PATH
from stowray.pipeline.pieces import read_pieces
from stowray.pipeline.serve_body import cut, send_range
from stowray.pipeline.serve_errors import COMMON_HEADERS, RefusalError, json_answer, later
from stowray.pipeline.stripe_standing import (
    GIVEN_UP,
    NOTHING,
    close_unclaimed,
    open_begun,
    standing,
    standing_of,
)
from stowray.pipeline.stripe_state import STRIPE_LIMIT
from stowray.pipeline.stripes import Stripe
from stowray.pipeline.values import dataclass
from stowray.pipeline.witness import read_witness

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import ThreadPoolExecutor
    from io import FileIO

    from stowray.pipeline.clock import Clock
    from stowray.pipeline.serve_limits import ServeLimits
    from stowray.pipeline.store import Store

Value = TypeVar("Value")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.02
_FIRST_LOOK, _LONGEST_LOOK = 0.005, 0.1
_LIFE_SECONDS = 0.25


@dataclass(slots=True)
class _Waiting:
    """A stream that has sent all that was there."""

    stripe: Stripe
    position: int
    woken: asyncio.Future[None]


@dataclass(slots=True)
class _Blob:
    """One blob that streams are sent of: what is open of it now, and who waits."""

    digest: Digest
    users: int = 0
    descriptor: int = -1  # of the committed blob
    arriving: Arriving | None = None
    is_given_up: bool = False
    is_damaged: bool = False
    waiting: list[_Waiting] = field(default_factory=list)
    beginning: list[asyncio.Future[None]] = field(default_factory=list)
    watch: asyncio.Task[None] | None = None

    @property
    def has_begun(self) -> bool:
        return self.descriptor >= 0 or self.arriving is not None

    def wake(self) -> None:
        """Wake all: what they knew has changed."""
        for waiting in self.waiting:
            _wake(waiting.woken)
        for begun in self.beginning:
            _wake(begun)

    def let_go(self) -> None:
        if self.arriving is not None:
            self.arriving.close()
            self.arriving = None
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class StripeAnswers:
    """Answers the requests of peers from one store; lives in one event loop."""

    def __init__(
        self,
        store: Store,
        allowed: Callable[[Digest], bool],
        *,
        clock: Clock,
        limits: ServeLimits,
        lookups: ThreadPoolExecutor,
    ) -> None:
        """Answer for the digests that ``allowed`` approves; ``lookups`` waits for the disk."""
        self._store = store
        self._allowed = allowed
        self._clock = clock
        self._limits = limits
        self._lookups = lookups
        self._blobs: dict[Digest, _Blob] = {}
        self._fates = Fates()
        self._comparing: dict[Digest, asyncio.Task[dict[str, Any]]] = {}
        self._held = 0

    def close(self) -> None:
        """Forget what became of the bytes that were sent; nobody asks any more."""
        self._fates.close()

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request, or raise RefusalError."""
        if request.method != "GET":
            raise RefusalError(405, "UNSUPPORTED", "only GET is known here", {"Allow": "GET"})
        match = ABOUT_PATH.fullmatch(request.path)
        if match is not None:
            digest = self._digest(match["digest"])
            if match["kind"] == "pieces":
                return await self._pieces(digest)
            witness = await self._in_pool(read_witness, self._store, digest)
            return json_answer(witness.to_dict(), {})
        match = STRIPE_PATH.fullmatch(request.path)
        if match is None:
            raise RefusalError(404, "NOT_FOUND", "no such endpoint")
        digest = self._digest(match["digest"])
        index, count, unit = (int(match[name]) for name in ("index", "count", "unit"))
        if not (index < count <= STRIPE_LIMIT and unit > 0):
            raise RefusalError(400, "RANGE_INVALID", "no such stripe")
        if match["kind"] == "have":
            of = _number(request, "of")
            return json_answer(await self._have(digest, (index, count, unit), of), {})
        position = _number(request, "from")
        blob = self._blobs.setdefault(digest, _Blob(digest))
        blob.users += 1
        try:
            await self._begin(blob)
            return await self._send(request, blob, (index, count, unit), position)
        finally:
            blob.users -= 1
            if blob.users == 0:
                if self._blobs.get(digest) is blob:
                    del self._blobs[digest]
                if blob.watch is not None:
                    blob.watch.cancel()
                blob.let_go()

    def _digest(self, text: str) -> Digest:
        digest = Digest(text)
        if not self._allowed(digest):
            raise RefusalError(404, "BLOB_UNKNOWN", "not a blob of this run")
        return digest

    # -- stripes ----------------------------------------------------------------------------------

    async def _begin(self, blob: _Blob) -> None:
        """Return when there is something to be sent of; 503 when that takes too long."""
        if blob.watch is None:
            blob.watch = asyncio.ensure_future(self._watch(blob))
            await asyncio.sleep(0)
        if blob.has_begun:
            return
        if self._held >= self._limits.held:
            raise later("too many requests wait for blobs that have not begun")
        self._held += 1
        try:
            async with asyncio.timeout(self._limits.hold_seconds):
                while not blob.has_begun:
                    if blob.is_given_up:
                        raise RefusalError(410, "BLOB_UNKNOWN", "the blob was given up here")
                    begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    blob.beginning.append(begun)
                    try:
                        await begun
                    finally:
                        blob.beginning.remove(begun)
        except TimeoutError:
            raise later("the blob has not begun yet") from None
        finally:
            self._held -= 1

    async def _send(
        self, request: web.BaseRequest, blob: _Blob, division: tuple[int, int, int], position: int
    ) -> web.StreamResponse:
        arriving = blob.arriving
        source = blob.descriptor if arriving is None else arriving.data
        # Its own, so that another generation can begin while this one is still being sent.
        with open(os.dup(source), "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size if arriving is None else arriving.size
            stripe = Stripe(size, *division)
            if position > stripe.length:
                raise RefusalError(416, "RANGE_INVALID", "the stripe is shorter")
            if arriving is not None and not arriving.gives(stripe):
                raise RefusalError(409, "BLOB_UNKNOWN", "the blob comes in one piece here")
            have = stripe.length if arriving is None else arriving.position(stripe)
            headers = {
                **COMMON_HEADERS,
                "Content-Type": "application/octet-stream",
                "Stowray-Have": str(have),
                "Stowray-Generation": str(0 if arriving is None else arriving.generation),
                "Stowray-Complete": str(int(arriving is None or arriving.is_committed)),
            }
            response = web.StreamResponse(status=200, headers=headers)
            response.content_length = stripe.length - position
            await response.prepare(request)
            if arriving is None:
                await self._send_positions(request, file, blob, stripe, position, stripe.length)
            else:
                await self._send_arriving(request, file, blob, arriving, stripe, position)
        await response.write_eof()
        return response

    async def _send_arriving(
        self,
        request: web.BaseRequest,
        file: FileIO,
        blob: _Blob,
        arriving: Arriving,
        stripe: Stripe,
        position: int,
    ) -> None:
        while position < stripe.length:
            if blob.arriving is not arriving or arriving.is_void or not arriving.gives(stripe):
                cut(request)
            if blob.watch is None or (blob.watch.done() and not arriving.is_committed):
                cut(request)  # nobody looks any more
            have = arriving.position(stripe)
            if have > position:
                await self._send_positions(request, file, blob, stripe, position, have)
                position = have
                continue
            woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            waiting = _Waiting(stripe, position, woken)
            blob.waiting.append(waiting)
            try:
                await woken
            finally:
                blob.waiting.remove(waiting)

    async def _send_positions(
        self,
        request: web.BaseRequest,
        file: FileIO,
        blob: _Blob,
        stripe: Stripe,
        start: int,
        end: int,
    ) -> None:
        for first, last in stripe.ranges(start, end):
            if blob.is_damaged:
                cut(request)
            await send_range(request, file, first, last, self._limits.stall_seconds)

    # -- what is here, and what is on its way -----------------------------------------------------

    async def _watch(self, blob: _Blob) -> None:
        """Follow one blob for all its streams until it is committed or nobody is left."""
        try:
            await self._follow(blob)
        finally:
            blob.wake()

    async def _follow(self, blob: _Blob) -> None:
        pause, look = _FIRST_PAUSE, _FIRST_LOOK
        alive_at = look_at = self._clock.monotonic()
        while blob.descriptor < 0:
            if blob.arriving is None:
                try:
                    await self._open(blob)
                except StowrayError:
                    # The disk has no answer now; those who wait are told so in time.
                    await asyncio.sleep(_LONGEST_LOOK)
                    continue
                if blob.is_given_up:
                    blob.wake()
                if blob.has_begun:
                    alive_at = self._clock.monotonic()
                    pause, look = _FIRST_PAUSE, _FIRST_LOOK
                    blob.wake()
                else:
                    await asyncio.sleep(look)
                    look = min(look * 1.5, _LONGEST_LOOK)
                continue
            arriving = blob.arriving
            await asyncio.sleep(pause)
            if arriving.is_committed:
                return
            now = self._clock.monotonic()
            if now >= look_at:
                look_at = now + _LIFE_SECONDS
                if arriving.writer_lives():
                    alive_at = now
            is_left = arriving.is_given_up or now - alive_at > self._limits.grace_seconds
            if arriving.is_void or is_left:
                blob.arriving = None
                blob.wake()
                arriving.close()
                continue
            pause = min(pause * 1.3, _LONGEST_PAUSE)
            for waiting in blob.waiting:
                stripe = waiting.stripe
                if arriving.position(stripe) > waiting.position or not arriving.gives(stripe):
                    _wake(waiting.woken)
                    pause = _FIRST_PAUSE

    async def _open(self, blob: _Blob) -> None:
        opening = asyncio.get_running_loop().run_in_executor(
            self._lookups, open_begun, self._store, blob.digest
        )
        try:
            found = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(close_unclaimed)
            raise
        blob.is_given_up = found is GIVEN_UP
        if isinstance(found, Arriving):
            blob.arriving = found
            self._fates.note(blob.digest, found.state)
        elif isinstance(found, int):
            blob.descriptor = found

    async def _have(
        self, digest: Digest, division: tuple[int, int, int], generation: int
    ) -> dict[str, object]:
        blob = self._blobs.get(digest)
        if blob is not None and blob.arriving is not None:
            told = standing_of(blob.arriving, division, generation)
        elif blob is not None and not blob.has_begun and blob.watch is not None:
            # It is looked for all the time.
            told = {**NOTHING, "given_up": blob.is_given_up}
        else:
            told = await self._in_pool(standing, self._store, digest, division, generation)
        if told["fate"] == UNKNOWN:
            told["fate"] = self._fates.of(digest, generation)
        return told

    async def _pieces(self, digest: Digest) -> web.Response:
        """Read a blob anew, once for all who ask meanwhile; one that is damaged is sent no more."""
        comparing = self._comparing.get(digest)
        if comparing is None:
            comparing = self._comparing[digest] = asyncio.ensure_future(self._compare(digest))
            comparing.add_done_callback(lambda _: self._comparing.pop(digest, None))
        told = await asyncio.shield(comparing)
        return json_answer(told, {})

    async def _compare(self, digest: Digest) -> dict[str, Any]:
        pieces = await self._in_pool(read_pieces, self._store, digest)
        if pieces.damaged:
            blob = self._blobs.pop(digest, None)
            if blob is not None:
                blob.is_damaged = True
        return pieces.to_dict()

    async def _in_pool(self, function: Callable[..., Value], *arguments: Any) -> Value:
        return await asyncio.get_running_loop().run_in_executor(self._lookups, function, *arguments)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _number(request: web.BaseRequest, name: str) -> int:
    text = request.query.get(name, "0")
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise RefusalError(400, "RANGE_INVALID", "no such position")
    return int(text)
