"""The maps in tests/proofs: every test that they name exists, and no table of facts is left out."""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.support.vectors import table

TESTS = Path(__file__).parents[1]
MAPS = sorted((TESTS / "proofs").glob("*.toml"))


def read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


@cache
def source(name: str) -> str:
    return (TESTS / name).read_text(encoding="utf-8")


@cache
def functions(name: str) -> frozenset[str]:
    """Return the tests of a file, as pytest would find them: functions at its top."""
    tree = ast.parse(source(name))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def named(document: dict[str, Any]) -> dict[str, list[str]]:
    """Return the tests by what they prove."""
    found = {name: case.get("tests", []) for name, case in document["cases"].items()}
    for file, sections in document["tables"].items():
        found |= {f"{file}/{name}": tests for name, tests in sections.items()}
    return found


@pytest.mark.parametrize("path", MAPS, ids=lambda path: path.stem)
def test_every_test_that_is_named_exists(path: Path) -> None:
    missing = {
        test
        for tests in named(read(path)).values()
        for test in tests
        if not (TESTS / test.partition("::")[0]).is_file()
        or test.partition("::")[2] not in functions(test.partition("::")[0])
    }
    assert missing == set()


@pytest.mark.parametrize("path", MAPS, ids=lambda path: path.stem)
def test_every_case_has_a_test_or_says_why_not(path: Path) -> None:
    for name, case in read(path)["cases"].items():
        assert set(case) <= {"what", "tests", "why"}, name
        assert case["what"], name
        assert bool(case.get("tests")) != bool(case.get("why")), name


@pytest.mark.parametrize("path", MAPS, ids=lambda path: path.stem)
def test_every_table_is_read_by_the_tests_that_are_named(path: Path) -> None:
    for file, sections in read(path)["tables"].items():
        assert set(sections) == set(table(file)), file
        for name, tests in sections.items():
            assert tests, name
            for test in tests:
                text = source(test.partition("::")[0])
                assert f'"{file}"' in text, test
                assert f'"{name}"' in text, f"{test} does not read {name}"
