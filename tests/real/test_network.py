"""Through Debian's nginx and squid: a mirror with TLS both ways, and a proxy that wants a login.

And what both engines make of limits, of bad certificates, and of what a registry says on the side.
"""

from __future__ import annotations

import socket
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from tests.support import network_peers
from tests.support.registry import FakeRegistry, Fault, incompressible
from tests.support.small import small_tar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.real.conftest import Published
    from tests.support.command import Stowray
    from tests.support.network_peers import Program

# Names that no resolver knows: who finds them went through the mirror or the proxy.
ELSEWHERE = "registry.test"
USER, PASSWORD = "carrier", "pigeon-4711"


class Network:
    """A published image, a private authority, and hosts between us and the registry."""

    def __init__(self, folder: Path, image: Published, stack: ExitStack) -> None:
        self.folder = folder
        self.image = image
        self.stack = stack
        self.authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.ca))

    def certificate(self, *names: str) -> tuple[Path, Path]:
        issued = self.authority.issue_cert(*names)
        certificate, key = self.folder / f"{names[0]}.pem", self.folder / f"{names[0]}.key"
        certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key))
        return certificate, key

    def nginx(self, *, client_certificates: bool = False) -> Program:
        certificate, key = self.certificate("127.0.0.1", ELSEWHERE)
        authority = self.ca if client_certificates else None
        return self.stack.enter_context(
            network_peers.nginx(
                self.folder / "nginx",
                self.image.host,
                certificate,
                key,
                client_authority=authority,
            )
        )

    def squid(self) -> Program:
        return self.stack.enter_context(
            network_peers.squid([ELSEWHERE], user=USER, password=PASSWORD)
        )

    def hosts(self, registry: str, text: str) -> str:
        place = self.folder / "hosts" / registry
        place.mkdir(parents=True)
        (place / "hosts.toml").write_text(text)
        return str(self.folder / "hosts")

    def certs_d(self, registry: str) -> str:
        place = self.folder / "certs.d" / registry
        place.mkdir(parents=True)
        self.authority.cert_pem.write_to_path(str(place / "ca.crt"))
        return str(self.folder / "certs.d")


@pytest.fixture
def network(workspace: Path, publish: Callable[[str], Published]) -> Iterator[Network]:
    folder = workspace / "network"
    folder.mkdir()
    with ExitStack() as stack:
        yield Network(folder, publish("small"), stack)


def proxy(squid: Program, password: str = PASSWORD) -> dict[str, str]:
    url = f"http://{USER}:{password}@{squid.host}"
    return {"HTTPS_PROXY": url, "HTTP_PROXY": url}


def digest_of(answer) -> str:
    assert answer.status == 0, answer.stderr
    digest: str = answer.json["digest"]
    return digest


@pytest.mark.peers("docker-registry", "nginx")
def test_nginx_as_a_mirror_that_demands_a_certificate(network: Network, local: Stowray) -> None:
    nginx = network.nginx(client_certificates=True)
    certificate, key = network.certificate("client.test")
    directory = network.hosts(
        ELSEWHERE,
        f'[host."https://{nginx.host}"]\nca = "{network.ca}"\n'
        f'client = [["{certificate}", "{key}"]]\n',
    )
    reference = network.image.at(ELSEWHERE)
    answer = local.attempt("pull", "--json", "--hosts-dir", directory, reference)
    assert digest_of(answer) == network.image.manifest["digest"]
    assert answer.json["fetched_bytes"] == network.image.layers_size
    assert {layer["source"] for layer in answer.json["layers"]} == {nginx.host}
    assert nginx.log
    for line in nginx.log:
        assert line.startswith("200 ")
        assert f"?ns={ELSEWHERE} " in line


@pytest.mark.peers("docker-registry", "nginx")
def test_nginx_without_the_certificate_that_it_demands(network: Network, local: Stowray) -> None:
    nginx = network.nginx(client_certificates=True)
    directory = network.hosts(ELSEWHERE, f'server = "https://{nginx.host}"\nca = "{network.ca}"\n')
    answer = local.attempt("pull", "--json", "--hosts-dir", directory, network.image.at(ELSEWHERE))
    assert answer.status == 6
    assert local.blobs() == set()


@pytest.mark.peers("docker-registry", "nginx", "squid", "openssl")
def test_squid_as_a_tunnel(network: Network, local: Stowray) -> None:
    nginx, squid = network.nginx(), network.squid()
    registry = f"{ELSEWHERE}:{nginx.port}"
    answer = local.attempt(
        "pull",
        "--json",
        "--hosts-dir",
        network.certs_d(registry),
        network.image.at(registry),
        env=proxy(squid),
    )
    assert digest_of(answer) == network.image.manifest["digest"]
    assert all(f"CONNECT {registry}" in line for line in squid.log)
    assert squid.log
    assert nginx.log
    # The proxy's login is the proxy's: the last field is what the registry got of it.
    assert all(line.endswith('"-"') for line in nginx.log)


@pytest.mark.peers("docker-registry", "squid", "openssl")
def test_squid_for_plain_http(network: Network, local: Stowray) -> None:
    squid = network.squid()
    registry = f"{ELSEWHERE}:{network.image.host.rpartition(':')[2]}"
    arguments = ["--json", "--plain-http", registry, network.image.at(registry)]
    answer = local.attempt("pull", *arguments, env=proxy(squid))
    assert digest_of(answer) == network.image.manifest["digest"]
    assert any(f"GET http://{registry}/v2/" in line for line in squid.log)


