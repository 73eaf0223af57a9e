from __future__ import annotations

import base64
import gzip
import json
import pickle
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import (
    ContentError,
    DigestMismatchError,
    ManifestError,
    NotFoundError,
    RegistryError,
    SizeMismatchError,
    UnauthorizedError,
    UnavailableError,
    UsageError,
)
from stowray.pipeline.reference import Reference
from stowray.pipeline.registry import Registry
from stowray.pipeline.registry_documents import DOCUMENT_LIMIT
from stowray.pipeline.settings import RegistrySettings
from stowray.pipeline.source import DiskImage
from tests.support.registry import (
    DOCKER_MANIFEST,
    OCI_MANIFEST,
    FakeRegistry,
    Fault,
    digest_of,
    incompressible,
)
from tests.support.small import small_tar

if TYPE_CHECKING:
    from pathlib import Path

NAME = "team/app"
LAYER = incompressible(100_000)
MANIFESTS = "/manifests/"

Make = Callable[..., Registry]


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry() as made:
        made.add_image(NAME, "1", layers=[LAYER])
        yield made


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Registry] = []

    def build(environment: dict[str, str] | None = None, **settings: Any) -> Registry:
        defaults: dict[str, Any] = {"attempts": 3, "stall_timeout_seconds": 20.0}
        registry = Registry(
            RegistrySettings(**{**defaults, **settings}), environment=environment or {}
        )
        made.append(registry)
        return registry

    yield build
    for registry in made:
        registry.close()


def reference(fake: FakeRegistry, tag: str = "1") -> Reference:
    return Reference.parse(f"{fake.host}/{NAME}:{tag}")


def pinned(fake: FakeRegistry, digest: str) -> Reference:
    return Reference.parse(f"{fake.host}/{NAME}@{digest}")


def tagged(fake: FakeRegistry, tag: str = "1") -> tuple[Digest, bytes]:
    digest = fake.tags[NAME, tag]
    return Digest(digest), fake.manifests[NAME, digest][1]


def methods(fake: FakeRegistry) -> list[str]:
    return [request.method for request in fake.requests]


# What a tag names


def test_a_head_is_enough(fake: FakeRegistry, make: Make) -> None:
    digest, body = tagged(fake)
    resolved = make().resolve(reference(fake))
    assert resolved.descriptor == Descriptor(OCI_MANIFEST, digest, len(body))
    assert resolved.body is None
    assert methods(fake) == ["HEAD"]


def test_every_type_is_accepted_as_a_value_of_its_own(fake: FakeRegistry, make: Make) -> None:
    make().resolve(reference(fake))
    assert fake.requests[0].accept == (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "*/*",
    )


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(status=405), id="405"),
        pytest.param(Fault(status=403), id="403"),
        pytest.param(Fault(status=400), id="400"),
        pytest.param(Fault(status=501), id="501"),
        pytest.param(Fault(remove=("Docker-Content-Digest",)), id="no digest"),
        pytest.param(Fault(headers=(("Docker-Content-Digest", "md5:0"),)), id="odd digest"),
        pytest.param(Fault(length="chunked"), id="no length"),
        pytest.param(Fault(length=0), id="length 0"),
        pytest.param(Fault(remove=("Content-Type",)), id="no type"),
        pytest.param(Fault(headers=(("Content-Type", "application/json"),)), id="odd type"),
        pytest.param(Fault(encoding="gzip"), id="encoded"),
    ],
)
def test_a_head_that_does_not_tell_all_is_followed_by_a_get(
    fake: FakeRegistry, make: Make, fault: Fault
) -> None:
    digest, body = tagged(fake)
    fake.fault(MANIFESTS, fault, method="HEAD")
    resolved = make().resolve(reference(fake))
    assert methods(fake) == ["HEAD", "GET"]
    assert resolved.descriptor == Descriptor(OCI_MANIFEST, digest, len(body))
    assert resolved.body == body


