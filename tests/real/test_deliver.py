"""`stowray deliver` to a real containerd and podman, and archives that other tools read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import peers, runtimes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.real.conftest import Published
    from tests.support.command import Stowray

pytestmark = [pytest.mark.peers, pytest.mark.root]


@pytest.fixture(scope="module")
def containerd(fast_tmp: Path) -> Iterator[runtimes.Containerd]:
    peers.require("containerd", "ctr")
    with runtimes.containerd(fast_tmp / "containerd") as instance:
        yield instance


@pytest.fixture(scope="module")
def podman(fast_tmp: Path) -> Iterator[runtimes.Podman]:
    peers.require("podman")
    with runtimes.podman(fast_tmp / "podman") as instance:
        yield instance


def hand_over(
    stowray: Stowray, reference: str, target: str, *arguments: str, env: dict[str, str]
) -> dict[str, object]:
    answer = stowray.attempt("deliver", "--json", reference, "--to", target, *arguments, env=env)
    assert answer.status == 0, answer.stderr
    return answer.json


@pytest.mark.parametrize("name", ["debian", "multi", "multi-docker", "debian-zstd"])
def test_to_containerd(
    local: Stowray,
    publish: Callable[[str], Published],
    judged: Callable[[str], Path],
    containerd: runtimes.Containerd,
    workspace: Path,
    name: str,
) -> None:
    """What is not here is pulled; the reference's own digest stays, also that of an index."""
    image = publish(name)
    env = {"CONTAINERD_ADDRESS": str(containerd.address), "CONTAINERD_NAMESPACE": name}
    answer = hand_over(local, image.reference, "containerd", env=env)
    assert answer["name"] == image.reference
    assert answer["digest"] == image.resolved["digest"]
    assert answer["present"] is False
    own = containerd.within(name)
    assert own.images() == {image.reference: image.resolved["digest"]}
    assert own.is_ready(image.reference)
    assert hand_over(local, image.reference, "containerd", env=env)["present"] is True
    with own.mounted(image.reference, workspace / "m") as tree:
        runtimes.assert_same_image(tree, judged(name))


def test_to_containerd_by_digest_and_under_another_name(
    local: Stowray, publish: Callable[[str], Published], containerd: runtimes.Containerd
) -> None:
    image = publish("small")
    digest = image.resolved["digest"]
    env = {"CONTAINERD_ADDRESS": str(containerd.address), "CONTAINERD_NAMESPACE": "names"}
    pinned = f"{image.host}/{image.repository}@{digest}"
    hand_over(local, pinned, "containerd", env=env)
    hand_over(local, image.reference, "containerd", "--name", "Example.org/a__b:X", env=env)
    hand_over(local, image.reference, "containerd", "--name", "debian", env=env)
    assert containerd.within("names").images() == {
        pinned: digest,
        "Example.org/a__b:X": digest,
        "docker.io/library/debian:latest": digest,
    }


def test_to_containerd_for_another_platform(
    local: Stowray,
    publish: Callable[[str], Published],
    containerd: runtimes.Containerd,
) -> None:
    image = publish("multi")
    env = {"CONTAINERD_ADDRESS": str(containerd.address), "CONTAINERD_NAMESPACE": "foreign"}
    arguments = ("--platform", "linux/arm64")
    answer = hand_over(local, image.reference, "containerd", *arguments, env=env)
    assert answer["platform"] == "linux/arm64"
    assert containerd.within("foreign").images() == {image.reference: image.resolved["digest"]}
    entry = next(
        entry
        for entry in image.layout.children(image.resolved)
        if entry.get("platform", {}).get("architecture") == "arm64"
    )
    listed = containerd.within("foreign").ctr("content", "ls", "-q").split()
    assert {child["digest"] for child in image.layout.children(entry)} <= set(listed)


def test_no_containerd_there(
    local: Stowray, publish: Callable[[str], Published], workspace: Path
) -> None:
    peers.require("ctr")
    env = {"CONTAINERD_ADDRESS": str(workspace / "none.sock")}
    answer = local.attempt("deliver", publish("small").reference, "--to", "containerd", env=env)
    assert answer.status == 6
    assert "none.sock" in answer.stderr
    assert "CONTAINERD_ADDRESS" in answer.stderr


@pytest.mark.parametrize("name", ["debian", "multi", "multi-docker", "debian-zstd"])
def test_to_podman(
    local: Stowray,
    publish: Callable[[str], Published],
    judged: Callable[[str], Path],
    podman: runtimes.Podman,
    name: str,
) -> None:
    image = publish(name)
    answer = hand_over(local, image.reference, "podman", env=podman.environment)
    assert answer["present"] is False
    repository = f"{image.host}/{image.repository}"
    digests = json.loads(podman.inspect(image.reference, "{{json .RepoDigests}}"))
    assert {f"{repository}@{image.resolved['digest']}"} <= set(digests)
    assert f"{repository}@{answer['digest']}" in digests
    assert podman.inspect(image.reference, "{{.Id}}") == image.document["config"][
        "digest"
    ].removeprefix("sha256:")
    # By its digest as well, as whoever pins an image asks for it.
    podman.run("image", "exists", f"{repository}@{image.resolved['digest']}")
    again = hand_over(local, image.reference, "podman", env=podman.environment)
    assert again["present"] is True
    with podman.mounted(image.reference) as tree:
        runtimes.assert_same_image(Path(tree), judged(name))
    podman.run("image", "rm", image.reference)


