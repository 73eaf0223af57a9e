"""JSON as a registry's peers must all read it: I-JSON, and nothing that Python alone accepts.

Invariant: a document that parses has one meaning. Python keeps the last of two equal keys, decodes
UTF-16, takes NaN, and turns 7682.0 and true into numbers; another tool would see another image.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_INTEGER: Final = 2**63 - 1

# Longer ones cannot be a size; int() of more than 4300 digits raises an error of its own.
_DIGITS_LIMIT: Final = 20
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class JSONError(ValueError):
    """The bytes are not one JSON document with one meaning; the text says why."""


def parse(body: bytes) -> Any:
    """Return the value of ``body``, or raise ``JSONError``."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise JSONError("not UTF-8") from None
    if text.startswith("\ufeff"):
        raise JSONError("it begins with a byte order mark")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_constant=_constant,
        )
    except RecursionError:
        raise JSONError("nested too deeply") from None
    except JSONError:
        raise
    except ValueError:
        # The decoder's own text may quote the document.
        raise JSONError("not JSON") from None
    # Only an escape can make a lone surrogate; without one there is nothing to search.
    if _SURROGATE_ESCAPE.search(text) and _has_surrogate(value):
        raise JSONError("a string with a lone surrogate")
    return value


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the object in ``body``, or raise ``JSONError``."""
    value = parse(body)
    if not isinstance(value, dict):
        raise JSONError(f"{_kind(value)} instead of an object")
    return value


def check_case(fields: dict[str, Any], known: Iterable[str]) -> None:
    """Raise when a key equals a known one but for its case: Go takes it, others do not."""
    folded = {name.casefold(): name for name in known}
    for key in fields:
        name = folded.get(key.casefold())
        if name is not None and name != key:
            raise JSONError(f"ambiguous key {key[:64]!r} beside {name!r}")


def text(fields: dict[str, Any], key: str) -> str:
    """Return the string at ``key``; absent and null are empty, as in Go."""
    value = fields.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise JSONError(f"{key} is {_kind(value)}, not a string")
    return value


def required_text(fields: dict[str, Any], key: str) -> str:
    """Return the string at ``key``, which must be there and not be empty."""
    value = text(fields, key)
    if not value:
        raise JSONError(f"{key} is missing")
    return value


def size(fields: dict[str, Any], key: str) -> int:
    """Return the number of bytes at ``key``: an integer from 0 to 2^63-1, in integer notation."""
    value = fields.get(key)
    if value is None:
        raise JSONError(f"{key} is missing")
    # bool is a subclass of int.
    if type(value) is not int or not 0 <= value <= MAX_INTEGER:
        raise JSONError(f"{key} is not an integer from 0 to 2^63-1")
    return value


def array(fields: dict[str, Any], key: str) -> list[Any]:
    """Return the array at ``key``; absent and null are empty."""
    value = fields.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise JSONError(f"{key} is {_kind(value)}, not an array")
    return value


def texts(fields: dict[str, Any], key: str) -> tuple[str, ...]:
    """Return the array of strings at ``key``; absent and null are empty."""
    values = array(fields, key)
    for value in values:
        if not isinstance(value, str):
            raise JSONError(f"{key} holds {_kind(value)}, not only strings")
    return tuple(values)


def mapping(fields: dict[str, Any], key: str) -> dict[str, Any] | None:
    """Return the object at ``key``; None when absent or null."""
    value = fields.get(key)
    if value is None:
        return None
    if not isinstance(value, dict):
        raise JSONError(f"{key} is {_kind(value)}, not an object")
    return value


def text_pairs(fields: dict[str, Any], key: str) -> tuple[tuple[str, str], ...]:
    """Return the string-to-string object at ``key`` as pairs in document order; null is empty."""
    values = mapping(fields, key) or {}
    for name, value in values.items():
        if value is not None and not isinstance(value, str):
            raise JSONError(f"{key}[{name[:64]!r}] is {_kind(value)}, not a string")
    return tuple((name, value or "") for name, value in values.items())


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise JSONError(f"duplicate key {name[:64]!r}")
            seen.add(name)
    return fields


def _integer(digits: str) -> int | float:
    # As a float it is refused where an integer is wanted, and ignored in fields that are ignored.
    return int(digits) if len(digits) <= _DIGITS_LIMIT else float(digits)


def _constant(name: str) -> Any:
    raise JSONError(f"{name} is not JSON")


def _has_surrogate(value: Any) -> bool:
    """Tell whether any string in ``value`` cannot be encoded; without recursion."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            if any("\ud800" <= character <= "\udfff" for character in item):
                return True
        elif isinstance(item, list):
            pending.extend(item)
        elif isinstance(item, dict):
            pending.extend(item.keys())
            pending.extend(item.values())
    return False


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, list):
        return "an array"
    return "an object" if isinstance(value, dict) else "a number"