def test_every_request_for_a_manifest_is_counted(fake: FakeRegistry, make: Make) -> None:
    """As the registry counts: challenges, failed tries and second thoughts are requests too."""
    fake.auth = "bearer"
    digest, body = tagged(fake)
    fake.fault(
        MANIFESTS,
        Fault(status=405),
        Fault(status=503),
        Fault(cut="reset", after=5),
        Fault(status=500),
        Fault(),
        Fault(corrupt=3),
    )
    counted: list[None] = []
    registry = make(attempts=6)
    registry.resolve(reference(fake), asked=lambda: counted.append(None))
    registry.manifest(reference(fake), digest, len(body), asked=lambda: counted.append(None))
    assert len(counted) == fake.count(MANIFESTS) >= 7


def test_what_is_known_by_its_tag_only(fake: FakeRegistry, make: Make) -> None:
    digest, body = tagged(fake)
    fake.fault(str(digest), Fault(status=404), repeat=True)
    assert make().manifest(reference(fake), digest, len(body)) == body


def test_a_head_that_tells_a_digest_of_nothing(fake: FakeRegistry, make: Make) -> None:
    false = Digest("sha256:" + "0" * 64)
    fake.fault(MANIFESTS, Fault(headers=(("Docker-Content-Digest", str(false)),)), repeat=True)
    registry = make()
    assert registry.resolve(reference(fake)).descriptor.digest == false
    with pytest.raises(DigestMismatchError):
        registry.manifest(reference(fake), false)
    # Gone meanwhile is another matter than wrong.
    fake.clear_faults()
    with pytest.raises(NotFoundError):
        registry.manifest(reference(fake), false)


def test_the_reason_of_a_refused_head_comes_from_a_get(fake: FakeRegistry, make: Make) -> None:
    denied = b'{"errors":[{"code":"DENIED","message":"pull access is denied"}]}'
    fake.fault(MANIFESTS, Fault(status=403, body=denied), repeat=True)
    with pytest.raises(UnauthorizedError, match="pull access is denied") as caught:
        make().resolve(reference(fake))
    assert caught.value.registry == fake.host
    assert caught.value.scope == f"repository:{NAME}:pull"
    assert methods(fake) == ["HEAD", "GET"]


def test_a_digest_that_is_not_that_of_the_body(fake: FakeRegistry, make: Make) -> None:
    other = digest_of(b"other")
    fake.fault(MANIFESTS, Fault(status=405), method="HEAD")
    fake.fault(MANIFESTS, Fault(headers=(("Docker-Content-Digest", other),)), method="GET")
    with pytest.raises(DigestMismatchError) as caught:
        make().resolve(reference(fake))
    assert caught.value.expected == other


def test_a_digest_of_another_algorithm_is_checked_as_such(fake: FakeRegistry, make: Make) -> None:
    _, body = tagged(fake)
    sha512 = digest_of(body, "sha512")
    header = Fault(headers=(("Docker-Content-Digest", sha512),))
    fake.fault(MANIFESTS, Fault(status=405), method="HEAD")
    fake.fault(MANIFESTS, header, method="GET")
    assert make().resolve(reference(fake)).descriptor.digest == sha512


@pytest.mark.parametrize(
    "content_type",
    [
        f"{OCI_MANIFEST}; charset=utf-8",
        OCI_MANIFEST.upper(),
        "text/plain",
        "text/plain; charset=utf-8",
        "application/json",
        "application/octet-stream",
        "",
    ],
)
def test_the_type_is_found_whatever_the_header(
    fake: FakeRegistry, make: Make, content_type: str
) -> None:
    fake.fault(MANIFESTS, Fault(headers=(("Content-Type", content_type),)), repeat=True)
    assert make().resolve(reference(fake)).descriptor.media_type == OCI_MANIFEST


def test_a_web_page_is_no_manifest(fake: FakeRegistry, make: Make) -> None:
    page = Fault(status=200, headers=(("Content-Type", "text/html"),), body=b"<html>Log in</html>")
    fake.fault(MANIFESTS, page, repeat=True)
    registry = make()
    with pytest.raises(RegistryError, match="web page"):
        registry.resolve(reference(fake))
    with pytest.raises(ContentError):
        registry.manifest(reference(fake), tagged(fake)[0])


