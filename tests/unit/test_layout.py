from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import shutil
import tarfile
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowray.pipeline.digest import Digest
from stowray.pipeline.layout import entries, spell
from stowray.pipeline.platform import Platform
from stowray.pipeline.store import Store
from tests.support import peers
from tests.support.stores import record

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stowray.pipeline.records import ReferenceRecord

ONE = Digest.of(b"1")
HEX = "a" * 64

# image-spec annotations.md, org.opencontainers.image.ref.name
GRAMMAR = re.compile(
    r"[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*(?:/[A-Za-z0-9]+(?:(?:[-._:@+]|--)[A-Za-z0-9]+)*)*"
)

NAMES = [
    ("docker.io/library/debian:latest", "docker.io/library/debian:latest"),
    (f"docker.io/library/debian@sha256:{HEX}", f"docker.io/library/debian@sha256:{HEX}"),
    ("127.0.0.1:5000/a/b:1", "127.0.0.1:5000/a/b:1"),
    ("UPPER.example/a--b/c_d:V1.2_x-y", "UPPER.example/a--b/c_d:V1.2_x-y"),
    ("docker.io/library/a__b:1", "docker.io/library/a+5F+5Fb:1"),
    ("docker.io/library/a---b:1", "docker.io/library/a+2D+2D+2Db:1"),
    ("docker.io/library/a:_x", "docker.io/library/a+3A+5Fx"),
    ("docker.io/library/a:x..y-", "docker.io/library/a:x+2E+2Ey+2D"),
    ("[::1]:5000/x:1", "0+5B+3A+3A1+5D+3A5000/x:1"),
]


@pytest.mark.parametrize(("reference", "name"), NAMES)
def test_names_are_the_reference_where_the_grammar_allows_it(reference: str, name: str) -> None:
    assert spell(reference) == name
    assert GRAMMAR.fullmatch(name)


def test_a_platform_is_a_suffix() -> None:
    assert spell("a/b:1", "linux/arm/v7") == "a/b:1+linux.arm.v7"
    assert GRAMMAR.fullmatch(spell("a/b:1", "windows(10.0.17763)/amd64"))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("aB0._-:/@[]+é", min_size=1, max_size=8), min_size=2, max_size=2))
def test_every_name_can_be_looked_up_and_no_two_are_one(texts: list[str]) -> None:
    names = [spell("r" + text) for text in texts]
    assert all(GRAMMAR.fullmatch(name) for name in names)
    assert (names[0] == names[1]) == (texts[0] == texts[1])
    assert GRAMMAR.fullmatch(spell(texts[0]))


@pytest.mark.parametrize(
    ("platforms", "plain"),
    [
        pytest.param(["linux/amd64", "linux/arm64"], "linux/amd64", id="the host's"),
        pytest.param(["linux/arm64", "linux/386"], "linux/386", id="what the host can run"),
        pytest.param(["linux/s390x", "linux/arm64"], "linux/s390x", id="else the oldest"),
        pytest.param(["", "linux/amd64"], "linux/amd64", id="one without platform"),
    ],
)
def test_one_platform_has_the_plain_name(platforms: list[str], plain: str) -> None:
    records = [
        record(ONE, "a/b:1", platform, created=float(number))
        for number, platform in enumerate(platforms)
    ]
    found = entries(records, Platform("linux", "amd64"))
    names = [entry["annotations"]["org.opencontainers.image.ref.name"] for entry in found]
    assert names[platforms.index(plain)] == "a/b:1"
    assert len(set(names)) == 2


def put_image(store: Store, content: str, architecture: str, reference: str) -> ReferenceRecord:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("content")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content.encode()))
    tar = buffer.getvalue()
    layer = gzip.compress(tar, mtime=0)
    config = json.dumps(
        {
            "architecture": architecture,
            "os": "linux",
            "config": {},
            "rootfs": {
                "type": "layers",
                "diff_ids": [f"sha256:{hashlib.sha256(tar).hexdigest()}"],
            },
        }
    ).encode()
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": Digest.of(config),
                "size": len(config),
            },
            "layers": [
                {
                    "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                    "digest": Digest.of(layer),
                    "size": len(layer),
                }
            ],
        }
    ).encode()
    for blob in (layer, config, manifest):
        store.put_blob(Digest.of(blob), blob)
    known = record(
        Digest.of(manifest),
        reference,
        f"linux/{architecture}",
        config=Digest.of(config),
        layers=[Digest.of(layer)],
        size=len(manifest),
    )
    store.record_reference(known)
    return known


@pytest.fixture(scope="module")
def store(fast_tmp: Path) -> Iterator[Store]:
    path = fast_tmp / "layout-peers" / "deep"
    path.mkdir(parents=True)
    with Store.open(path / "store") as store:
        for number, (reference, _) in enumerate(NAMES):
            put_image(store, f"image {number}", "amd64", reference)
        for architecture in ("arm64", "amd64"):
            put_image(store, architecture, architecture, "docker.io/library/multi:1")
        yield store
    shutil.rmtree(path)


class TestPeers:
    @pytest.mark.peers("skopeo")
    @pytest.mark.parametrize("number", range(len(NAMES)))
    def test_skopeo_finds_every_image(self, store: Store, number: int) -> None:
        reference, name = NAMES[number]
        target = store.path.parent / f"copy-{number}"
        command = ["skopeo", "--insecure-policy"]
        peers.run([*command, "copy", f"oci:{store.path}:{name}", f"dir:{target}"])
        (known,) = [one for one in store.references() if one.reference == reference]
        assert Digest.of((target / "manifest.json").read_bytes()) == known.manifest
        said = json.loads(
            peers.run([*command, "inspect", "--config", f"oci:{store.path}:{name}"]).stdout
        )
        assert said["architecture"] == "amd64"

    @pytest.mark.peers("umoci")
    @pytest.mark.parametrize("number", range(len(NAMES)))
    def test_umoci_unpacks_every_image(self, store: Store, number: int) -> None:
        _, name = NAMES[number]
        target = store.path.parent / f"bundles-{number}" / "deep" / "bundle"
        target.parent.mkdir(parents=True)
        peers.run(["umoci", "unpack", "--rootless", "--image", f"{store.path}:{name}", str(target)])
        assert (target / "rootfs" / "content").read_text() == f"image {number}"

    @pytest.mark.peers("skopeo", "umoci")
    @pytest.mark.parametrize("architecture", ["amd64", "arm64"])
    def test_each_platform_has_a_name(self, store: Store, architecture: str) -> None:
        own = Platform.host().architecture
        if own not in ("amd64", "arm64"):
            pytest.skip("the test image has no platform for this host")
        reference = "docker.io/library/multi:1"
        name = spell(reference, "" if architecture == own else f"linux/{architecture}")
        said = peers.run(["skopeo", "inspect", "--config", f"oci:{store.path}:{name}"]).stdout
        assert json.loads(said)["architecture"] == architecture
        target = store.path.parent / f"platform-{architecture}" / "deep" / "bundle"
        target.parent.mkdir(parents=True)
        peers.run(["umoci", "unpack", "--rootless", "--image", f"{store.path}:{name}", str(target)])
        assert (target / "rootfs" / "content").read_text() == architecture
