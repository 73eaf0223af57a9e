"""Pulling through mirrors, over real sockets: order, failure, trust, and what they get to know."""

from __future__ import annotations

import base64
import json
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.engine import PullOptions
from stowray.pipeline.errors import (
    DigestMismatchError,
    NotFoundError,
    UsageError,
)
from stowray.pipeline.fetch import Fetched, Fetcher
from stowray.pipeline.reference import Reference
from stowray.pipeline.registry import Registry
from stowray.pipeline.settings import RegistrySettings
from stowray.pipeline.store import Store
from tests.support.registry import OCI_MANIFEST, FakeRegistry, Fault, incompressible
from tests.support.small import local_engine, small_tar

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "team/app"
SIZE = 2_000_000
HALF = SIZE // 2
DATA = incompressible(SIZE)
WRONG = incompressible(SIZE, seed=2)
BLOB = Descriptor("application/octet-stream", Digest.of(DATA), SIZE)
BODY = json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST}).encode()
MANIFEST = Digest.of(BODY)
# Short enough for a test that waits for a mirror, long enough for a busy machine that answers.
PATIENCE = {"connect_timeout_seconds": 2.0, "stall_timeout_seconds": 2.0}


def silent(*_arguments: Any, **_more: Any) -> None:
    return None


class Bench:
    """A registry, mirrors of it, and what fetches through the latter."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder = folder
        self.stack = stack
        self.home = self.serve()
        self.store = stack.enter_context(Store.open(folder / "store"))
        self.environment: dict[str, str] = {}
        self.settings: dict[str, Any] = {"attempts": 3, **PATIENCE}
        self.registry: Registry | None = None

    def serve(self, *, filled: bool = True, **options: Any) -> FakeRegistry:
        fake = self.stack.enter_context(FakeRegistry(**options))
        if filled:
            self.fill(fake, NAME)
        return fake

    def fill(self, fake: FakeRegistry, name: str) -> None:
        fake.add_blob(DATA)
        fake.add_manifest(name, BODY, tag="1")

    @property
    def reference(self) -> Reference:
        return Reference.parse(f"{self.home.host}/{NAME}:1")

    @property
    def by_digest(self) -> Reference:
        return self.reference.with_digest(MANIFEST)

    def hosts(self, text: str, registry: str = "") -> None:
        place = self.folder / "hosts" / (registry or self.home.host)
        place.mkdir(parents=True)
        (place / "hosts.toml").write_text(text)
        self.settings["hosts_dir"] = str(self.folder / "hosts")

    def mirrors(self, *fakes: FakeRegistry, more: str = "") -> None:
        self.hosts("".join(f'[host."{fake.url}"]\n{more}\n' for fake in fakes))

    def conf(self, text: str) -> None:
        (self.folder / "registries.conf").write_text(text)
        self.settings["registries_conf"] = str(self.folder / "registries.conf")

    def logins(self, **users: str) -> None:
        """Write ``NAME:PASSWORD`` by host."""
        auths = {
            host: {"auth": base64.b64encode(login.encode()).decode()}
            for host, login in users.items()
        }
        (self.folder / "auth.json").write_text(json.dumps({"auths": auths}))
        self.settings["authfile"] = str(self.folder / "auth.json")

    def origin(self) -> Registry:
        if self.registry is None:
            settings = RegistrySettings(**self.settings)
            self.registry = Registry(settings, environment=self.environment)
            self.stack.callback(self.registry.close)
        return self.registry

    def resolve(self) -> Digest:
        return self.origin().resolve(self.reference).descriptor.digest

    def fetch(self, descriptor: Descriptor = BLOB) -> Fetched:
        fetcher = Fetcher(
            self.store,
            [self.origin()],
            RegistrySettings(**self.settings),
            uniform=lambda _low, _high: 0.0,
        )
        fetched = fetcher.fetch(self.reference, descriptor, report=silent)
        assert self.store.blob_path(descriptor.digest).read_bytes() == DATA
        return fetched


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(tmp_path, stack)


def dead_host() -> str:
    """A loopback address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def blob_requests(fake: FakeRegistry) -> list[str | None]:
    return [request.range for request in fake.seen("/blobs/")]