def test_a_missing_tag_names_reference_and_registry(fake: FakeRegistry, make: Make) -> None:
    with pytest.raises(NotFoundError) as caught:
        make().resolve(reference(fake, "none"))
    assert f"{fake.host}/{NAME}:none" in str(caught.value)
    assert "check name and tag" in str(caught.value)
    assert caught.value.where == fake.host
    assert methods(fake) == ["HEAD"]


def test_a_tag_is_never_looked_for_among_the_blobs(fake: FakeRegistry, make: Make) -> None:
    fake.fault(MANIFESTS, Fault(status=503), Fault(status=500), repeat=False)
    make().resolve(reference(fake))
    fake.fault(MANIFESTS, Fault(status=404), repeat=True)
    with pytest.raises(NotFoundError):
        make().resolve(reference(fake))
    assert fake.count("/blobs/") == 0


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 522])
def test_what_passes_is_tried_again(fake: FakeRegistry, make: Make, status: int) -> None:
    fake.fault(MANIFESTS, Fault(status=status))
    assert make().resolve(reference(fake)).descriptor.digest == tagged(fake)[0]


def test_what_does_not_pass_ends(fake: FakeRegistry, make: Make) -> None:
    fake.fault(MANIFESTS, Fault(status=500, body=b"boom"), repeat=True)
    with pytest.raises(UnavailableError) as caught:
        make(attempts=2).resolve(reference(fake))
    assert caught.value.status == 500
    # HEAD and GET for the reason, twice.
    assert methods(fake) == ["HEAD", "GET", "HEAD", "GET"]
    assert "boom" in str(caught.value)


def test_a_rate_limit_ends_typed(fake: FakeRegistry, make: Make) -> None:
    fake.fault(MANIFESTS, Fault(status=429), repeat=True)
    with pytest.raises(UnavailableError, match="rate limited"):
        make(attempts=2).resolve(reference(fake))


def test_a_resolution_can_be_cancelled(fake: FakeRegistry, make: Make) -> None:
    from stowray.pipeline.errors import CancelledError

    fake.fault(MANIFESTS, Fault(hang=True))
    with pytest.raises(CancelledError):
        make().resolve(reference(fake), cancelled=lambda: fake.count(MANIFESTS) > 0)


# Documents by digest


def test_a_digest_is_asked_for_once_and_hashed(fake: FakeRegistry, make: Make) -> None:
    digest, body = tagged(fake)
    resolved = make().resolve(pinned(fake, digest))
    assert resolved.body == body
    assert methods(fake) == ["GET"]


def test_other_bytes_are_refused_even_when_the_header_agrees(
    fake: FakeRegistry, make: Make
) -> None:
    digest, body = tagged(fake)
    fake.fault(MANIFESTS, Fault(body=body + b" "), repeat=True)
    with pytest.raises(DigestMismatchError) as caught:
        make().manifest(reference(fake), digest)
    assert caught.value.expected == digest
    assert caught.value.actual == digest_of(body + b" ")


def test_other_bytes_once_are_asked_for_again(fake: FakeRegistry, make: Make) -> None:
    digest, body = tagged(fake)
    fake.fault(MANIFESTS, Fault(corrupt=5))
    assert make().manifest(reference(fake), digest, len(body)) == body


def test_the_size_is_binding(fake: FakeRegistry, make: Make) -> None:
    digest, body = tagged(fake)
    with pytest.raises(SizeMismatchError):
        make().manifest(reference(fake), digest, len(body) + 1)


def test_a_document_among_the_blobs_is_found_last(fake: FakeRegistry, make: Make) -> None:
    digest, body = tagged(fake)
    fake.add_blob(body)
    fake.fault(MANIFESTS, Fault(status=404))
    assert make().manifest(reference(fake), digest) == body
    assert [request.path.split("/")[-2] for request in fake.requests] == ["manifests", "blobs"]


