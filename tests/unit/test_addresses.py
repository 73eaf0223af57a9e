from __future__ import annotations

from typing import Any

import pytest

from stowray.pipeline.addresses import (
    canonical_address,
    foreign_refusal,
    is_loopback,
    is_refused_peer,
    origin_of,
    realm_refusal,
    refusal,
    same_origin,
)
from tests.support.vectors import table

TABLES = table("auth_transport")
PUBLIC = "registry.example.com"


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{row['realm']} for {row['registry'] or 'none'}")
        for row in TABLES["realm"]
    ],
)
def test_realm(row: dict[str, Any]) -> None:
    scheme = "http" if row.get("insecure") else "https"
    assert (
        bool(realm_refusal(row["realm"], registry=row["registry"], scheme=scheme)) == (row["error"])
    )


@pytest.mark.parametrize("row", [pytest.param(row, id=row["url"]) for row in TABLES["foreign_url"]])
def test_foreign_url(row: dict[str, Any]) -> None:
    assert bool(foreign_refusal(row["url"])) == row["error"]


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{row['scheme']} {row['address']}")
        for row in TABLES["canonical_address"]
    ],
)
def test_canonical_address(row: dict[str, Any]) -> None:
    assert canonical_address(row["scheme"], row["address"]) == row["want"]


@pytest.mark.parametrize("row", [pytest.param(row, id=row["host"]) for row in TABLES["localhost"]])
def test_loopback(row: dict[str, Any]) -> None:
    assert is_loopback(row["host"]) == row["match"]


@pytest.mark.parametrize(
    ("registry", "scheme", "target", "refused"),
    [
        pytest.param(PUBLIC, "https", "https://cdn.example.net/x", False, id="public to public"),
        pytest.param(PUBLIC, "https", "http://cdn.example.net/x", True, id="https to http"),
        pytest.param(PUBLIC, "https", "https://127.0.0.1/x", True, id="public to loopback"),
        pytest.param(PUBLIC, "https", "https://localhost:8080/x", True, id="public to localhost"),
        pytest.param(PUBLIC, "https", "https://10.0.0.1/x", True, id="public to private"),
        pytest.param(PUBLIC, "https", "https://169.254.169.254/x", True, id="public to metadata"),
        pytest.param(PUBLIC, "https", "https://[::ffff:10.0.0.1]/x", True, id="mapped private"),
        pytest.param(PUBLIC, "https", "ftp://cdn.example.net/x", True, id="ftp"),
        pytest.param(PUBLIC, "https", "file:///etc/passwd", True, id="file"),
        pytest.param(PUBLIC, "https", "https:///x", True, id="no host"),
        pytest.param(PUBLIC, "https", "https://[::1/x", True, id="broken"),
        pytest.param(PUBLIC, "https", "https://cdn.example.net:99999/x", True, id="broken port"),
        pytest.param("127.0.0.1:5000", "http", "http://127.0.0.1:6000/x", False, id="loopback"),
        pytest.param("127.0.0.1:5000", "http", "http://10.0.0.1/x", False, id="loopback, private"),
        pytest.param("127.0.0.1:5000", "http", "http://169.254.169.254/", True, id="metadata"),
        pytest.param("10.0.0.1:5000", "http", "http://10.0.0.2/x", False, id="private to private"),
        pytest.param("10.0.0.1:5000", "http", "http://127.0.0.1/x", True, id="private, loopback"),
        pytest.param("10.0.0.1", "https", "https://10.0.0.1/x", False, id="itself"),
        pytest.param("169.254.1.1:80", "http", "http://169.254.1.1/x", False, id="itself, local"),
    ],
)
def test_redirect(registry: str, scheme: str, target: str, refused: bool) -> None:
    assert bool(refusal(target, registry=registry, scheme=scheme)) == refused


def test_hosts_that_the_settings_name_are_trusted() -> None:
    target = "http://10.0.0.7:9000/x"
    about = {"registry": "registry.corp.example:80", "scheme": "http"}
    assert refusal(target, registry="registry.corp.example:80", scheme="http")
    assert not refusal(target, **about, trusted=("10.0.0.7:9000",))
    # A registry that is spoken to in the clear by the user's word lives in a private network.
    assert not refusal(target, **about, trusted=("registry.corp.example:80",))
    assert realm_refusal(target, **about, trusted=("registry.corp.example:80",))
    assert not realm_refusal(target, **about, trusted=("10.0.0.7:9000",))


def test_origin_is_scheme_host_and_port() -> None:
    assert same_origin("https://A.example/x", "https://a.example:443/y")
    assert not same_origin("https://a.example/", "https://b.a.example/")
    assert not same_origin("https://a.example/", "https://a.example:444/")
    assert not same_origin("https://a.example/", "http://a.example:443/")
    assert origin_of("http://[2001:DB8::1]/x") == ("http", "2001:db8::1", 80)


@pytest.mark.parametrize(
    ("address", "registry_peer", "refused"),
    [
        ("93.184.216.34", "93.184.216.35", False),
        ("127.0.0.1", "93.184.216.35", True),
        ("127.0.0.1", "", True),
        ("::1", "10.0.0.1", True),
        ("127.0.0.1", "127.0.0.1", False),
        ("169.254.169.254", "93.184.216.35", True),
        ("169.254.169.254", "127.0.0.1", True),
        ("fe80::1%eth0", "", True),
        ("::ffff:169.254.169.254", "", True),
        # A cloud's private endpoint behind a public name.
        ("10.0.0.1", "93.184.216.35", False),
    ],
)
def test_where_a_name_may_lead(address: str, registry_peer: str, refused: bool) -> None:
    assert is_refused_peer(address, registry_peer) == refused
