"""The images that real tests and measurements use, built once and kept in a cache folder.

Invariant: a cached image is complete: it is built in a private folder and renamed into place under
a lock, so that test workers that start together build it once. Each image `name` has a twin
`name-judge` with the same tree that Debian's umoci can read (OCI media types, gzip).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import random
import shutil
import sysconfig
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import debian, entries
from tests.support.images import Json, Layer, Layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.compressors import Compression

VERSION = 3  # of the recipes below: a change of one makes the cached images stale
SITE_BYTES = 300_000_000
MANY_LAYERS = 45


class Catalogue:
    """Layouts by image name, built on first use under `folder`."""

    def __init__(self, folder: Path | None = None, compression: Compression = "gzip-fast") -> None:
        default = Path(tempfile.gettempdir()) / f"stowray-test-cache-{os.getuid()}"
        self.folder = folder or Path(os.environ.get("STOWRAY_TEST_CACHE") or default)
        self.compression = compression

    def layout(self, name: str) -> Layout:
        """The layout that holds the images `name` and `name-judge`."""
        kept = self.folder / f"{name}-{self.compression}-v{VERSION}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{kept.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not kept.exists():
                with self._scratch() as scratch:
                    self.recipe(name)(self, Layout(scratch / "layout"), scratch)
                    (scratch / "layout").rename(kept)
        return Layout(kept)

    def recipe(self, name: str) -> Callable[[Catalogue, Layout, Path], None]:
        """What builds the image; others have more of them."""
        return RECIPES[name]

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        scratch = Path(tempfile.mkdtemp(prefix="building-", dir=self.folder))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch)

    def system_layer(self, layout: Layout) -> Layer:
        """The Debian tree as the lowest layer of another image; the tree itself is made once."""
        source = self.layout("debian")
        manifest = source.document(source.tagged("debian")["digest"])
        config = source.document(manifest["config"]["digest"])
        return layout.link_layer(source, manifest["layers"][0], config["rootfs"]["diff_ids"][0])


def _debian(catalogue: Catalogue, layout: Layout, scratch: Path) -> None:
    """One system tree; `debian-zstd` is the same tree in zstd, `debian-judge` serves both."""
    tree = scratch / "tree"
    tree.mkdir(mode=0o755)
    origin = debian.system_tree(tree)
    packed = layout.add_layer(entries.tree_entries(tree), catalogue.compression)
    zstd = layout.add_layer(entries.tree_entries(tree), "zstd")
    labels = {"Labels": {"origin": origin}}
    layout.tag("debian", layout.add_image([packed], run=labels))
    layout.tag("debian-judge", layout.add_image([packed], run=labels))
    layout.tag("debian-zstd", layout.add_image([zstd], run=labels))
    hello = {
        **labels,
        "Cmd": ["echo hello from $PWD as $(id -u)"],
        "Entrypoint": ["/bin/sh", "-c"],
        "WorkingDir": "/srv",
    }
    layout.tag("debian-hello", layout.add_image([packed], run=hello))


def _site(catalogue: Catalogue, layout: Layout, scratch: Path) -> None:
    """A system layer below pip's site-packages (more than 300 MB unpacked)."""
    site = Path(sysconfig.get_path("purelib"))
    size = 0
    below = [entries.directory("usr/lib/python3"), entries.directory("usr/lib/python3/site")]
    for entry in entries.tree_entries(site):
        if entry.source is not None:
            size += entry.source.stat().st_size
        linkname = (
            f"usr/lib/python3/site/{entry.linkname}" if entry.kind == b"1" else entry.linkname
        )
        if entry.name != ".":
            below.append(_renamed(entry, f"usr/lib/python3/site/{entry.name}", linkname))
    if size < SITE_BYTES:
        below.append(entries.file("usr/lib/python3/site/filler", _noise(SITE_BYTES - size)))
    system = catalogue.system_layer(layout)
    packages = layout.add_layer(below, catalogue.compression)
    for name in ("site", "site-judge"):
        layout.tag(name, layout.add_image([system, packages]))


