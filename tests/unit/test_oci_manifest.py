from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.collect import collect
from stowray.pipeline.digest import Digest
from stowray.pipeline.engine import PullOptions
from stowray.pipeline.media_types import OCI_MANIFEST
from stowray.pipeline.oci_manifest import oci_twin
from stowray.pipeline.reference import Reference
from tests.support.registry import DOCKER_MANIFEST, FakeRegistry, compact
from tests.support.small import local_engine, small_tar

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = "application/vnd.docker.container.image.v1+json"
LAYER = "application/vnd.docker.image.rootfs.diff.tar"


def manifest(config: str, *layers: str, media_type: str = DOCKER_MANIFEST) -> bytes:
    def part(kind: str, number: int):
        return {"mediaType": kind, "digest": f"sha256:{number:064x}", "size": number}

    return compact(
        {
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": part(config, 1),
            "layers": [part(layer, number) for number, layer in enumerate(layers, 2)],
            "annotations": {"kept": "as it is"},
        }
    )


@pytest.mark.parametrize(
    ("docker", "oci"),
    [
        (LAYER, "application/vnd.oci.image.layer.v1.tar"),
        (f"{LAYER}.gzip", "application/vnd.oci.image.layer.v1.tar+gzip"),
        (f"{LAYER}.zstd", "application/vnd.oci.image.layer.v1.tar+zstd"),
        (
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        ),
    ],
)
def test_types_change_and_nothing_else(docker: str, oci: str) -> None:
    twin = oci_twin(manifest(CONFIG, docker, docker), DOCKER_MANIFEST)
    expected = manifest(
        "application/vnd.oci.image.config.v1+json", oci, oci, media_type=OCI_MANIFEST
    )
    assert twin is not None
    assert json.loads(twin) == json.loads(expected)


def test_the_twin_of_a_manifest_whose_layers_are_null_has_an_empty_list() -> None:
    body = json.dumps({**json.loads(manifest(CONFIG)), "layers": None}).encode()
    twin = oci_twin(body, DOCKER_MANIFEST)
    assert twin is not None
    assert json.loads(twin)["layers"] == []


def test_an_oci_manifest_needs_no_twin_unless_its_parts_do() -> None:
    config = "application/vnd.oci.image.config.v1+json"
    plain = manifest(config, "application/vnd.oci.image.layer.v1.tar", media_type=OCI_MANIFEST)
    assert oci_twin(plain, OCI_MANIFEST) is None
    assert oci_twin(manifest(config, LAYER, media_type=OCI_MANIFEST), OCI_MANIFEST) is not None


def test_the_twin_lives_and_goes_with_its_image(tmp_path: Path) -> None:
    with FakeRegistry() as registry, local_engine(tmp_path / "store") as engine:
        tagged = registry.add_image("a/b", "1", [small_tar({"a": b"1"})])
        document = json.loads(registry.manifests["a/b", tagged][1])
        document["mediaType"] = DOCKER_MANIFEST
        document["config"]["mediaType"] = CONFIG
        document["layers"][0]["mediaType"] = f"{LAYER}.gzip"
        docker = registry.add_manifest("a/b", compact(document), DOCKER_MANIFEST, "1")
        reference = Reference.parse(f"{registry.host}/a/b:1")
        result = engine.pull(reference, PullOptions())
        # What was pulled is the registry's manifest; the twin is for readers of the layout.
        assert result.digest == docker
        index = json.loads((tmp_path / "store" / "index.json").read_bytes())
        [entry] = index["manifests"]
        assert entry["mediaType"] == OCI_MANIFEST
        assert entry["digest"] != docker
        twin = Digest(entry["digest"])
        collect(engine.store)
        assert engine.store.has(twin, entry["size"])
        # Lost by accident, it comes back with the next pull, with no request for a blob.
        engine.store.quarantine(twin)
        before = registry.count("/blobs/")
        engine.pull(reference, PullOptions())
        assert engine.store.has(twin, entry["size"])
        assert registry.count("/blobs/") == before
        engine.store.remove_reference(reference.canonical)
        collect(engine.store)
        assert not engine.store.has(twin)
