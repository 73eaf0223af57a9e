"""Each thing that can be wrong has its class and exit status, one sentence, and leaves nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.support import entries, peers
from tests.support.docker_registry import free_port
from tests.support.images import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Layer,
    Layout,
)
from tests.support.registry import FakeRegistry, Fault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.real.conftest import Published
    from tests.support.command import Stowray

pytestmark = pytest.mark.peers


def assert_failed(
    stowray: Stowray, reference: str, status: int, error: str, *arguments: str
) -> None:
    """Exit status, class and one sentence; nothing that was not proven is to be seen."""
    answer = stowray.attempt("pull", "--json", *arguments, reference)
    assert answer.status == status, (answer.text, answer.stderr[-2000:])
    failure = answer.json
    assert failure["reference"]
    assert failure["error"]["type"] == error
    message = failure["error"]["message"]
    assert message, "no sentence"
    assert "Traceback" not in answer.stderr
    assert "\n" not in message.strip()
    assert_nothing_unproven(stowray)


def assert_nothing_unproven(stowray: Stowray) -> None:
    for path in (stowray.store / "blobs").glob("*/*"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    if stowray.store.exists():
        assert stowray.run("images", "--json").lines == []


@pytest.fixture
def fake() -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        yield registry


@pytest.fixture
def layout(workspace: Path) -> Layout:
    return Layout(workspace / "layout")


def serve(fake: FakeRegistry, layout: Layout, descriptor: dict[str, Any]) -> str:
    """Put an image of the layout into the registry that takes anything."""
    for path in (layout.path / "blobs" / "sha256").iterdir():
        fake.add_blob(path.read_bytes())
    body = layout.blob(descriptor["digest"])
    fake.add_manifest("bad/image", body, descriptor["mediaType"], tag="1")
    return f"{fake.host}/bad/image:1"


def good_layer(layout: Layout, text: bytes = b"x") -> Layer:
    return layout.add_layer([entries.directory("etc"), entries.file("etc/file", text)])


# --- the registry ------------------------------------------------------------------------------


def test_unknown_tag_and_repository(stowray: Stowray, publish: Callable[[str], Published]) -> None:
    image = publish("small")
    assert_failed(stowray, f"{image.host}/{image.repository}:no-such", 3, "NotFoundError")
    assert_failed(stowray, f"{image.host}/no/such:1", 3, "NotFoundError")
    absent = f"{image.host}/{image.repository}@sha256:{'0' * 64}"
    assert_failed(stowray, absent, 3, "NotFoundError")


def test_unknown_platform(stowray: Stowray, publish: Callable[[str], Published]) -> None:
    image = publish("multi")
    answer = stowray.attempt("pull", "--json", "--platform", "linux/riscv64", image.reference)
    assert answer.status == 3
    assert answer.json["error"]["type"] == "PlatformError"
    message = answer.json["error"]["message"]
    assert "riscv64" in message
    assert "amd64" in message
    assert "unknown" not in message


def test_refused_connection(stowray: Stowray, workspace: Path) -> None:
    settings = workspace / "settings.toml"
    settings.write_text("[registry]\nattempts = 2\n")
    reference = f"127.0.0.1:{free_port()}/a/b:1"
    assert_failed(stowray, reference, 6, "UnavailableError", "--config", str(settings))


@pytest.mark.parametrize("text", ["a/B", "a/b:", "a/b@sha256:12", "", "a b", "-x/y:"])
def test_bad_reference(local: Stowray, text: str) -> None:
    answer = local.attempt("pull", "--", text)
    assert answer.status == 2
    assert not local.blobs()


# --- bytes that are not what was promised ------------------------------------------------------


@pytest.mark.parametrize("where", [0, 100, -1])
def test_wrong_bytes_in_a_layer(
    stowray: Stowray, fake: FakeRegistry, layout: Layout, where: int
) -> None:
    layer = good_layer(layout, b"some text " * 500)
    reference = serve(fake, layout, layout.add_image([layer]))
    position = where % layer.descriptor["size"]
    digest = layer.descriptor["digest"]
    fake.fault(f"/blobs/{digest}", Fault(corrupt=position), repeat=True)
    assert_failed(stowray, reference, 5, "DigestMismatchError")


def test_other_bytes_of_the_right_form(
    stowray: Stowray, fake: FakeRegistry, layout: Layout
) -> None:
    # Not compressed, so that both have the same size.
    layer, other = (
        layout.add_layer([entries.file("file", text)], "none") for text in (b"right", b"wrong")
    )
    assert layer.descriptor["size"] == other.descriptor["size"]
    body = layout.blob(other.descriptor["digest"])
    reference = serve(fake, layout, layout.add_image([layer]))
    fake.fault(f"/blobs/{layer.descriptor['digest']}", Fault(body=body), repeat=True)
    assert_failed(stowray, reference, 5, "DigestMismatchError")


@pytest.mark.parametrize("change", [1, -1])
def test_wrong_size(stowray: Stowray, fake: FakeRegistry, layout: Layout, change: int) -> None:
    layer = good_layer(layout)
    false = Layer({**layer.descriptor, "size": layer.descriptor["size"] + change}, layer.diff_id, 0)
    reference = serve(fake, layout, layout.add_image([false]))
    assert_failed(stowray, reference, 5, "SizeMismatchError")


def test_body_cut_short_for_ever(
    stowray: Stowray, fake: FakeRegistry, layout: Layout, workspace: Path
) -> None:
    layer = good_layer(layout, bytes(range(256)) * 40)
    reference = serve(fake, layout, layout.add_image([layer]))
    fake.fault(f"/blobs/{layer.descriptor['digest']}", Fault(cut="fin", after=0), repeat=True)
    settings = workspace / "settings.toml"
    settings.write_text("[registry]\nattempts = 2\n")
    assert_failed(stowray, reference, 6, "UnavailableError", "--config", str(settings))


def test_body_cut_once_is_survived(stowray: Stowray, fake: FakeRegistry, layout: Layout) -> None:
    layer = good_layer(layout, bytes(range(256)) * 40)
    reference = serve(fake, layout, layout.add_image([layer]))
    fake.fault(f"/blobs/{layer.descriptor['digest']}", Fault(cut="reset", after=50))
    assert stowray.pull(reference)["layers"][0]["fetched_bytes"] == layer.descriptor["size"]


def test_manifest_by_digest_with_other_bytes(
    stowray: Stowray, fake: FakeRegistry, layout: Layout
) -> None:
    first = layout.add_image([good_layer(layout)])
    second = layout.add_image([good_layer(layout, b"second")])
    serve(fake, layout, first)
    body = layout.blob(second["digest"])
    fake.fault(f"/manifests/{first['digest']}", Fault(body=body), repeat=True)
    reference = f"{fake.host}/bad/image@{first['digest']}"
    assert_failed(stowray, reference, 5, "DigestMismatchError")


def _document(layout: Layout, **changes: Any) -> dict[str, Any]:
    layer = good_layer(layout)
    return {**layout.document(layout.add_image([layer])["digest"]), **changes}


def _raw(document: object) -> bytes:
    return json.dumps(document).encode()


MANIFESTS: dict[str, tuple[Callable[[Layout], bytes], str]] = {
    "over 4 MiB": (
        lambda layout: _raw(_document(layout, annotations={"a": "x" * (4 << 20)})),
        OCI_MANIFEST,
    ),
    "not JSON": (lambda _: b"{", OCI_MANIFEST),
    "not an object": (lambda _: b"[]", OCI_MANIFEST),
    "empty": (lambda _: b"", OCI_MANIFEST),
    "both manifest and index": (
        lambda layout: _raw(_document(layout, manifests=[])),
        OCI_MANIFEST,
    ),
    "media type of another kind": (
        lambda layout: _raw(_document(layout, mediaType=OCI_INDEX)),
        OCI_MANIFEST,
    ),
    "a key twice": (
        lambda layout: _raw(_document(layout)).replace(b"{", b'{"layers": [], ', 1),
        OCI_MANIFEST,
    ),
    "deeply nested": (lambda _: b"[" * 100_000, OCI_MANIFEST),
    "negative size": (
        lambda layout: _raw(
            _document(
                layout,
                layers=[{"mediaType": OCI_LAYER, "digest": f"sha256:{'1' * 64}", "size": -1}],
            )
        ),
        OCI_MANIFEST,
    ),
    "digest that climbs": (
        lambda layout: _raw(
            _document(
                layout,
                layers=[{"mediaType": OCI_LAYER, "digest": "sha256:../../etc/passwd", "size": 1}],
            )
        ),
        OCI_MANIFEST,
    ),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_bad_manifest(stowray: Stowray, fake: FakeRegistry, layout: Layout, name: str) -> None:
    make, media_type = MANIFESTS[name]
    body = make(layout)
    for path in (layout.path / "blobs" / "sha256").iterdir():
        fake.add_blob(path.read_bytes())
    fake.add_manifest("bad/image", body, media_type, tag="1")
    assert_failed(stowray, f"{fake.host}/bad/image:1", 5, "ManifestError")


def test_fewer_diff_ids_than_layers(stowray: Stowray, fake: FakeRegistry, layout: Layout) -> None:
    layers = [good_layer(layout), good_layer(layout, b"two")]
    rootfs = {"type": "layers", "diff_ids": [layers[0].diff_id]}
    reference = serve(fake, layout, layout.add_image(layers, rootfs=rootfs))
    assert_failed(stowray, reference, 5, "ManifestError")


@pytest.mark.parametrize("claimed", ["nobody's", "the lower layer's"])
def test_wrong_diff_id(stowray: Stowray, fake: FakeRegistry, layout: Layout, claimed: str) -> None:
    below, layer = good_layer(layout), good_layer(layout, b"above")
    diff_id = f"sha256:{'3' * 64}" if claimed == "nobody's" else below.diff_id
    false = Layer(layer.descriptor, diff_id, 0)
    reference = serve(fake, layout, layout.add_image([below, false]))
    assert_failed(stowray, reference, 5, "DigestMismatchError")


def test_swapped_diff_ids(stowray: Stowray, fake: FakeRegistry, layout: Layout) -> None:
    one, two = good_layer(layout), good_layer(layout, b"two")
    crossed = [Layer(one.descriptor, two.diff_id, 0), Layer(two.descriptor, one.diff_id, 0)]
    reference = serve(fake, layout, layout.add_image(crossed))
    assert_failed(stowray, reference, 5, "DigestMismatchError")


def test_unknown_media_type_of_a_layer(
    stowray: Stowray, fake: FakeRegistry, layout: Layout
) -> None:
    layer = good_layer(layout)
    strange = {**layer.descriptor, "mediaType": "application/vnd.example.thing+gzip"}
    reference = serve(fake, layout, layout.add_image([Layer(strange, layer.diff_id, 0)]))
    assert_failed(stowray, reference, 5, "ManifestError")


def test_layer_that_is_not_what_its_compression_says(
    stowray: Stowray, fake: FakeRegistry, layout: Layout
) -> None:
    junk = b"\x1f\x8b\x08\x00" + bytes(60)
    descriptor = layout.add_blob(junk, f"{OCI_LAYER}+gzip")
    reference = serve(fake, layout, layout.add_image([Layer(descriptor, f"sha256:{'2' * 64}", 0)]))
    assert_failed(stowray, reference, 5, "LayerError")


def test_layer_that_climbs_out(
    stowray: Stowray, fake: FakeRegistry, layout: Layout, workspace: Path
) -> None:
    (workspace / "victim").write_bytes(b"untouched")
    climbing = layout.add_layer(
        [entries.file("../" * number + "victim", b"changed") for number in range(1, 8)]
    )
    reference = serve(fake, layout, layout.add_image([climbing]))
    assert_failed(stowray, reference, 5, "LayerError")
    assert (workspace / "victim").read_bytes() == b"untouched"


def test_config_that_is_no_config(stowray: Stowray, fake: FakeRegistry, layout: Layout) -> None:
    layer = good_layer(layout)
    document = layout.document(layout.add_image([layer])["digest"])
    document["config"] = layout.add_blob(b'{"rootfs": 1}', OCI_CONFIG)
    reference = serve(fake, layout, layout.add_document(document, OCI_MANIFEST))
    assert_failed(stowray, reference, 5, "ManifestError")


# --- this machine ------------------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    peers.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)])
    try:
        yield folder
    finally:
        peers.run(["umount", "--lazy", str(folder)])


@pytest.mark.root
def test_full_store(stowray: Stowray, publish: Callable[[str], Published], workspace: Path) -> None:
    image = publish("debian")
    with mounted(workspace / "tiny", "size=24m,mode=0700") as tiny:
        stowray.store = tiny / "store"
        answer = stowray.attempt("pull", "--json", image.reference)
        assert answer.status == 7, (answer.text, answer.stderr[-2000:])
        assert answer.json["error"]["type"] == "StorageError"
        assert image.document["layers"][0]["digest"] not in stowray.blobs()
        assert not list((tiny / "store" / "snapshots").glob("*[0-9a-f]"))


@pytest.mark.root
def test_read_only_store(
    stowray: Stowray, publish: Callable[[str], Published], workspace: Path
) -> None:
    with mounted(workspace / "frozen", "ro,size=1m") as frozen:
        stowray.store = frozen / "store"
        answer = stowray.attempt("pull", "--json", publish("small").reference)
        assert answer.status == 7
        assert answer.json["error"]["type"] == "StorageError"


def test_destination_that_is_not_empty(
    local: Stowray, publish: Callable[[str], Published], workspace: Path
) -> None:
    target = workspace / "target"
    target.mkdir()
    (target / "mine").write_bytes(b"precious")
    for command in ("rootfs", "bundle"):
        answer = local.attempt(command, publish("small").reference, target)
        assert answer.status in (2, 7)
        assert str(target) in answer.stderr
        assert [path.name for path in target.iterdir()] == ["mine"]
