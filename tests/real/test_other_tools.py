"""The store is an OCI image layout that skopeo and umoci read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.support import judge, peers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.real.conftest import Published
    from tests.support.command import Stowray

pytestmark = [pytest.mark.peers, pytest.mark.root]


def stored_name(stowray: Stowray, reference: str) -> str:
    """The name under which the index of the store has the image."""
    index = json.loads((stowray.store / "index.json").read_text())
    names = [
        entry["annotations"]["org.opencontainers.image.ref.name"] for entry in index["manifests"]
    ]
    assert reference in names
    return reference


@pytest.mark.parametrize("name", ["debian", "many-zstd", "many"])
def test_skopeo_copies_out_of_the_store(
    stowray: Stowray, publish: Callable[[str], Published], workspace: Path, name: str
) -> None:
    image = publish(name)
    stowray.pull(image.reference)
    source = f"oci:{stowray.store}:{stored_name(stowray, image.reference)}"
    copy = workspace / "copy"
    copy.mkdir()
    peers.run(["skopeo", "copy", "--quiet", source, f"dir:{copy}"])
    copied = json.loads((copy / "manifest.json").read_bytes())
    digests = [layer["digest"] for layer in image.document["layers"]]
    assert [layer["digest"] for layer in copied["layers"]] == digests


@pytest.mark.parametrize("name", ["debian", "many"])
def test_umoci_unpacks_from_the_store(
    stowray: Stowray,
    publish: Callable[[str], Published],
    judged: Callable[[str], Path],
    workspace: Path,
    name: str,
) -> None:
    image = publish(name)
    stowray.pull(image.reference)
    reference = stored_name(stowray, image.reference)
    tree = peers.umoci_unpack(stowray.store, reference, workspace / "umoci")
    judge.assert_same_tree(tree, judged(name))


def test_several_platforms_of_one_reference(
    stowray: Stowray, publish: Callable[[str], Published], workspace: Path
) -> None:
    image = publish("multi")
    for platform in ("linux/arm64", "linux/amd64"):
        stowray.pull(image.reference, "--platform", platform)
    name = stored_name(stowray, image.reference)
    for architecture in ("arm64", "amd64"):
        choice = ["--override-os", "linux", "--override-arch", architecture]
        target = workspace / architecture
        target.mkdir()
        source = f"oci:{stowray.store}:{name}"
        peers.run(["skopeo", *choice, "copy", "--quiet", source, f"dir:{target}"])
        assert (target / "manifest.json").exists()


def test_all_platforms_brings_content_only(
    stowray: Stowray, publish: Callable[[str], Published]
) -> None:
    image = publish("multi")
    stowray.run("pull", "--json", "--all-platforms", image.reference)
    wanted = {
        child["digest"]
        for entry in image.layout.children(image.resolved)
        if entry["platform"]["os"] != "unknown"
        for child in [entry, *image.layout.children(entry)]
    }
    assert wanted <= stowray.blobs()


def test_images_on_disk_are_pulled_like_those_of_a_registry(
    stowray: Stowray,
    publish: Callable[[str], Published],
    judged: Callable[[str], Path],
    workspace: Path,
) -> None:
    image = publish("many")
    layout = f"oci:{image.layout.path}:many"
    archive = workspace / "image.tar"
    source = f"docker://{image.reference}"
    peers.skopeo_copy(source, f"docker-archive:{archive}:example.org/many:1")
    oci_archive = workspace / "oci.tar"
    peers.skopeo_copy(source, f"oci-archive:{oci_archive}:many")
    for number, reference in enumerate(
        (layout, f"docker-archive:{archive}", f"oci-archive:{oci_archive}:many")
    ):
        result = stowray.pull(reference)
        assert [layer["diff_id"] for layer in result["layers"]] == image.config["rootfs"][
            "diff_ids"
        ]
        stowray.run("rootfs", reference, workspace / str(number))
        judge.assert_same_tree(workspace / str(number), judged("many"), ignored=())
