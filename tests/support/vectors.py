"""Reads the tables under ``tests/vectors``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VECTORS = Path(__file__).parent.parent / "vectors"


def table(name: str) -> dict[str, Any]:
    """Return the tables of ``name``.json by their names."""
    tables: dict[str, Any] = json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))
    return tables


def label(text: str, limit: int = 60) -> str:
    """Return a printable, short test ID for any text."""
    shown = text.encode("unicode_escape").decode("ascii") or "empty"
    return shown if len(shown) <= limit else f"{shown[:limit]}({len(text)})"
