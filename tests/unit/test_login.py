"""Logins, tokens and redirects, against a registry that checks them."""

from __future__ import annotations

import base64
import json
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import pytest
import trustme

from stowray.pipeline.clock import Clock
from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import (
    CancelledError,
    NotFoundError,
    RegistryError,
    StowrayError,
    UnauthorizedError,
    UnavailableError,
)
from stowray.pipeline.reference import Reference
from stowray.pipeline.registry import Registry
from stowray.pipeline.settings import RegistrySettings
from tests.support.registry import FakeRegistry, Fault, incompressible

if TYPE_CHECKING:
    from pathlib import Path

NAME = "team/app"
USER, PASSWORD = "alice", "hunter2hunter2"
LAYER = incompressible(50_000)
BLOB = Descriptor("application/octet-stream", Digest.of(LAYER), len(LAYER))

Login = Callable[..., Registry]


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry(auth="bearer", users={USER: PASSWORD}, anonymous=False) as made:
        made.add_image(NAME, "1", layers=[])
        made.add_blob(LAYER)
        yield made


@pytest.fixture
def login(tmp_path: Path) -> Iterator[Login]:
    made: list[Registry] = []

    def build(entries: dict[str, Any] | None = None, **options: Any) -> Registry:
        file = tmp_path / "auth.json"
        file.write_text(json.dumps({"auths": entries or {}}))
        clock = options.pop("clock", Clock())
        settings = RegistrySettings(
            authfile=str(file), **{"attempts": 3, "connections": 100, **options}
        )
        registry = Registry(settings, environment={}, clock=clock)
        made.append(registry)
        return registry

    yield build
    for registry in made:
        registry.close()


def entry(user: str = USER, password: str = PASSWORD) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def reference(fake: FakeRegistry, name: str = NAME) -> Reference:
    return Reference.parse(f"{fake.host}/{name}:1")


def fetch(registry: Registry, fake: FakeRegistry, offset: int = 0) -> bytes:
    with registry.open_blob(reference(fake), BLOB, offset) as stream:
        whole = bytearray()
        while piece := stream.read(1 << 16):
            whole += piece
    return bytes(whole)


def challenge(fake: FakeRegistry, **parameters: str) -> Fault:
    given = {"realm": f"{fake.url}/token", "service": "s", **parameters}
    text = ",".join(f'{name}="{value}"' for name, value in given.items() if value)
    return Fault(status=401, headers=(("WWW-Authenticate", f"Bearer {text}"),))


# Basic


def test_basic(fake: FakeRegistry, login: Login) -> None:
    fake.auth = "basic"
    registry = login({fake.host: entry()})
    registry.resolve(reference(fake))
    registry.resolve(reference(fake))
    # Nothing before it was asked for, then always.
    assert [request.authenticated for request in fake.requests] == [False, True, True]


@pytest.mark.parametrize("entries", [{}, {"user": "wrong"}])
def test_basic_refused(fake: FakeRegistry, login: Login, entries: dict[str, str]) -> None:
    fake.auth = "basic"
    registry = login({fake.host: entry(USER, "wrongwrong")} if entries else {})
    with pytest.raises(UnauthorizedError) as caught:
        registry.resolve(reference(fake))
    assert caught.value.registry == fake.host
    assert "wrongwrong" not in str(caught.value)
    assert len(fake.requests) <= 2


# Bearer


def test_a_token_is_asked_for_with_service_and_scope(fake: FakeRegistry, login: Login) -> None:
    login({fake.host: entry()}).resolve(reference(fake))
    (token,) = fake.seen("/token")
    assert parse_qs(token.query) == {
        "service": [fake.host],
        "scope": [f"repository:{NAME}:pull"],
        "account": [USER],
    }
    assert token.authorization == "Basic " + entry()["auth"]


def test_anonymous(fake: FakeRegistry, login: Login) -> None:
    fake.anonymous = True
    login().resolve(reference(fake))
    (token,) = fake.seen("/token")
    assert not token.authenticated
    assert "account" not in token.query


def test_a_login_for_another_host_is_not_sent(fake: FakeRegistry, login: Login) -> None:
    fake.anonymous = True
    login({"other.example": entry(), "127.0.0.1": entry()}).resolve(reference(fake))
    assert not fake.seen("/token")[0].authenticated