def test_to_podman_for_another_platform(
    local: Stowray, publish: Callable[[str], Published], podman: runtimes.Podman
) -> None:
    image = publish("multi")
    arguments = ("--platform", "linux/arm64", "--name", "example.org/foreign:1")
    hand_over(local, image.reference, "podman", *arguments, env=podman.environment)
    assert podman.inspect("example.org/foreign:1", "{{.Architecture}}") == "arm64"


def test_to_docker(
    local: Stowray,
    publish: Callable[[str], Published],
    judged: Callable[[str], Path],
    podman: runtimes.Podman,
    workspace: Path,
) -> None:
    """No daemon runs here: what the command would load is read by skopeo and podman instead."""
    image = publish("debian-zstd")
    loaded = workspace / "loaded.tar"
    programs = workspace / "bin"
    programs.mkdir()
    docker = programs / "docker"
    docker.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = load ]; then cat > ' + str(loaded) + "; exit 0; fi\n"
        "echo Error: No such image >&2; exit 1\n"
    )
    docker.chmod(0o755)
    path = f"{programs}:{local.environment()['PATH']}"
    answer = hand_over(local, image.reference, "docker", env={"PATH": path})
    assert answer["digest"] == image.document["config"]["digest"]
    said = json.loads(peers.skopeo_inspect(f"docker-archive:{loaded}:{image.reference}"))
    assert said["Layers"] == image.config["rootfs"]["diff_ids"]
    podman.run("load", "--quiet", "--input", loaded)
    with podman.mounted(image.reference) as tree:
        runtimes.assert_same_image(Path(tree), judged("debian-zstd"))
    podman.run("image", "rm", image.reference)


def test_to_an_archive(
    local: Stowray,
    publish: Callable[[str], Published],
    judged: Callable[[str], Path],
    workspace: Path,
) -> None:
    image = publish("many-zstd")
    archive = workspace / "image.tar"
    target = f"oci-archive:{archive}"
    answer = hand_over(local, image.reference, target, env={})
    assert answer["target"] == target
    first = archive.read_bytes()
    hand_over(local, image.reference, target, "--offline", env={})
    assert archive.read_bytes() == first
    assert [path.name for path in workspace.glob("*.t*")] == ["image.tar"]
    for source in (f"{target}:{image.reference}", target):
        copy = workspace / f"copy-{len(source)}"
        peers.skopeo_copy(source, f"dir:{copy}")
        assert (copy / "manifest.json").read_bytes() == image.layout.blob(image.manifest["digest"])
    result = local.pull(target)
    assert result["digest"] == image.manifest["digest"]
    local.run("rootfs", target, workspace / "tree")
    runtimes.assert_same_image(workspace / "tree", judged("many-zstd"))


def test_an_archive_goes_on_to_another_tool(
    local: Stowray, publish: Callable[[str], Published], podman: runtimes.Podman, workspace: Path
) -> None:
    """An image on disk has the name that it has there, or gets one."""
    image = publish("small")
    archive = f"oci-archive:{workspace / 'image.tar'}"
    hand_over(local, image.reference, archive, env={})
    named = hand_over(local, f"{archive}:{image.reference}", "podman", env=podman.environment)
    assert named["name"] == image.reference
    nameless = local.attempt("deliver", archive, "--to", "podman", env=podman.environment)
    assert nameless.status == 2
    assert "--name" in nameless.stderr
    arguments = ("--name", "example.org/x:1")
    hand_over(local, archive, "podman", *arguments, env=podman.environment)
    podman.run("image", "exists", "example.org/x:1")


@pytest.mark.parametrize(
    ("target", "status"),
    [("nowhere", 2), ("oci-archive:", 2), ("oci-archive:/no/such/folder/x.tar", 7)],
)
def test_targets_that_cannot_be(
    local: Stowray, publish: Callable[[str], Published], target: str, status: int
) -> None:
    answer = local.attempt("deliver", publish("small").reference, "--to", target)
    assert answer.status == status
    assert "Traceback" not in answer.stderr


def test_offline_delivers_what_is_here_only(
    local: Stowray, publish: Callable[[str], Published], workspace: Path
) -> None:
    image = publish("small")
    target = f"oci-archive:{workspace / 'x.tar'}"
    answer = local.attempt("deliver", "--offline", image.reference, "--to", target)
    assert answer.status == 3
    assert not (workspace / "x.tar").exists()
