from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowray.pipeline.answers import (
    BODY_LIMIT,
    ContentRange,
    Refusal,
    describe,
    parse_content_range,
    parse_length,
    parse_unsatisfied,
    parse_warning,
    to_error,
)
from stowray.pipeline.errors import (
    NotFoundError,
    RegistryError,
    UnauthorizedError,
    UnavailableError,
)
from stowray.pipeline.redact import redact_text
from tests.support.vectors import table

TABLES = table("auth_transport")


def refused(status: int, code: str = "", message: str = "", challenged: bool = False) -> Refusal:
    return Refusal("http://h/x", status, code, message, challenged)


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=ascii(row["header"])) for row in TABLES["content_range"]]
)
def test_content_range(row: dict[str, Any]) -> None:
    wanted = None
    if "first" in row:
        wanted = ContentRange(row["first"], row["last"], row["total"])
    assert parse_content_range(row["header"]) == wanted


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=ascii(row["headers"])) for row in TABLES["content_length"]]
)
def test_content_length(row: dict[str, Any]) -> None:
    if row["size"] == "error":
        with pytest.raises(ValueError, match="not one number"):
            parse_length(row["headers"])
    else:
        assert parse_length(row["headers"]) == row["size"]


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=ascii(row["header"])) for row in TABLES["warning"]]
)
def test_warning(row: dict[str, Any]) -> None:
    assert parse_warning(row["header"]) == row["text"]


def test_unsatisfied_range() -> None:
    assert parse_unsatisfied("bytes */7") == 7
    assert parse_unsatisfied("bytes 0-1/7") is None
    assert parse_unsatisfied(None) is None


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=ascii(row["body"])) for row in TABLES["not_found"]]
)
def test_every_404_is_not_found(row: dict[str, Any]) -> None:
    code, message = describe(row["body"].encode())
    error = to_error(refused(404, code, message), what="h/a:1", registry="h", scope="s")
    assert isinstance(error, NotFoundError)
    assert "h/a:1" in str(error)
    assert "in h" in str(error)


@pytest.mark.parametrize(
    ("status", "code", "kind", "retryable"),
    [
        (401, "UNAUTHORIZED", UnauthorizedError, False),
        (403, "DENIED", UnauthorizedError, False),
        (403, "TOOMANYREQUESTS", UnavailableError, True),
        (400, "NAME_INVALID", RegistryError, False),
        (400, "UNAVAILABLE", UnavailableError, True),
        (405, "UNSUPPORTED", RegistryError, False),
        (410, "", RegistryError, False),
        (416, "", RegistryError, False),
        (429, "TOOMANYREQUESTS", UnavailableError, True),
        (500, "", UnavailableError, True),
        (501, "", RegistryError, False),
        (503, "", UnavailableError, True),
    ],
)
def test_class_by_what_the_caller_can_do(
    status: int, code: str, kind: type[Exception], retryable: bool
) -> None:
    error = to_error(refused(status, code, "why"), what="x", registry="h", scope="s")
    assert type(error) is kind
    assert error.retryable == retryable
    assert "why" in str(error)


def test_a_rate_limit_is_called_so() -> None:
    error = to_error(refused(429), what="x", registry="h", scope="s")
    assert "rate limited" in str(error)


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        (b'{"errors":[{"code":"DENIED","message":"no"}]}', ("DENIED", "no")),
        (b'{"errors":[{"code":404,"message":null}]}', ("404", "")),
        (b'{"errors":["plain"]}', ("", "plain")),
        (b'{"details":"incorrect username or password"}', ("", "incorrect username or password")),
        (b'{"error":"invalid_grant","error_description":"bad"}', ("", "bad")),
        (b"<Error><Code>ExpiredToken</Code></Error>", ("ExpiredToken", "ExpiredToken")),
        (b"<html><style>x{}</style><h1>Bad  gateway</h1></html>", ("", "Bad gateway")),
        (b"plain text", ("", "plain text")),
        (b"[1]", ("", "")),
        (b"", ("", "")),
    ],
)
def test_error_body(body: bytes, wanted: tuple[str, str]) -> None:
    assert describe(body) == wanted


@pytest.mark.parametrize("unit", [b"<", b"<script ", b"token", b"a.b/", b"{"])
def test_no_error_body_takes_long(unit: bytes) -> None:
    code, message = describe(unit * (BODY_LIMIT // len(unit)))
    assert len(redact_text(f"{code} {message} {unit.decode() * 10_000}")) < 1000


@given(st.binary(max_size=80))
def test_any_error_body_is_described(body: bytes) -> None:
    code, message = describe(body)
    assert isinstance(code, str)
    assert isinstance(message, str)


@pytest.mark.parametrize(
    ("answer", "expired"),
    [
        (refused(403, "DENIED", "Your authorization token has expired. Reauthenticate"), True),
        (refused(403, "DENIED", "Your token has expired.", challenged=True), False),
        (refused(403, "DENIED", "requested access is denied"), False),
        (refused(400, "ExpiredToken"), True),
        (refused(400, "NAME_INVALID", "expired"), False),
        (refused(404, "", "expired"), False),
    ],
)
def test_a_login_that_expired_without_a_challenge(answer: Refusal, expired: bool) -> None:
    assert answer.is_expired_login == expired