def test_one_token_for_many_threads(fake: FakeRegistry, login: Login) -> None:
    registry = login({fake.host: entry()})
    failed: list[StowrayError] = []
    # All meet the first 401 together: none is answered before all have asked.
    barrier = threading.Barrier(20)

    def meet() -> None:
        barrier.wait(60)

    refused = Fault(status=401, then=meet, headers=challenge(fake).headers)
    fake.fault("/blobs/", *[refused for _ in range(20)])

    def work() -> None:
        try:
            assert fetch(registry, fake) == LAYER
        except StowrayError as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert fake.count("/token") == 1


def test_each_repository_has_its_own_token(fake: FakeRegistry, login: Login) -> None:
    fake.add_image("other/app", "1", layers=[])
    registry = login({fake.host: entry()})
    for name in (NAME, "other/app", NAME, "other/app"):
        registry.resolve(reference(fake, name))
    scopes = [parse_qs(request.query)["scope"] for request in fake.seen("/token")]
    assert scopes == [[f"repository:{NAME}:pull"], ["repository:other/app:pull"]]


def test_a_token_is_renewed_before_it_ends(fake: FakeRegistry, login: Login) -> None:
    now = [0.0]
    registry = login({fake.host: entry()}, clock=Clock(monotonic=lambda: now[0]))
    fake.token_lifetime = 300
    registry.resolve(reference(fake))
    now[0] = 269.0
    registry.resolve(reference(fake))
    assert fake.count("/token") == 1
    now[0] = 271.0
    registry.resolve(reference(fake))
    assert fake.count("/token") == 2


def test_a_token_that_ends_early_is_asked_for_again(fake: FakeRegistry, login: Login) -> None:
    registry = login({fake.host: entry()})
    assert fetch(registry, fake) == LAYER
    fake.revoke_tokens()
    assert fetch(registry, fake, 1000) == LAYER[1000:]
    assert fake.count("/token") == 2
    # The range is asked for again with the new token.
    assert [request.range for request in fake.seen("/blobs/")][-2:] == ["bytes=1000-49999"] * 2


def test_every_token_refused_ends_after_two(fake: FakeRegistry, login: Login) -> None:
    fake.fault("/manifests/", challenge(fake, error="invalid_token"), repeat=True)
    with pytest.raises(UnauthorizedError):
        login({fake.host: entry()}).resolve(reference(fake))
    assert fake.count("/token") <= 4
    assert fake.count("/manifests/") <= 6


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_password_is_final_and_poisons_nothing(
    fake: FakeRegistry, login: Login, status: int
) -> None:
    body = b'{"details":"incorrect username or password"}'
    fake.fault("/token", Fault(status=status, body=body))
    registry = login({fake.host: entry()})
    with pytest.raises(UnauthorizedError, match="incorrect username") as caught:
        registry.resolve(reference(fake))
    assert caught.value.registry == fake.host
    assert fake.count("/token") == 1
    registry.resolve(reference(fake))


def test_a_token_server_that_stumbles_is_asked_again(fake: FakeRegistry, login: Login) -> None:
    fake.fault("/token", Fault(status=500), Fault(status=429), Fault(cut="reset", after=-1))
    registry = login({fake.host: entry()}, attempts=5)
    registry.resolve(reference(fake))
    assert fake.count("/token") == 4


def test_a_token_server_that_is_down_is_unavailable(fake: FakeRegistry, login: Login) -> None:
    fake.fault("/token", Fault(status=503), repeat=True)
    with pytest.raises(UnavailableError):
        login({fake.host: entry()}, attempts=2).resolve(reference(fake))


@pytest.mark.parametrize(
    "body", [b"IAmNotJson", b"{}", b'{"token":"a\\r\\nX: y"}', b" " * (2 << 20), b"[" * 5000]
)
def test_a_token_answer_that_is_none(fake: FakeRegistry, login: Login, body: bytes) -> None:
    fake.fault("/token", Fault(status=200, body=body), repeat=True)
    with pytest.raises(RegistryError, match="token"):
        login().resolve(reference(fake))


def test_insufficient_scope_leads_to_the_union(fake: FakeRegistry, login: Login) -> None:
    registry = login({fake.host: entry()})
    registry.resolve(reference(fake))
    fake.fault(
        "/manifests/",
        challenge(fake, scope="registry:catalog:*", error="insufficient_scope"),
    )
    registry.resolve(reference(fake))
    scopes = parse_qs(fake.seen("/token")[-1].query)["scope"]
    assert scopes == ["registry:catalog:*", f"repository:{NAME}:pull"]


