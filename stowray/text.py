"""Figures as people read them."""

from __future__ import annotations

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size_text(size: float) -> str:
    """Return a number of bytes with a binary unit: ``1.5 MiB``."""
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return ""


def seconds_text(seconds: float) -> str:
    """Return a duration: ``4.2 ms``, ``42 ms``, ``0.42 s``, ``12 s``, ``3 min 05 s``."""
    if 0 < seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.00995 else f"{seconds * 1000:.1f} ms"
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def left_text(seconds: float) -> str:
    """Return a guess at a duration: ``4 s``, ``3 min 05 s``."""
    return f"{seconds:.0f} s" if seconds < 10 else seconds_text(seconds)


def age_text(seconds: float) -> str:
    """Return how long ago something was: ``5 minutes``, ``3 days``."""
    for length, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count != 1 else ''}"
    return "just now"