def test_a_missing_digest(fake: FakeRegistry, make: Make) -> None:
    missing = Digest.of(b"missing")
    with pytest.raises(NotFoundError, match=missing):
        make().manifest(reference(fake), missing)


@pytest.mark.parametrize("length", ["right", "chunked", "none"])
@pytest.mark.parametrize("method", ["tag", "digest"])
def test_a_document_has_a_limit(fake: FakeRegistry, make: Make, length: str, method: str) -> None:
    digest, _ = tagged(fake)
    huge = Fault(body=b" " * (DOCUMENT_LIMIT + 1), length=length)
    fake.fault(MANIFESTS, Fault(status=405), method="HEAD")
    fake.fault(MANIFESTS, huge, method="GET", repeat=True)
    with pytest.raises(ManifestError, match="limit"):
        make().resolve(reference(fake) if method == "tag" else pinned(fake, digest))


def test_a_document_of_exactly_the_limit(fake: FakeRegistry, make: Make) -> None:
    body = b"{" + b" " * (DOCUMENT_LIMIT - 2) + b"}"
    digest = fake.add_manifest(NAME, body)
    assert make().manifest(reference(fake), Digest(digest), len(body)) == body


def test_an_encoding_that_nobody_asked_for_is_undone_once(fake: FakeRegistry, make: Make) -> None:
    digest, body = tagged(fake)
    fake.fault(MANIFESTS, Fault(encoding="gzip"), repeat=True)
    registry = make()
    assert registry.manifest(reference(fake), digest, len(body)) == body
    assert registry.resolve(reference(fake)).body == body


def test_an_encoding_that_was_only_claimed(fake: FakeRegistry, make: Make) -> None:
    digest, body = tagged(fake)
    claim = Fault(headers=(("Content-Encoding", "gzip"),))
    fake.fault(MANIFESTS, claim, repeat=True)
    assert make().manifest(reference(fake), digest, len(body)) == body


def test_an_encoded_bomb_is_not_blown_up(fake: FakeRegistry, make: Make) -> None:
    digest, _ = tagged(fake)
    fake.fault(MANIFESTS, Fault(body=bytes(DOCUMENT_LIMIT * 8), encoding="gzip"), repeat=True)
    with pytest.raises(ManifestError, match="limit"):
        make().manifest(reference(fake), digest)


def test_a_tag_that_moves_gives_one_image_or_the_other(fake: FakeRegistry, make: Make) -> None:
    registry = make()
    first = registry.resolve(reference(fake)).descriptor
    fake.add_image(NAME, "1", layers=[b"new"])
    body = registry.manifest(reference(fake), first.digest, first.size)
    assert first.digest.matches(body)


def test_docker_types(fake: FakeRegistry, make: Make) -> None:
    digest, body = tagged(fake)
    fake.manifests[NAME, digest] = (DOCKER_MANIFEST, body)
    assert make().resolve(reference(fake)).descriptor.media_type == DOCKER_MANIFEST


def test_an_image_on_disk_is_not_for_registries(make: Make) -> None:
    with pytest.raises(UsageError):
        make().resolve(DiskImage("oci", "/x"))


# Blobs


def blob(fake: FakeRegistry, data: bytes = LAYER) -> Descriptor:
    return Descriptor("application/octet-stream", Digest(fake.add_blob(data)), len(data))


def read(stream: Any) -> bytes:
    with stream:
        whole = bytearray()
        while piece := stream.read(10_000):
            whole += piece
        return bytes(whole)


def test_a_blob_from_its_start_without_a_range(fake: FakeRegistry, make: Make) -> None:
    stream = make().open_blob(reference(fake), blob(fake))
    assert (stream.offset, stream.source) == (0, fake.host)
    assert read(stream) == LAYER
    assert fake.requests[-1].range is None


def test_a_blob_from_an_offset_by_a_closed_range(fake: FakeRegistry, make: Make) -> None:
    stream = make().open_blob(reference(fake), blob(fake), 1000)
    assert stream.offset == 1000
    assert read(stream) == LAYER[1000:]
    assert fake.requests[-1].range == f"bytes=1000-{len(LAYER) - 1}"