def test_a_scope_that_was_held_already_is_no_loop(fake: FakeRegistry, login: Login) -> None:
    # A realm may grant less than it was asked for, without a word.
    registry = login()
    with pytest.raises(UnauthorizedError):
        registry.resolve(reference(fake))
    assert fake.count("/token") <= 2
    assert fake.count("/manifests/") <= 4


def test_the_scope_of_the_challenge_counts(fake: FakeRegistry, login: Login) -> None:
    fake.fault("/manifests/", challenge(fake, scope="repository:real/name:pull repository:x:pull"))
    fake.anonymous = True
    login().resolve(reference(fake))
    assert parse_qs(fake.seen("/token")[0].query)["scope"] == [
        "repository:real/name:pull",
        "repository:x:pull",
    ]


def test_a_401_without_challenge_asks_the_root(fake: FakeRegistry, login: Login) -> None:
    fake.fault("/manifests/", Fault(status=401))
    login({fake.host: entry()}).resolve(reference(fake))
    assert fake.count("/v2/") >= 1


def test_a_401_without_any_challenge_is_final(fake: FakeRegistry, login: Login) -> None:
    fake.fault("/v2/", Fault(status=401), repeat=True)
    with pytest.raises(UnauthorizedError):
        login({fake.host: entry()}).resolve(reference(fake))
    assert len(fake.requests) <= 4
    assert not any(request.authenticated for request in fake.requests)


@pytest.mark.parametrize(
    "header", ["Negotiate", "Digest realm=x", "Bearer", 'Bearer realm="::bad url"', "\x07"]
)
def test_challenges_that_cannot_be_answered(fake: FakeRegistry, login: Login, header: str) -> None:
    fake.fault("/v2/", Fault(status=401, headers=(("WWW-Authenticate", header),)), repeat=True)
    with pytest.raises((UnauthorizedError, RegistryError)):
        login({fake.host: entry()}).resolve(reference(fake))
    assert not any(request.authenticated for request in fake.requests)


def test_basic_beside_bearer(fake: FakeRegistry, login: Login) -> None:
    headers = (("WWW-Authenticate", 'Basic realm="x"'), *challenge(fake).headers)
    fake.fault("/manifests/", Fault(status=401, headers=headers))
    login({fake.host: entry()}).resolve(reference(fake))
    assert fake.seen("/manifests/")[-1].authorization.startswith("Bearer ")  # type: ignore[union-attr]


# OAuth2


def test_an_identity_token_is_exchanged_by_post(fake: FakeRegistry, login: Login) -> None:
    fake.identity_tokens["refresh-me"] = USER
    login({fake.host: {"identitytoken": "refresh-me"}}).resolve(reference(fake))
    (token,) = fake.seen("/token")
    assert token.method == "POST"
    assert not token.authenticated
    assert parse_qs(token.body.decode()) == {
        "grant_type": ["refresh_token"],
        "refresh_token": ["refresh-me"],
        "service": [fake.host],
        "client_id": ["stowray"],
        "scope": [f"repository:{NAME}:pull"],
    }


@pytest.mark.parametrize("status", [400, 401, 404, 405])
def test_a_refused_post_falls_back_to_get(fake: FakeRegistry, login: Login, status: int) -> None:
    fake.users["<token>"] = "refresh-me"
    fake.fault("/token", Fault(status=status), method="POST")
    login({fake.host: {"identitytoken": "refresh-me"}}).resolve(reference(fake))
    assert [request.method for request in fake.seen("/token")] == ["POST", "GET"]


@pytest.mark.parametrize("status", [404, 405])
def test_a_refused_get_falls_back_to_post(fake: FakeRegistry, login: Login, status: int) -> None:
    fake.fault("/token", Fault(status=status), method="GET")
    login({fake.host: entry()}).resolve(reference(fake))
    assert parse_qs(fake.seen("/token")[-1].body.decode())["grant_type"] == ["password"]


def test_a_registry_token_is_used_as_it_is(fake: FakeRegistry, login: Login) -> None:
    fake.anonymous = True
    login().resolve(reference(fake))
    (ready,) = fake.tokens
    login({fake.host: {"registrytoken": ready}}).resolve(reference(fake))
    assert fake.count("/token") == 1


# Logins that expire without a challenge


