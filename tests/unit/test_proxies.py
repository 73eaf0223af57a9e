from __future__ import annotations

from typing import Any

import pytest

from stowray.pipeline.errors import UsageError
from stowray.pipeline.proxies import Proxies
from tests.support.vectors import table

PROXY = "http://proxy.example:3128"


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{row['rule'] or 'none'} for {row['url']}")
        for row in table("auth_transport")["no_proxy"]
    ],
)
def test_no_proxy(row: dict[str, Any]) -> None:
    proxies = Proxies.read({"HTTPS_PROXY": PROXY, "NO_PROXY": row["rule"]})
    assert proxies.choose(row["url"]) == ("" if row["direct"] else PROXY)


@pytest.mark.parametrize("host", ["127.0.0.1:5000", "localhost", "[::1]:5000", "127.9.9.9"])
def test_loopback_is_never_reached_through_a_proxy(host: str) -> None:
    proxies = Proxies.read({"HTTP_PROXY": PROXY, "HTTPS_PROXY": PROXY})
    assert proxies.choose(f"http://{host}/v2/") == ""
    assert proxies.choose(f"https://{host}/v2/") == ""


def test_each_scheme_has_its_own() -> None:
    proxies = Proxies.read({"http_proxy": "http://a.example:1", "https_proxy": "b.example:2"})
    assert proxies.choose("http://r.example/") == "http://a.example:1"
    assert proxies.choose("https://r.example/") == "http://b.example:2"
    assert Proxies.read({"http_proxy": "http://a.example:1"}).choose("https://r.example/") == ""


def test_lower_case_wins_and_all_proxy_fills_in() -> None:
    environment = {"https_proxy": "http://low:1", "HTTPS_PROXY": "http://up:1"}
    assert Proxies.read(environment).choose("https://r.example/") == "http://low:1"
    assert Proxies.read({"ALL_PROXY": PROXY}).choose("http://r.example/") == PROXY
    assert Proxies.read({}).choose("https://r.example/") == ""


def test_a_request_header_is_not_taken_for_a_proxy() -> None:
    environment = {"HTTP_PROXY": PROXY, "REQUEST_METHOD": "GET"}
    assert Proxies.read(environment).choose("http://r.example/") == ""


@pytest.mark.parametrize("value", ["socks5://proxy:1080", "http://", "http://[::1"])
def test_what_is_no_http_proxy_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match="HTTPS_PROXY"):
        Proxies.read({"HTTPS_PROXY": value})


def test_a_refusal_names_the_variable_that_is_wrong() -> None:
    with pytest.raises(UsageError, match="ALL_PROXY"):
        Proxies.read({"HTTPS_PROXY": PROXY, "ALL_PROXY": "socks5://proxy:1080"})


def test_a_refusal_does_not_show_the_password() -> None:
    with pytest.raises(UsageError) as caught:
        Proxies.read({"HTTPS_PROXY": "socks5://u:hunter2@proxy:1080"})
    assert "hunter2" not in str(caught.value)
