"""The attribute in which a plain user's tree says who owns a file in the image.

Invariant: the value is a ``rootlesscontainers.Resource`` message as ``umoci --rootless`` writes it,
so that tools which know the attribute show or pack such a tree with the image's owners.
"""

from __future__ import annotations

NAME = b"user.rootlesscontainers"
# "Leave as it is" (rootlesscontainers.proto, ``NoopID``): stands for root, which all files have.
_SAME = 0xFFFFFFFF


def owner_attribute(uid: int, gid: int) -> bytes:
    """Return the value for an owner; of ``0:0`` there is none to be set."""
    # Fields 1 and 2 of wire type 0.
    return b"\x08" + _varint(uid or _SAME) + b"\x10" + _varint(gid or _SAME)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
