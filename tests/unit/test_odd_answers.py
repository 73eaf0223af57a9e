"""Answers that are legal, or nearly so, and rare: each once led to a wrong end, or to a crash."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import pytest

from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import RegistryError, UnauthorizedError, UnavailableError, UsageError
from stowray.pipeline.reference import Reference
from stowray.pipeline.registry import Registry
from stowray.pipeline.settings import RegistrySettings
from tests.support.registry import FakeRegistry, Fault, incompressible
from tests.support.small import small_tar

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "team/app"
DATA = incompressible(50_000)
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
DENIED = b'{"errors":[{"code":"DENIED","message":"requested access is denied"}]}'


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry() as made:
        made.add_image(NAME, "1", layers=[small_tar({"f": DATA})])
        yield made


def make(authfile: str = "", attempts: int = 2) -> Registry:
    return Registry(RegistrySettings(attempts=attempts, authfile=authfile), environment={})


def reference(fake: FakeRegistry) -> Reference:
    return Reference.parse(f"{fake.host}/{NAME}:1")


def resolve(fake: FakeRegistry, **settings: Any) -> str:
    registry = make(**settings)
    try:
        return str(registry.resolve(reference(fake)).descriptor.digest)
    finally:
        registry.close()


def fetched(fake: FakeRegistry, data: bytes, media_type: str = "application/octet-stream") -> bytes:
    descriptor = Descriptor(media_type, Digest(fake.add_blob(data)), len(data))
    registry = make()
    whole = bytearray()
    try:
        with registry.open_blob(reference(fake), descriptor) as stream:
            buffer = bytearray(1000)
            # Both ways of reading in turn, as the one goes on where the other ended.
            while piece := stream.read(700):
                whole += piece
                count = stream.read_into(memoryview(buffer))
                whole += buffer[:count]
        return bytes(whole)
    finally:
        registry.close()


def challenge(text: str) -> Fault:
    return Fault(status=401, headers=(("WWW-Authenticate", text),))


# Where an answer leads


def test_a_scheme_in_capitals(fake: FakeRegistry) -> None:
    fake.fault("/manifests/", challenge(f'Bearer realm="HTTP://{fake.host}/token"'))
    where = f"HTTP://{fake.host}/v2/{NAME}/manifests/1"
    fake.fault("/manifests/", Fault(status=307, headers=(("Location", where),)))
    assert resolve(fake) == fake.tags[NAME, "1"]
    assert fake.count("/token") == 1


@pytest.mark.parametrize("how", ["realm", "redirect"])
def test_a_scheme_in_capitals_without_a_port(fake: FakeRegistry, how: str) -> None:
    there = "HTTPS://nobody.invalid/x"
    fault = challenge(f'Bearer realm="{there}"')
    if how == "redirect":
        fault = Fault(status=307, headers=(("Location", there),))
    fake.fault("/manifests/", fault, repeat=True)
    with pytest.raises(UnavailableError, match=r"nobody\.invalid"):
        resolve(fake, attempts=1)


def test_a_redirect_with_bytes_that_should_have_been_escaped(fake: FakeRegistry) -> None:
    path = f"/v2/{NAME}/manifests/1"
    where = f"{path}?file=ä b€".encode().decode("latin-1")
    fake.fault("/manifests/", Fault(status=307, headers=(("Location", where),)))
    assert resolve(fake) == fake.tags[NAME, "1"]
    assert parse_qs(fake.requests[-1].query) == {"file": ["ä b€"]}


def test_a_fragment_of_a_realm_does_not_take_the_scopes_along(fake: FakeRegistry) -> None:
    fake.fault("/manifests/", challenge(f'Bearer realm="{fake.url}/token#x",service="s"'))
    assert resolve(fake) == fake.tags[NAME, "1"]
    (asked,) = fake.seen("/token")
    assert parse_qs(asked.query) == {"service": ["s"], "scope": [f"repository:{NAME}:pull"]}


@pytest.mark.parametrize("port", ["65536", "99999", "123456789"])
def test_a_port_that_there_cannot_be(port: str) -> None:
    registry = make()
    with pytest.raises(UsageError, match=port):
        registry.resolve(Reference.parse(f"127.0.0.1:{port}/a/b:1"))
    registry.close()


def test_port_0_is_not_the_usual_port() -> None:
    registry = make(attempts=1)
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:0\b"):
        registry.resolve(Reference.parse("127.0.0.1:0/a/b:1"))
    registry.close()


# Who may come in


def test_a_scope_that_is_missed_with_403(fake: FakeRegistry) -> None:
    realm = f'Bearer realm="{fake.url}/token",service="s"'
    more = f'{realm},scope="repository:base/os:pull",error="insufficient_scope"'
    fake.fault("/manifests/", challenge(realm))
    missed = Fault(status=403, headers=(("WWW-Authenticate", more),), body=DENIED)
    fake.fault("/manifests/", missed)
    assert resolve(fake) == fake.tags[NAME, "1"]
    assert [parse_qs(request.query)["scope"] for request in fake.seen("/token")] == [
        [f"repository:{NAME}:pull"],
        ["repository:base/os:pull", f"repository:{NAME}:pull"],
    ]


def test_a_scope_that_is_missed_for_ever(fake: FakeRegistry) -> None:
    realm = f'Bearer realm="{fake.url}/token",scope="repository:{NAME}:pull"'
    fake.fault("/manifests/", challenge(realm))
    more = (("WWW-Authenticate", f'{realm},error="insufficient_scope"'),)
    fake.fault("/manifests/", Fault(status=403, headers=more, body=DENIED), repeat=True)
    with pytest.raises(UnauthorizedError):
        resolve(fake)
    assert len(fake.requests) == 3


@pytest.mark.parametrize("status", [400, 404, 405, 501])
def test_a_realm_that_takes_posts_only(fake: FakeRegistry, tmp_path: Path, status: int) -> None:
    fake.auth, fake.users, fake.anonymous = "bearer", {"u": "p"}, False
    fake.fault("/token", Fault(status=status), method="GET", repeat=True)
    authfile = tmp_path / "auth.json"
    authfile.write_text(json.dumps({"auths": {fake.host: {"username": "u", "password": "p"}}}))
    assert resolve(fake, authfile=str(authfile)) == fake.tags[NAME, "1"]


def test_a_realm_that_takes_neither_is_told_by_its_first_answer(
    fake: FakeRegistry, tmp_path: Path
) -> None:
    fake.auth, fake.users, fake.oauth_post = "bearer", {"u": "p"}, False
    fake.fault("/token", Fault(status=400, body=DENIED), method="GET", repeat=True)
    authfile = tmp_path / "auth.json"
    authfile.write_text(json.dumps({"auths": {fake.host: {"username": "u", "password": "p"}}}))
    with pytest.raises(RegistryError, match=r"answered 400.*requested access is denied"):
        resolve(fake, authfile=str(authfile))


def test_a_token_in_an_encoding(fake: FakeRegistry) -> None:
    fake.auth = "bearer"
    fake.fault("/token", Fault(encoding="gzip"))
    assert resolve(fake) == fake.tags[NAME, "1"]


def test_a_token_that_is_said_to_be_encoded(fake: FakeRegistry) -> None:
    fake.auth = "bearer"
    fake.fault("/token", Fault(headers=(("Content-Encoding", "gzip"),)))
    with pytest.raises(RegistryError, match="gzip"):
        resolve(fake)


@pytest.mark.parametrize("challenged", [None, 'Basic realm="files"', "Bearer"])
def test_a_signed_url_that_was_refused_with_401(fake: FakeRegistry, challenged: str | None) -> None:
    fake.redirect = True
    headers = (("WWW-Authenticate", challenged),) if challenged else ()
    fake.fault("/cdn/", Fault(status=401, headers=headers, body=b"expired"))
    assert fetched(fake, DATA) == DATA
    assert fake.count("/cdn/") == 2


def test_a_host_of_files_that_wants_a_login_for_ever(fake: FakeRegistry) -> None:
    fake.redirect = True
    refused = Fault(status=401, headers=(("WWW-Authenticate", 'Basic realm="files"'),))
    fake.fault("/cdn/", refused, repeat=True)
    with pytest.raises(UnauthorizedError):
        fetched(fake, DATA)
    assert fake.count("/cdn/") == 2


# What a body is


@pytest.mark.parametrize("length", ["none", "chunked"])
@pytest.mark.parametrize(
    ("data", "media_type"),
    [
        pytest.param(gzip.compress(DATA), LAYER_TYPE, id="a layer"),
        pytest.param(DATA, "application/octet-stream", id="no gzip at all"),
        pytest.param(b"\x1f", "application/octet-stream", id="one byte"),
        pytest.param(b"", "application/octet-stream", id="nothing"),
    ],
)
def test_an_encoding_that_was_only_claimed_by_an_answer_without_a_length(
    fake: FakeRegistry, data: bytes, media_type: str, length: str
) -> None:
    claim = (("Content-Encoding", "gzip"),)
    fake.fault("/blobs/", Fault(length=length, headers=claim, trickle=(1000, 0.0)))
    assert fetched(fake, data, media_type) == data


@pytest.mark.parametrize("length", ["right", "none", "chunked"])
@pytest.mark.parametrize("step", [1, 3, 10_000])
def test_a_layer_in_an_encoding(fake: FakeRegistry, length: str, step: int) -> None:
    layer = gzip.compress(DATA[:2000])
    fake.fault("/blobs/", Fault(encoding="gzip", length=length, trickle=(step, 0.0)))
    assert fetched(fake, layer, LAYER_TYPE) == layer


def test_an_encoding_in_two_parts_and_with_a_word_too_many(fake: FakeRegistry) -> None:
    body = gzip.compress(DATA[:20_000]) + gzip.compress(DATA[20_000:])
    headers = (("Content-Encoding", "gzip, identity"),)
    fake.fault("/blobs/", Fault(body=body, headers=headers))
    assert fetched(fake, DATA) == DATA