# -- order ----------------------------------------------------------------------------------------


def test_the_first_mirror_serves_and_the_registry_is_left_alone(bench: Bench) -> None:
    first, second = bench.serve(), bench.serve()
    bench.mirrors(first, second)
    assert bench.resolve() == MANIFEST
    assert bench.origin().manifest(bench.reference, MANIFEST) == BODY
    fetched = bench.fetch()
    assert (fetched.source, fetched.fetched_bytes) == (first.host, SIZE)
    assert bench.home.count() == second.count() == 0
    # The content is this registry's, whoever sent it.
    assert bench.store.confirmed(BLOB.digest, bench.reference.name)


FAILING = [
    pytest.param({"status": 404}, id="404"),
    pytest.param({"status": 500}, id="500"),
    pytest.param({"status": 503, "headers": (("Retry-After", "1"),)}, id="503"),
    pytest.param({"status": 401}, id="401"),
    pytest.param({"status": 403}, id="403"),
    pytest.param({"status": 429}, id="429"),
    pytest.param({"status": 302, "headers": (("Location", "ftp://x"),)}, id="bad redirect"),
    pytest.param(
        {"status": 200, "body": b"<html>", "headers": (("Content-Type", "text/html"),)},
        id="a web page",
    ),
    pytest.param({"cut": "reset", "after": -1}, id="reset"),
    pytest.param({"hang": True}, id="hanging"),
]


@pytest.mark.parametrize("fault", FAILING)
def test_a_mirror_that_fails_makes_room_for_the_next(bench: Bench, fault: dict[str, Any]) -> None:
    first, second = bench.serve(), bench.serve()
    bench.mirrors(first, second)
    first.fault("/", Fault(**fault), repeat=True)
    assert bench.resolve() == MANIFEST
    fetched = bench.fetch()
    assert (fetched.source, fetched.fetched_bytes) == (second.host, SIZE)
    assert bench.home.count() == 0
    assert bench.store.has(BLOB.digest, SIZE)


def test_a_mirror_where_nobody_listens(bench: Bench) -> None:
    second = bench.serve()
    bench.hosts(f'[host."http://{dead_host()}"]\n[host."{second.url}"]')
    assert bench.resolve() == MANIFEST
    assert bench.fetch().source == second.host
    assert bench.home.count() == 0


def test_all_mirrors_fail_and_the_registry_serves(bench: Bench) -> None:
    empty = bench.serve(filled=False)
    bench.hosts(f'[host."http://{dead_host()}"]\n[host."{empty.url}"]')
    assert bench.resolve() == MANIFEST
    assert bench.fetch().source == bench.home.host


def test_the_registrys_own_word_counts_when_all_fail(bench: Bench) -> None:
    bench.hosts(f'[host."http://{dead_host()}"]')
    missing = Descriptor("x", Digest.of(b"none"), 4)
    with pytest.raises(NotFoundError) as caught:
        bench.fetch(missing)
    assert bench.home.host in str(caught.value)
    with pytest.raises(NotFoundError):
        bench.origin().resolve(Reference.parse(f"{bench.home.host}/{NAME}:none"))


def test_a_hanging_mirror_is_waited_for_once(bench: Bench) -> None:
    mirror = bench.serve()
    bench.mirrors(mirror)
    mirror.fault("/", Fault(hang=True), repeat=True)
    assert bench.resolve() == MANIFEST
    for number in range(20):
        data = incompressible(1000, seed=10 + number)
        bench.home.add_blob(data)
        descriptor = Descriptor("x", Digest.of(data), 1000)
        fetcher = Fetcher(bench.store, [bench.origin()], RegistrySettings(**bench.settings))
        assert fetcher.fetch(bench.reference, descriptor, report=silent).source == bench.home.host
    assert mirror.count() == 1


