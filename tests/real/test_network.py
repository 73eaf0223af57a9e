"""Through Debian's nginx and squid: a mirror with TLS both ways, and a proxy that wants a login."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
import trustme

from tests.support import network_peers

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
