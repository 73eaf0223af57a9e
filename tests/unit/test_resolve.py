from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest

from stowray.pipeline.clock import SYSTEM_CLOCK
from stowray.pipeline.engine import PullOptions
from stowray.pipeline.errors import (
    CancelledError,
    ManifestError,
    NotFoundError,
    PlatformError,
    UnavailableError,
)
from stowray.pipeline.fetch import Fetcher
from stowray.pipeline.platform import Platform
from stowray.pipeline.reference import Reference
from stowray.pipeline.registry import Registry
from stowray.pipeline.resolve import Request, Resolver
from stowray.pipeline.store import Store
from tests.support.registry import OCI_INDEX, FakeRegistry, Fault, compact
from tests.support.small import local_engine, small_tar

AMD64 = Platform.parse("linux/amd64")


def silent(*_arguments, **_more) -> None:
    return None


class World:
    """A registry, a store, a resolver with a clock that only tests move."""

    def __init__(self, registry: FakeRegistry, store: Store) -> None:
        self.registry = registry
        self.store = store
        self.now = 1000.0
        self.origin = Registry()
        fetcher = Fetcher(store, [self.origin])
        clock = replace(SYSTEM_CLOCK, monotonic=lambda: self.now)
        self.resolver = Resolver(lambda: (self.origin, fetcher), store, clock=clock)

    def request(self, text: str, platform: Platform = AMD64, policy="newer", **more) -> Request:
        reference = Reference.parse(f"{self.registry.host}/{text}")
        return Request(reference, platform, False, policy, silent, more.get("cancelled", bool))

    def image(self, text: str, platform: str = "linux/amd64", **more):
        return self.resolver.image(self.request(text, Platform.parse(platform), **more))

    def asked(self) -> int:
        return self.registry.count("/manifests/")


@pytest.fixture
def world(tmp_path):
    with FakeRegistry() as registry, Store.open(tmp_path / "store") as store:
        made = World(registry, store)
        yield made
        made.origin.close()


LAYER = small_tar({"a": b"1"})


def test_a_tag_is_asked_for_once_per_ttl(world: World) -> None:
    world.registry.add_image("a/b", "1", [LAYER])
    for now, expected in ((1000.0, 1), (1004.9, 1), (1005.0, 2), (500.0, 2), (1009.9, 2)):
        world.now = now
        world.resolver.resolve(world.request("a/b:1"))
        assert world.registry.count("/manifests/1") == expected


def test_a_hundred_waiters_make_one_request(world: World) -> None:
    digest = world.registry.add_image("a/b", "1", [LAYER])
    world.registry.fault("/manifests/1", Fault(delay=0.3))
    answers = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(world.resolver.resolve(world.request("a/b:1")).digest)
        )
        for _ in range(100)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [digest] * 100
    assert world.registry.count("/manifests/1") == 1


def test_one_waiter_leaving_does_not_hurt_the_other(world: World) -> None:
    digest = world.registry.add_image("a/b", "1", [LAYER])
    world.registry.fault("/manifests/1", Fault(delay=0.5))
    answers = []
    stays = threading.Thread(
        target=lambda: answers.append(world.resolver.resolve(world.request("a/b:1")).digest)
    )
    stays.start()
    world.registry.wait_for("/manifests/1")
    with pytest.raises(CancelledError):
        world.resolver.resolve(world.request("a/b:1", cancelled=lambda: True))
    stays.join()
    assert answers == [digest]


def test_an_error_is_not_remembered(world: World) -> None:
    with pytest.raises(NotFoundError):
        world.image("a/b:1")
    world.registry.add_image("a/b", "1", [LAYER])
    assert world.image("a/b:1").layers


