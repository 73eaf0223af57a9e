"""Digests: ``algorithm:encoded`` over exact bytes.

Invariant: a ``Digest`` that exists is well formed and of an algorithm that can be verified, so that
its parts may be used in a path or a URL as they are (CVE-2024-3727: a digest with ``../`` in it).
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Final

from stowray.pipeline.errors import InvalidDigestError

if TYPE_CHECKING:
    from collections.abc import Mapping

# Hexadecimal digits of each algorithm (image-spec descriptor.md, "Registered algorithms").
HEX_LENGTHS: Final[Mapping[str, int]] = {"sha256": 64, "sha512": 128}
DISPLAY_LIMIT = 200

# ASCII only and always with fullmatch: `$` would also match before a newline, `\w` is Unicode.
_GRAMMAR = re.compile(r"[a-z0-9]+(?:[+._-][a-z0-9]+)*:[a-zA-Z0-9=_-]+")
_HEX = re.compile(r"[a-f0-9]+")
# Never repeats the text: in a mistyped reference it may be a piece of a password.
_UNSUPPORTED = f"the digest algorithm is unsupported ({' and '.join(HEX_LENGTHS)} are)"


class Digest(str):
    """A verified-by digest such as ``sha256:e3b0…``; equal and interchangeable with its text."""

    __slots__ = ()

    def __new__(cls, text: str) -> Digest:
        """Return ``text`` as a digest, or raise ``InvalidDigestError`` saying what is wrong."""
        if type(text) is cls:
            return text
        problem = _problem(text)
        if problem:
            raise InvalidDigestError(text[:DISPLAY_LIMIT], problem)
        return super().__new__(cls, text)

    @property
    def algorithm(self) -> str:
        """The part before the colon: ``sha256`` or ``sha512``."""
        return self.partition(":")[0]

    @property
    def encoded(self) -> str:
        """The part after the colon: lower-case hexadecimal digits."""
        return self.partition(":")[2]

    @classmethod
    def of(cls, data: bytes, algorithm: str = "sha256") -> Digest:
        """Return the digest of ``data``."""
        if algorithm not in HEX_LENGTHS:
            raise InvalidDigestError(algorithm[:DISPLAY_LIMIT], _UNSUPPORTED)
        return cls(f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}")

    def hasher(self) -> hashlib._Hash:
        """Return a new hash object of this digest's algorithm."""
        return hashlib.new(self.algorithm)

    def matches(self, data: bytes) -> bool:
        """Tell whether this is the digest of ``data``."""
        return Digest.of(data, self.algorithm) == self


def is_unsupported(text: str) -> bool:
    """Tell whether ``text`` is well formed but of an algorithm that is not verified here."""
    return _GRAMMAR.fullmatch(text) is not None and text.partition(":")[0] not in HEX_LENGTHS


def _problem(text: str) -> str:
    """Return why ``text`` is not a digest; empty if it is one."""
    algorithm, colon, encoded = text.partition(":")
    length = HEX_LENGTHS.get(algorithm)
    # The usual case first: known algorithm, right length, lower-case hexadecimal.
    if length is not None and len(encoded) == length and _HEX.fullmatch(encoded):
        return ""
    if not colon or not encoded:
        return "a digest is ALGORITHM:HEX, for example sha256:e3b0…"
    if _GRAMMAR.fullmatch(text) is None:
        return "characters that no digest has (lower-case algorithm, ':', lower-case hexadecimal)"
    if length is None:
        return _UNSUPPORTED
    if _HEX.fullmatch(encoded) is None:
        return f"{algorithm} is written in lower-case hexadecimal digits"
    return f"{algorithm} has {length} hexadecimal digits, not {len(encoded)}"
