from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowray.pipeline.challenge import HEADER_LIMIT, choose, parse
from tests.support.vectors import table

TABLES = table("auth_transport")
TOKEN = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=8)


@pytest.mark.parametrize("row", [pytest.param(row, id=row["name"]) for row in TABLES["challenge"]])
def test_one_header(row: dict[str, Any]) -> None:
    first = parse([row["header"]])[0]
    if row["scheme"] == "unknown":
        assert choose([first]) is None
    else:
        assert first.scheme == row["scheme"]
    assert first.parameters == row["params"]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=" | ".join(row["headers"]) or "none")
        for row in TABLES["challenge_choice"]
    ],
)
def test_choice(row: dict[str, Any]) -> None:
    chosen = choose(parse(row["headers"]))
    assert (chosen.scheme if chosen else None) == row["use"]


def test_a_bearer_without_a_realm_makes_room_for_another_one() -> None:
    basic, bearer = 'Basic realm="x"', 'Bearer realm="https://a/t"'
    assert [one.scheme for one in map(choose, map(parse, (["Bearer", basic],))) if one] == ["basic"]
    assert choose(parse(["Bearer", bearer])) == parse([bearer])[0]


def test_two_challenges_in_one_header_keep_their_realms() -> None:
    header = 'Bearer realm="https://a/t", service="s", Basic realm="x", charset="UTF-8"'
    bearer, basic = parse([header])
    assert bearer.parameters == {"realm": "https://a/t", "service": "s"}
    assert basic.parameters == {"realm": "x", "charset": "UTF-8"}


def test_a_second_realm_does_not_replace_the_first() -> None:
    (challenge,) = parse(['Bearer realm="https://a/t",realm="https://evil/t"'])
    assert challenge.parameters["realm"] == "https://a/t"


def test_escapes_in_quotes_are_undone() -> None:
    (challenge,) = parse([r'Bearer realm="a\"b\\c, d=e"'])
    assert challenge.parameters == {"realm": r"a\"b\c, d=e".replace(r"\"", '"')}


def test_names_are_read_in_any_case() -> None:
    (challenge,) = parse(['bEARER REALM="https://a/t",Scope="repository:Case/Kept:pull"'])
    assert challenge.scheme == "bearer"
    assert challenge.parameters["realm"] == "https://a/t"
    assert challenge.parameters["scope"] == "repository:Case/Kept:pull"


def test_a_token_after_an_unknown_scheme_belongs_to_it() -> None:
    negotiate, bearer = parse(['Negotiate YWJj==, Bearer realm="https://a/t"'])
    assert negotiate.scheme == "negotiate"
    assert bearer.parameters == {"realm": "https://a/t"}


def test_an_endless_header_is_cut() -> None:
    assert len(parse(["Basic, " * (HEADER_LIMIT // 2)])) <= HEADER_LIMIT // 7 + 1


@given(st.lists(st.text(max_size=60), max_size=3))
def test_any_text_parses(headers: list[str]) -> None:
    for challenge in parse(headers):
        assert challenge.scheme


@given(
    st.lists(
        st.tuples(TOKEN, st.dictionaries(TOKEN, st.text(max_size=12), min_size=1, max_size=3)),
        min_size=1,
        max_size=3,
    )
)
def test_what_is_written_well_is_read_back(wanted: list[tuple[str, dict[str, str]]]) -> None:
    parts = []
    for scheme, parameters in wanted:
        quoted = [
            '{}="{}"'.format(name, value.replace("\\", "\\\\").replace('"', '\\"'))
            for name, value in parameters.items()
        ]
        parts.append(f"{scheme} {', '.join(quoted)}")
    read = [(challenge.scheme, challenge.parameters) for challenge in parse([", ".join(parts)])]
    assert read == wanted
