from __future__ import annotations

import os
import threading
import time

import pytest

from stowray.pipeline.engine import PullOptions
from stowray.pipeline.errors import CancelledError, DigestMismatchError
from stowray.pipeline.reference import Reference
from stowray.pipeline.settings import RegistrySettings, UnpackSettings
from stowray.pipeline.verify import verify
from tests.support.registry import FakeRegistry, Fault, digest_of, incompressible
from tests.support.small import local_engine, small_tar

LAYERS = [small_tar({"a": b"1"}), small_tar({"b": b"2"})]


def reference_of(registry: FakeRegistry, text: str = "a/b:1") -> Reference:
    return Reference.parse(f"{registry.host}/{text}")


def test_a_blob_damaged_since_it_was_fetched_is_fetched_again(tmp_path) -> None:
    with FakeRegistry() as registry, local_engine(tmp_path / "store") as engine:
        registry.add_image("a/b", "1", LAYERS)
        reference = reference_of(registry)
        result = engine.pull(reference, PullOptions(unpack=False))
        from stowray.pipeline.digest import Digest

        path = engine.store.blob_path(Digest(result.layers[0].digest))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0xFF
        os.chmod(path, 0o600)
        path.write_bytes(data)
        mended = engine.pull(reference, PullOptions())
        assert mended.layers[0].fetched_bytes == mended.layers[0].size
        assert mended.layers[1].fetched_bytes == 0
        assert engine.snapshots.has(Digest(mended.chain_id))


def test_a_tag_that_moved_is_recorded_as_unpacked_only_if_its_new_image_is(tmp_path) -> None:
    with FakeRegistry() as registry, local_engine(tmp_path / "store") as engine:
        reference = reference_of(registry)
        moves = [(LAYERS[:1], True, True), (LAYERS[:1], False, True), (LAYERS[1:], False, False)]
        for layers, unpack, unpacked in moves:
            registry.add_image("a/b", "1", layers)
            engine.pull(reference, PullOptions(unpack=unpack, policy="always"))
            (record,) = engine.store.references()
            assert record.unpacked is unpacked
            assert verify(engine.store).damaged == ()


def test_a_layer_with_another_diff_id_is_not_fetched_for_ever(tmp_path) -> None:
    with FakeRegistry() as registry, local_engine(tmp_path / "store") as engine:
        wrong = {"type": "layers", "diff_ids": ["sha256:" + "0" * 64]}
        registry.add_image("a/b", "1", LAYERS[:1], config_overrides={"rootfs": wrong})
        for _ in range(2):
            with pytest.raises(DigestMismatchError):
                engine.pull(reference_of(registry), PullOptions())
        # The config and the layer, once each: the layer's blob is what it says, its diff ID is not.
        assert registry.count("/blobs/") == 2
        assert engine.snapshots.all() == []