def _ml(catalogue: Catalogue, layout: Layout, scratch: Path) -> None:
    """A system layer and site-packages in several layers, as a pipeline of RUN lines makes them."""
    site = Path(sysconfig.get_path("purelib"))
    system = catalogue.system_layer(layout)
    parts: list[list[entries.Entry]] = [[], [], []]
    for entry in entries.tree_entries(site):
        if entry.name == ".":
            continue
        top, _, inside = entry.name.partition("/")
        which = 2 if top != "ray" else 1 if inside.startswith("core") else 0
        prefix = "usr/lib/python3/site/"
        linkname = prefix + entry.linkname if entry.kind == b"1" else entry.linkname
        parts[which].append(_renamed(entry, prefix + entry.name, linkname))
    layers = [system, *(layout.add_layer(part, catalogue.compression) for part in parts)]
    for name in ("ml", "ml-judge"):
        layout.tag(name, layout.add_image(layers))


def _renamed(entry: entries.Entry, name: str, linkname: str) -> entries.Entry:
    return dataclasses.replace(entry, name=name, linkname=linkname)


def _noise(size: int, seed: int = 7) -> bytes:
    return random.Random(seed).randbytes(size)


def _many(catalogue: Catalogue, layout: Layout, scratch: Path) -> None:
    """Many small layers that depend on each other; docker media types, `many-zstd` in zstd."""
    contents = [list(layer) for layer in many_layers()]
    kinds: list[Compression] = ["gzip-fast", "gzip", "gzip-members", "none"]
    docker = [
        layout.add_layer(content, kinds[number % 4], docker=True)
        for number, content in enumerate(contents)
    ]
    oci = [layout.add_layer(content, kinds[number % 4]) for number, content in enumerate(contents)]
    zstd = [layout.add_layer(content, "zstd") for content in contents]
    layout.tag("many", layout.add_image(docker, docker=True))
    layout.tag("many-judge", layout.add_image(oci))
    layout.tag("many-zstd", layout.add_image(zstd))


def _many_plain(catalogue: Catalogue, layout: Layout, scratch: Path) -> None:
    """`many` without links to files of lower layers, which podman and containerd cannot unpack."""
    contents = many_layers(lower_links=False)
    layers = [layout.add_layer(content, catalogue.compression) for content in contents]
    for name in ("many-plain", "many-plain-judge"):
        layout.tag(name, layout.add_image(layers))


def many_layers(
    count: int = MANY_LAYERS, *, lower_links: bool = True
) -> Iterator[list[entries.Entry]]:
    """Layers with files, replacements, whiteouts, opaque directories and links, by a fixed seed."""
    chance = random.Random(20)
    yield [
        entries.directory("etc"),
        entries.directory("srv", 0o2775, gid=50),
        *(entries.directory(f"srv/d{number}") for number in range(6)),
        *(
            entries.file(
                f"srv/d{number % 6}/base{number}", chance.randbytes(chance.randrange(4000))
            )
            for number in range(60)
        ),
        entries.symlink("srv/latest", "d0"),
        entries.hardlink("srv/d1/base-linked", "srv/d0/base0"),
    ]
    living = {f"srv/d{number % 6}/base{number}" for number in range(60)}
    for layer in range(1, count):
        folder = f"srv/d{chance.randrange(6)}"
        content = [entries.directory(folder, 0o755, mtime=entries.EPOCH + layer)]
        for number in range(25):
            name = f"{folder}/l{layer}-{number}"
            body = chance.randbytes(chance.randrange(3000)) * chance.randrange(1, 4)
            mode = chance.choice([0o644, 0o600, 0o755, 0o4755])
            content.append(
                entries.file(
                    name,
                    body,
                    mode=mode,
                    uid=chance.randrange(3),
                    mtime=f"{1_700_000_000 + layer}.{number:09d}",
                )
            )
        content.append(entries.hardlink(f"{folder}/l{layer}-twin", f"{folder}/l{layer}-0"))
        content.append(entries.symlink(f"{folder}/l{layer}-link", f"l{layer}-1"))
        content.append(entries.file("etc/generation", f"{layer}\n".encode(), mtime=layer))
        gone = chance.sample(sorted(living), min(3, len(living)))
        living.difference_update(gone)
        content += [entries.whiteout(name) for name in gone]
        if layer % 7 == 3:  # a directory that hides what lower layers put there
            content += [
                entries.opaque(folder),
                entries.file(f"{folder}/after-opaque-{layer}", b"kept"),
            ]
            living = {name for name in living if not name.startswith(f"{folder}/")}
        elif layer % 5 == 2 and living and lower_links:  # a second name for a file of a lower layer
            content.append(
                entries.hardlink(f"{folder}/l{layer}-lower", chance.choice(sorted(living)))
            )
        if layer % 11 == 4:  # a directory becomes a file and the other way round
            content.append(entries.file("etc/turns", b"now a file"))
        elif layer % 11 == 5:
            content += [entries.directory("etc/turns"), entries.file("etc/turns/inside", b"")]
        living |= {f"{folder}/l{layer}-{number}" for number in range(2, 25)}
        yield content


