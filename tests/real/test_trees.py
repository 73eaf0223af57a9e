"""A pull gives the tree that umoci gives, however it is looked at."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from tests.support import judge, peers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.real.conftest import Published
    from tests.support.command import Json, Stowray

pytestmark = [pytest.mark.peers, pytest.mark.root]

IMAGES = [
    "small",
    "many",
    "many-zstd",
    "debian",
    "debian-zstd",
    pytest.param("site", marks=pytest.mark.slow),
    "multi",
    "multi-docker",
    "multi-nested",
]


def chain(diff_ids: list[str]) -> list[str]:
    """Chain IDs as the image specification defines them."""
    chained = diff_ids[:1]
    for diff_id in diff_ids[1:]:
        text = f"{chained[-1]} {diff_id}".encode()
        chained.append(f"sha256:{hashlib.sha256(text).hexdigest()}")
    return chained


def assert_same(tree: Path, expected: Path, image: Published) -> None:
    """Equal in everything; a root that no layer describes has a time of its own making."""
    actual, wanted = judge.read_tree(tree), judge.read_tree(expected)
    if not image.name.startswith(("debian", "site")):
        for described in (actual, wanted):
            del described[b"."]
    assert judge.differences(actual, wanted) == []


def assert_result(result: Json, image: Published, engine: str) -> None:
    diff_ids = image.config["rootfs"]["diff_ids"]
    chain_ids = chain(diff_ids)
    assert result["reference"] == image.reference
    assert result["digest"] == image.manifest["digest"]
    assert result["resolved"] == image.resolved["digest"]
    assert result["config"] == image.document["config"]["digest"]
    assert result["platform"] == "linux/amd64"
    assert result["chain_id"] == chain_ids[-1]
    assert result["engine"] == engine
    assert [layer["digest"] for layer in result["layers"]] == [
        layer["digest"] for layer in image.document["layers"]
    ]
    assert [layer["size"] for layer in result["layers"]] == [
        layer["size"] for layer in image.document["layers"]
    ]
    assert [layer["diff_id"] for layer in result["layers"]] == diff_ids
    assert [layer["chain_id"] for layer in result["layers"]] == chain_ids
    assert {layer["source"] for layer in result["layers"]} == {image.host}
    assert sum(layer["fetched_bytes"] for layer in result["layers"]) == image.layers_size
    assert result["fetched_bytes"] >= image.layers_size
    assert result["manifest_requests"] >= 1
    assert set(result["seconds"]) == {"resolve", "fetch", "apply", "total"}


@pytest.mark.parametrize("name", IMAGES)
def test_rootfs_and_mount_equal_umoci(
    stowray: Stowray,
    publish: Callable[[str], Published],
    judged: Callable[[str], Path],
    workspace: Path,
    mount_point: Path,
    name: str,
) -> None:
    image, expected = publish(name), judged(name)
    assert_result(stowray.pull(image.reference), image, stowray.engine)

    stowray.run("rootfs", image.reference, workspace / "flat")
    assert_same(workspace / "flat", expected, image)

    stowray.run("mount", image.reference, mount_point)
    assert mount_point.is_mount()
    assert_same(mount_point, expected, image)
    with pytest.raises(OSError, match="Read-only"):
        (mount_point / "new").write_bytes(b"")
    stowray.run("umount", mount_point)
    assert not mount_point.is_mount()

    again = stowray.pull(image.reference)
    assert again["fetched_bytes"] == 0
    assert {layer["source"] for layer in again["layers"]} == {"store"}


def test_rw_mount_writes_to_the_upper_directory_only(
    local: Stowray, publish: Callable[[str], Published], workspace: Path, mount_point: Path
) -> None:
    image = publish("small")
    upper = workspace / "upper"
    upper.mkdir()
    local.run("mount", image.reference, mount_point, "--rw", upper)
    (mount_point / "etc" / "hostname").write_bytes(b"changed")
    (mount_point / "new").write_bytes(b"written")
    local.run("umount", mount_point)
    assert (upper / "new").read_bytes() == b"written"
    local.run("rootfs", image.reference, workspace / "flat")
    assert (workspace / "flat" / "etc" / "hostname").read_bytes() == b"smaller\n"
    assert not (workspace / "flat" / "new").exists()


@pytest.mark.parametrize("link", ["copy", "hardlink"])
def test_rootfs_by_each_kind_of_link(
    local: Stowray,
    publish: Callable[[str], Published],
    judged: Callable[[str], Path],
    workspace: Path,
    link: str,
) -> None:
    image = publish("many")
    local.run("rootfs", image.reference, workspace / "flat", "--link", link)
    assert_same(workspace / "flat", judged("many"), image)


def test_bundle_starts_with_runc(
    local: Stowray, publish: Callable[[str], Published], workspace: Path
) -> None:
    peers.require("runc")
    image = publish("debian-hello")
    if not image.config["config"]["Labels"]["origin"].startswith("debootstrap"):
        pytest.skip("the system tree is a copy of parts of this machine and cannot be started")
    bundle = workspace / "bundle"
    local.run("bundle", image.reference, bundle)
    command = ["runc", "--root", str(workspace / "runc"), "run", "--bundle", str(bundle)]
    said = peers.attempt([*command, f"stowray-test-{workspace.name}"])
    assert (said.status, said.stdout) == (0, "hello from /srv as 0\n"), said.stderr


def test_every_platform_of_an_index(
    stowray: Stowray, publish: Callable[[str], Published], workspace: Path
) -> None:
    image = publish("multi")
    for platform in ("linux/amd64", "linux/arm64", "linux/arm/v7", "linux/s390x"):
        result = stowray.pull(image.reference, "--platform", platform)
        assert result["resolved"] == image.resolved["digest"]
        target = workspace / platform.replace("/", "-")
        stowray.run("rootfs", "--platform", platform, image.reference, target)
        said = (target / "etc" / "platform").read_text()
        assert said.startswith(platform)


def test_layers_shared_with_an_image_that_is_here_are_not_fetched(
    stowray: Stowray, publish: Callable[[str], Published]
) -> None:
    stowray.pull(publish("debian").reference)
    result = stowray.pull(publish("site").reference)
    below, above = result["layers"]
    assert (below["source"], below["fetched_bytes"]) == ("store", 0)
    assert above["fetched_bytes"] == above["size"]
