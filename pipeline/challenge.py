"""What a 401 asks for: the ``WWW-Authenticate`` headers (RFC 9110, section 11.6.1).

Invariant: any bytes parse to a list of challenges; several challenges in one header stay apart, and
a parameter that is not well-formed is left out rather than guessed.
"""

from __future__ import annotations

import re
from dataclasses import field
from typing import TYPE_CHECKING

from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable

HEADER_LIMIT = 16 * 1024

_SCHEME = re.compile(r"\s*([!#$%&'*+.^_`|~0-9A-Za-z-]+)")
_PARAMETER = re.compile(
    r"""\s*([!#$%&'*+.^_`|~0-9A-Za-z-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s",=]+))\s*(?=,|$)""",
    re.DOTALL,
)
_TOKEN68 = re.compile(r"\s+[A-Za-z0-9._~+/-]+=*\s*(?=,|$)")
_SEPARATOR = re.compile(r"[\s,]*")


@dataclass(frozen=True, slots=True)
class Challenge:
    """One scheme, in lower case, with its parameters, their names in lower case."""

    scheme: str
    parameters: dict[str, str] = field(default_factory=dict)


def parse(headers: Iterable[str]) -> list[Challenge]:
    """Return the challenges of all ``WWW-Authenticate`` headers, in order."""
    challenges: list[Challenge] = []
    for header in headers:
        challenges.extend(_parse_header(header[:HEADER_LIMIT]))
    return challenges


def choose(challenges: Iterable[Challenge]) -> Challenge | None:
    """Return the challenge to answer: Bearer before Basic, others cannot be answered.

    A Bearer without a realm is nothing to go by as long as there is another one.
    """
    known = [one for one in challenges if one.scheme in ("bearer", "basic")]

    def rank(challenge: Challenge) -> int:
        return 1 if challenge.scheme == "basic" else 0 if challenge.parameters.get("realm") else 2

    return min(known, key=rank, default=None)


def _parse_header(header: str) -> list[Challenge]:
    challenges: list[Challenge] = []
    position = 0
    while position < len(header):
        separator = _SEPARATOR.match(header, position)
        position = separator.end() if separator else position
        parameter = _PARAMETER.match(header, position)
        if parameter is not None and challenges:
            name, quoted, plain = parameter.groups()
            value = plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted, flags=re.DOTALL)
            # The first one counts: a second realm must not replace the one that was checked.
            challenges[-1].parameters.setdefault(name.lower(), value)
            position = parameter.end()
            continue
        scheme = _SCHEME.match(header, position)
        if scheme is None or header[scheme.end() : scheme.end() + 1] not in ("", " ", "\t", ","):
            position = _next_part(header, position)
            continue
        if header[scheme.end() :].lstrip().startswith("="):
            # A parameter with a broken value, or one before any scheme.
            position = _next_part(header, position)
            continue
        challenges.append(Challenge(scheme[1].lower()))
        position = scheme.end()
        token = _TOKEN68.match(header, position)
        if token is not None and not _PARAMETER.match(header, position):
            position = token.end()
    return challenges


def _next_part(header: str, position: int) -> int:
    """Return where the next part begins: after a comma that stands outside quotes."""
    quoted = False
    while position < len(header):
        character = header[position]
        if character == "\\" and quoted:
            position += 1
        elif character == '"':
            quoted = not quoted
        elif character == "," and not quoted:
            return position + 1
        position += 1
    return position