def test_two_pulls_at_once_share_blobs_and_layers(tmp_path) -> None:
    base = small_tar({"base": incompressible(3 << 20)})
    with FakeRegistry() as registry, local_engine(tmp_path / "store") as engine:
        for tag in ("1", "2"):
            registry.add_image("a/b", tag, [base, small_tar({tag: tag.encode()})])
        registry.fault("/blobs/", Fault(delay=0.2))
        results = []
        threads = [
            threading.Thread(
                target=lambda tag=tag: results.append(
                    engine.pull(reference_of(registry, f"a/b:{tag}"), PullOptions())
                )
            )
            for tag in ("1", "2")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 2
        shared = results[0].layers[0].digest
        assert registry.count(f"/blobs/{shared}") == 1
        # Two configs, one shared layer, two own layers.
        assert registry.count("/blobs/") == 5


def test_cancelling_keeps_what_came_and_the_next_pull_goes_on(tmp_path) -> None:
    layer = small_tar({"a": incompressible(4 << 20)})
    with FakeRegistry() as registry, local_engine(tmp_path / "store") as engine:
        registry.add_image("a/b", "1", [layer], compression=None)
        size = len(layer)
        stop = threading.Event()
        registry.fault("/blobs/", Fault(), Fault(stall=size // 2))
        threading.Thread(
            target=lambda: (wait_for_part(engine, size), stop.set()), daemon=True
        ).start()
        with pytest.raises(CancelledError):
            engine.pull(reference_of(registry), PullOptions(), stop.is_set)
        registry.clear_faults()
        result = engine.pull(reference_of(registry), PullOptions())
        assert 0 < result.layers[0].fetched_bytes < size - size // 4


def wait_for_part(engine, size: int) -> None:
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        for event in engine.progress.events():
            if event.kind == "blob" and event.total == size and event.current >= size // 4:
                return
        threading.Event().wait(0.01)


@pytest.mark.parametrize("refuses_heads", [False, True])
def test_manifest_requests_are_what_the_registry_saw(tmp_path, refuses_heads) -> None:
    with FakeRegistry() as registry, local_engine(tmp_path / "store") as engine:
        registry.add_image("a/b", "1", LAYERS)
        if refuses_heads:
            registry.fault("/manifests/", Fault(status=405), method="HEAD", repeat=True)
        for _ in range(2):
            before = registry.count("/manifests/")
            result = engine.pull(reference_of(registry, "a/b:1"), PullOptions(policy="always"))
            asked = registry.count("/manifests/") - before
            assert result.manifest_requests == asked >= 1 + refuses_heads


def test_a_limit_of_one_everywhere_finishes_fifty_layers(tmp_path) -> None:
    """Permits are held for one exchange only: whoever waits for another layer holds none."""
    limits = {
        "registry": RegistrySettings(connections=1, range_connections=1),
        "unpack": UnpackSettings(workers=1),
    }
    layers = [small_tar({f"file{n}": b"%d" % n, "shared": b"%d" % n}) for n in range(50)]
    with FakeRegistry(redirect=True) as registry, local_engine(tmp_path, **limits) as engine:
        registry.add_image("a/b", "1", layers)
        result = engine.pull(reference_of(registry, "a/b:1"), PullOptions())
        assert len(result.layers) == 50
        connections = {request.connection for request in registry.seen("/cdn/")}
        assert len(connections) == 1


def test_a_pull_that_finds_everything_starts_nothing(tmp_path) -> None:
    with FakeRegistry() as registry, local_engine(tmp_path / "store") as engine:
        digest = registry.add_image("a/b", "1", LAYERS)
        engine.pull(reference_of(registry, f"a/b@{digest}"), PullOptions())
        before = len(registry.requests)
    with local_engine(tmp_path / "store") as engine:
        begun = []
        engine.on_begin = lambda: begun.append(True)
        result = engine.pull(reference_of(registry, f"a/b@{digest}"), PullOptions())
        assert begun == []
        assert result.fetched_bytes == result.manifest_requests == 0
        assert [layer.source for layer in result.layers] == ["store", "store"]
        assert len(registry.requests) == before


def test_a_pull_holds_its_image_against_the_collector(tmp_path) -> None:
    from stowray.pipeline.collect import collect

    with FakeRegistry() as registry, local_engine(tmp_path / "store") as engine:
        registry.add_image("a/b", "1", LAYERS)
        reference = reference_of(registry)
        image, lease = engine.hold_image(reference, PullOptions())
        with lease:
            engine.pull_image(reference, image, PullOptions())
            engine.store.remove_reference(reference.canonical)
            collect(engine.store)
            assert engine.snapshots.has(image.chain_ids[-1])
            assert all(engine.store.has(layer.digest) for layer in image.layers)
        collect(engine.store)
        assert not engine.snapshots.has(image.chain_ids[-1])
        assert not any(engine.store.has(layer.digest) for layer in image.layers)


def test_an_image_without_layers_is_pulled(tmp_path) -> None:
    with FakeRegistry() as registry, local_engine(tmp_path / "store") as engine:
        registry.add_image("a/b", "1", [])
        result = engine.pull(reference_of(registry), PullOptions())
        assert (result.layers, result.chain_id) == ((), "")


def test_the_same_layer_twice_is_fetched_once_and_committed_twice(tmp_path) -> None:
    with FakeRegistry() as registry, local_engine(tmp_path / "store") as engine:
        registry.add_image("a/b", "1", [LAYERS[0], LAYERS[1], LAYERS[0]])
        result = engine.pull(reference_of(registry), PullOptions())
        assert len({layer.chain_id for layer in result.layers}) == 3
        assert registry.count(f"/blobs/{result.layers[0].digest}") == 1


@pytest.mark.parametrize("pulled_before", [False, True])
def test_a_blob_that_claims_the_diff_id_of_another_layer_is_found_out(
    tmp_path, pulled_before
) -> None:
    with FakeRegistry() as registry, local_engine(tmp_path / "store") as engine:
        registry.add_image("a/b", "honest", LAYERS[:1])
        if pulled_before:
            engine.pull(reference_of(registry, "a/b:honest"), PullOptions())
        same = {"type": "layers", "diff_ids": [digest_of(LAYERS[0])] * 2}
        registry.add_image("a/b", "lies", LAYERS, config_overrides={"rootfs": same})
        with pytest.raises(DigestMismatchError):
            engine.pull(reference_of(registry, "a/b:lies"), PullOptions())


def test_the_same_layer_in_another_compression_proves_itself(tmp_path) -> None:
    with FakeRegistry() as registry, local_engine(tmp_path / "store") as engine:
        registry.add_image("a/b", "gzip", LAYERS)
        registry.add_image("a/b", "zstd", LAYERS, compression="zstd")
        first = engine.pull(reference_of(registry, "a/b:gzip"), PullOptions())
        second = engine.pull(reference_of(registry, "a/b:zstd"), PullOptions())
        assert first.chain_id == second.chain_id
        assert {layer.digest for layer in first.layers}.isdisjoint(
            layer.digest for layer in second.layers
        )