def test_a_digest_of_this_repository_needs_no_network_and_of_another_does(world: World) -> None:
    digest = world.registry.add_image("a/b", "1", [LAYER])
    first = world.image(f"a/b@{digest}")
    asked = world.asked()
    world.now += 100
    again = world.image(f"a/b@{digest}")
    assert again == replace(first, reference=again.reference)
    assert world.asked() == asked
    # The same digest under another name was never served by it: content of one repository is
    # not passed off as another's.
    with pytest.raises(NotFoundError):
        world.image(f"other/name@{digest}")
    assert world.asked() > asked


def test_a_digest_from_the_store_keeps_its_media_type(world: World) -> None:
    amd64 = world.registry.add_image("a/b", None, [LAYER])
    index = world.registry.add_index("a/b", None, {"linux/amd64": amd64})
    for digest in (amd64, index):
        first = world.resolver.resolve(world.request(f"a/b@{digest}"))
        world.image(f"a/b@{digest}")
        assert world.resolver.resolve(world.request(f"a/b@{digest}")) == first


def test_the_platform_is_chosen_by_preference(world: World) -> None:
    variants = {
        f"linux/arm/{variant}": world.registry.add_image(
            "a/b", None, [LAYER], architecture="arm", config_overrides={"variant": variant}
        )
        for variant in ("v5", "v6", "v7")
    }
    world.registry.add_index("a/b", "1", variants)
    for wanted, expected in (("v8", "v7"), ("v7", "v7"), ("v6", "v6"), ("v5", "v5")):
        image = world.image("a/b:1", f"linux/arm/{wanted}")
        assert image.manifest_descriptor.digest == variants[f"linux/arm/{expected}"]


def test_no_platform_fits_and_all_are_named(world: World) -> None:
    amd64 = world.registry.add_image("a/b", None, [LAYER])
    arm64 = world.registry.add_image("a/b", None, [LAYER], architecture="arm64")
    world.registry.add_index("a/b", "1", {"linux/amd64": amd64, "linux/arm64": arm64})
    with pytest.raises(PlatformError) as caught:
        world.image("a/b:1", "linux/s390x")
    assert caught.value.offered == "linux/amd64, linux/arm64"


def test_a_single_manifest_for_another_platform_is_refused(world: World) -> None:
    world.registry.add_image("a/b", "1", [LAYER], architecture="arm64")
    with pytest.raises(PlatformError) as caught:
        world.image("a/b:1")
    assert "arm64" in caught.value.offered


def test_attestations_and_unknown_entries_are_neither_chosen_nor_fetched(world: World) -> None:
    amd64 = world.registry.add_image("a/b", None, [LAYER])
    attestation = world.registry.add_image("a/b", None, [LAYER], config_overrides={"x": 1})
    entry = {
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": attestation,
        "size": len(world.registry.manifests["a/b", attestation][1]),
        "platform": {"os": "unknown", "architecture": "unknown"},
        "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
    }
    foreign = {**entry, "mediaType": "application/vnd.example.thing+json"}
    world.registry.add_index("a/b", "1", {"linux/amd64": amd64}, extra=[entry, foreign])
    assert world.image("a/b:1").manifest_descriptor.digest == amd64
    assert world.registry.count(attestation) == 0
    with pytest.raises(PlatformError) as caught:
        world.image("a/b:1", "linux/arm64")
    assert "unknown" not in caught.value.offered


def nested(world: World, depth: int) -> str:
    inner = world.registry.add_image("a/b", None, [LAYER])
    media_type = "application/vnd.oci.image.manifest.v1+json"
    for _ in range(depth):
        size = len(world.registry.manifests["a/b", inner][1])
        entry = {"mediaType": media_type, "digest": inner, "size": size}
        body = compact({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]})
        inner = world.registry.add_manifest("a/b", body, OCI_INDEX, "1")
        media_type = OCI_INDEX
    return inner


def test_an_index_inside_an_index_is_followed(world: World) -> None:
    outer = nested(world, 2)
    image = world.image("a/b:1")
    assert image.resolved.digest == outer
    assert image.layers


def test_indexes_nested_without_end_are_refused(world: World) -> None:
    nested(world, 30)
    with pytest.raises(ManifestError, match="nested"):
        world.image("a/b:1")


