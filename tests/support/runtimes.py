"""Other runtimes with everything of their own: a private containerd, podman with private storage.

Invariant: nothing of the machine's own runtimes is read or touched, and what was started is ended
by its process id; sockets, roots and states lie in the folder that the test gives.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from tests.support import judge, peers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

START_SECONDS = 60.0
# What needs the kernel, the network or a clean-up that a short-lived test instance has no use for.
UNWANTED = (
    "io.containerd.grpc.v1.cri",
    "io.containerd.internal.v1.opt",
    "io.containerd.internal.v1.restart",
    "io.containerd.snapshotter.v1.aufs",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
)


def assert_same_image(actual: Path, expected: Path) -> None:
    """Compare trees all but the root's own time and mode: an image need not say what they are."""
    trees = [judge.read_tree(actual), judge.read_tree(expected)]
    for tree in trees:
        tree[b"."] = replace(tree[b"."], mtime_ns=0, mode="")
    lines = judge.differences(*trees)
    assert not lines, "\n".join(lines[: judge.SHOWN])


class Containerd:
    """A running containerd, spoken to through `ctr`."""

    def __init__(self, root: Path, namespace: str = "default") -> None:
        self.root = root
        self.namespace = namespace
        self.address = root / "containerd.sock"

    def within(self, namespace: str) -> Containerd:
        """The same one, in another namespace."""
        return Containerd(self.root, namespace)

    def ctr(self, *arguments: str | Path) -> str:
        command = ["ctr", "-a", str(self.address), "-n", self.namespace, *map(str, arguments)]
        return peers.run(command).stdout

    def images(self) -> dict[str, str]:
        """Name to digest."""
        lines = self.ctr("images", "ls").splitlines()[1:]
        return {words[0]: words[2] for words in map(str.split, lines)}

    def is_ready(self, name: str) -> bool:
        """Whether all content is there and unpacked."""
        return name in self.ctr("images", "check", "-q").split()

    @contextlib.contextmanager
    def mounted(self, name: str, at: Path, *, platform: str = "linux/amd64") -> Iterator[Path]:
        at.mkdir()
        self.ctr("images", "mount", "--platform", platform, name, at)
        try:
            yield at
        finally:
            self.ctr("images", "unmount", "--rm", at)


@contextlib.contextmanager
def containerd(root: Path, settings: str = "") -> Iterator[Containerd]:
    """Run one, with more `settings` (TOML) if they are given."""
    root.mkdir()
    instance = Containerd(root)
    config = root / "config.toml"
    unwanted = ", ".join(f'"{name}"' for name in UNWANTED)
    config.write_text(
        f"""version = 2
root = "{root}/root"
state = "{root}/state"
disabled_plugins = [{unwanted}]
[grpc]
address = "{instance.address}"
[ttrpc]
address = "{root}/ttrpc.sock"
{settings}
"""
    )
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            ["containerd", "--config", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", "HOME": str(root)},
        )
    try:
        give_up = time.monotonic() + START_SECONDS
        asked = ["ctr", "--connect-timeout", "1s", "-a", str(instance.address), "version"]
        while peers.attempt(asked).status:
            if process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(f"containerd does not start:\n{(root / 'log').read_text()}")
            time.sleep(0.02)
        yield instance
    finally:
        process.terminate()
        process.wait(timeout=60)


class Podman:
    """podman with a storage and registry settings of its own, by way of the environment."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.root = root
        self.registries = root / "registries.conf"
        storage = root / "storage.conf"
        storage.write_text(
            f"""[storage]
driver = "overlay"
graphroot = "{root}/graph"
runroot = "{root}/run"
"""
        )
        self.registries.write_text("")
        self.environment = {
            "CONTAINERS_STORAGE_CONF": str(storage),
            "CONTAINERS_REGISTRIES_CONF": str(self.registries),
            "TMPDIR": str(root),
        }

    def run(self, *arguments: str | Path) -> str:
        return peers.run(["podman", *map(str, arguments)], env=self.environment).stdout

    def inspect(self, name: str, what: str) -> str:
        return self.run("image", "inspect", "--format", what, name).strip()

    def close(self) -> None:
        """Let the storage go: its home is bind-mounted by the overlay driver."""
        peers.attempt(["umount", str(self.root / "graph" / "overlay")])

    @contextlib.contextmanager
    def mounted(self, name: str) -> Iterator[str]:
        where = self.run("image", "mount", name).strip()
        try:
            yield where
        finally:
            self.run("image", "umount", name)


@contextlib.contextmanager
def podman(root: Path) -> Iterator[Podman]:
    instance = Podman(root)
    try:
        yield instance
    finally:
        instance.close()