def test_a_mirror_that_wants_a_pause_is_not_waited_for(bench: Bench) -> None:
    """Neither by those that it told so, nor by those that stood in its line, nor by later ones."""
    mirror = bench.serve()
    bench.settings["connections"] = 1
    bench.mirrors(mirror)
    blobs = [incompressible(5000, seed) for seed in range(4)]
    for fake in (mirror, bench.home):
        for data in blobs:
            fake.add_blob(data)
    too_many = Fault(status=429, headers=(("Retry-After", "3600"),), delay=0.2)
    mirror.fault("/blobs/", too_many, repeat=True)
    fetcher = Fetcher(bench.store, [bench.origin()], RegistrySettings(**bench.settings))
    wanted = [Descriptor("application/octet-stream", Digest.of(data), 5000) for data in blobs]
    with ThreadPoolExecutor(4) as pool:
        fetched = list(
            pool.map(lambda one: fetcher.fetch(bench.reference, one, report=silent), wanted)
        )
    assert [one.source for one in fetched] == [bench.home.host] * 4
    assert mirror.count("/blobs/") == 1
    # A tag is asked for elsewhere, too.
    assert bench.resolve() == MANIFEST
    assert mirror.count("/manifests/") == 0


@pytest.mark.parametrize("status", [429, 503])
def test_a_mirror_that_wants_a_pause_is_not_asked_for_its_reason(bench: Bench, status: int) -> None:
    mirror = bench.serve()
    bench.mirrors(mirror)
    fault = Fault(status=status, headers=(("Retry-After", "3600"),))
    mirror.fault("/v2/", fault, repeat=True)
    assert bench.resolve() == MANIFEST
    assert bench.fetch().source == bench.home.host
    assert mirror.count() == 1


def test_a_mirror_s_pause_is_waited_for_when_nobody_else_is_there(bench: Bench) -> None:
    mirror = bench.serve()
    bench.mirrors(mirror)
    bench.home.fault("/v2/", Fault(status=404), repeat=True)
    too_many = Fault(status=429, headers=(("Retry-After", "2"),))
    mirror.fault("/blobs/", too_many)
    fetched = bench.fetch()
    assert fetched.source == mirror.host
    first, second = mirror.seen("/blobs/")
    assert second.time - first.time >= 2


def test_a_registry_that_is_gone_does_not_matter_while_a_mirror_is_there(bench: Bench) -> None:
    mirror = bench.serve()
    bench.mirrors(mirror)
    bench.home.close()
    assert bench.resolve() == MANIFEST
    assert bench.fetch().source == mirror.host


def test_a_mirror_with_a_bad_moment_is_tried_again_when_the_registry_is_gone(bench: Bench) -> None:
    mirror = bench.serve()
    bench.mirrors(mirror)
    mirror.fault("/blobs/", Fault(status=503), Fault(cut="reset", after=-1))
    bench.home.close()
    assert bench.fetch().source == mirror.host


# -- inside a blob --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(cut="reset", after=HALF), id="reset"),
        pytest.param(Fault(cut="fin", after=HALF), id="FIN"),
        pytest.param(Fault(stall=HALF), id="stall"),
    ],
)
def test_the_next_host_goes_on_at_the_same_byte(bench: Bench, fault: Fault) -> None:
    first, second = bench.serve(), bench.serve()
    bench.mirrors(first, second)
    first.fault("/blobs/", fault)
    fetched = bench.fetch()
    assert blob_requests(first) == [None]
    ((went_on,),) = [blob_requests(second)]
    assert went_on is not None
    start = int(went_on.removeprefix("bytes=").partition("-")[0])
    # What was on the way when the connection was reset may be lost with it.
    assert 0 < start <= HALF
    assert fetched.fetched_bytes == SIZE, "not one byte came twice"
    assert bench.home.count() == 0


def test_three_hosts_bring_a_third_each(bench: Bench) -> None:
    first, second = bench.serve(), bench.serve()
    bench.mirrors(first, second)
    first.fault("/blobs/", Fault(cut="fin", after=600_000))
    second.fault("/blobs/", Fault(cut="fin", after=600_000))
    fetched = bench.fetch()
    assert fetched.fetched_bytes == SIZE
    assert blob_requests(second) == [f"bytes=600000-{SIZE - 1}"]
    assert blob_requests(bench.home) == [f"bytes=1200000-{SIZE - 1}"]


