"""The table of known weaknesses names tests that are there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "weaknesses.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(test_\w+\.py)::(test_\w+)`", TABLE)


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_every_class_of_weakness_has_its_test(file: str, name: str) -> None:
    text = (ROOT / "tests" / "unit" / file).read_text(encoding="utf-8")
    assert re.search(rf"^ *def {name}\(", text, re.MULTILINE), f"{file} has no {name}"


@pytest.mark.parametrize("name", json.loads((ROOT / "tests/vectors/weaknesses.json").read_text()))
def test_every_known_weakness_is_in_the_table_or_said_not_to_apply(name: str) -> None:
    assert re.search(rf"{re.escape(name)}(?![0-9])", TABLE), f"{name} is not mentioned"


def test_the_table_is_not_empty_and_no_row_lacks_a_test() -> None:
    rows = [line for line in TABLE.splitlines() if line.startswith("| ") and "CVE" in line]
    assert len(rows) > 20
    assert all("`test_" in row for row in rows)
