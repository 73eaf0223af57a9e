from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowray.pipeline.redact import DETAIL_LIMIT, host_of, public_url, redact_text, redact_url
from tests.support.vectors import table

SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row["url"]) for row in table("auth_transport")["redaction"]]
)
def test_url(row: dict[str, Any]) -> None:
    assert redact_url(row["url"]) == row["shown"]


@pytest.mark.parametrize(
    "url",
    [
        f"https://cdn.example/blob?X-Amz-Signature={SECRET}",
        f"https://user:{SECRET}@cdn.example/blob",
        f"https://cdn.example/blob#{SECRET}",
    ],
)
def test_of_a_signed_url_only_host_and_path_are_public(url: str) -> None:
    assert public_url(url) == "https://cdn.example/blob"


@pytest.mark.parametrize(
    "text",
    [
        f"failed: https://cdn.example/blob?sig={SECRET} (timeout)",
        f"HTTPConnectionPool(host='x', port=1): url: /blob?sig={SECRET} gone",
        f"Authorization: Bearer {SECRET}",
        f"sent basic {SECRET}",
        f'{{"access_token": "{SECRET}"}}',
        f"password={SECRET}&x=1",
        f"X-Amz-Signature={SECRET}",
        f"eyJhbGciOiJIUzI1NiJ9.{SECRET}.x",
        f"proxy http://user:{SECRET}@proxy.example:3128 refused",
    ],
)
def test_text_of_others_loses_secrets(text: str) -> None:
    assert SECRET not in redact_text(text)


def test_text_of_others_loses_what_we_know_to_be_secret() -> None:
    assert redact_text("you said s3cr3t!", ("s3cr3t",)) == "you said REDACTED!"


def test_text_of_others_keeps_what_explains() -> None:
    text = "denied: requested access to the resource is denied"
    assert redact_text(text) == text


@given(st.text(max_size=200))
def test_text_of_others_cannot_steer_a_terminal(text: str) -> None:
    shown = redact_text(text)
    assert shown.isprintable() or not shown
    assert len(redact_text(text * 50)) <= DETAIL_LIMIT + 1


def test_host() -> None:
    assert host_of("https://u:p@[::1]:5000/x?y") == "[::1]:5000"
