"""Every fault of ``http_faults.json`` against a whole fetch: one scenario per row."""

from __future__ import annotations

import gzip
import random
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import (
    DigestMismatchError,
    RegistryError,
    StowrayError,
    UnauthorizedError,
    UnavailableError,
)
from stowray.pipeline.fetch import Fetcher
from stowray.pipeline.reference import Reference
from stowray.pipeline.registry import Registry
from stowray.pipeline.settings import RegistrySettings
from stowray.pipeline.store import Store
from tests.support.registry import FakeRegistry, Fault, digest_of, incompressible
from tests.support.vectors import table

if TYPE_CHECKING:
    from pathlib import Path

    from stowray.pipeline.origin import BlobStream, Resolved
    from stowray.pipeline.source import Source

NAME = "team/app"
DATA = incompressible(400_000)
SIZE = len(DATA)
BLOB = Descriptor("application/octet-stream", Digest.of(DATA), SIZE)
MANIFEST = "/manifests/1"

Scenario = Callable[["Stage"], None]
SCENARIOS: dict[str, Scenario] = {}


class Stage:
    """A registry, and what a client sees of it."""

    def __init__(self, fake: FakeRegistry, store: Store, folder: Path) -> None:
        self.fake = fake
        self.store = store
        self.folder = folder
        self.opened: list[Registry] = []

    @property
    def reference(self) -> Reference:
        return Reference.parse(f"{self.fake.host}/{NAME}:1")

    def registry(self, **settings: Any) -> Registry:
        made = Registry(RegistrySettings(**{"attempts": 4, **settings}), environment={})
        self.opened.append(made)
        return made

    def fetch(self, **settings: Any) -> int:
        """Fetch the blob, check it, and return how often it was tried again."""
        fetcher = Fetcher(
            self.store,
            [self.registry(**settings)],
            RegistrySettings(**{"attempts": 4, **settings}),
            uniform=lambda low, high: 0.0,
        )
        fetched = fetcher.fetch(self.reference, BLOB, report=lambda *_, **__: None)
        assert self.store.blob_path(BLOB.digest).read_bytes() == DATA
        assert list((self.store.path / "ingest").iterdir()) == []
        return fetched.retries

    def resolve(self, **settings: Any) -> Digest:
        return self.registry(**settings).resolve(self.reference).descriptor.digest

    def blob_fault(self, *faults: Fault, repeat: bool = False) -> None:
        self.fake.fault("/blobs/", *faults, repeat=repeat)

    def tag_fault(self, *faults: Fault, repeat: bool = False) -> None:
        self.fake.fault(MANIFEST, *faults, repeat=repeat)

    @property
    def tagged(self) -> str:
        return self.fake.tags[NAME, "1"]

    @property
    def ranges(self) -> list[str | None]:
        return [request.range for request in self.fake.seen("/blobs/")]


def scenario(name: str) -> Callable[[Scenario], Scenario]:
    def register(function: Scenario) -> Scenario:
        SCENARIOS[name] = function
        return function

    return register


def test_every_row_has_a_scenario() -> None:
    assert {row["id"] for row in table("http_faults")["faults"]} == set(SCENARIOS)


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row["id"]) for row in table("http_faults")["faults"]]
)
def test_row(row: dict[str, Any], tmp_path: Path) -> None:
    with FakeRegistry() as fake, Store.open(tmp_path / "store") as store:
        fake.add_blob(DATA)
        fake.add_image(NAME, "1", layers=[])
        stage = Stage(fake, store, tmp_path)
        try:
            SCENARIOS[row["id"]](stage)
        finally:
            for registry in stage.opened:
                registry.close()


# Connections


@scenario("reset-0")
def _(stage: Stage) -> None:
    stage.fake.fault_connections(Fault(cut="reset"), Fault(cut="reset"))
    assert stage.fetch(attempts=6) >= 1