@pytest.mark.parametrize(
    ("fault", "requests"),
    [
        pytest.param(Fault(ignore_range=True), 1, id="ignored"),
        pytest.param(Fault(shift_range=7), 2, id="another part"),
        pytest.param(Fault(shift_range=-7), 2, id="an earlier part"),
        pytest.param(Fault(multipart=True), 2, id="multipart"),
        pytest.param(Fault(remove=("Content-Range",)), 2, id="no Content-Range"),
        pytest.param(Fault(false_range="bytes 1000-x/100000"), 2, id="broken"),
        pytest.param(Fault(false_range="bytes 1000-99999/100001"), 2, id="another total"),
        pytest.param(Fault(false_range="bytes 1000-100000/*"), 2, id="beyond the end"),
        pytest.param(Fault(false_range="bytes 1000-5000/*"), 2, id="another length"),
        pytest.param(Fault(encoding="x", false_range="bytes 1000-99999/100000"), 2, id="encoded"),
        pytest.param(Fault(status=416), 2, id="416"),
        pytest.param(Fault(status=400), 2, id="refused as bad"),
        pytest.param(Fault(status=406), 2, id="refused as not acceptable"),
        pytest.param(Fault(status=501), 2, id="not implemented"),
    ],
)
def test_a_range_that_cannot_be_used_brings_the_whole(
    fake: FakeRegistry, make: Make, fault: Fault, requests: int
) -> None:
    descriptor = blob(fake)
    fake.fault("/blobs/", fault)
    stream = make().open_blob(reference(fake), descriptor, 1000)
    assert stream.offset == 0
    assert read(stream) == LAYER
    assert len(fake.requests) == requests
    assert fake.requests[-1].range is None or requests == 1


@pytest.mark.parametrize("status", [204, 206, 416])
def test_an_answer_that_is_no_blob_may_be_another_one_the_next_time(
    fake: FakeRegistry, make: Make, status: int
) -> None:
    descriptor = blob(fake)
    fake.fault("/blobs/", Fault(status=status))
    registry = make()
    with pytest.raises(UnavailableError, match="not the blob"):
        registry.open_blob(reference(fake), descriptor)
    assert read(registry.open_blob(reference(fake), descriptor)) == LAYER


@pytest.mark.parametrize("fault", [Fault(no_total=True), Fault(short_range=500)])
def test_a_range_that_can_be_used(fake: FakeRegistry, make: Make, fault: Fault) -> None:
    descriptor = blob(fake)
    fake.fault("/blobs/", fault)
    stream = make().open_blob(reference(fake), descriptor, 1000)
    assert stream.offset == 1000
    data = read(stream)
    assert LAYER[1000:].startswith(data)
    assert data
    assert len(fake.requests) == 1


def test_another_length_is_refused_before_a_byte(fake: FakeRegistry, make: Make) -> None:
    descriptor = blob(fake)
    fake.fault("/blobs/", Fault(body=LAYER + b"x"), Fault(body=LAYER[:-1]))
    for _ in range(2):
        with pytest.raises(SizeMismatchError):
            make().open_blob(reference(fake), descriptor)


@pytest.mark.parametrize("header", ["0x10", "1_0", "-1"])
def test_a_length_that_is_no_number(fake: FakeRegistry, make: Make, header: str) -> None:
    descriptor = blob(fake)
    headers = (("Content-Length", header), ("Connection", "close"))
    fake.fault("/blobs/", Fault(length="none", headers=headers))
    with pytest.raises(RegistryError):
        make().open_blob(reference(fake), descriptor)


@pytest.mark.parametrize("length", ["right", "chunked"])
def test_an_encoded_blob_is_decoded_once(fake: FakeRegistry, make: Make, length: str) -> None:
    data = gzip.compress(LAYER, 1)
    descriptor = blob(fake, data)
    fake.fault("/blobs/", Fault(encoding="gzip", length=length))
    assert read(make().open_blob(reference(fake), descriptor)) == data