def _small(catalogue: Catalogue, layout: Layout, scratch: Path) -> None:
    """A few kilobytes in three layers: for tests that are about something else."""
    layers = [
        layout.add_layer(
            [
                entries.directory("etc"),
                entries.file("etc/hostname", b"small\n"),
                entries.directory("var"),
                entries.file("var/old", b"old"),
                entries.symlink("var/link", "../etc/hostname"),
            ],
            "gzip",
        ),
        layout.add_layer(
            [
                entries.directory("var"),
                entries.whiteout("var/old"),
                entries.file("var/new", b"new"),
            ],
            "gzip",
        ),
        layout.add_layer([entries.file("etc/hostname", b"smaller\n", mode=0o600)], "gzip"),
    ]
    for name in ("small", "small-judge"):
        layout.tag(name, layout.add_image(layers, run={"Labels": {"test": "small"}}))


def _multi(catalogue: Catalogue, layout: Layout, scratch: Path) -> None:
    """Indexes: `multi` flat with attestations, `multi-docker` a manifest list, `multi-nested`."""
    images: list[Json] = []
    for platform in ("linux/arm/v7", "linux/arm64/v8", "linux/amd64", "linux/s390x"):
        content = [entries.directory("etc"), entries.file("etc/platform", platform.encode())]
        images.append(layout.add_image([layout.add_layer(content)], platform=platform))
    attestations = [layout.add_attestation(image) for image in images]
    layout.tag("multi", layout.add_index([*attestations[:1], *images, *attestations[1:]]))
    listed: list[Json] = []
    for platform in ("linux/arm64/v8", "linux/amd64"):
        content = [entries.directory("etc"), entries.file("etc/platform", platform.encode())]
        layers = [layout.add_layer(content, docker=True)]
        listed.append(layout.add_image(layers, platform=platform, docker=True))
    layout.tag("multi-docker", layout.add_index(listed, docker=True))
    inner = layout.add_index(images[2:])
    layout.tag("multi-nested", layout.add_index([images[0], inner]))
    layout.tag("multi-judge", images[2])


def _large(catalogue: Catalogue, layout: Layout, scratch: Path) -> None:
    """One layer of 1 GiB: half noise, half text, in files of up to 64 MiB."""
    block = _noise(1 << 20)
    content = [entries.directory("data")]
    for number in range(16):
        path = scratch / f"large{number}"
        with path.open("wb") as out:
            for part in range(64):
                tail = b"%010d some words of text\n" % (part * 64 + number)
                out.write(block[: 1 << 19] + (tail * (1 << 15))[: 1 << 19])
        content.append(entries.Entry(f"data/{number}", source=path))
    layer = layout.add_layer(content, catalogue.compression)
    for name in ("large", "large-judge"):
        layout.tag(name, layout.add_image([layer]))


RECIPES: dict[str, Callable[[Catalogue, Layout, Path], None]] = {
    "debian": _debian,
    "site": _site,
    "ml": _ml,
    "many": _many,
    "many-plain": _many_plain,
    "small": _small,
    "multi": _multi,
    "large": _large,
}
