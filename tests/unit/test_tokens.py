from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowray.pipeline.challenge import parse
from stowray.pipeline.tokens import Token, merge_scopes, parse_answer, parse_scopes
from tests.support.vectors import table

TABLES = table("auth_transport")
SCOPE = st.builds(
    "{}:{}:{}".format,
    st.sampled_from(["repository", "registry"]),
    st.sampled_from(["a", "a/b", "host:5000/a", "catalog"]),
    st.lists(st.sampled_from(["pull", "push", "*"]), min_size=1, max_size=3).map(",".join),
)


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row["name"]) for row in TABLES["token_answer"]]
)
def test_answer(row: dict[str, Any]) -> None:
    body = row["body"].encode()
    if row.get("error"):
        with pytest.raises(ValueError) as caught:
            parse_answer(body)
        assert "IAm" not in str(caught.value)
    else:
        assert parse_answer(body) == Token(row["token"], row["seconds"])


def test_a_token_does_not_show_itself() -> None:
    assert "secret" not in repr(Token("secret", 60))


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=str(row["header"])) for row in TABLES["insufficient_scope"]]
)
def test_what_an_insufficient_scope_demands(row: dict[str, Any]) -> None:
    demanded = None
    for challenge in parse([row["header"]] if row["header"] else []):
        parameters = challenge.parameters
        if challenge.scheme == "bearer" and parameters.get("error") == "insufficient_scope":
            demanded = " ".join(parse_scopes(parameters.get("scope", ""))) or None
    assert demanded == row["scope"]


@pytest.mark.parametrize(
    ("scopes", "merged"),
    [
        (["repository:b:pull", "repository:a:pull"], ("repository:a:pull", "repository:b:pull")),
        (["repository:a:push", "repository:a:pull"], ("repository:a:pull,push",)),
        (["repository:a:pull", "repository:a:pull"], ("repository:a:pull",)),
        (["repository:host:5000/a:pull"], ("repository:host:5000/a:pull",)),
        ([], ()),
    ],
)
def test_scopes_are_sorted_and_merged(scopes: list[str], merged: tuple[str, ...]) -> None:
    assert merge_scopes(scopes) == merged


@given(st.lists(SCOPE, max_size=5))
def test_merging_loses_nothing_and_is_idempotent(scopes: list[str]) -> None:
    merged = merge_scopes(scopes)
    assert merge_scopes(merged) == merged
    assert merge_scopes(reversed(scopes)) == merged

    def held(some: Any) -> set[tuple[str, str]]:
        return {
            (scope.rpartition(":")[0], action)
            for scope in some
            for action in scope.rpartition(":")[2].split(",")
        }

    assert held(merged) == held(scopes)
