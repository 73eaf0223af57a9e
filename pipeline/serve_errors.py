"""Answers of the blob server that say no, in the words of the OCI distribution-spec.

Invariant: no path of this machine and nothing that a client sent as a secret is in an answer.
"""

from __future__ import annotations

import json

from aiohttp import web

from stowray.pipeline.errors import (
    CancelledError,
    InvalidDigestError,
    InvalidReferenceError,
    StowrayError,
)

COMMON_HEADERS = {"Docker-Distribution-Api-Version": "registry/2.0", "Server": "stowray"}


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


def json_answer(document: object, headers: dict[str, str], status: int = 200) -> web.Response:
    """Return an answer that is a JSON document."""
    body = json.dumps(document, separators=(",", ":")).encode()
    return web.Response(
        status=status,
        body=body,
        headers={**COMMON_HEADERS, "Content-Type": "application/json", **headers},
    )


def refused(refusal: RefusalError) -> web.Response:
    """Return the answer that says no."""
    error = {"code": refusal.code, "message": refusal.message}
    return json_answer({"errors": [error]}, refusal.headers, refusal.status)


def later(reason: str) -> RefusalError:
    """Return the refusal after which a client asks again."""
    return RefusalError(503, "UNAVAILABLE", reason, {"Retry-After": "1"})


def refusal_of(error: StowrayError) -> RefusalError:
    """Return what an error of the store means to a client; paths of this machine stay here."""
    if isinstance(error, InvalidDigestError):
        return RefusalError(400, "DIGEST_INVALID", error.reason)
    if isinstance(error, InvalidReferenceError):
        return RefusalError(400, "NAME_INVALID", error.reason)
    if isinstance(error, CancelledError):
        return later("the server is stopping")
    return RefusalError(500, "UNKNOWN", f"the store cannot answer ({type(error).__name__})")