def test_a_mirror_with_wrong_bytes_is_left_and_not_asked_first_again(bench: Bench) -> None:
    mirror = bench.serve()
    bench.mirrors(mirror)
    mirror.fault("/blobs/", Fault(corrupt=HALF), repeat=True)
    fetched = bench.fetch()
    assert fetched.source == bench.home.host
    assert fetched.fetched_bytes == 2 * SIZE, "the whole generation is void"
    assert blob_requests(bench.home) == [None], "the new generation begins at its first byte"
    other = incompressible(5000, seed=5)
    bench.home.add_blob(other)
    mirror.add_blob(other)
    descriptor = Descriptor("x", Digest.of(other), 5000)
    fetcher = Fetcher(bench.store, [bench.origin()], RegistrySettings(**bench.settings))
    assert fetcher.fetch(bench.reference, descriptor, report=silent).source == bench.home.host
    assert mirror.count("/blobs/") == 1


def test_wrong_bytes_then_a_good_mirror_while_the_registry_is_gone(bench: Bench) -> None:
    bad, good = bench.serve(), bench.serve()
    bench.mirrors(bad, good)
    bad.fault("/blobs/", Fault(corrupt=HALF), repeat=True)
    bench.home.close()
    assert bench.fetch().source == good.host


def test_a_mirror_with_another_size_is_left(bench: Bench) -> None:
    mirror = bench.serve(filled=False)
    mirror.add_blob(DATA + b"more", str(BLOB.digest))
    bench.mirrors(mirror)
    fetched = bench.fetch()
    assert (fetched.source, fetched.fetched_bytes) == (bench.home.host, SIZE)


def test_a_mirror_with_a_wrong_manifest_is_left(bench: Bench) -> None:
    mirror = bench.serve(filled=False)
    mirror.add_manifest(NAME, b'{"schemaVersion": 2}', digest=str(MANIFEST))
    bench.mirrors(mirror)
    assert bench.origin().manifest(bench.reference, MANIFEST) == BODY
    assert bench.origin().resolve(bench.by_digest).body == BODY
    assert mirror.count("/manifests/") == 1, "after that it rests"


def test_wrong_bytes_everywhere_are_an_error(bench: Bench) -> None:
    mirror = bench.serve()
    bench.mirrors(mirror)
    for fake in (mirror, bench.home):
        fake.blobs[str(BLOB.digest)] = WRONG
    with pytest.raises(DigestMismatchError):
        bench.fetch()
    assert not bench.store.has(BLOB.digest, SIZE)


# -- what is asked --------------------------------------------------------------------------------


def test_a_mirror_is_told_the_registry_and_the_registry_is_not(bench: Bench) -> None:
    mirror = bench.serve()
    bench.mirrors(mirror)
    mirror.fault("/blobs/", Fault(status=404))
    bench.resolve()
    bench.fetch()
    assert {request.query for request in mirror.seen()} == {f"ns={bench.home.host}"}
    assert {request.query for request in bench.home.seen()} == {""}


def test_a_host_without_resolve_is_not_asked_for_tags(bench: Bench) -> None:
    mirror = bench.serve()
    mirror.add_manifest(NAME, b"{}", tag="1")
    bench.mirrors(mirror, more='capabilities = ["pull"]')
    assert bench.resolve() == MANIFEST
    assert mirror.count() == 0
    assert bench.origin().resolve(bench.by_digest).body == BODY
    assert bench.fetch().source == mirror.host
    assert bench.home.count("/blobs/") == 0


def test_a_host_without_pull_gives_tags_only(bench: Bench) -> None:
    mirror = bench.serve()
    bench.mirrors(mirror, more='capabilities = ["resolve"]')
    assert bench.resolve() == MANIFEST
    assert bench.fetch().source == bench.home.host
    assert mirror.count("/blobs/") == 0


def test_a_server_takes_the_place_of_the_registry(bench: Bench) -> None:
    only = bench.serve()
    bench.hosts(f'server = "{only.url}"', "_default")
    assert bench.resolve() == MANIFEST
    assert bench.fetch().source == only.host
    only.blobs.clear()
    with pytest.raises(NotFoundError):
        bench.fetch(Descriptor("x", Digest.of(b"none"), 4))
    assert bench.home.count() == 0


