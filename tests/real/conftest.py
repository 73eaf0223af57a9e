"""The parts of the end-to-end tests: the command on both engines, images in a real registry."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.support import peers
from tests.support.command import Stowray
from tests.support.push import Pusher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.catalogue import Catalogue
    from tests.support.docker_registry import DockerRegistry
    from tests.support.images import Json, Layout

# image -> the layout of the catalogue that holds it, the image with the same tree that umoci reads
IMAGES = {
    "small": ("small", "small-judge"),
    "many": ("many", "many-judge"),
    "many-zstd": ("many", "many-judge"),
    "debian": ("debian", "debian-judge"),
    "debian-zstd": ("debian", "debian-judge"),
    "debian-hello": ("debian", "debian-judge"),
    "site": ("site", "site-judge"),
    "multi": ("multi", "multi-judge"),
    "multi-docker": ("multi", "multi-judge"),
    "multi-nested": ("multi", "multi-judge"),
}


@dataclass(frozen=True)
class Published:
    """An image as it is in the registry."""

    name: str
    layout: Layout
    resolved: Json  # what the tag points to
    manifest: Json  # for linux/amd64
    host: str

    @property
    def repository(self) -> str:
        return f"real/{self.name}"

    @property
    def reference(self) -> str:
        return self.at(self.host)

    def at(self, host: str) -> str:
        return f"{host}/{self.repository}:1"

    @property
    def document(self) -> Json:
        return self.layout.document(self.manifest["digest"])

    @property
    def config(self) -> Json:
        return self.layout.document(self.document["config"]["digest"])

    @property
    def layers_size(self) -> int:
        layers = {layer["digest"]: layer["size"] for layer in self.document["layers"]}
        return sum(layers.values())


@pytest.fixture(scope="session")
def publish(real_registry: DockerRegistry, catalogue: Catalogue) -> Callable[[str], Published]:
    """Push an image of the catalogue to the session's registry, once."""
    done: dict[str, Published] = {}

    def push(name: str) -> Published:
        if name not in done:
            done[name] = publish_to(real_registry.host, catalogue, name)
        return done[name]

    return push


def publish_to(
    host: str, catalogue: Catalogue, name: str, *, authorization: str | None = None
) -> Published:
    layout = catalogue.layout(IMAGES[name][0])
    resolved = layout.tagged(name)
    published = Published(name, layout, resolved, layout.image(resolved), host)
    with Pusher(host, authorization=authorization) as pusher:
        pusher.push(layout, resolved, published.repository, "1")
    return published


@pytest.fixture(scope="session")
def judged(catalogue: Catalogue, fast_tmp: Path) -> Callable[[str], Path]:
    """The tree that umoci makes of an image, once per session."""
    trees: dict[str, Path] = {}

    def unpack(name: str) -> Path:
        layout, twin = IMAGES[name]
        if twin not in trees:
            trees[twin] = peers.umoci_unpack(
                catalogue.layout(layout).path, twin, fast_tmp / "judged" / twin
            )
        return trees[twin]

    return unpack


@pytest.fixture(scope="session")
def home(fast_tmp: Path) -> Path:
    """A home directory without anybody's settings; the session of the ray engine lives in it."""
    folder = fast_tmp / "home"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def warm_session(home: Path, fast_tmp: Path) -> Iterator[None]:
    """A `stowray session` that all tests on the ray engine use."""
    command = Stowray(fast_tmp / "session-store", home)
    command.run("session", "start")
    yield
    command.run("session", "stop")


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.cluster)])
def engine(request: pytest.FixtureRequest) -> str:
    """The engine; tests on `ray` share one warm session."""
    name: str = request.param
    if name == "ray":
        request.getfixturevalue("warm_session")
    return name


@pytest.fixture
def stowray(workspace: Path, home: Path, engine: str) -> Stowray:
    """The command on each engine, with a store of this test's own."""
    return Stowray(workspace / "store", home, engine)


@pytest.fixture
def local(workspace: Path, home: Path) -> Stowray:
    """The command on the local engine only, for what no engine has a part in."""
    return Stowray(workspace / "store", home, "local")


@pytest.fixture
def mount_point(workspace: Path) -> Iterator[Path]:
    """A directory to mount at; a mount that a failed test left is undone."""
    folder = workspace / "mounted"
    folder.mkdir()
    yield folder
    with contextlib.suppress(OSError):
        while folder.is_mount():
            peers.run(["umount", "--lazy", str(folder)])
