from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stowray.pipeline.clock import SYSTEM_CLOCK
from stowray.pipeline.endpoint import Connection, Endpoint
from stowray.pipeline.endpoints import Endpoints, final_error
from stowray.pipeline.errors import (
    DigestMismatchError,
    NotFoundError,
    UnauthorizedError,
    UnavailableError,
    UsageError,
)
from stowray.pipeline.reference import Reference
from stowray.pipeline.settings import RegistrySettings

DIGEST = "sha256:" + "a" * 64


class Setup:
    """Configuration files, and a clock that only tests move."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = 1000.0
        self.hosts_dir = ""
        self.conf = ""
        self.plain_http: tuple[str, ...] = ()

    def hosts(self, registry: str, text: str) -> None:
        self.hosts_dir = str(self.folder / "hosts")
        place = self.folder / "hosts" / registry
        place.mkdir(parents=True)
        (place / "hosts.toml").write_text(text)

    def certificate(self, registry: str) -> str:
        self.hosts_dir = str(self.folder / "hosts")
        place = self.folder / "hosts" / registry
        place.mkdir(parents=True)
        (place / "ca.crt").touch()
        return str(place / "ca.crt")

    def registries(self, text: str) -> None:
        self.conf = str(self.folder / "registries.conf")
        Path(self.conf).write_text(text)

    def endpoints(self) -> Endpoints:
        settings = RegistrySettings(hosts_dir=self.hosts_dir, registries_conf=self.conf)
        return Endpoints(settings, {}, replace(SYSTEM_CLOCK, monotonic=lambda: self.now))

    def find(self, name: str, operation="pull") -> list[Endpoint]:
        return list(self.endpoints().find(Reference.parse(name), operation))


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


def test_nothing_configured(setup: Setup) -> None:
    assert setup.find("debian:12") == [
        Endpoint("registry-1.docker.io", "docker.io", "library/debian")
    ]
    assert setup.find("r.io:5000/a/b:1") == [Endpoint("r.io:5000", "r.io:5000", "a/b")]


def test_mirrors_of_a_hosts_file(setup: Setup) -> None:
    setup.hosts(
        "docker.io",
        """
        [host."https://first.io"]
        [host."http://second.io:5000"]
        header = {x-a = "b"}
        [host."https://registry-1.docker.io"]
        [host."https://third.io/cache"]
        override_path = true
        """,
    )
    first, second, hub, third, home = setup.find("debian:12")
    assert [first.host, second.host, third.host] == ["first.io", "second.io:5000", "third.io"]
    assert first.target("manifests/12") == "/v2/library/debian/manifests/12?ns=docker.io"
    assert third.target("blobs/x") == "/cache/library/debian/blobs/x?ns=docker.io"
    assert (first.scheme, second.scheme) == ("https", "http")
    assert not first.plain_http
    assert second.plain_http, "the file says http"
    assert second.headers == (("x-a", "b"),)
    assert first.registry == "first.io", "a mirror's own logins"
    assert hub.registry == "docker.io"
    assert hub.namespace == "", "it is the registry itself"
    assert not hub.home
    assert home == Endpoint("registry-1.docker.io", "docker.io", "library/debian")


@pytest.mark.parametrize(
    ("server", "host", "namespace"),
    [
        ("https://docker.io", "registry-1.docker.io", ""),
        ("https://registry-1.docker.io", "registry-1.docker.io", ""),
        ("https://only.io", "only.io", "docker.io"),
    ],
)
def test_the_server_of_a_hosts_file(setup: Setup, server: str, host: str, namespace: str) -> None:
    setup.hosts("docker.io", f'server = "{server}"')
    (home,) = setup.find("debian:12")
    assert (home.host, home.namespace, home.home) == (host, namespace, True)


def test_tls_that_is_described_for_an_http_host_is_used_if_it_speaks_it(setup: Setup) -> None:
    setup.hosts(
        "_default",
        """
        [host."http://a.io:5000"]
        skip_verify = true
        [host."http://b.io:80"]
        skip_verify = true
        [host."http://c.io"]
        """,
    )
    schemes = [(endpoint.scheme, endpoint.plain_http) for endpoint in setup.find("r.io/x")[:3]]
    assert schemes == [("", True), ("http", True), ("http", True)]


def test_capabilities_choose_by_operation(setup: Setup) -> None:
    setup.hosts(
        "r.io",
        """
        [host."https://pull.io"]
        capabilities = ["pull"]
        [host."https://resolve.io"]
        capabilities = ["resolve"]
        [host."https://both.io"]
        [host."https://push.io"]
        capabilities = ["push"]
        """,
    )

    def hosts(operation: str) -> list[str]:
        return [endpoint.host for endpoint in setup.find("r.io/x:1", operation)]

    assert hosts("pull") == ["pull.io", "both.io", "r.io"]
    assert hosts("resolve") == ["resolve.io", "both.io", "r.io"]


def test_changed_files_count_soon(setup: Setup) -> None:
    setup.hosts("r.io", '[host."https://a.io"]')
    setup.registries('[[registry]]\nlocation = "q.io"')
    endpoints = setup.endpoints()

    def hosts(name: str) -> list[str]:
        return [one.host for one in endpoints.find(Reference.parse(name), "pull")]

    assert (hosts("r.io/x"), hosts("q.io/x")) == (["a.io", "r.io"], ["q.io"])
    (setup.folder / "hosts" / "r.io" / "hosts.toml").write_text('[host."https://b.io"]')
    setup.registries('[[registry]]\nlocation = "q.io"\nblocked = true')
    setup.now += 6
    assert hosts("r.io/x") == ["b.io", "r.io"]
    with pytest.raises(UsageError, match="blocked"):
        hosts("q.io/x")


def test_nobody_may_do_it(setup: Setup) -> None:
    setup.hosts("r.io", 'server = "https://r.io"\ncapabilities = ["push"]')
    with pytest.raises(UsageError, match="capability 'pull'"):
        setup.find("r.io/x")


def test_the_default_directory_serves_every_registry(setup: Setup) -> None:
    setup.hosts("_default", '[host."https://cache.io"]')
    found = setup.find("quay.io/a/b:1")
    assert [endpoint.host for endpoint in found] == ["cache.io", "quay.io"]
    assert [endpoint.namespace for endpoint in found] == ["quay.io", ""]


def test_certificates_alone_change_nothing_else(setup: Setup) -> None:
    file = setup.certificate("r.io:5000")
    assert setup.find("r.io:5000/x") == [
        Endpoint("r.io:5000", "r.io:5000", "x", connection=Connection(ca_files=(file,)))
    ]


CONF = """
[[registry]]
prefix = "docker.io"
location = "hub.corp/docker"
[[registry.mirror]]
location = "m.corp:5000"
insecure = true
[[registry.mirror]]
location = "tags.corp/x"
pull-from-mirror = "tag-only"
[[registry.mirror]]
location = "digests.corp"
pull-from-mirror = "digest-only"
[[registry]]
location = "bad.io"
blocked = true
[[registry]]
location = "docker.io/library/old:1"
blocked = true
"""


def test_mirrors_of_registries_conf(setup: Setup) -> None:
    setup.registries(CONF)
    mirror, tags, home = setup.find("debian:12")
    assert mirror == Endpoint(
        "m.corp:5000",
        "m.corp:5000",
        "library/debian",
        home=False,
        plain_http=True,
        connection=Connection(skip_verify=True),
    )
    assert tags.target("blobs/x") == "/v2/x/library/debian/blobs/x", "podman's send no ns"
    assert home == Endpoint("hub.corp", "hub.corp", "docker/library/debian")
    by_digest = [endpoint.host for endpoint in setup.find(f"debian@{DIGEST}")]
    assert by_digest == ["m.corp:5000", "digests.corp", "hub.corp"]


@pytest.mark.parametrize("name", ["bad.io/x:1", "docker.io/library/old:1", f"old:1@{DIGEST}"])
def test_what_is_blocked_has_no_endpoints(setup: Setup, name: str) -> None:
    setup.registries(CONF)
    with pytest.raises(UsageError) as caught:
        setup.find(name)
    assert "blocked" in str(caught.value)
    assert setup.conf in str(caught.value)


def test_a_block_holds_beside_a_hosts_file(setup: Setup) -> None:
    setup.registries(CONF)
    setup.hosts("_default", '[host."https://cache.io"]')
    with pytest.raises(UsageError, match="blocked"):
        setup.find("bad.io/x:1")
    assert [endpoint.host for endpoint in setup.find("debian:12")] == [
        "cache.io",
        "registry-1.docker.io",
    ], "a hosts.toml wins"


def test_certificates_go_with_registries_conf(setup: Setup) -> None:
    file = setup.certificate("m.corp:5000")
    setup.registries(CONF)
    mirror, *_, home = setup.find("debian:12")
    assert mirror.connection == Connection(ca_files=(file,), skip_verify=True)
    assert home.connection == Connection()


def test_a_tag_may_be_called_otherwise_elsewhere(setup: Setup) -> None:
    setup.registries('[[registry]]\nprefix = "r.io/a:new"\nlocation = "m.io/a:old"')
    assert [endpoint.tag for endpoint in setup.find("r.io/a:new")] == ["old"]
    assert [endpoint.host for endpoint in setup.find("r.io/a:1")] == ["r.io"]


def unavailable(code: str, status: int = 0) -> UnavailableError:
    return UnavailableError("https://m", status, code, "")


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        pytest.param(unavailable("TIMEOUT"), 30, id="no answer"),
        pytest.param(unavailable("SLOW"), 30, id="trickle"),
        pytest.param(unavailable("UNREACHABLE"), 30, id="nobody there"),
        pytest.param(DigestMismatchError("x", "y", "z"), 900, id="wrong bytes"),
        pytest.param(unavailable("", 503), 0, id="503 costs nothing"),
        pytest.param(NotFoundError("x", "m"), 0, id="has it not"),
        pytest.param(UnauthorizedError("m", "x"), 0, id="may not have it"),
    ],
)
def test_how_long_a_mirror_rests(setup: Setup, error: Exception, seconds: int) -> None:
    setup.hosts("r.io", '[host."https://a.io"]\n[host."https://b.io"]')
    endpoints = setup.endpoints()
    found = endpoints.find(Reference.parse("r.io/x"), "pull")
    endpoints.blame(found[0], error)

    def order() -> list[str]:
        return [endpoint.host for endpoint in sorted(found, key=endpoints.is_resting)]

    if seconds:
        setup.now += seconds - 1
        assert order() == ["b.io", "r.io", "a.io"]
        # What rests is not awakened by a lesser failure.
        endpoints.blame(found[0], NotFoundError("x", "m"))
        assert endpoints.is_resting(found[0])
        setup.now += 2
    assert order() == ["a.io", "b.io", "r.io"]


def test_who_is_silent_again_rests_longer(setup: Setup) -> None:
    setup.hosts("r.io", '[host."https://a.io"]')
    endpoints = setup.endpoints()
    mirror, _ = endpoints.find(Reference.parse("r.io/x"), "pull")

    def rested() -> float:
        begun = setup.now
        while endpoints.is_resting(mirror):
            setup.now += 1
        return setup.now - begun

    for expected in (30, 60, 120, 240, 480, 900, 900):
        for _ in range(6):
            endpoints.blame(mirror, unavailable("TIMEOUT"))
        assert rested() == expected
    setup.now += 900
    endpoints.blame(mirror, unavailable("TIMEOUT"))
    assert rested() == 30, "that was long ago"


def test_the_registry_itself_never_rests(setup: Setup) -> None:
    endpoints = setup.endpoints()
    (home,) = endpoints.find(Reference.parse("r.io/x"), "pull")
    endpoints.blame(home, unavailable("TIMEOUT"))
    assert not endpoints.is_resting(home)


def test_the_registrys_own_word_counts() -> None:
    mirror = Endpoint("m.io", "m.io", "x", home=False)
    home = Endpoint("r.io", "r.io", "x")
    missing, down = NotFoundError("x", "r.io"), unavailable("TIMEOUT")
    assert final_error([(mirror, down), (home, missing)]) is missing
    assert final_error([(home, missing), (mirror, down)]) is missing
    assert final_error([(mirror, down)]) is down


def test_headers_and_proxies_do_not_show_themselves() -> None:
    shown = repr(
        Endpoint(
            "m.io",
            "m.io",
            "x",
            headers=(("authorization", "sesame"),),
            connection=Connection(proxy="http://u:sesame@p"),
        )
    )
    assert "sesame" not in shown
