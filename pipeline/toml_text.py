"""TOML as people write it: whatever is none is their mistake, and said as that.

Invariant: no text makes anything but a document or a UsageError that names where it came from.
Whole numbers in a document have 64 bits, as TOML has them, so that none is larger than a float.
"""

from __future__ import annotations

from typing import Any, Final

from stowray.pipeline.errors import UsageError

_BITS: Final = 63


def parse_toml(text: str, origin: str) -> dict[str, Any]:
    """Return the document of a text; ``origin`` names it in errors."""
    import tomllib

    try:
        document = tomllib.loads(text)
        is_large = _is_large(document)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(origin, f"not a TOML file: {error}") from error
    except RecursionError:
        raise UsageError(origin, "not a TOML file: nested too deeply") from None
    except ValueError:
        # More digits than Python reads.
        is_large = True
    if is_large:
        raise UsageError(origin, "not a TOML file: a whole number has more than 64 bits")
    return document


def _is_large(value: object) -> bool:
    """Tell whether a whole number that is too large is in ``value``."""
    if isinstance(value, dict):
        return any(_is_large(entry) for entry in value.values())
    if isinstance(value, list):
        return any(_is_large(entry) for entry in value)
    return isinstance(value, int) and not -(1 << _BITS) <= value < 1 << _BITS