def test_override_path_and_headers(bench: Bench) -> None:
    mirror = bench.serve()
    bench.hosts(
        f'[host."{mirror.url}/v2/{NAME.partition("/")[0]}"]\noverride_path = true\n'
        f'[host."{mirror.url}/v2/{NAME.partition("/")[0]}".header]\nx-key = "sesame"\n'
    )
    bench.fill(mirror, f"team/{NAME}")
    bench.resolve()
    bench.fetch()
    assert {request.path.rpartition("/")[0] for request in mirror.seen()} == {
        f"/v2/team/{NAME}/manifests",
        f"/v2/team/{NAME}/blobs",
    }
    assert {request.headers.get("x-key") for request in mirror.seen()} == {"sesame"}


def test_a_header_of_a_mirror_goes_nowhere_else(bench: Bench) -> None:
    mirror = bench.serve(redirect=True)
    bench.mirrors(mirror, more='header = {x-key = "sesame", authorization = "Bearer static-one"}')
    assert bench.fetch().source == mirror.host
    (elsewhere,) = [request for request in mirror.seen() if request.listener == "cdn"]
    assert elsewhere.authorization is None
    assert "x-key" not in elsewhere.headers
    (there,) = mirror.seen("/v2/")
    assert there.authorization == "Bearer static-one"


# -- logins ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_a_login_is_used_where_it_belongs_only(bench: Bench, auth: str) -> None:
    mirror = bench.serve(auth=auth, users={"mirror-user": "mirror-secret"}, anonymous=False)
    bench.home.auth, bench.home.users = auth, {"home-user": "home-secret"}
    bench.home.anonymous = False
    bench.logins(
        **{bench.home.host: "home-user:home-secret", mirror.host: "mirror-user:mirror-secret"}
    )
    bench.mirrors(mirror)
    mirror.fault("/blobs/", Fault(cut="fin", after=HALF))
    mirror.fault("/blobs/", Fault(status=404), repeat=True)
    assert bench.resolve() == MANIFEST
    assert bench.fetch().source == bench.home.host
    assert mirror.count("/blobs/") > 0
    for fake, own, other in ((mirror, "mirror", "home"), (bench.home, "home", "mirror")):
        sent = [request.authorization for request in fake.seen() if request.authorization]
        assert sent, f"{own} was asked with a login"
        basic = base64.b64encode(f"{other}-user:{other}-secret".encode()).decode()
        assert not any(basic in value for value in sent)


def test_a_mirror_gets_nothing_of_the_registrys_login(bench: Bench) -> None:
    mirror = bench.serve(auth="basic", users={"home-user": "home-secret"})
    bench.logins(**{bench.home.host: "home-user:home-secret"})
    bench.mirrors(mirror)
    assert bench.resolve() == MANIFEST
    assert bench.fetch().source == bench.home.host
    assert mirror.count() > 0
    assert [request.authorization for request in mirror.seen() if request.authorization] == []


# -- TLS ------------------------------------------------------------------------------------------


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    made = trustme.CA()
    made.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return made


def client_files(authority: trustme.CA, folder: Path) -> tuple[Path, Path]:
    issued = authority.issue_cert("client@example.com")
    certificate, key = folder / "client.cert", folder / "client.key"
    certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    return certificate, key


def demand_client(fake: FakeRegistry, authority: trustme.CA) -> None:
    context = fake._context
    assert context is not None
    authority.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED


def test_an_authority_of_a_mirror(bench: Bench, authority: trustme.CA, tmp_path: Path) -> None:
    mirror = bench.serve(authority=authority)
    bench.mirrors(mirror, more=f'ca = "{tmp_path}/ca.pem"')
    assert bench.resolve() == MANIFEST
    assert bench.fetch().source == mirror.host


def test_an_untrusted_mirror_is_passed_over(bench: Bench, authority: trustme.CA) -> None:
    mirror = bench.serve(authority=authority)
    bench.mirrors(mirror)
    assert bench.resolve() == MANIFEST
    assert bench.fetch().source == bench.home.host
    assert mirror.count() == 0