def test_a_layer_that_is_said_to_be_encoded_is_left_alone(fake: FakeRegistry, make: Make) -> None:
    data = gzip.compress(LAYER, 1)
    descriptor = blob(fake, data)
    fake.fault("/blobs/", Fault(headers=(("Content-Encoding", "gzip"),)))
    assert read(make().open_blob(reference(fake), descriptor)) == data


def test_an_encoded_blob_that_is_cut_or_broken(fake: FakeRegistry, make: Make) -> None:
    descriptor = blob(fake)
    faults = [
        Fault(encoding="gzip", cut="fin", after=500),
        Fault(encoding="gzip", corrupt=5000),
        Fault(headers=(("Content-Encoding", "gzip"),), body=b"x" * 50),
    ]
    fake.fault("/blobs/", *faults)
    for _ in faults:
        with pytest.raises(UnavailableError):
            read(make().open_blob(reference(fake), descriptor))


@pytest.mark.parametrize("encoding", ["br", "zstd", "deflate", "gzip, zstd", "zstd,gzip"])
def test_other_encodings_are_named(fake: FakeRegistry, make: Make, encoding: str) -> None:
    descriptor = blob(fake)
    fake.fault("/blobs/", Fault(headers=(("Content-Encoding", encoding),), body=b"x"))
    with pytest.raises(RegistryError, match=encoding):
        make().open_blob(reference(fake), descriptor)


@pytest.mark.parametrize("status", [204, 206])
def test_another_success_is_not_the_blob(fake: FakeRegistry, make: Make, status: int) -> None:
    descriptor = blob(fake)
    fake.fault("/blobs/", Fault(status=status))
    with pytest.raises(RegistryError):
        make().open_blob(reference(fake), descriptor)


def test_every_refusal_gives_its_permit_back(fake: FakeRegistry, make: Make) -> None:
    descriptor = blob(fake)
    registry = make(connections=1)
    faults = [
        Fault(status=404),
        Fault(status=500, body=b"x" * 200_000),
        Fault(status=416),
        Fault(headers=(("Content-Encoding", "br"),)),
        Fault(cut="reset", after=0),
        Fault(cut="reset", after=-1),
        Fault(body=b"short"),
        Fault(status=307),
        Fault(status=307, headers=(("Location", "ftp://x/"),)),
        Fault(status=200, length="none", headers=(("Content-Length", "x"),)),
    ]
    for fault in faults * 3:
        fake.fault("/blobs/", fault)
        offset = 10 if fault.status == 416 else 0
        try:
            read(registry.open_blob(reference(fake), descriptor, offset))
        except (NotFoundError, RegistryError, SizeMismatchError):
            continue
    assert read(registry.open_blob(reference(fake), descriptor)) == LAYER


# Foreign layers


