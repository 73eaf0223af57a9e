"""One login: a plain value.

Invariant: no secret of it shows itself in a ``repr``, and tokens that were got with one login are
never taken for another one's.
"""

from __future__ import annotations

import base64
from dataclasses import field
from typing import Final

from stowray.pipeline.values import dataclass

TOKEN_USER: Final = "<token>"


@dataclass(frozen=True, slots=True)
class Credential:
    """A login: name and password, or an identity token, or a ready registry token."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)

    @property
    def identity(self) -> str:
        """Return a name for cache keys: tokens of one login are never used for another."""
        import hashlib

        parts = (self.username, self.password, self.identity_token, self.registry_token)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def basic(self) -> str:
        """Return the value of an ``Authorization`` header of scheme Basic (RFC 7617)."""
        pair = f"{self.username}:{self.password}".encode()
        return "Basic " + base64.b64encode(pair).decode("ascii")

    @property
    def secrets(self) -> tuple[str, ...]:
        """Return what must not be shown."""
        known = (self.password, self.identity_token, self.registry_token)
        return tuple(filter(None, (*known, self.basic.partition(" ")[2] if self.password else "")))