def test_an_authority_is_trusted_for_its_own_host_only(
    bench: Bench, authority: trustme.CA, tmp_path: Path
) -> None:
    trusted, other = bench.serve(authority=authority), bench.serve(authority=authority)
    bench.hosts(f'[host."{other.url}"]\n[host."{trusted.url}"]\nca = ["{tmp_path}/ca.pem"]')
    assert bench.fetch().source == trusted.host
    assert other.count() == 0


def test_skip_verify_is_for_its_own_host_only(bench: Bench, authority: trustme.CA) -> None:
    lax, strict = bench.serve(authority=authority), bench.serve(authority=authority)
    bench.hosts(f'[host."{strict.url}"]\n[host."{lax.url}"]\nskip_verify = true')
    assert bench.fetch().source == lax.host
    assert strict.count() == 0


def test_skip_verify_does_not_hold_where_a_mirror_redirects(
    bench: Bench, authority: trustme.CA
) -> None:
    mirror = bench.serve(authority=authority, redirect=True)
    bench.mirrors(mirror, more="skip_verify = true")
    assert bench.fetch().source == bench.home.host
    assert [request.listener for request in mirror.seen("/")] == ["registry"]


def test_an_authority_holds_where_a_mirror_redirects(
    bench: Bench, authority: trustme.CA, tmp_path: Path
) -> None:
    mirror = bench.serve(authority=authority, redirect=True)
    bench.mirrors(mirror, more=f'ca = "{tmp_path}/ca.pem"')
    assert bench.fetch().source == mirror.host


def test_a_certificate_of_the_client(bench: Bench, authority: trustme.CA, tmp_path: Path) -> None:
    certificate, key = client_files(authority, tmp_path)
    mirror = bench.serve(authority=authority)
    demand_client(mirror, authority)
    bench.mirrors(mirror, more=f'ca = "{tmp_path}/ca.pem"\nclient = [["{certificate}", "{key}"]]')
    assert bench.fetch().source == mirror.host


def test_without_the_certificate_of_the_client(
    bench: Bench, authority: trustme.CA, tmp_path: Path
) -> None:
    mirror = bench.serve(authority=authority)
    demand_client(mirror, authority)
    bench.mirrors(mirror, more=f'ca = "{tmp_path}/ca.pem"')
    assert bench.fetch().source == bench.home.host
    assert mirror.count() == 0


def test_files_that_are_no_certificates_are_named(bench: Bench, authority: trustme.CA) -> None:
    mirror = bench.serve(authority=authority)
    bench.mirrors(mirror, more='ca = "none.pem"')
    with pytest.raises(UsageError, match=r"none\.pem"):
        bench.fetch()


def test_certs_d_without_a_hosts_file(bench: Bench, authority: trustme.CA, tmp_path: Path) -> None:
    registry = bench.serve(authority=authority)
    demand_client(registry, authority)
    place = tmp_path / "certs.d" / registry.host
    place.mkdir(parents=True)
    authority.cert_pem.write_to_path(str(place / "ca.crt"))
    client_files(authority, place)
    bench.home = registry
    bench.settings["hosts_dir"] = str(tmp_path / "certs.d")
    assert bench.resolve() == MANIFEST
    assert bench.fetch().source == registry.host


# -- registries.conf ------------------------------------------------------------------------------


def registries(bench: Bench, *mirrors: str, head: str = "") -> None:
    tables = "".join(f"[[registry.mirror]]\n{mirror}\n" for mirror in mirrors)
    bench.conf(f'[[registry]]\nlocation = "{bench.home.host}"\n{head}\n{tables}')


def test_a_mirror_under_another_name(bench: Bench) -> None:
    mirror = bench.serve(filled=False)
    bench.fill(mirror, f"copies/of/{NAME}")
    registries(bench, f'location = "{mirror.host}/copies/of"')
    assert bench.resolve() == MANIFEST
    assert bench.fetch().source == mirror.host
    assert all(
        request.path.startswith(f"/v2/copies/of/{NAME}/") and request.query == ""
        for request in mirror.seen()
    )
    assert bench.home.count() == 0
    assert bench.store.confirmed(BLOB.digest, bench.reference.name)


