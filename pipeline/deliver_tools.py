"""Handing images to containerd, podman and docker through their own commands.

Invariant: each tool reads the image from a pipe and checks its digests itself; what it has already
under this name and digest is not sent again. containerd and podman keep the digest that the
reference resolved to; docker knows images by their config.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from stowray.pipeline.deliver_archive import ImageArchive
from stowray.pipeline.deliver_program import failure, find_program, run_program
from stowray.pipeline.errors import NodeError
from stowray.pipeline.media_types import INDEX_TYPES
from stowray.pipeline.platform import Platform

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.image import Image
    from stowray.pipeline.store import Store

_ASK_SECONDS = 60.0
_CONNECT = "10s"
DEFAULT_ADDRESS = "/run/containerd/containerd.sock"
DEFAULT_NAMESPACE = "default"


def to_containerd(
    store: Store, image: Image, name: str, seconds: float, cancelled: Callable[[], bool]
) -> tuple[Digest, bool]:
    """Import into the containerd and namespace that ``CONTAINERD_*`` name; unpacked there."""
    program = find_program("ctr", "install containerd, which has it")
    address = os.environ.get("CONTAINERD_ADDRESS") or DEFAULT_ADDRESS
    namespace = os.environ.get("CONTAINERD_NAMESPACE") or DEFAULT_NAMESPACE
    command = [program, "--connect-timeout", _CONNECT, "-a", address, "-n", namespace, "images"]
    archive = ImageArchive(store, image, name, whole=True)
    archive.check()
    # `check` lists REF TYPE DIGEST STATUS (n/n) SIZE UNPACKED for this host's platform.
    asked = run_program(
        [*command, "check", f'name=="{name}"'], seconds=_ASK_SECONDS, cancelled=cancelled
    )
    if asked.status:
        # A ctr of containerd 1 tells that it dialled, one of 2 that there is no such socket.
        is_absent = "dial" in asked.errors or "no such file" in asked.errors
        if is_absent and "permission denied" not in asked.errors:
            raise NodeError(
                f"containerd at {address}",
                f"does not answer: start it, or name its socket with CONTAINERD_ADDRESS "
                f"({asked.said})",
            )
        raise failure(f"containerd at {address}", asked, "be asked for its images")
    for line in asked.output.splitlines():
        words = line.split()
        if (
            words[:1] == [name]
            and str(archive.root.digest) in words
            and "complete" in words
            and words[-1] == "true"
            and _is_hosts(image)
        ):
            return archive.root.digest, True
    # Without --platform only what suits this host is looked for in an index.
    platform = [] if _is_hosts(image) else ["--platform", str(image.platform)]
    ended = run_program(
        [*command, "import", *platform, "-"],
        seconds=seconds,
        cancelled=cancelled,
        feed=lambda pipe: archive.write(pipe, cancelled),
    )
    if ended.status:
        raise failure(f"containerd at {address}", ended, f"import {name}")
    return archive.root.digest, False


def to_podman(
    store: Store, image: Image, name: str, seconds: float, cancelled: Callable[[], bool]
) -> tuple[Digest, bool]:
    """Load into podman's storage of this user."""
    program = find_program("podman", "install podman")
    # podman picks what suits this host from an index, and would miss any other platform's image.
    archive = ImageArchive(store, image, name, whole=_is_hosts(image))
    archive.check()
    present = _inspect(
        [program, "image", "inspect", "--format", "{{.Id}} {{.RepoDigests}}", name],
        "podman",
        cancelled,
    )
    if str(archive.root.digest) in present and image.manifest.config.digest.encoded in present:
        return archive.root.digest, True
    ended = run_program(
        [program, "load", "--quiet"],
        seconds=seconds,
        cancelled=cancelled,
        feed=lambda pipe: archive.write(pipe, cancelled),
    )
    if ended.status:
        raise failure("podman", ended, f"load {name}")
    return archive.root.digest, False


def to_docker(
    store: Store, image: Image, name: str, seconds: float, cancelled: Callable[[], bool]
) -> tuple[Digest, bool]:
    """Load into the docker daemon that the environment names."""
    program = find_program("docker", "install docker's command")
    if "@" in name:
        # `docker load` takes tags only: the image would be there without a name.
        raise NodeError("docker", f"cannot load {name} under its digest: give a tag with --name")
    archive = ImageArchive(store, image, name, docker=True)
    archive.check()
    present = _inspect(
        [program, "image", "inspect", "--format", "{{.Id}}", name], "docker", cancelled
    )
    config = image.manifest.config.digest
    # The Id is the config's digest, with containerd's image store the manifest's.
    if present.strip() in (config, image.manifest_descriptor.digest):
        return config, True
    ended = run_program(
        [program, "load", "--quiet"],
        seconds=seconds,
        cancelled=cancelled,
        feed=lambda pipe: archive.write(pipe, cancelled),
    )
    if ended.status:
        raise failure("docker", ended, f"load {name}")
    return config, False


def _inspect(command: Sequence[str], tool: str, cancelled: Callable[[], bool]) -> str:
    """Return what a tool says of an image; empty when it has none of that name."""
    ended = run_program(command, seconds=_ASK_SECONDS, cancelled=cancelled)
    if ended.status == 0:
        return ended.output
    said = ended.errors.lower()
    if "not known" in said or "no such image" in said:
        return ""
    if "cannot connect" in said or "daemon" in said:
        raise NodeError(
            tool, f"does not answer: start it, or name it with DOCKER_HOST ({ended.said})"
        )
    raise failure(tool, ended, "be asked for the image")


def _is_hosts(image: Image) -> bool:
    """Tell whether this machine would choose ``image`` from an index."""
    if image.resolved.media_type not in INDEX_TYPES:
        return True
    return Platform.host().normalized().rank(image.platform) is not None
