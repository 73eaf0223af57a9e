"""The blob server over real sockets: what it answers, what it refuses, how it passes blobs on."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import queue
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.engine import PullOptions
from stowray.pipeline.errors import UsageError
from stowray.pipeline.fetch import Fetcher
from stowray.pipeline.platform import Platform
from stowray.pipeline.reference import Reference
from stowray.pipeline.registry import Registry
from stowray.pipeline.serve import (
    BlobServer,
    Served,
    ServeLimits,
    bearer,
    is_loopback_host,
    parse_listen,
)
from stowray.pipeline.settings import RegistrySettings
from stowray.pipeline.source import parse_source
from stowray.pipeline.store import Store
from tests.support import stores
from tests.support.registry import OCI_INDEX, OCI_LAYER, OCI_MANIFEST, FakeRegistry
from tests.support.small import local_engine, small_tar

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

LARGE = stores.pattern(3_000_000, seed=1)  # more than is sent from memory, in two pieces
AMD64 = Platform.parse("linux/amd64")


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def code(self) -> str:
        code: str = json.loads(self.body)["errors"][0]["code"]
        return code


def ask(
    server: BlobServer,
    path: str,
    headers: Mapping[str, str] | None = None,
    *,
    method: str = "GET",
) -> Answer:
    """Ask on a connection of its own; a body that was cut raises IncompleteRead."""
    connection = http.client.HTTPConnection(*split(server.address), timeout=60)
    try:
        connection.request(method, path, headers=dict(headers or {}))
        response = connection.getresponse()
        return Answer(response.status, dict(response.headers), response.read())
    finally:
        connection.close()


def split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def dial(server: BlobServer) -> socket.socket:
    return socket.create_connection(split(server.address), timeout=60)


@contextlib.contextmanager
def reading(
    server: BlobServer, path: str, headers: Mapping[str, str] | None = None
) -> Iterator[http.client.HTTPResponse]:
    """The answer to a GET whose body is read by the test."""
    connection = http.client.HTTPConnection(*split(server.address), timeout=60)
    try:
        connection.request("GET", path, headers=dict(headers or {}))
        yield connection.getresponse()
    finally:
        connection.close()


@dataclass(frozen=True)
class Pulled:
    """An index of two platforms in a store, and the registry that it came from."""

    store: Store
    host: str
    index: str
    manifest: str
    other: str
    layers: tuple[str, ...]
    large: bytes
    registry: FakeRegistry


@pytest.fixture(scope="module")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pulled]:
    path = tmp_path_factory.mktemp("serve") / "store"
    with FakeRegistry() as registry:
        layers = [small_tar({"large": LARGE}), small_tar({"small": b"1"})]
        manifest = registry.add_image("a/b", None, layers)
        other = registry.add_image("a/b", None, layers[:1], architecture="arm64")
        index = registry.add_index("a/b", "1", {"linux/amd64": manifest, "linux/arm64": other})
        registry.add_image("c/d", "x", layers[:1])
        with local_engine(path) as engine:
            options = PullOptions(platform=AMD64, unpack=False)
            result = engine.pull(parse_source(f"{registry.host}/a/b:1"), options)
            engine.pull(parse_source(f"{registry.host}/c/d:x"), options)
        digests = tuple(str(layer.digest) for layer in result.layers)
        store = Store.open(path)
        large = store.blob_path(Digest(digests[0])).read_bytes()
        yield Pulled(store, registry.host, index, manifest, other, digests, large, registry)


@pytest.fixture(scope="module")
def server(pulled: Pulled) -> Iterator[BlobServer]:
    with BlobServer(pulled.store) as started:
        yield started


# What is here


def test_says_that_it_is_a_registry(server: BlobServer) -> None:
    answer = ask(server, "/v2/")
    assert (answer.status, answer.body) == (200, b"{}")
    assert answer.headers["Docker-Distribution-Api-Version"] == "registry/2.0"
    assert ask(server, "/v2").status == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("by", ["tag", "digest"])
@pytest.mark.parametrize("namespace", [True, False])
def test_manifests(
    server: BlobServer, pulled: Pulled, method: str, by: str, namespace: bool
) -> None:
    target = "1" if by == "tag" else pulled.index
    query = f"?ns={pulled.host}" if namespace else ""
    answer = ask(server, f"/v2/a/b/manifests/{target}{query}", method=method)
    body = pulled.registry.manifests["a/b", pulled.index][1]
    assert answer.status == 200
    assert answer.headers["Content-Type"] == OCI_INDEX
    assert answer.headers["Docker-Content-Digest"] == pulled.index
    assert answer.headers["Content-Length"] == str(len(body))
    assert answer.body == (body if method == "GET" else b"")


def test_the_manifest_of_the_platform(server: BlobServer, pulled: Pulled) -> None:
    answer = ask(server, f"/v2/a/b/manifests/{pulled.manifest}")
    assert answer.headers["Content-Type"] == OCI_MANIFEST
    assert Digest(pulled.manifest).matches(answer.body)


def test_the_manifest_that_was_not_pulled_is_unknown(server: BlobServer, pulled: Pulled) -> None:
    answer = ask(server, f"/v2/a/b/manifests/{pulled.other}")
    assert (answer.status, answer.code) == (404, "MANIFEST_UNKNOWN")


def test_a_layer_is_no_manifest(server: BlobServer, pulled: Pulled) -> None:
    for layer in pulled.layers:
        assert ask(server, f"/v2/a/b/manifests/{layer}").status == 404


def test_blobs_large_and_small(server: BlobServer, pulled: Pulled) -> None:
    for layer in pulled.layers:
        answer = ask(server, f"/v2/a/b/blobs/{layer}")
        assert answer.status == 200
        assert answer.headers["Docker-Content-Digest"] == layer
        assert answer.headers["Content-Type"] == "application/octet-stream"
        assert answer.headers["Accept-Ranges"] == "bytes"
        assert Digest(layer).matches(answer.body)


def test_head_of_a_blob(server: BlobServer, pulled: Pulled) -> None:
    answer = ask(server, f"/v2/a/b/blobs/{pulled.layers[0]}", method="HEAD")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["Content-Length"] == str(len(pulled.large))


def test_one_connection_takes_many_requests(server: BlobServer, pulled: Pulled) -> None:
    connection = http.client.HTTPConnection(*split(server.address), timeout=60)
    connection.connect()
    first = connection.sock
    for _ in range(3):
        connection.request("GET", f"/v2/a/b/blobs/{pulled.layers[0]}")
        assert connection.getresponse().read() == pulled.large
        connection.request("GET", "/v2/a/b/manifests/none")
        response = connection.getresponse()
        response.read()
        assert response.status == 404
    assert connection.sock is first
    connection.close()


def test_tags(server: BlobServer, pulled: Pulled) -> None:
    assert json.loads(ask(server, "/v2/a/b/tags/list").body) == {"name": "a/b", "tags": ["1"]}
    answer = ask(server, "/v2/a/x/tags/list")
    assert (answer.status, answer.code) == (404, "NAME_UNKNOWN")


def test_tags_page_by_page(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    digest = stores.commit(store, b"{}")
    for tag in ("c", "a", "b"):
        store.record_reference(stores.record(digest, f"example.org/a/b:{tag}"))
    with BlobServer(store) as server:
        first = ask(server, "/v2/a/b/tags/list?n=2&ns=example.org")
        assert json.loads(first.body)["tags"] == ["a", "b"]
        link = first.headers["Link"]
        assert link == '</v2/a/b/tags/list?n=2&last=b&ns=example.org>; rel="next"'
        second = ask(server, link.partition(">")[0].removeprefix("<"))
        assert json.loads(second.body)["tags"] == ["c"]
        assert "Link" not in second.headers


def test_what_the_client_has_is_not_sent_again(server: BlobServer, pulled: Pulled) -> None:
    path = f"/v2/a/b/blobs/{pulled.layers[0]}"
    etag = ask(server, path, method="HEAD").headers["ETag"]
    assert etag == f'"{pulled.layers[0]}"'
    for value in (etag, f'"x", W/{etag}', "*"):
        answer = ask(server, path, {"If-None-Match": value})
        assert (answer.status, answer.body) == (304, b"")
    assert ask(server, path, {"If-None-Match": '"x"'}).status == 200
    manifest = f"/v2/a/b/manifests/{pulled.index}"
    assert ask(server, manifest, {"If-None-Match": f'"{pulled.index}"'}).status == 304


# Ranges


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        pytest.param("bytes=0-0", 0, 1, id="first byte"),
        pytest.param("bytes=5-9", 5, 10, id="closed"),
        pytest.param("bytes=100000-2900000", 100_000, 2_900_001, id="closed, sent by the kernel"),
        pytest.param("bytes=7-", 7, None, id="open"),
        pytest.param("bytes=-3", -3, None, id="suffix"),
        pytest.param("bytes=-99999999", 0, None, id="suffix longer than the blob"),
        pytest.param("bytes=10-99999999", 10, None, id="end beyond the blob"),
        pytest.param("Bytes= 5-9 ", 5, 10, id="spelled otherwise"),
    ],
)
def test_ranges(
    server: BlobServer, pulled: Pulled, asked: str, start: int, end: int | None
) -> None:
    answer = ask(server, f"/v2/a/b/blobs/{pulled.layers[0]}", {"Range": asked})
    wanted = pulled.large[start:end]
    size = len(pulled.large)
    first = start % size if start < 0 else start
    assert answer.status == 206
    assert answer.headers["Content-Range"] == f"bytes {first}-{first + len(wanted) - 1}/{size}"
    assert answer.headers["Content-Length"] == str(len(wanted))
    assert answer.body == wanted


@pytest.mark.parametrize(
    "asked",
    [
        "bytes=9-5",
        "bytes=-",
        "bytes=0-1,3-4",
        "lines=0-1",
        "bytes",
        "bytes=a-b",
        "bytes=\u0661-",
        "bytes=" + "9" * 5000 + "-",
    ],
)
def test_what_is_no_range_gets_all(server: BlobServer, pulled: Pulled, asked: str) -> None:
    headers = {"Range": asked.encode().decode("latin-1")}
    answer = ask(server, f"/v2/a/b/blobs/{pulled.layers[0]}", headers)
    assert (answer.status, answer.body) == (200, pulled.large)


@pytest.mark.parametrize("beyond", [0, 1, 10**18])
def test_a_range_outside_of_the_blob(server: BlobServer, pulled: Pulled, beyond: int) -> None:
    size = len(pulled.large)
    path = f"/v2/a/b/blobs/{pulled.layers[0]}"
    answer = ask(server, path, {"Range": f"bytes={size + beyond}-"})
    assert (answer.status, answer.code) == (416, "RANGE_INVALID")
    assert answer.headers["Content-Range"] == f"bytes */{size}"
    assert ask(server, path, {"Range": "bytes=-0"}).status == 416


def test_if_range(server: BlobServer, pulled: Pulled) -> None:
    path = f"/v2/a/b/blobs/{pulled.layers[0]}"
    fits = {"Range": "bytes=0-3", "If-Range": f'"{pulled.layers[0]}"'}
    assert ask(server, path, fits).body == pulled.large[:4]
    for other in ('"x"', f'W/"{pulled.layers[0]}"', "Tue, 24 Nov 2026 00:00:00 GMT"):
        answer = ask(server, path, {"Range": "bytes=0-3", "If-Range": other})
        assert (answer.status, len(answer.body)) == (200, len(pulled.large))


def test_ranges_are_not_for_head(server: BlobServer, pulled: Pulled) -> None:
    answer = ask(server, f"/v2/a/b/blobs/{pulled.layers[0]}", {"Range": "bytes=0-3"}, method="HEAD")
    assert (answer.status, answer.headers["Content-Length"]) == (200, str(len(pulled.large)))


# Whose content it is


def test_another_registry_has_nothing_of_it(server: BlobServer, pulled: Pulled) -> None:
    for kind, target in (
        ("manifests", "1"),
        ("manifests", pulled.index),
        ("blobs", pulled.layers[0]),
    ):
        answer = ask(server, f"/v2/a/b/{kind}/{target}?ns=example.org")
        assert answer.status == 404


def test_another_repository_has_nothing_of_it(server: BlobServer, pulled: Pulled) -> None:
    small = pulled.layers[1]
    assert ask(server, f"/v2/c/d/blobs/{small}").status == 404
    assert ask(server, f"/v2/c/d/manifests/{pulled.index}").status == 404
    assert ask(server, f"/v2/none/blobs/{small}").status == 404


def test_a_layer_that_two_images_share_belongs_to_both(server: BlobServer, pulled: Pulled) -> None:
    """The second pull found it here: no registry was asked for it under that name."""
    assert not pulled.store.confirmed(Digest(pulled.layers[0]), f"{pulled.host}/c/d")
    assert ask(server, f"/v2/c/d/blobs/{pulled.layers[0]}").body == pulled.large


def test_registries_that_differ_are_told_apart(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    bodies = {}
    for registry in ("one.example", "two.example"):
        body = json.dumps({"schemaVersion": 2, "manifests": [], "x": registry}).encode()
        bodies[registry] = body
        digest = stores.commit(store, body)
        store.confirm(digest, f"{registry}/a")
        store.record_reference(stores.record(digest, f"{registry}/a:1"))
        store.record_reference(stores.record(digest, f"{registry}/a:{registry[:3]}"))
    with BlobServer(store) as server:
        for registry, body in bodies.items():
            assert ask(server, f"/v2/a/manifests/1?ns={registry}").body == body
            assert ask(server, f"/v2/a/manifests/{registry[:3]}").body == body
            # A path that begins with the registry names it as well, for clients without ?ns=.
            assert ask(server, f"/v2/{registry}/a/manifests/1").body == body
            assert ask(server, f"/v2/a/manifests/{Digest.of(body)}").body == body
        answer = ask(server, "/v2/a/manifests/1")
        assert answer.status == 404
        message = json.loads(answer.body)["errors"][0]["message"]
        assert "one.example/a, two.example/a" in message
        assert "?ns=" in message


def test_docker_hub_by_its_names(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    digest = stores.commit(store, b'{"schemaVersion":2,"manifests":[]}')
    store.record_reference(stores.record(digest, "docker.io/library/debian:12"))
    with BlobServer(store) as server:
        for path in (
            "library/debian/manifests/12?ns=docker.io",
            "library/debian/manifests/12?ns=registry-1.docker.io",
            "library/debian/manifests/12",
            "debian/manifests/12",
        ):
            assert ask(server, f"/v2/{path}").status == 200, path
        assert ask(server, "/v2/debian/manifests/12?ns=docker.io").status == 404


def test_records_are_seen_as_they_come_and_go(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    with BlobServer(store) as server:
        for number in range(3):
            body = json.dumps({"schemaVersion": 2, "manifests": [], "n": number}).encode()
            digest = stores.commit(store, body)
            assert ask(server, "/v2/a/manifests/1").body != body
            store.record_reference(stores.record(digest, "example.org/a:1"))
            assert ask(server, "/v2/a/manifests/1").body == body
        store.remove_reference("example.org/a:1")
        assert ask(server, "/v2/a/manifests/1").status == 404


def test_an_image_from_disk_has_no_repository(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    digest = stores.commit(store, b'{"schemaVersion":2,"manifests":[]}')
    store.confirm(digest, "oci:/srv/layout")
    store.record_reference(stores.record(digest, "oci:/srv/layout:1"))
    with BlobServer(store) as server:
        assert ask(server, f"/v2/srv/layout/blobs/{digest}").status == 404
        assert ask(server, "/v2/srv/layout/manifests/1").status == 404


# What is asked wrongly


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 404),
        ("/v1/", 404),
        ("/v2/a/b", 404),
        ("/v2/a/b/manifests/", 404),
        ("/v2/a/b/tags/all", 404),
        ("/v2/a/b/uploads/1", 404),
        ("/v2/../../etc/passwd", 404),
        ("/v2/a/../../../etc/blobs/passwd", 400),
        ("/v2/a%2f..%2f..%2fetc/blobs/" + "sha256:" + "0" * 64, 400),
        ("/v2/a/b/blobs/sha256:..", 400),
        ("/v2/a/b/blobs/sha256:..%2f..%2f..%2foci-layout", 400),
        ("/v2/a/b/blobs/md5:" + "0" * 32, 400),
        ("/v2/a/b/blobs/sha256:" + "A" * 64, 400),
        ("/v2/a/b/blobs/1", 400),
        ("/v2/A/b/manifests/1", 400),
        ("/v2/a//b/manifests/1", 400),
        ("/v2/a%0ab/manifests/1", 400),
        ("/v2/a/b/manifests/1?ns=../x", 400),
        ("/v2/a/b/manifests/1?ns=a%0ab", 400),
        ("/v2/" + "a" * 300 + "/manifests/1", 400),
        ("/v2/a/b/manifests/" + "1" * 200, 404),
        ("/v2/a/b/blobs/sha256:" + "0" * 64, 404),
    ],
)
def test_strange_paths(server: BlobServer, path: str, status: int) -> None:
    """Sent as they are: a client library would mend some of them."""
    with dial(server) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        response = http.client.HTTPResponse(connection)
        response.begin()
        body = response.read()
    assert response.status in (status, 404)
    assert json.loads(body)["errors"][0]["code"]
    assert b"imageLayoutVersion" not in body
    assert b"root:" not in body


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_nothing_is_written(server: BlobServer, pulled: Pulled, method: str) -> None:
    answer = ask(server, f"/v2/a/b/blobs/{pulled.layers[0]}", method=method)
    assert (answer.status, answer.code) == (405, "UNSUPPORTED")
    assert answer.headers["Allow"] == "GET, HEAD"
    assert pulled.store.has(Digest(pulled.layers[0]))


def test_a_damaged_blob_is_put_aside_and_not_sent(tmp_path: Path) -> None:
    """What another boot wrote is proven before it is sent."""
    store = Store.open(tmp_path / "store", boot=stores.FIRST_BOOT)
    good, bad = stores.pattern(100_000, 1), stores.pattern(100_000, 2)
    for data in (good, bad):
        store.confirm(stores.commit(store, data), "example.org/a")
    damaged = store.blob_path(Digest.of(bad))
    damaged.chmod(0o600)
    damaged.write_bytes(bad[:-1] + b"\0")
    later = Store.open(tmp_path / "store", boot=stores.NEXT_BOOT)
    with BlobServer(later) as server:
        assert ask(server, f"/v2/a/blobs/{Digest.of(good)}").body == good
        assert ask(server, f"/v2/a/blobs/{Digest.of(bad)}").status == 404
    assert not damaged.exists()


# Blobs on their way

ARRIVING = stores.pattern(2_500_000, seed=3)
DIGEST = Digest.of(ARRIVING)
PATH = f"/v2/a/b/blobs/{DIGEST}"
HALF = 1_200_000


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


@pytest.fixture
def mirror(store: Store) -> Iterator[BlobServer]:
    """A server while `example.org/a/b:1` is being pulled."""
    limits = ServeLimits(grace_seconds=0.3)
    lease = store.lease("pull example.org/a/b:1", digests=[DIGEST])
    with lease, BlobServer(store, limits=limits) as server:
        yield server


def test_an_arriving_blob_is_passed_on_as_it_comes(store: Store, mirror: BlobServer) -> None:
    ingest = store.acquire(DIGEST, len(ARRIVING))
    assert ingest is not None
    with ingest:
        ingest.write(ARRIVING[:HALF])
        with reading(mirror, PATH) as response:
            assert response.status == 200
            assert response.headers["Content-Length"] == str(len(ARRIVING))
            # Not before this half has been read is the other one there to be sent.
            first = response.read(HALF)
            ingest.write(ARRIVING[HALF:])
            ingest.commit()
            assert first + response.read() == ARRIVING
    assert ask(mirror, PATH).body == ARRIVING


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [("bytes=5-9", 5, 10), (f"bytes={HALF}-", HALF, None), ("bytes=-7", -7, None)],
)
def test_parts_of_an_arriving_blob(
    store: Store, mirror: BlobServer, asked: str, start: int, end: int | None
) -> None:
    ingest = store.acquire(DIGEST, len(ARRIVING))
    assert ingest is not None
    with ingest:
        ingest.write(ARRIVING[:HALF])
        with reading(mirror, PATH, {"Range": asked}) as response:
            assert response.status == 206
            ingest.write(ARRIVING[HALF:])
            ingest.commit()
            assert response.read() == ARRIVING[start:end]


def test_head_of_an_arriving_blob(store: Store, mirror: BlobServer) -> None:
    ingest = store.acquire(DIGEST, len(ARRIVING))
    assert ingest is not None
    with ingest:
        answer = ask(mirror, PATH, method="HEAD")
        assert (answer.status, answer.headers["Content-Length"]) == (200, str(len(ARRIVING)))


def test_a_generation_that_fails_cuts_the_connection(store: Store, mirror: BlobServer) -> None:
    ingest = store.acquire(DIGEST, len(ARRIVING))
    assert ingest is not None
    with ingest:
        ingest.write(bytes(HALF))
        with reading(mirror, PATH) as response:
            assert response.read(HALF) == bytes(HALF)
            ingest.restart()
            with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
                response.read()


def test_a_body_never_ends_whole_before_it_is_proven(store: Store, mirror: BlobServer) -> None:
    """All bytes are there, and wrong: the client must not get the last of them."""
    ingest = store.acquire(DIGEST, len(ARRIVING))
    assert ingest is not None
    wrong = bytes(len(ARRIVING))
    with ingest, dial(mirror) as connection:
        ingest.write(wrong)
        connection.sendall(f"GET {PATH} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        connection.settimeout(0.5)
        received = b""
        with pytest.raises(TimeoutError):
            while data := connection.recv(1 << 20):
                received += data
        body = received.partition(b"\r\n\r\n")[2]
        assert 0 < len(body) < len(wrong)
        ingest.restart()
        connection.settimeout(60)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""


def test_a_writer_that_dies_cuts_the_connection(store: Store, mirror: BlobServer) -> None:
    ingest = store.acquire(DIGEST, len(ARRIVING))
    assert ingest is not None
    with ingest:
        ingest.write(ARRIVING[:HALF])
        with reading(mirror, PATH) as response:
            response.read(HALF)
            ingest.close()
            with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
                response.read()
    assert ask(mirror, PATH).status == 404, "nobody is writing it any more"


def test_a_blob_that_has_not_begun_is_not_waited_for(store: Store, mirror: BlobServer) -> None:
    answer = ask(mirror, PATH)
    assert (answer.status, answer.code) == (404, "BLOB_UNKNOWN")


def test_what_is_pulled_for_another_repository_is_not_passed_on(
    store: Store, mirror: BlobServer
) -> None:
    ingest = store.acquire(DIGEST, len(ARRIVING))
    assert ingest is not None
    with ingest:
        for path in (f"/v2/a/c/blobs/{DIGEST}", f"{PATH}?ns=other.example"):
            assert ask(mirror, path).status == 404
        assert ask(mirror, f"{PATH}?ns=example.org", method="HEAD").status == 200


def test_many_follow_one_blob(store: Store, tmp_path: Path) -> None:
    """More of them than there are threads to follow with."""
    limits = ServeLimits(followers=2)
    bodies: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with (
        store.lease("pull example.org/a/b:1", digests=[DIGEST]),
        BlobServer(store, limits=limits) as server,
    ):
        ingest = store.acquire(DIGEST, len(ARRIVING))
        assert ingest is not None
        clients = [
            threading.Thread(target=lambda: bodies.put(ask(server, PATH).body)) for _ in range(6)
        ]
        with ingest:
            ingest.write(ARRIVING[:HALF])
            for client in clients:
                client.start()
            ingest.write(ARRIVING[HALF:])
            ingest.commit()
        assert [bodies.get(timeout=60) == ARRIVING for _ in clients] == [True] * 6
        for client in clients:
            client.join()


# Peers of one run


@contextlib.contextmanager
def peer(store: Store, *digests: str, **settings: object) -> Iterator[BlobServer]:
    wanted = set(digests)
    limits = ServeLimits(**settings)  # type: ignore[arg-type]
    with BlobServer(store, allowed=lambda digest: digest in wanted, limits=limits) as server:
        yield server


def test_a_peer_serves_what_the_run_is_about_and_nothing_else(store: Store) -> None:
    other = stores.commit(store, b"not of this run")
    store.confirm(other, "example.org/a/b")
    stores.commit(store, ARRIVING)
    with peer(store, DIGEST) as server:
        assert ask(server, PATH).body == ARRIVING
        assert ask(server, f"/v2/a/b/blobs/{other}").status == 404


def test_a_peer_holds_a_request_until_the_blob_begins(store: Store) -> None:
    with peer(store, DIGEST) as server, dial(server) as connection:
        connection.sendall(f"GET {PATH} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(60)
        ingest = store.acquire(DIGEST, len(ARRIVING))
        assert ingest is not None
        with ingest:
            response = http.client.HTTPResponse(connection)
            response.begin()
            assert response.status == 200
            ingest.write(ARRIVING)
            ingest.commit()
            assert response.read() == ARRIVING


def test_a_blob_passes_through_a_chain_of_peers_while_it_arrives(
    store: Store, tmp_path: Path
) -> None:
    """The third has bytes of which the first does not have the end yet."""
    second = Store.open(tmp_path / "second")
    descriptor = Descriptor(OCI_LAYER, DIGEST, len(ARRIVING))
    ingest = store.acquire(DIGEST, len(ARRIVING))
    assert ingest is not None
    with ingest, peer(store, DIGEST) as first, peer(second, DIGEST) as between:
        registry = Registry(RegistrySettings())
        fetcher = Fetcher(second, [registry])
        reference = Reference.parse(f"{first.address}/a/b:1")
        with ThreadPoolExecutor(1) as pool:
            # Asked before there is anything: both servers hold.
            fetched = pool.submit(
                fetcher.fetch,
                reference,
                descriptor,
                report=lambda *_: None,
                cancelled=lambda: False,
            )
            ingest.write(ARRIVING[:HALF])
            with reading(between, PATH) as response:
                start = response.read(HALF)
                assert not fetched.done()
                ingest.write(ARRIVING[HALF:])
                ingest.commit()
                assert start + response.read() == ARRIVING
            assert fetched.result(timeout=60).fetched_bytes == len(ARRIVING)
        registry.close()
    assert second.has(DIGEST, len(ARRIVING))


def test_a_peer_holds_requests_for_manifests_too(store: Store) -> None:
    body = b'{"schemaVersion":2,"manifests":[]}'
    digest = Digest.of(body)
    with peer(store, digest) as server, dial(server) as connection:
        path = f"/v2/a/b/manifests/{digest}"
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        store.put_blob(digest, body)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert (response.status, response.read()) == (200, body)


def test_holding_ends_with_come_again(store: Store) -> None:
    with peer(store, DIGEST, hold_seconds=0.05) as server:
        answer = ask(server, PATH)
    assert (answer.status, answer.code) == (503, "UNAVAILABLE")
    assert answer.headers["Retry-After"] == "1"


def test_no_more_are_held_than_the_limit(store: Store) -> None:
    with peer(store, DIGEST, held=0) as server:
        assert ask(server, PATH).status == 503


def test_a_held_request_whose_client_leaves_is_dropped(store: Store) -> None:
    told: queue.SimpleQueue[Served] = queue.SimpleQueue()
    with BlobServer(store, allowed=lambda _: True, report=told.put) as server:
        with dial(server) as connection:
            connection.sendall(f"GET {PATH} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            connection.settimeout(0.05)
            with pytest.raises(TimeoutError):
                connection.recv(1)
        served = told.get(timeout=60)
    assert (served.path, served.complete) == (PATH, False)


def test_a_token_is_wanted_for_everything(store: Store) -> None:
    stores.commit(store, ARRIVING)
    basic = base64.b64encode(b"any:correct").decode()
    with BlobServer(store, authorize=bearer("correct"), allowed=lambda _: True) as server:
        for path in ("/v2/", PATH, "/v2/a/b/manifests/1", "/none"):
            for header in (None, "Bearer wrong", "Bearer", "Basic !", "Basic eA==", "correct"):
                headers = {} if header is None else {"Authorization": header}
                answer = ask(server, path, headers)
                assert (answer.status, answer.code) == (401, "UNAUTHORIZED"), header
                assert answer.headers["WWW-Authenticate"].startswith("Basic ")
        for header in ("Bearer correct", "bearer correct", f"Basic {basic}"):
            assert ask(server, PATH, {"Authorization": header}).body == ARRIVING


# Connections


def test_too_many_connections_are_told_so(store: Store) -> None:
    with BlobServer(store, limits=ServeLimits(connections=1)) as server:
        connection = http.client.HTTPConnection(*split(server.address), timeout=60)
        connection.request("GET", "/v2/")
        assert connection.getresponse().read() == b"{}"
        with dial(server) as second:
            assert second.recv(1000).startswith(b"HTTP/1.1 503 ")
        connection.close()


def test_a_crowd_that_calls_at_once_gets_through_to_a_server_that_is_busy(store: Store) -> None:
    gate, busy = threading.Event(), threading.Event()

    def stand_still(_: Served) -> None:
        busy.set()
        gate.wait(60)

    with (
        BlobServer(store, limits=ServeLimits(connections=400), report=stand_still) as server,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(gate.set)
        first = stack.enter_context(dial(server))
        first.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
        assert busy.wait(60)
        # Nobody accepts now. Of those for whom there is no room the kernel drops the first packet.
        crowd = [stack.enter_context(socket.socket()) for _ in range(300)]
        for one in crowd:
            one.settimeout(60)
            one.connect(split(server.address))
            assert one.getpeername()
        gate.set()
        for one in crowd:
            one.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
        assert all(one.recv(1000).startswith(b"HTTP/1.1 200 ") for one in crowd)


def test_a_silent_connection_is_ended(store: Store) -> None:
    with BlobServer(store, limits=ServeLimits(header_seconds=0.1)) as server:
        with dial(server) as connection:
            connection.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\nX-Slow:")
            assert connection.recv(1) == b""
        assert ask(server, "/v2/").status == 200


def test_a_connection_that_was_used_is_ended_later(store: Store) -> None:
    limits = ServeLimits(header_seconds=60.0, keepalive_seconds=0.1)
    with BlobServer(store, limits=limits) as server, dial(server) as connection:
        connection.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n")
        received = b""
        while data := connection.recv(4096):
            received += data
        assert received.endswith(b"{}")


def test_a_client_that_does_not_read_is_cut(store: Store) -> None:
    told: queue.SimpleQueue[Served] = queue.SimpleQueue()
    data = stores.pattern(40_000_000)
    digest = stores.commit(store, data)
    limits = ServeLimits(stall_seconds=0.2)
    with (
        BlobServer(store, allowed=lambda _: True, limits=limits, report=told.put) as server,
        socket.socket() as connection,
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(split(server.address))
        connection.sendall(f"GET /v2/a/blobs/{digest} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert told.get(timeout=60).complete is False


@pytest.mark.parametrize(
    "head",
    [
        pytest.param("GET /v2/ HTTP/1.1\r\nHost: x\r\nX: " + "y" * 20_000, id="long header"),
        pytest.param("GET /" + "y" * 20_000 + " HTTP/1.1\r\nHost: x", id="long path"),
        pytest.param("GET /v2/ HTTP/1.1\r\nHost: x" + "\r\nX: y" * 500, id="many headers"),
        pytest.param("nonsense", id="not HTTP"),
    ],
)
def test_a_head_that_is_no_good(store: Store, head: str) -> None:
    with BlobServer(store) as server, dial(server) as connection:
        connection.sendall(f"{head}\r\n\r\n".encode())
        received = b""
        try:
            while data := connection.recv(4096):
                received += data
        except ConnectionResetError:
            assert received == b"" or received.startswith(b"HTTP/1.")
        assert received == b"" or received.split(b" ")[1] == b"400"


def test_what_is_served_is_told(pulled: Pulled) -> None:
    told: list[Served] = []
    with BlobServer(pulled.store, report=told.append) as server:
        ask(server, f"/v2/a/b/blobs/{pulled.layers[0]}?ns={pulled.host}")
        ask(server, "/v2/a/b/manifests/none")
    assert [(one.method, one.path, one.status, one.complete) for one in told] == [
        ("GET", f"/v2/a/b/blobs/{pulled.layers[0]}", 200, True),
        ("GET", "/v2/a/b/manifests/none", 404, True),
    ]
    assert told[0].length == len(pulled.large)


def test_stopping_cuts_what_is_under_way_and_leaves_no_thread(store: Store) -> None:
    before = set(threading.enumerate())
    ingest = store.acquire(DIGEST, len(ARRIVING))
    assert ingest is not None
    server = BlobServer(store, allowed=lambda _: True)
    server.start()
    with ingest, dial(server) as held:
        ingest.write(ARRIVING[:HALF])
        with reading(server, PATH) as response:
            response.read(1000)
            other = Digest.of(b"never comes")
            held.sendall(f"GET /v2/a/blobs/{other} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            server.stop()
            with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
                response.read()
    assert server.wait(0)
    server.stop()
    assert set(threading.enumerate()) == before


def test_it_can_be_started_again(store: Store) -> None:
    server = BlobServer(store)
    for _ in range(2):
        server.start()
        assert ask(server, "/v2/").status == 200
        server.stop()


# Addresses


def test_ipv6(store: Store) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"no IPv6 on loopback: {error}")
    with BlobServer(store, host="::1") as server:
        assert server.address.startswith("[::1]:")
        assert ask(server, "/v2/").status == 200


def test_an_address_that_is_taken(store: Store) -> None:
    with BlobServer(store) as server:
        host, port = split(server.address)
        with pytest.raises(UsageError, match="another program listens there"):
            BlobServer(store, host=host, port=port).start()


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:5001", "127.0.0.1", 5001),
        ("0.0.0.0:80", "0.0.0.0", 80),
        ("localhost", "localhost", 5001),
        (":8080", "127.0.0.1", 8080),
        ("8080", "127.0.0.1", 8080),
        ("[::1]:0", "::1", 0),
        ("[::]", "::", 5001),
        ("::1", "::1", 5001),
        ("", "127.0.0.1", 5001),
    ],
)
def test_listen(text: str, host: str, port: int) -> None:
    assert parse_listen(text) == (host, port)


@pytest.mark.parametrize("text", ["a:b", "a:65536", "a:-1", "[::1", "[::1]5000", "a:\u0661"])
def test_listen_that_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        parse_listen(text)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("[::]", False),
        ("10.1.2.3", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback_host(host) == expected