def test_a_registry_that_moved(bench: Bench) -> None:
    moved = bench.serve(filled=False)
    bench.fill(moved, "new/app")
    bench.conf(f'[[registry]]\nprefix = "{bench.home.host}/team"\nlocation = "{moved.host}/new"')
    assert bench.resolve() == MANIFEST
    assert bench.fetch().source == moved.host
    assert bench.home.count() == 0


def test_a_digest_only_mirror(bench: Bench) -> None:
    mirror = bench.serve()
    registries(bench, f'location = "{mirror.host}"', head="mirror-by-digest-only = true")
    assert bench.resolve() == MANIFEST
    assert mirror.count() == 0
    assert bench.origin().resolve(bench.by_digest).body == BODY
    assert mirror.count() == 1


def test_a_blocked_registry_is_not_asked(bench: Bench) -> None:
    registries(bench, head="blocked = true")
    with pytest.raises(UsageError, match="blocked"):
        bench.resolve()
    with pytest.raises(UsageError, match="blocked"):
        bench.fetch()
    assert bench.home.count() == 0


@pytest.mark.parametrize("insecure", [True, False])
def test_an_insecure_mirror_needs_no_certificate(
    bench: Bench, authority: trustme.CA, insecure: bool
) -> None:
    mirror = bench.serve(authority=authority)
    registries(bench, f'location = "{mirror.host}"\ninsecure = {str(insecure).lower()}')
    assert bench.resolve() == MANIFEST
    assert bench.fetch().source == (mirror.host if insecure else bench.home.host)


def test_the_variable_of_podman_names_the_file(bench: Bench, tmp_path: Path) -> None:
    registries(bench, head="blocked = true")
    bench.environment["CONTAINERS_REGISTRIES_CONF"] = bench.settings.pop("registries_conf")
    with pytest.raises(UsageError, match="blocked"):
        bench.resolve()


# -- the whole pull -------------------------------------------------------------------------------


def test_one_image_through_four_mirrors_of_which_one_is_good(bench: Bench) -> None:
    layers = [small_tar({f"file-{number}": incompressible(50_000, number)}) for number in range(4)]
    fakes = [bench.serve(filled=False) for _ in range(4)]
    for fake in (*fakes, bench.home):
        digest = fake.add_image("site", "1", layers)
    wrong, broken, empty, good = fakes
    wrong.fault("/blobs/", Fault(corrupt=1000), repeat=True)
    broken.fault("/", Fault(status=500), repeat=True)
    empty.blobs.clear()
    empty.manifests.clear()
    bench.mirrors(*fakes)
    bench.settings["attempts"] = 6
    reference = Reference.parse(f"{bench.home.host}/site:1")
    with local_engine(
        bench.folder / "pulled", registry=RegistrySettings(**bench.settings)
    ) as engine:
        result = engine.pull(reference, PullOptions())
    assert str(result.digest) == digest
    assert good.count() + bench.home.count() > 0


def test_a_policy_holds_for_what_is_in_the_store_too(bench: Bench, tmp_path: Path) -> None:
    bench.home.add_image("site", "1", [small_tar({"a": b"b"})])
    reference = Reference.parse(f"{bench.home.host}/site:1")
    with local_engine(tmp_path / "pulled") as engine:
        engine.pull(reference, PullOptions())
    asked = bench.home.count()
    policy = tmp_path / "policy.json"
    policy.write_text(
        json.dumps(
            {
                "default": [{"type": "insecureAcceptAnything"}],
                "transports": {"docker": {bench.home.host: [{"type": "reject"}]}},
            }
        )
    )
    settings = RegistrySettings(policy_file=str(policy))
    with local_engine(tmp_path / "pulled", registry=settings) as engine:
        for act in (engine.pull, engine.resolve, engine.image):
            with pytest.raises(UsageError, match="rejected by"):
                act(reference, PullOptions(policy="missing"))
    assert bench.home.count() == asked
