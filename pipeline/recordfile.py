"""The form of our small record files: JSON that proves itself whole.

Invariant: a record is read either exactly as it was written or not at all. The file is one JSON
object whose first member is the SHA-256 of every byte after it, so that a file that a power cut
left empty, short or mixed is told from a good one, and people can still read it.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from stowray.pipeline.errors import StorageError
from stowray.pipeline.files import read_regular, storage_error

if TYPE_CHECKING:
    from pathlib import Path

RECORD_LIMIT = 256 << 20
_HEAD = b'{"checksum":"'
_TAIL = b'",'
_BODY = len(_HEAD) + 64 + len(_TAIL)


def encode_record(payload: dict[str, Any]) -> bytes:
    """Return the bytes of a record file for a non-empty ``payload``."""
    body = json.dumps(payload, separators=(",", ":"), ensure_ascii=True).encode("ascii")[1:]
    return _HEAD + hashlib.sha256(body).hexdigest().encode("ascii") + _TAIL + body


def decode_record(data: bytes) -> dict[str, Any] | None:
    """Return the payload of a record file, or None when the bytes are damaged."""
    body = data[_BODY:]
    head = _HEAD + hashlib.sha256(body).hexdigest().encode("ascii") + _TAIL
    if data[:_BODY] != head:
        return None
    # The checksum is ours, so the body is what ``encode_record`` wrote: it parses.
    payload: dict[str, Any] = json.loads(b"{" + body)
    return payload


def read_limited(path: Path, limit: int = RECORD_LIMIT) -> bytes | None:
    """Return a record file's bytes, or None when there is none."""
    try:
        return read_regular(path, limit)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None
    except OSError as error:
        raise storage_error(error, path, "read a record") from error


def read_record_file(path: Path) -> dict[str, Any] | None:
    """Return a record's payload; None when it is missing or damaged."""
    data = read_limited(path)
    return None if data is None else decode_record(data)


def require_record_file(path: Path, remedy: str) -> dict[str, Any] | None:
    """Return a record's payload, None when it is missing; a damaged one is a ``StorageError``."""
    data = read_limited(path)
    if data is None:
        return None
    payload = decode_record(data)
    if payload is None:
        raise StorageError(str(path), f"this record is damaged: {remedy}")
    return payload
