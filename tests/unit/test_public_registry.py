"""Registries with public names, reached through a proxy's tunnel."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import (
    NotFoundError,
    RegistryError,
    SizeMismatchError,
    StowrayError,
)
from stowray.pipeline.reference import Reference
from stowray.pipeline.registry import Registry
from stowray.pipeline.settings import RegistrySettings
from tests.support.registry import FakeRegistry, Fault, incompressible
from tests.support.tunnel import Tunnel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAMES = ["registry.example", "registry-1.docker.io", "auth.docker.io", "files.example"]
LAYER = incompressible(100_000)
BLOB = Descriptor("application/octet-stream", Digest.of(LAYER), len(LAYER))


class Public:
    """A registry behind a tunnel under all the names above."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.ca_file = str(folder / "ca.pem")
        authority.cert_pem.write_to_path(self.ca_file)
        self.fake = FakeRegistry(authority=authority, certificate_names=NAMES)
        self.tunnel = Tunnel(self.fake)
        self.opened: list[Registry] = []

    def registry(self, **settings: Any) -> Registry:
        made = Registry(
            RegistrySettings(ca_file=self.ca_file, attempts=2, **settings),
            environment={"HTTPS_PROXY": self.tunnel.url},
        )
        self.opened.append(made)
        return made


@pytest.fixture
def public(tmp_path: Path) -> Iterator[Public]:
    made = Public(tmp_path)
    with made.fake, made.tunnel:
        made.fake.add_image("library/app", "1", layers=[])
        yield made
        for registry in made.opened:
            registry.close()


def reference(text: str = "registry.example/library/app:1") -> Reference:
    return Reference.parse(text)


def test_a_tunnel_keeps_the_proxy_s_login_to_the_proxy(public: Public) -> None:
    public.registry().resolve(reference())
    (asked,) = public.tunnel.requests
    assert asked.startswith("CONNECT registry.example:443 ")
    assert "proxy-authorization: basic " in asked.lower()
    (request,) = public.fake.requests
    assert not {name.lower() for name in request.headers} & {"proxy-authorization", "authorization"}


def test_the_hub_is_asked_at_its_own_host(public: Public) -> None:
    public.registry().resolve(reference("app:1"))
    assert public.fake.requests[0].headers["Host"] == "registry-1.docker.io"
    assert public.fake.requests[0].path == "/v2/library/app/manifests/1"


def test_a_realm_on_another_public_host(public: Public) -> None:
    header = (
        "WWW-Authenticate",
        'Bearer realm="https://auth.docker.io/token",service="registry.docker.io"',
    )
    public.fake.fault("/manifests/", Fault(status=401, headers=(header,)))
    public.registry().resolve(reference("app:1"))
    (token,) = public.fake.seen("/token")
    assert token.headers["Host"] == "auth.docker.io"
    assert "service=registry.docker.io" in token.query
    assert "scope=repository%3Alibrary%2Fapp%3Apull" in token.query


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:8080/x",
        "https://127.0.0.1/x",
        "https://localhost/x",
        "https://10.0.0.1/x",
        "https://169.254.169.254/latest/meta-data/",
        "https://[::ffff:7f00:1]/x",
        "https://2130706433/x",
        "http://files.example/x",
    ],
)
def test_a_public_registry_does_not_lead_to_private_places(public: Public, location: str) -> None:
    public.fake.fault("/blobs/", Fault(status=307, headers=(("Location", location),)))
    with pytest.raises(RegistryError, match="refused"):
        public.registry().open_blob(reference(), BLOB)
    assert len(public.fake.requests) == 1


@pytest.mark.parametrize(
    "realm", ["https://127.0.0.1/token", "http://auth.docker.io/token", "https://10.1.2.3/token"]
)
def test_a_public_registry_does_not_name_private_realms(public: Public, realm: str) -> None:
    header = ("WWW-Authenticate", f'Bearer realm="{realm}"')
    public.fake.fault("/", Fault(status=401, headers=(header,)), repeat=True)
    with pytest.raises(RegistryError, match="not asked for a token"):
        public.registry().resolve(reference())


# Foreign layers


def foreign(*urls: str) -> Descriptor:
    return Descriptor(BLOB.media_type, BLOB.digest, BLOB.size, urls=urls)


def test_a_layer_from_its_own_url_when_the_registry_has_none(public: Public) -> None:
    public.fake.fault("/dir/layer", Fault(status=200, body=LAYER))
    layer = foreign("https://127.0.0.1/dir/layer", "https://files.example/dir/layer?sig=1")
    with public.registry(foreign_urls=True).open_blob(reference(), layer) as stream:
        assert b"".join(iter(stream.read, b"")) == LAYER
        assert stream.source == "files.example"
    # The registry first, then the one that is fit; as nobody.
    assert [request.headers["Host"] for request in public.fake.requests] == [
        "registry.example",
        "files.example",
    ]
    assert not public.fake.requests[-1].authenticated


def test_a_layer_s_own_host_gets_no_login_not_even_when_it_asks_for_one(
    public: Public, tmp_path: Path
) -> None:
    entry = {"auth": base64.b64encode(b"alice:hunter2hunter2").decode()}
    logins = tmp_path / "auth.json"
    hosts = ("registry.example", "files.example")
    logins.write_text(json.dumps({"auths": dict.fromkeys(hosts, entry)}))
    public.fake.auth = "basic"
    public.fake.users = {"alice": "hunter2hunter2"}
    public.fake.anonymous = False
    asks = Fault(status=401, headers=(("WWW-Authenticate", 'Basic realm="files.example"'),))
    public.fake.fault("/dir/layer", asks, repeat=True)
    registry = public.registry(foreign_urls=True, authfile=str(logins))
    registry.resolve(reference())
    with pytest.raises(StowrayError):
        registry.open_blob(reference(), foreign("https://files.example/dir/layer"))
    told = {
        host: any(r.authenticated for r in public.fake.requests if r.headers["Host"] == host)
        for host in hosts
    }
    assert told == {"registry.example": True, "files.example": False}


def test_a_layer_from_its_own_url_only_when_allowed(public: Public) -> None:
    layer = foreign("https://files.example/dir/layer")
    with pytest.raises(NotFoundError):
        public.registry().open_blob(reference(), layer)
    assert len(public.fake.requests) == 1


def test_a_layer_s_own_url_may_redirect_but_not_anywhere(public: Public) -> None:
    layer = foreign("https://files.example/dir/layer")
    moved = Fault(status=302, headers=(("Location", "/there"),))
    public.fake.fault("/dir/layer", moved)
    public.fake.fault("/there", Fault(status=200, body=LAYER))
    registry = public.registry(foreign_urls=True)
    with registry.open_blob(reference(), layer) as stream:
        assert b"".join(iter(stream.read, b"")) == LAYER
    for location in ("https://10.0.0.1/x", "http://files.example/x", "/dir/layer"):
        public.fake.fault(
            "/dir/layer", Fault(status=302, headers=(("Location", location),)), repeat=True
        )
        with pytest.raises(RegistryError, match="redirect"):
            registry.open_blob(reference(), layer)
        public.fake.clear_faults()


def test_a_layer_s_own_url_without_it(public: Public) -> None:
    layer = foreign("https://files.example/dir/none")
    registry = public.registry(foreign_urls=True)
    with pytest.raises(NotFoundError) as caught:
        registry.open_blob(reference(), layer)
    assert caught.value.where == "files.example"
    public.fake.fault("/dir/none", Fault(status=200, body=b"short"))
    with pytest.raises(SizeMismatchError):
        registry.open_blob(reference(), layer)