@pytest.mark.peers("docker-registry", "squid", "openssl")
def test_a_host_that_needs_no_proxy_is_reached_without(network: Network, local: Stowray) -> None:
    squid = network.squid()
    registry = f"{ELSEWHERE}:{network.image.host.rpartition(':')[2]}"
    arguments = ["--json", "--plain-http", registry, network.image.at(registry)]
    answer = local.attempt("pull", *arguments, env={**proxy(squid), "NO_PROXY": ELSEWHERE})
    assert answer.status == 6, "the name leads nowhere without the proxy"
    assert squid.log == []


@pytest.mark.peers("docker-registry", "nginx", "squid", "openssl")
def test_a_proxy_that_refuses_the_login(network: Network, local: Stowray) -> None:
    nginx, squid = network.nginx(), network.squid()
    registry = f"{ELSEWHERE}:{nginx.port}"
    answer = local.attempt(
        "pull",
        "--json",
        "--hosts-dir",
        network.certs_d(registry),
        network.image.at(registry),
        env=proxy(squid, "wrong-one-0815"),
    )
    assert answer.status == 6
    assert "407" in answer.stderr
    for text in (answer.stderr, answer.text):
        assert "wrong-one-0815" not in text
    assert nginx.log == []


@pytest.mark.peers("docker-registry", "nginx", "squid", "openssl")
def test_a_proxy_of_one_host_s_own(network: Network, stowray: Stowray) -> None:
    """The name leads nowhere without the proxy, which only the file of hosts knows."""
    nginx, squid = network.nginx(), network.squid()
    registry = f"{ELSEWHERE}:{nginx.port}"
    directory = network.hosts(
        "registry.elsewhere.test",
        f'[host."https://{registry}"]\nca = "{network.ca}"\n'
        f'proxy = "http://{USER}:{PASSWORD}@{squid.host}"\n',
    )
    reference = network.image.at("registry.elsewhere.test")
    answer = stowray.attempt("pull", "--json", "--hosts-dir", directory, reference)
    assert digest_of(answer) == network.image.manifest["digest"]
    assert {layer["source"] for layer in answer.json["layers"]} == {registry}
    assert nginx.log, "the name is known to the proxy alone"
    # Of a tunnel squid writes at its end, and a session keeps its connections.
    assert squid.log or stowray.engine == "ray"
    assert all(f"CONNECT {registry}" in line for line in squid.log)
    assert all(line.endswith('"-"') for line in nginx.log), "the proxy's login is the proxy's"
    assert PASSWORD not in answer.stderr + answer.text


def settings_file(folder: Path, text: str) -> str:
    path = folder / "settings.toml"
    path.write_text(text)
    return str(path)


def test_limits_of_one_finish_fifty_layers(stowray: Stowray, workspace: Path) -> None:
    """Permits are held for one exchange only, by whatever process."""
    at_once: list[int] = []
    text = "[registry]\nconnections = 1\nrange_connections = 1\n[unpack]\nworkers = 1\n"
    layers = [small_tar({f"file{n}": incompressible(3000, n)}) for n in range(50)]
    with FakeRegistry() as registry:
        digest = registry.add_image("a/many", "1", layers)
        slow = Fault(trickle=(1000, 0.002), then=lambda: at_once.append(registry.bodies))
        registry.fault("/blobs/", slow, repeat=True)
        answer = stowray.run(
            "pull",
            "--json",
            "--config",
            settings_file(workspace, text),
            f"{registry.host}/a/many:1",
        )
        assert answer.json["digest"] == digest
        assert registry.count("/blobs/") == 51
    assert set(at_once) == {0}, "a blob was asked for while another one was under way"


@pytest.mark.parametrize("how", ["unknown authority", "expired", "another host"])
def test_a_certificate_that_is_not_right(stowray: Stowray, workspace: Path, how: str) -> None:
    """Nothing falls back to plain http or to no check, also where plain http would be allowed."""
    authority = trustme.CA()
    options: dict[str, Any] = {"authority": authority}
    text = ""
    if how != "unknown authority":
        authority.cert_pem.write_to_path(str(workspace / "ca.pem"))
        text = f'[registry]\nca_file = "{workspace / "ca.pem"}"\n'
    if how == "expired":
        options["not_after"] = datetime.now(UTC) - timedelta(days=1)
    if how == "another host":
        # The certificate is for 127.0.0.1.
        options["listener"] = socket.create_server(("127.0.0.2", 0))
    with FakeRegistry(**options) as registry:
        registry.add_image("a/b", "1", [small_tar({"f": b"x"})])
        host = registry.host
        if how == "another host":
            host = host.replace("127.0.0.1", "127.0.0.2")
        # Allowed to be plain, which it is not.
        arguments = ("--config", settings_file(workspace, text), "--plain-http", host)
        answer = stowray.attempt("pull", *arguments, f"{host}/a/b:1")
        assert registry.requests == []
    assert answer.status == 6
    assert "the certificate is not trusted" in answer.stderr
    assert stowray.blobs() == set()


def test_what_a_registry_says_on_the_side(stowray: Stowray, workspace: Path) -> None:
    """Its quota is told by both engines; its own words by the process that heard them alone."""
    with FakeRegistry() as registry:
        registry.add_image("a/b", "1", [small_tar({"f": b"x"})])
        said = (
            ("RateLimit-Limit", "100;w=21600"),
            ("RateLimit-Remaining", "3;w=21600"),
            ("Warning", '299 - "this registry moves in May"'),
        )
        registry.fault("/manifests/", Fault(headers=said), repeat=True)
        answer = stowray.run("pull", f"{registry.host}/a/b:1")
        assert f"{registry.host}: 3 of 100 requests are left in 6 h" in answer.stderr
        told = "warns: this registry moves in May"
        if stowray.engine == "ray":
            told = f"{registry.host} sends a warning; `stowray resolve` shows it"
        assert told in answer.stderr
        again = stowray.run("resolve", f"{registry.host}/a/b:1")
        assert "warns: this registry moves in May" in again.stderr
