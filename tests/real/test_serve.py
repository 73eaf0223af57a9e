"""`stowray serve` as a mirror: others pull from it, with the registry gone."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.real.conftest import publish_to
from tests.support import docker_registry, peers, runtimes
from tests.support.command import Stowray
from tests.support.proxy import counting_proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.real.conftest import Published
    from tests.support.catalogue import Catalogue

pytestmark = [pytest.mark.peers, pytest.mark.root]


@contextlib.contextmanager
def serving(stowray: Stowray, *arguments: str) -> Iterator[str]:
    """The command serving on a free port; gives HOST:PORT."""
    with stowray.running("serve", "--listen", "127.0.0.1:0", "--json", *arguments) as process:
        yield json.loads(_line(process.stdout))["address"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def _line(stream: object) -> bytes:
    line: bytes = stream.readline()  # type: ignore[attr-defined]
    return line


@pytest.fixture(scope="module")
def mirrored(
    fast_tmp: Path, home: Path, catalogue: Catalogue
) -> Iterator[tuple[Stowray, dict[str, Published]]]:
    """Images in a store whose registry has gone away."""
    stowray = Stowray(fast_tmp / "mirror-store", home)
    with docker_registry.running(fast_tmp / "mirror-registry") as registry:
        images = {
            name: publish_to(registry.host, catalogue, name)
            for name in ("debian", "many", "multi", "multi-docker")
        }
        for image in images.values():
            stowray.run("pull", "--no-unpack", "--platform", "linux/amd64", image.reference)
    yield stowray, images


@pytest.mark.peers("containerd", "ctr", "umoci")
@pytest.mark.parametrize("name", ["debian", "multi", "multi-docker"])
def test_containerd_pulls_by_hosts_toml(
    mirrored: tuple[Stowray, dict[str, Published]],
    judged: Callable[[str], Path],
    workspace: Path,
    name: str,
) -> None:
    stowray, images = mirrored
    image = images[name]
    with serving(stowray) as address, runtimes.containerd(workspace / "c") as containerd:
        folder = workspace / "hosts" / image.host
        folder.mkdir(parents=True)
        (folder / "hosts.toml").write_text(
            f'server = "http://{image.host}"\n\n'
            f'[host."http://{address}"]\n  capabilities = ["pull", "resolve"]\n'
        )
        containerd.ctr("images", "pull", "--hosts-dir", folder.parent, image.reference)
        assert containerd.images() == {image.reference: image.resolved["digest"]}
        assert containerd.is_ready(image.reference)
        with containerd.mounted(image.reference, workspace / "m") as tree:
            runtimes.assert_same_image(tree, judged(name))


@pytest.mark.peers("podman", "umoci")
@pytest.mark.parametrize("name", ["debian", "multi"])
def test_podman_pulls_by_registries_conf(
    mirrored: tuple[Stowray, dict[str, Published]],
    judged: Callable[[str], Path],
    workspace: Path,
    name: str,
) -> None:
    stowray, images = mirrored
    image = images[name]
    with serving(stowray) as address, runtimes.podman(workspace / "p") as podman:
        podman.registries.write_text(
            f'[[registry]]\nprefix = "{image.host}"\nlocation = "{image.host}"\ninsecure = true\n'
            f'[[registry.mirror]]\nlocation = "{address}"\ninsecure = true\n'
        )
        podman.run("pull", "--quiet", image.reference)
        digests = podman.inspect(image.reference, "{{json .RepoDigests}}")
        repository = f"{image.host}/{image.repository}"
        assert f"{repository}@{image.resolved['digest']}" in json.loads(digests)
        with podman.mounted(image.reference) as tree:
            runtimes.assert_same_image(Path(tree), judged(name))


def test_skopeo_copies_from_it(
    mirrored: tuple[Stowray, dict[str, Published]], workspace: Path
) -> None:
    stowray, images = mirrored
    image = images["many"]
    with serving(stowray) as address:
        peers.skopeo_copy(f"docker://{image.at(address)}", f"dir:{workspace / 'copy'}")
        listed = json.loads(peers.skopeo_inspect(f"docker://{image.at(address)}"))
    assert (workspace / "copy" / "manifest.json").read_bytes() == image.layout.blob(
        image.manifest["digest"]
    )
    assert listed["Digest"] == image.resolved["digest"]
    assert listed["RepoTags"] == ["1"]


def test_stowray_pulls_from_it(
    mirrored: tuple[Stowray, dict[str, Published]], workspace: Path, home: Path
) -> None:
    stowray, images = mirrored
    image = images["many"]
    other = Stowray(workspace / "store", home)
    with serving(stowray) as address:
        result = other.pull(image.at(address))
    assert result["resolved"] == image.resolved["digest"]
    assert result["fetched_bytes"] == image.layers_size


def test_a_layer_is_passed_on_while_it_arrives(
    local: Stowray, publish: Callable[[str], Published]
) -> None:
    """The registry has sent a part of the largest layer when the mirror is asked for all of it."""
    image = publish("many")
    layer = max(image.document["layers"], key=lambda layer: layer["size"])
    with counting_proxy(image.host) as proxy, serving(local) as address:
        proxy.hold_after(image.layers_size // 2)
        reference = image.at(proxy.host)
        with local.running("pull", "--json", "--no-unpack", reference) as pull:
            assert proxy.wait_served(image.layers_size // 2)
            connection = http.client.HTTPConnection(address, timeout=60)
            with contextlib.closing(connection):
                connection.request(
                    "GET", f"/v2/{image.repository}/blobs/{layer['digest']}?ns={proxy.host}"
                )
                response = connection.getresponse()
                assert response.status == 200, response.read()
                assert response.length == layer["size"]
                assert pull.poll() is None
                hasher = hashlib.sha256(response.read(1))
                assert pull.poll() is None
                proxy.hold_after(None)
                while data := response.read(1 << 20):
                    hasher.update(data)
            assert f"sha256:{hasher.hexdigest()}" == layer["digest"]
            assert pull.wait(timeout=60) == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_ends_when_it_is_asked_to(local: Stowray, number: int, status: int) -> None:
    with local.running("serve", "--listen", "127.0.0.1:0") as process:
        line = _line(process.stderr).decode()
        assert line.startswith(f"stowray: serving {local.store} at http://127.0.0.1:")
        address = line.strip().rpartition("//")[2]
        connection = http.client.HTTPConnection(address, timeout=60)
        connection.request("GET", "/v2/")
        assert connection.getresponse().read() == b"{}"
        process.send_signal(number)
        assert process.wait(timeout=60) == status
        connection.close()


def test_it_says_who_can_reach_it(local: Stowray) -> None:
    with local.running("serve", "--listen", "0.0.0.0:0") as process:
        _line(process.stderr)
        assert b"anybody who reaches this address" in _line(process.stderr)


def test_a_port_that_is_taken(local: Stowray) -> None:
    with local.running("serve", "--json", "--listen", "127.0.0.1:0") as process:
        address = json.loads(_line(process.stdout))["address"]
        answer = local.attempt("serve", "--listen", address)
    assert answer.status == 2
    assert "another program listens there" in answer.stderr


def test_requests_are_shown_when_asked_for(local: Stowray) -> None:
    with local.running("serve", "-v", "--listen", "127.0.0.1:0") as process:
        address = _line(process.stderr).decode().strip().rpartition("//")[2]
        connection = http.client.HTTPConnection(address, timeout=60)
        headers = {"Authorization": "Bearer secret-of-the-client"}
        connection.request("GET", "/v2/a%0ab/tags/list?token=secret", headers=headers)
        connection.getresponse().read()
        connection.close()
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read().decode()
    assert "GET /v2/a\\nb/tags/list 404" in said
    assert "secret" not in said
