"""Pulls through indexes: nested, of two images for one platform, at odds with their configs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.collect import collect, remove
from stowray.pipeline.engine import PullOptions
from stowray.pipeline.errors import PlatformError
from stowray.pipeline.image import manifest_key
from stowray.pipeline.platform import Platform
from stowray.pipeline.records import ReferenceRecord
from stowray.pipeline.reference import Reference
from tests.support.registry import FakeRegistry
from tests.support.small import local_engine, small_tar

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from stowray.pipeline.engine import LocalEngine

ALL = PullOptions(policy="always", unpack=False)


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as made:
        yield made


@pytest.fixture
def engine(workspace: Path) -> Iterator[LocalEngine]:
    with local_engine(workspace / "store") as made:
        yield made


def layer(name: str) -> bytes:
    return small_tar({name: name.encode()})


def of_platform(text: str) -> PullOptions:
    return PullOptions(platform=Platform.parse(text), unpack=False)


@pytest.mark.parametrize("depth", [1, 3])
def test_what_is_between_an_index_and_its_image_is_kept_with_it(
    registry: FakeRegistry, engine: LocalEngine, depth: int
) -> None:
    digest = registry.add_image("a/b", None, [layer("file")])
    inner = digest
    for _ in range(depth):
        inner = registry.add_index("a/b", None, {"linux/amd64": inner})
    registry.add_index("a/b", "1", {"linux/amd64": inner})
    reference = Reference.parse(f"{registry.host}/a/b:1")
    options = of_platform("linux/amd64")
    assert engine.pull(reference, options).digest == digest
    collect(engine.store)
    offline = PullOptions(platform=options.platform, policy="never", unpack=False)
    assert engine.pull(reference, offline).digest == digest
    remove(engine.store, reference.canonical)
    collect(engine.store)
    assert not list((engine.store.path / "blobs" / "sha256").iterdir())


@pytest.mark.parametrize("first", ["one pull", "none"])
def test_all_images_of_one_platform_are_kept_and_the_first_is_the_one(
    registry: FakeRegistry, engine: LocalEngine, first: str
) -> None:
    """As a second compression is added to an index: who knows of it takes the second entry."""
    layers = [layer("file")]
    gzip = registry.add_image("a/b", None, layers)
    zstd = registry.add_image("a/b", None, layers, compression="zstd")
    arm = registry.add_image("a/b", None, layers, architecture="arm64")
    kind, body = registry.manifests["a/b", zstd]
    platform = {"os": "linux", "architecture": "amd64"}
    entry = {"mediaType": kind, "digest": zstd, "size": len(body), "platform": platform}
    registry.add_index("a/b", "1", {"linux/amd64": gzip, "linux/arm64": arm}, extra=[entry])
    reference = Reference.parse(f"{registry.host}/a/b:1")
    if first == "one pull":
        engine.pull(reference, of_platform("linux/amd64"))
    found = engine.pull_all_platforms(reference, ALL)
    assert [result.digest for result in found] == [gzip, arm, zstd]
    before = len(list((engine.store.path / "blobs" / "sha256").iterdir()))
    collect(engine.store)
    assert len(list((engine.store.path / "blobs" / "sha256").iterdir())) == before
    records = {record.platform: record.manifest for record in engine.store.references()}
    assert records == {"linux/amd64": gzip, "linux/arm64": arm}
    offline = PullOptions(platform=Platform.parse("linux/amd64"), policy="never", unpack=False)
    assert engine.pull(reference, offline).digest == gzip
    collect(engine.store)
    assert len(list((engine.store.path / "blobs" / "sha256").iterdir())) == before
    remove(engine.store, reference.canonical)
    collect(engine.store)
    assert not list((engine.store.path / "blobs" / "sha256").iterdir())


@pytest.mark.parametrize(
    ("entry", "config"),
    [
        pytest.param("linux/arm/v6", ("linux", "arm"), id="a config without a variant"),
        pytest.param("linux/arm/v5", ("linux", "arm"), id="an older one"),
        pytest.param(
            "linux/arm64/v8", ("linux", "amd64"), id="that of the machine it was built on"
        ),
    ],
)
def test_an_index_says_what_its_images_are(
    registry: FakeRegistry, engine: LocalEngine, entry: str, config: tuple[str, str]
) -> None:
    system, architecture = config
    digest = registry.add_image("a/b", None, [layer("file")], os=system, architecture=architecture)
    index = registry.add_index("a/b", "1", {entry: digest})
    reference = Reference.parse(f"{registry.host}/a/b:1")
    options = of_platform(entry)
    assert engine.pull(reference, options).digest == digest
    (record,) = engine.store.references()
    assert Platform.parse(record.platform).normalized() == Platform.parse(entry).normalized()
    image = engine.image(reference, options)
    assert image.key() == manifest_key(index, Platform.parse(entry).normalized())


def test_without_an_index_the_config_says_what_the_image_is(
    registry: FakeRegistry, engine: LocalEngine
) -> None:
    registry.add_image("a/b", "1", [layer("file")], architecture="arm64")
    digest = registry.add_image("a/b", None, [layer("file")], architecture="arm64")
    kind, body = registry.manifests["a/b", digest]
    bare = {"mediaType": kind, "digest": digest, "size": len(body)}
    registry.add_index("a/b", "2", {}, extra=[bare])
    for tag in ("1", "2"):
        reference = Reference.parse(f"{registry.host}/a/b:{tag}")
        with pytest.raises(PlatformError):
            engine.pull(reference, of_platform("linux/amd64"))
        assert engine.pull(reference, of_platform("linux/arm64")).digest == digest


def test_a_record_of_before_is_read(registry: FakeRegistry, engine: LocalEngine) -> None:
    registry.add_image("a/b", "1", [layer("file")])
    reference = Reference.parse(f"{registry.host}/a/b:1")
    engine.pull(reference, of_platform("linux/amd64"))
    (record,) = engine.store.references()
    payload = record.payload()
    del payload["others"]
    assert ReferenceRecord.parse(payload) == record
