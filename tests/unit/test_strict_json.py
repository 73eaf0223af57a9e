from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowray.pipeline import strict_json
from stowray.pipeline.strict_json import JSONError


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b'{"a":1,"a":2}', id="duplicate key"),
        pytest.param(b'{"x":{"a":1,"\\u0061":2}}', id="duplicate by escape"),
        pytest.param(b'{"a":NaN}', id="NaN"),
        pytest.param(b'{"a":Infinity}', id="Infinity"),
        pytest.param(b'{"a":-Infinity}', id="-Infinity"),
        pytest.param('{"a":1}'.encode("utf-16"), id="UTF-16"),
        pytest.param('{"a":1}'.encode("utf-32-le"), id="UTF-32"),
        pytest.param(b"\xef\xbb\xbf{}", id="BOM"),
        pytest.param(b'{"a":"\xff"}', id="invalid UTF-8"),
        pytest.param(b'{"a":"\xed\xa0\x80"}', id="encoded surrogate"),
        pytest.param(b'{"a":"\\ud800"}', id="lone surrogate"),
        pytest.param(b'{"a":["\\uDC00x"]}', id="lone low surrogate in an array"),
        pytest.param(b'{"\\ud800":1}', id="lone surrogate key"),
        pytest.param(b"[" * 100_000, id="open arrays"),
        pytest.param(b"[" * 100_000 + b"]" * 100_000, id="nested arrays"),
        pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, id="nested objects"),
        pytest.param(b"{}{}", id="two documents"),
        pytest.param(b'{"a":1,}', id="trailing comma"),
        pytest.param(b"{'a':1}", id="single quotes"),
        pytest.param(b'{"a":01}', id="leading zero"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"\0", id="NUL"),
        pytest.param(b'{"a":"\n"}', id="raw newline"),
    ],
)
def test_refused(body: bytes) -> None:
    with pytest.raises(JSONError):
        strict_json.parse(body)


@pytest.mark.parametrize("body", [b"null", b"[]", b'"x"', b"1", b"true", b"1.5"])
def test_no_object(body: bytes) -> None:
    strict_json.parse(body)
    with pytest.raises(JSONError, match="instead of an object"):
        strict_json.parse_object(body)


def test_surrogate_pair_is_one_character() -> None:
    assert strict_json.parse(b'["\\ud83d\\ude00"]') == ["😀"]


@pytest.mark.parametrize(
    "text",
    ["-1", "7682.0", "1e3", "true", "false", '"1"', "null", "[]", "{}", str(2**63), "9" * 5000],
)
def test_no_size(text: str) -> None:
    fields = strict_json.parse_object(f'{{"size":{text}}}'.encode())
    with pytest.raises(JSONError, match="size"):
        strict_json.size(fields, "size")


@pytest.mark.parametrize("number", [0, 1, 2**31, 2**63 - 1])
def test_size(number: int) -> None:
    assert strict_json.size(strict_json.parse_object(b'{"size":%d}' % number), "size") == number


@pytest.mark.parametrize("key", ["Layers", "LAYERS", "layerſ"])
def test_other_case_of_a_known_key(key: str) -> None:
    with pytest.raises(JSONError, match="ambiguous"):
        strict_json.check_case({key: 1}, ["layers"])
    strict_json.check_case({"layers": 1, "other": 2}, ["layers"])


def test_typed_fields() -> None:
    fields = {"s": "x", "a": ["x"], "m": {"k": "v"}, "n": None, "i": 1}
    assert strict_json.text(fields, "s") == "x"
    assert strict_json.text(fields, "n") == strict_json.text(fields, "absent") == ""
    assert strict_json.texts(fields, "a") == ("x",)
    assert strict_json.texts(fields, "n") == ()
    assert strict_json.text_pairs(fields, "m") == (("k", "v"),)
    assert strict_json.text_pairs({"m": {"k": None}}, "m") == (("k", ""),)
    assert strict_json.mapping(fields, "n") is None
    wrong: list[tuple[Any, str]] = [
        (strict_json.text, "i"),
        (strict_json.text, "a"),
        (strict_json.texts, "s"),
        (strict_json.texts, "m"),
        (strict_json.array, "m"),
        (strict_json.mapping, "a"),
        (strict_json.text_pairs, "s"),
        (strict_json.required_text, "n"),
    ]
    for read, key in wrong:
        with pytest.raises(JSONError):
            read(fields, key)
    with pytest.raises(JSONError):
        strict_json.texts({"a": [1]}, "a")
    with pytest.raises(JSONError):
        strict_json.text_pairs({"m": {"k": 1}}, "m")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(VALUES)
def test_ordinary_documents_keep_their_value(value: Any) -> None:
    assert strict_json.parse(json.dumps(value).encode()) == value
    assert strict_json.parse(json.dumps(value, ensure_ascii=False).encode()) == value


@given(st.binary(max_size=40))
def test_any_bytes_parse_or_are_refused(body: bytes) -> None:
    try:
        strict_json.parse(body)
    except JSONError as error:
        assert str(error)