def test_an_entry_without_a_platform_is_judged_by_its_config(world: World) -> None:
    arm64 = world.registry.add_image("a/b", None, [LAYER], architecture="arm64")
    amd64 = world.registry.add_image("a/b", None, [LAYER])
    entries = [
        {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest,
            "size": len(world.registry.manifests["a/b", digest][1]),
        }
        for digest in (arm64, amd64)
    ]
    world.registry.add_index("a/b", "1", {}, extra=entries)
    assert world.image("a/b:1").manifest_descriptor.digest == amd64


def test_a_moved_tag_gives_one_consistent_image(world: World) -> None:
    first = world.registry.add_image("a/b", "1", [LAYER])
    second = world.registry.add_image("a/b", None, [small_tar({"a": b"2"})])
    move = Fault(then=lambda: world.registry.tags.update({("a/b", "1"): second}))
    world.registry.fault("/manifests/1", move)
    image = world.image("a/b:1")
    assert image.resolved.digest == image.manifest_descriptor.digest
    assert image.resolved.digest in (first, second)


def test_only_documents_are_fetched(world: World) -> None:
    world.registry.add_image("a/b", "1", [LAYER])
    image = world.image("a/b:1")
    assert [request.path for request in world.registry.seen("/blobs/")] == [
        f"/v2/a/b/blobs/{image.manifest.config.digest}"
    ]


@pytest.mark.parametrize("policy", ["missing", "never"])
def test_what_was_pulled_is_known_without_asking(tmp_path, policy) -> None:
    with FakeRegistry() as registry, local_engine(tmp_path / "store") as engine:
        registry.add_image("a/b", "1", [LAYER])
        reference = Reference.parse(f"{registry.host}/a/b:1")
        pulled = engine.pull(reference, PullOptions())
        before = len(registry.requests)
        registry.add_image("a/b", "1", [small_tar({"a": b"2"})])
        again = engine.pull(reference, PullOptions(policy=policy))
        assert again.digest == pulled.digest
        assert again.manifest_requests == 0
        assert len(registry.requests) == before


def test_never_asks_for_what_is_not_here(tmp_path) -> None:
    with FakeRegistry() as registry, local_engine(tmp_path / "store") as engine:
        registry.add_image("a/b", "1", [LAYER])
        with pytest.raises(NotFoundError):
            engine.pull(Reference.parse(f"{registry.host}/a/b:1"), PullOptions(policy="never"))
        assert registry.requests == []


def test_always_asks_for_a_digest_too(tmp_path) -> None:
    with FakeRegistry() as registry, local_engine(tmp_path / "store") as engine:
        digest = registry.add_image("a/b", "1", [LAYER])
        reference = Reference.parse(f"{registry.host}/a/b@{digest}")
        engine.pull(reference, PullOptions())
        before = registry.count("/manifests/")
        result = engine.pull(reference, PullOptions(policy="always"))
        assert registry.count("/manifests/") > before
        assert result.manifest_requests > 0
        assert result.fetched_bytes == 0


def test_a_lesser_platform_is_found_again_under_its_own_name(tmp_path) -> None:
    with FakeRegistry() as registry, local_engine(tmp_path / "store") as engine:
        registry.add_image("a/b", "1", [LAYER], architecture="386")
        reference = Reference.parse(f"{registry.host}/a/b:1")
        options = PullOptions(platform=AMD64)
        assert engine.pull(reference, options).platform == "linux/386"
        before = len(registry.requests)
        engine.pull(reference, replace(options, policy="never"))
        assert len(registry.requests) == before


def test_an_unreachable_registry_is_unavailable(tmp_path) -> None:
    with FakeRegistry() as registry:
        host = registry.host
    with local_engine(tmp_path / "store") as engine, pytest.raises(UnavailableError) as caught:
        engine.pull(Reference.parse(f"{host}/a/b:1"), PullOptions())
    assert json.dumps(str(caught.value)).isascii()