def test_a_layer_is_not_taken_from_its_urls_unless_allowed(
    fake: FakeRegistry, make: Make, tmp_path: Path
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    missing = Descriptor(
        "application/octet-stream",
        Digest.of(LAYER),
        len(LAYER),
        urls=("http://127.0.0.1:1/x", "https://169.254.169.254/x"),
    )
    with pytest.raises(NotFoundError):
        make().open_blob(reference(fake), missing)
    with pytest.raises(RegistryError, match=r"not public|https to http"):
        make(foreign_urls=True).open_blob(reference(fake), missing)


# Plain HTTP and TLS


def test_plain_http_is_for_loopback_or_by_leave() -> None:
    from stowray.pipeline.client import Client
    from stowray.pipeline.credentials import Credentials
    from stowray.pipeline.limiter import Limiter
    from stowray.pipeline.transport import Transport

    client = Client(
        Transport(), Credentials({}), Limiter(1), plain_http=("r.example", "s.example:5000")
    )
    allowed = {
        "127.0.0.1:5000": True,
        "localhost": True,
        "[::1]:5000": True,
        "r.example": True,
        "r.example:80": True,
        "r.example:5000": False,
        "s.example:5000": True,
        "s.example": False,
        "x.example": False,
        "127.0.0.1.x.example": False,
    }
    assert {host: client.may_be_plain(host) for host in allowed} == allowed
    client.close()


def test_tls_on_loopback(make: Make, tmp_path: Path) -> None:
    authority = trustme.CA()
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    with FakeRegistry(authority=authority) as fake:
        fake.add_image(NAME, "1", layers=[LAYER])
        registry = make(ca_file=str(path))
        assert registry.resolve(reference(fake)).descriptor.digest == tagged(fake)[0]
        with pytest.raises(RegistryError, match="certificate is not trusted"):
            make().resolve(reference(fake))


def test_a_server_that_asks_for_tls_in_plain_words(make: Make, tmp_path: Path) -> None:
    """Go's TLS servers answer a plain request with a 400."""
    authority = trustme.CA()
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    with FakeRegistry(authority=authority) as fake:
        fake.add_image(NAME, "1", layers=[LAYER])
        fake.plain_answer = (
            b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"
        )
        resolved = make(ca_file=str(path)).resolve(reference(fake))
        assert resolved.descriptor.digest == tagged(fake)[0]


def test_a_reset_is_not_taken_for_tls(fake: FakeRegistry, make: Make) -> None:
    fake.fault_connections(Fault(cut="reset"))
    assert make().resolve(reference(fake)).descriptor.digest == tagged(fake)[0]


# What is shown


def test_errors_show_no_control_characters_and_no_endless_bodies(
    fake: FakeRegistry, make: Make
) -> None:
    body = b'{"errors":[{"code":"X\\u001b[2J","message":"\\u0007' + b"m" * 100_000 + b'"}]}'
    fake.fault(MANIFESTS, Fault(status=400, body=body), repeat=True)
    with pytest.raises(RegistryError) as caught:
        make().resolve(reference(fake))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_warnings_are_shown_once(fake: FakeRegistry) -> None:
    shown: list[str] = []
    registry = Registry(RegistrySettings(), environment={}, warn=shown.append)
    header = (("Warning", '299 - "this tag goes away"'),)
    fake.fault(MANIFESTS, Fault(headers=header), repeat=True)
    for _ in range(3):
        registry.resolve(reference(fake))
    registry.close()
    assert shown == [f"{fake.host} warns: this tag goes away"]


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_a_warning_that_quotes_our_login_does_not_show_it(auth: str, tmp_path: Path) -> None:
    shown: list[str] = []
    file = tmp_path / "auth.json"
    with FakeRegistry(auth=auth, users={"ann": "open sesame"}, anonymous=False) as guarded:
        guarded.add_image("a/b", "1", [small_tar({"a": b"1"})])
        pair = base64.b64encode(b"ann:open sesame").decode()
        file.write_text(json.dumps({"auths": {guarded.host: {"auth": pair}}}))
        quotes = f'299 - "you are open sesame, or {pair}"'
        # The very first answer too: it may know the login from an earlier run.
        guarded.fault("/manifests/", Fault(headers=(("Warning", quotes),)), repeat=True)
        registry = Registry(RegistrySettings(authfile=str(file)), environment={}, warn=shown.append)
        registry.resolve(Reference.parse(f"{guarded.host}/a/b:1"))
        registry.close()
    assert shown == [f"{guarded.host} warns: you are REDACTED, or REDACTED"]


def test_errors_survive_pickling_without_secrets(fake: FakeRegistry, make: Make) -> None:
    fake.redirect = True
    descriptor = blob(fake)
    fake.fault("/cdn/", Fault(status=500, body=b"token=hunter2hunter2"), repeat=True)
    with pytest.raises(UnavailableError) as caught:
        make().open_blob(reference(fake), descriptor)
    dumped = pickle.dumps(caught.value)
    assert b"Signature" not in dumped
    assert b"cdnsecret" not in dumped
    assert b"hunter2" not in dumped
    assert str(pickle.loads(dumped)) == str(caught.value)