@scenario("reset-mid")
def _(stage: Stage) -> None:
    cuts = [Fault(cut="reset", after=size) for size in (0, 1, SIZE // 2, SIZE - 1)]
    stage.blob_fault(*cuts)
    assert stage.fetch(attempts=6) <= 4


@scenario("fin-mid-nolen")
def _(stage: Stage) -> None:
    stage.blob_fault(Fault(length="none", cut="fin", after=SIZE // 2))
    stage.fetch()
    assert stage.ranges == [None, f"bytes={SIZE // 2}-{SIZE - 1}"]


@scenario("stall-headers")
def _(stage: Stage) -> None:
    stage.blob_fault(Fault(hang=True))
    assert stage.fetch(stall_timeout_seconds=0.5, connect_timeout_seconds=0.5) >= 1


@scenario("trickle")
def _(stage: Stage) -> None:
    stage.blob_fault(Fault(trickle=(1, 0.02)))
    assert stage.fetch(stall_timeout_seconds=0.5, minimum_bytes_per_second=1000) >= 1


@scenario("slow-ok")
def _(stage: Stage) -> None:
    stage.blob_fault(Fault(trickle=(10_000, 0.05)))
    assert stage.fetch(stall_timeout_seconds=1.0, minimum_bytes_per_second=1000) == 0


@scenario("latency")
def _(stage: Stage) -> None:
    stage.fake.fault("/v2/", Fault(delay=0.1), repeat=True)
    assert stage.fetch() == 0


@scenario("conn-reuse-stale")
def _(stage: Stage) -> None:
    registry = stage.registry()
    for _attempt in range(3):
        registry.resolve(stage.reference)
        stage.fake.cut_connections()
    assert stage.fake.count(MANIFEST) == 3


@scenario("drop-98")
def _(stage: Stage) -> None:
    chance = random.Random(7)
    registry = stage.registry(attempts=20)
    fetcher = Fetcher(
        stage.store,
        [registry],
        RegistrySettings(attempts=20),
        uniform=lambda low, high: 0.0,
    )
    layers = []
    for index in range(60):
        data = b"%d" % index * 1000
        layers.append(
            Descriptor("application/octet-stream", Digest(stage.fake.add_blob(data)), len(data))
        )
        if chance.random() < 0.5:
            stage.fake.fault(
                layers[-1].digest,
                *[
                    chance.choice(
                        (
                            Fault(status=503),
                            Fault(cut="reset", after=-1),
                            Fault(cut="fin", after=chance.randrange(len(data))),
                        )
                    )
                    for _ in range(chance.randrange(1, 4))
                ],
            )
    for layer in layers:
        fetcher.fetch(stage.reference, layer, report=lambda *_, **__: None)
        assert layer.digest.matches(stage.store.blob_path(layer.digest).read_bytes())


# Bytes and lengths


@scenario("wrong-then-right")
def _(stage: Stage) -> None:
    stage.blob_fault(Fault(corrupt=3))
    assert stage.fetch() == 1


@scenario("te-chunked")
def _(stage: Stage) -> None:
    stage.blob_fault(Fault(length="chunked"))
    assert stage.fetch() == 0


@scenario("te-cut")
def _(stage: Stage) -> None:
    stage.blob_fault(Fault(length="chunked", cut="fin", after=SIZE // 2))
    assert stage.fetch() == 1


@scenario("ce-gzip")
def _(stage: Stage) -> None:
    stage.blob_fault(Fault(encoding="gzip"))
    stage.fake.fault("/manifests/", Fault(encoding="gzip"), repeat=True)
    assert stage.fetch() == 0
    assert stage.resolve() == stage.tagged
    packed = gzip.compress(DATA, 1)
    layer = Descriptor("x/y", Digest(stage.fake.add_blob(packed)), len(packed))
    stage.blob_fault(Fault(encoding="gzip"))
    with stage.registry().open_blob(stage.reference, layer) as stream:
        assert b"".join(iter(stream.read, b"")) == packed


# Ranges


def _cut_then(stage: Stage, fault: Fault) -> None:
    stage.blob_fault(Fault(cut="fin", after=100_000), fault)
    stage.fetch()
    assert stage.ranges[1] == f"bytes=100000-{SIZE - 1}"


@scenario("range-nototal")
def _(stage: Stage) -> None:
    _cut_then(stage, Fault(no_total=True))
    assert len(stage.ranges) == 2


@scenario("range-short")
def _(stage: Stage) -> None:
    _cut_then(stage, Fault(short_range=50_000))
    assert stage.ranges[2] == f"bytes=150000-{SIZE - 1}"


@scenario("range-multi")
def _(stage: Stage) -> None:
    _cut_then(stage, Fault(multipart=True))
    assert stage.ranges[2] is None


@scenario("range-416b")
def _(stage: Stage) -> None:
    _cut_then(stage, Fault(status=416))
    assert stage.ranges[2] is None


@scenario("range-400-zero")
def _(stage: Stage) -> None:
    stage.fetch()
    assert stage.ranges == [None]


# Statuses


@scenario("500-once")
def _(stage: Stage) -> None:
    stage.blob_fault(Fault(status=500))
    assert stage.fetch() == 1


@scenario("500-always")
def _(stage: Stage) -> None:
    stage.blob_fault(Fault(status=500), repeat=True)
    with pytest.raises(UnavailableError):
        stage.fetch()
    assert stage.resolve() == stage.tagged


@scenario("429-secs")
def _(stage: Stage) -> None:
    stage.blob_fault(Fault(status=429, headers=(("Retry-After", "1"),)))
    assert stage.fetch() == 1
    first, second = stage.fake.seen("/blobs/")
    assert second.time - first.time >= 1.0


@scenario("429-forever")
def _(stage: Stage) -> None:
    stage.blob_fault(Fault(status=429), repeat=True)
    with pytest.raises(UnavailableError, match="rate limited"):
        stage.fetch()


@scenario("401-first")
def _(stage: Stage) -> None:
    stage.fake.auth = "bearer"
    registry = stage.registry(connections=8)
    threads = [threading.Thread(target=lambda: registry.resolve(stage.reference)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stage.fake.count("/token") == 1


@scenario("401-loop")
def _(stage: Stage) -> None:
    stage.fake.auth = "bearer"
    stage.fake.token_lifetime = -1.0
    with pytest.raises(UnauthorizedError):
        stage.resolve()
    assert stage.fake.count("/token") <= 4


@scenario("403-head")
def _(stage: Stage) -> None:
    body = b'{"errors":[{"code":"DENIED","message":"blocked by policy"}]}'
    stage.tag_fault(Fault(status=403, body=body), repeat=True)
    with pytest.raises(UnauthorizedError, match="blocked by policy"):
        stage.resolve()
    assert [request.method for request in stage.fake.seen(MANIFEST)] == ["HEAD", "GET"]


@scenario("token-500")
def _(stage: Stage) -> None:
    stage.fake.auth = "bearer"
    registry = stage.registry(attempts=2)
    stage.fake.fault("/token", Fault(status=500), Fault(status=500))
    with pytest.raises(UnavailableError):
        registry.resolve(stage.reference)
    assert registry.resolve(stage.reference).descriptor.digest == stage.tagged


@scenario("token-redirect-ssrf")
def _(stage: Stage) -> None:
    stage.fake.auth = "bearer"
    location = (("Location", "http://169.254.169.254/token"),)
    stage.fake.fault("/token", Fault(status=307, headers=location), repeat=True)
    with pytest.raises(RegistryError, match="refused"):
        stage.resolve()


# Redirects


@scenario("redir-head")
def _(stage: Stage) -> None:
    stage.fake.redirect = True
    stage.fetch()
    assert {request.method for request in stage.fake.seen("/cdn/")} == {"GET"}


@scenario("redir-loop")
def _(stage: Stage) -> None:
    location = (("Location", f"/v2/{NAME}/blobs/{BLOB.digest}"),)
    stage.blob_fault(Fault(status=302, headers=location), repeat=True)
    with pytest.raises(RegistryError, match="10 redirects"):
        stage.fetch()


@scenario("redir-downgrade")
def _(stage: Stage) -> None:
    with _secure(stage) as (secure, ca_file):
        secure.fault("/blobs/", Fault(status=302, headers=(("Location", f"{stage.fake.url}/x"),)))
        reference = Reference.parse(f"{secure.host}/{NAME}:1")
        with pytest.raises(RegistryError, match="https to http"):
            stage.registry(ca_file=ca_file).open_blob(reference, BLOB)


@scenario("redir-noloc")
def _(stage: Stage) -> None:
    stage.blob_fault(Fault(status=302), repeat=True)
    with pytest.raises(RegistryError, match="nowhere"):
        stage.fetch()


# Manifests


@scenario("dcd-mismatch")
def _(stage: Stage) -> None:
    header = (("Docker-Content-Digest", digest_of(b"other")),)
    stage.fake.fault(MANIFEST, Fault(status=405), method="HEAD")
    stage.fake.fault(MANIFEST, Fault(headers=header), method="GET", repeat=True)
    with pytest.raises(DigestMismatchError):
        stage.resolve()


@scenario("dcd-algo")
def _(stage: Stage) -> None:
    body = stage.fake.manifests[NAME, stage.tagged][1]
    header = (("Docker-Content-Digest", digest_of(body, "sha512")),)
    stage.fake.fault("/manifests/", Fault(headers=header), repeat=True)
    assert stage.registry().manifest(stage.reference, Digest(stage.tagged)) == body


@scenario("ct-params")
def _(stage: Stage) -> None:
    media_type = stage.fake.manifests[NAME, stage.tagged][0]
    header = (("Content-Type", f"{media_type}; charset=utf-8"),)
    stage.tag_fault(Fault(headers=header), repeat=True)
    resolved = stage.registry().resolve(stage.reference)
    assert resolved.descriptor.media_type == media_type


@scenario("html-200")
def _(stage: Stage) -> None:
    header = (("Content-Type", "text/html"),)
    stage.tag_fault(Fault(status=200, headers=header, body=b"<html>"), repeat=True)
    with pytest.raises(RegistryError, match="web page"):
        stage.resolve()


# TLS and names


def _secure(stage: Stage, **options: Any) -> Any:
    class Secure:
        def __enter__(self) -> tuple[FakeRegistry, str]:
            authority = trustme.CA()
            path = stage.folder / "ca.pem"
            authority.cert_pem.write_to_path(str(path))
            self.fake = FakeRegistry(authority=authority, **options)
            self.fake.__enter__()
            return self.fake, str(path)

        def __exit__(self, *details: object) -> None:
            self.fake.__exit__(*details)

    return Secure()


@scenario("tls-bad")
def _(stage: Stage) -> None:
    with _secure(stage) as (secure, _ca_file):
        reference = Reference.parse(f"{secure.host}/{NAME}:1")
        with pytest.raises(RegistryError, match="not trusted"):
            stage.registry().resolve(reference)
        assert secure.requests == []


@scenario("tls-http")
def _(stage: Stage) -> None:
    # Where plain http is allowed it is spoken; elsewhere a plain answer to TLS is an error.
    assert stage.resolve() == stage.tagged
    from stowray.pipeline.transport import Transport

    transport = Transport(connect_seconds=0.5)
    with pytest.raises(RegistryError, match="no TLS is spoken there"):
        transport.exchange("GET", f"https://{stage.fake.host}/v2/")
    transport.close()


@scenario("dns-fail")
def _(stage: Stage) -> None:
    reference = Reference.parse(f"registry.invalid/{NAME}:1")
    registry = stage.registry(attempts=2)
    with pytest.raises(UnavailableError, match="has no address") as caught:
        registry.resolve(reference)
    assert caught.value.code in ("NAME", "UNREACHABLE")


# Mirrors


@scenario("dead-mirror")
def _(stage: Stage) -> None:
    with FakeRegistry() as mirror, socket.socket() as deaf:
        mirror.add_blob(DATA)
        deaf.bind(("127.0.0.1", 0))
        near = f"127.0.0.1:{deaf.getsockname()[1]}"
        faults = [Fault(status=404), Fault(status=500), Fault(corrupt=1), Fault(hang=True)]
        registry = stage.registry(stall_timeout_seconds=0.3, connect_timeout_seconds=0.3)
        for host, fault in [(near, None), *((mirror.host, fault) for fault in faults)]:
            if fault is not None:
                mirror.fault("/blobs/", fault)
            with Store.open(stage.folder / f"store-{host}-{id(fault)}") as store:
                fetcher = Fetcher(store, [_At(registry, host), registry])
                fetcher.fetch(stage.reference, BLOB, report=lambda *_, **__: None)
                assert store.has(BLOB.digest, SIZE)


@scenario("mirror-lies")
def _(stage: Stage) -> None:
    with FakeRegistry() as mirror:
        mirror.add_blob(incompressible(SIZE, seed=2), BLOB.digest)
        registry = stage.registry()
        fetcher = Fetcher(stage.store, [_At(registry, mirror.host), registry])
        fetched = fetcher.fetch(stage.reference, BLOB, report=lambda *_, **__: None)
        assert fetched.source == stage.fake.host
        assert mirror.count(MANIFEST) == 0


class _At:
    """A registry asked at another host, as a mirror is."""

    def __init__(self, registry: Registry, host: str) -> None:
        self._registry = registry
        self._reference = Reference.parse(f"{host}/{NAME}:1")

    def open_blob(
        self,
        reference: Source,
        descriptor: Descriptor,
        offset: int = 0,
        *,
        cancelled: Callable[[], bool] | None = None,
    ) -> BlobStream:
        return self._registry.open_blob(self._reference, descriptor, offset, cancelled=cancelled)

    def resolve(self, reference: Source, **_: Any) -> Resolved:
        raise StowrayError("mirrors are not asked what a tag names")

    def manifest(
        self, reference: Source, digest: Digest, size: int | None = None, **_: Any
    ) -> bytes:
        raise StowrayError("not needed here")