def test_a_403_that_speaks_of_expiry_is_tried_once_more(fake: FakeRegistry, login: Login) -> None:
    registry = login({fake.host: entry()})
    assert fetch(registry, fake) == LAYER
    message = "Your authorization token has expired. Reauthenticate and try again."
    body = json.dumps({"errors": [{"code": "DENIED", "message": message}]}).encode()
    fake.fault("/blobs/", Fault(status=403, body=body))
    assert fetch(registry, fake) == LAYER
    assert fake.count("/token") == 2
    fake.fault("/blobs/", Fault(status=403, body=body), repeat=True)
    with pytest.raises(UnauthorizedError, match="expired"):
        fetch(registry, fake)
    assert fake.count("/blobs/") == 6


def test_another_403_is_final(fake: FakeRegistry, login: Login) -> None:
    fake.fault("/blobs/", Fault(status=403, body=b'{"errors":[{"code":"DENIED"}]}'), repeat=True)
    with pytest.raises(UnauthorizedError, match="DENIED"):
        fetch(login({fake.host: entry()}), fake)
    assert fake.count("/blobs/") == 1


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_login_does_not_follow_a_redirect(fake: FakeRegistry, login: Login, status: int) -> None:
    fake.redirect, fake.redirect_status = True, status
    assert fetch(login({fake.host: entry(), fake.cdn_host: entry()}), fake, 5) == LAYER[5:]
    (there,) = fake.seen("/cdn/")
    assert not there.authenticated
    assert there.range == "bytes=5-49999"


def test_a_login_does_not_come_back_with_a_redirect(fake: FakeRegistry, login: Login) -> None:
    registry = login({fake.host: entry()})
    fetch(registry, fake)
    path = f"/v2/{NAME}/blobs/{BLOB.digest}"
    away = Fault(status=307, headers=(("Location", f"http://{fake.cdn_host}/x"),))
    back = Fault(status=307, headers=(("Location", f"{fake.url}{path}"),))
    # Twice, as the registry is asked for another redirect when the first led to a 401.
    fake.fault("/blobs/", *(away, Fault(), Fault()) * 2)
    fake.fault("/x", back, back)
    with pytest.raises((UnauthorizedError, RegistryError)):
        fetch(registry, fake)
    assert fake.count("/x") == 2
    # The side that it was led back by may have made the URL: only nobody's token is risked.
    sent = [request.authorization for request in fake.seen("/blobs/")[-2:]]
    assert sent[0] is None
    assert sent[1] is not None
    assert fake.tokens[sent[1].removeprefix("Bearer ")].user is None


def test_a_login_stays_on_its_own_host(fake: FakeRegistry, login: Login) -> None:
    registry = login({fake.host: entry()})
    fetch(registry, fake)
    path = f"/v2/{NAME}/blobs/{BLOB.digest}?x=1"
    fake.fault("/blobs/", Fault(status=307, headers=(("Location", path),)))
    assert fetch(registry, fake) == LAYER
    assert fake.seen("/blobs/")[-1].authenticated


@pytest.mark.parametrize("answer", [(403, b"denied"), (400, b"<Code>ExpiredToken</Code>")])
def test_a_signed_url_that_expired_is_asked_for_again(
    fake: FakeRegistry, login: Login, answer: tuple[int, bytes]
) -> None:
    fake.redirect, fake.expired_answer = True, answer
    expire = Fault(then=fake.expire_signatures)
    fake.fault("/cdn/", expire)
    assert fetch(login({fake.host: entry()}), fake) == LAYER
    assert fake.count("/cdn/") == 2
    fake.fault("/cdn/", expire, repeat=True)
    with pytest.raises((UnauthorizedError, RegistryError)):
        fetch(login({fake.host: entry()}), fake)
    assert fake.count("/cdn/") == 4


@pytest.mark.parametrize(
    ("location", "match"),
    [
        ("ftp://files.example/x", "not http"),
        ("file:///etc/passwd", "not http"),
        ("http://169.254.169.254/latest/meta-data/", "not public"),
        ("http://[::ffff:169.254.169.254]/", "not public"),
        ("http://[::1", "not a URL"),
        (None, "nowhere"),
    ],
)
def test_redirects_that_are_refused(
    fake: FakeRegistry, login: Login, location: str | None, match: str
) -> None:
    headers = (("Location", location),) if location else ()
    fake.fault("/blobs/", Fault(status=307, headers=headers), repeat=True)
    with pytest.raises(RegistryError, match=match) as caught:
        fetch(login(), fake)
    assert not caught.value.retryable


def test_a_redirect_from_https_to_http_is_refused(tmp_path: Path, login: Login) -> None:
    authority = trustme.CA()
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    with FakeRegistry(authority=authority) as secure, FakeRegistry() as plain:
        headers = (("Location", f"{plain.url}/x"),)
        secure.fault("/blobs/", Fault(status=307, headers=headers))
        with pytest.raises(RegistryError, match="https to http"):
            fetch(login(ca_file=str(path)), secure)
        assert not plain.requests


def test_a_redirect_to_itself_ends(fake: FakeRegistry, login: Login) -> None:
    location = f"/v2/{NAME}/blobs/{BLOB.digest}"
    fake.fault("/blobs/", Fault(status=307, headers=(("Location", location),)), repeat=True)
    with pytest.raises(RegistryError, match="more than 10 redirects"):
        fetch(login(), fake)
    assert fake.count("/blobs/") == 11


def test_a_redirect_target_that_wants_a_token_gets_an_anonymous_one(
    fake: FakeRegistry, login: Login
) -> None:
    with FakeRegistry(auth="bearer", users={USER: PASSWORD}) as other:
        other.add_blob(LAYER)
        target = f"{other.url}/v2/{NAME}/blobs/{BLOB.digest}"
        registry = login({fake.host: entry(), other.host: entry()})
        fetch(registry, fake)
        fake.fault("/blobs/", Fault(status=307, headers=(("Location", target),)))
        assert fetch(registry, fake) == LAYER
        (token,) = other.seen("/token")
        assert not token.authenticated


@pytest.mark.parametrize(
    "realm",
    [
        "http://169.254.169.254/token",
        "http://127.0.0.1:1/token",
        "http://0.0.0.0/token",
        "http://[::ffff:127.0.0.1]:1/token",
        "file:///token",
    ],
)
def test_a_realm_that_is_not_fit_gets_nothing(fake: FakeRegistry, login: Login, realm: str) -> None:
    fake.fault("/v2/", challenge(fake, realm=realm), repeat=True)
    with pytest.raises(RegistryError, match="not asked for a token"):
        login({fake.host: entry()}).resolve(reference(fake))


def test_a_realm_does_not_lead_on_to_where_it_must_not(fake: FakeRegistry, login: Login) -> None:
    for location in ("http://169.254.169.254/token", f"http://{fake.cdn_host}/token"):
        fake.fault("/token", Fault(status=307, headers=(("Location", location),)), repeat=False)
        with pytest.raises(RegistryError):
            login({fake.host: entry()}).resolve(reference(fake))
    assert not [request for request in fake.requests if request.listener == "cdn"]


def test_a_realm_in_the_settings_is_trusted(fake: FakeRegistry, login: Login) -> None:
    with FakeRegistry(users={USER: PASSWORD}) as other:
        fake.fault("/manifests/", challenge(fake, realm=f"{other.url}/token"))
        login({fake.host: entry()}, plain_http=(other.host,)).resolve(reference(fake))
        assert other.count("/token") == 1


# Cancelling, and what is shown


def test_a_waiter_for_a_token_can_leave(fake: FakeRegistry, login: Login) -> None:
    registry = login({fake.host: entry()})
    fake.fault("/token", Fault(hang=True))
    with pytest.raises(CancelledError):
        registry.open_blob(reference(fake), BLOB, cancelled=lambda: fake.count("/token") > 0)


def test_no_secret_is_ever_shown(
    fake: FakeRegistry, login: Login, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    fake.redirect = True
    registry = login({fake.host: entry()})
    assert fetch(registry, fake) == LAYER
    secrets = [PASSWORD, entry()["auth"], *fake.tokens]
    echo = json.dumps({"errors": [{"code": "X", "message": " ".join(secrets)}]}).encode()
    shown = [caplog.text]
    faults = [
        ("/blobs/", Fault(status=400, body=echo)),
        ("/blobs/", Fault(status=500, body=echo)),
        ("/cdn/", Fault(status=500, body=b"<Provided>cdnsecret</Provided>")),
        ("/cdn/", Fault(cut="reset", after=10)),
        ("/cdn/", Fault(headers=(("Content-Encoding", "br"),), body=b"x")),
        ("/cdn/", Fault(status=404)),
    ]
    for needle, fault in faults:
        fake.fault(needle, fault)
        with pytest.raises((RegistryError, NotFoundError)) as caught:
            fetch(registry, fake)
        shown += [str(caught.value), repr(caught.value), repr(pickle.dumps(caught.value))]
    secrets += ["cdnsecret", *fake.signatures]
    for text in shown:
        assert not [secret for secret in secrets if secret in text]
