"""Build the images that the measurements pull, and say what they are.

    python -m bench.images [--workdir DIR] [NAME…]

Images are built once per working directory, outside the repository. Packages are pinned and all
their files carry one time, so that two machines measure nearly the same bytes; what the machine's
registries do not give is made up (`SYNTHETIC` in the image's label then).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import entries, peers
from tests.support.catalogue import RECIPES, Catalogue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.compressors import Compression
    from tests.support.images import Layer, Layout

RECIPE_VERSION = 1
INSTALL_SECONDS = 600
PYTHON_PACKAGES = (
    "matplotlib==3.11.2",
    "numpy==2.4.6",
    "pandas==3.1.1",
    "pyarrow==26.0.1",
    "scikit-learn==1.9.1",
    "scipy==1.17.1",
)
NODE_PACKAGES = (
    "eslint@9.17.0",
    "express@4.21.2",
    "lodash@4.17.21",
    "react-dom@18.3.1",
    "react@18.3.1",
    "typescript@5.7.3",
    "webpack@5.97.1",
)
SYNTHETIC = "made up"
SMALL_LAYERS = 60

# name -> (layout of the catalogue, the tag in it, the tag of its twin that umoci can read)
IMAGES = {
    "debian": ("debian", "debian", "debian"),
    "ml": ("bench-ml", "ml", "ml"),
    "node": ("bench-node", "node", "node"),
    "many": ("bench-many", "many", "many"),
    "mlzstd": ("bench-ml", "mlzstd", "ml"),
    "debian-zstd": ("debian", "debian-zstd", "debian"),
    "linked": ("many", "many", "many"),
    "large": ("large", "large", "large"),
}
STANDARD = ("debian", "ml", "node", "many", "mlzstd")


@dataclass(frozen=True)
class About:
    """An image in numbers: `compressed` and `unpacked_tar` in bytes."""

    name: str
    layers: int
    compressed: int
    unpacked_tar: int


class BenchCatalogue(Catalogue):
    """The tests' images and those of the standard set, in gzip level 6 as docker publishes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, compression="gzip")

    def recipe(self, name: str) -> Callable[[Catalogue, Layout, Path], None]:
        return {**RECIPES, **OURS}[name]


def default_workdir() -> Path:
    """Memory where there is one: stores on a disk measure the disk."""
    memory = Path("/dev/shm")
    return (memory if memory.is_dir() else Path(tempfile.gettempdir())) / "stowray-bench"


def catalogue(workdir: Path) -> Catalogue:
    return BenchCatalogue(workdir / f"images-v{RECIPE_VERSION}")


def about(workdir: Path, name: str) -> About:
    layout_name, tag, _ = IMAGES[name]
    layout = catalogue(workdir).layout(layout_name)
    image = layout.image(layout.tagged(tag))
    layers = layout.document(image["digest"])["layers"]
    sizes = layout.layer_sizes()
    return About(
        name,
        len(layers),
        sum(layer["size"] for layer in layers),
        sum(sizes.get(layer["digest"], 0) for layer in layers),
    )


# -- recipes --------------------------------------------------------------------------------------


def _ml(catalogue: Catalogue, layout: Layout, scratch: Path) -> None:
    """A system layer, 500 MB of site-packages, and the small layers of an application."""
    packages, origin = _python_packages(scratch / "site")
    content = list(_moved(packages, "usr/local/lib/python3.11/dist-packages"))
    run = {"Labels": {"packages": origin}}
    kinds: tuple[tuple[str, Compression], ...] = (("ml", "gzip"), ("mlzstd", "zstd"))
    for tag, compression in kinds:
        layers = [
            _system_layer(catalogue, layout, compression),
            layout.add_layer(content, compression),
            *(layout.add_layer(layer, compression) for layer in _application()),
        ]
        layout.tag(tag, layout.add_image(layers, run=run))


def _node(catalogue: Catalogue, layout: Layout, scratch: Path) -> None:
    """A system layer and a node_modules of about 7,000 files."""
    modules, origin = _node_modules(scratch / "node")
    content = list(_moved(modules, "srv/app/node_modules"))
    layers = [catalogue.system_layer(layout), layout.add_layer(content, "gzip")]
    layout.tag("node", layout.add_image(layers, run={"Labels": {"packages": origin}}))


def _many(catalogue: Catalogue, layout: Layout, scratch: Path) -> None:
    """A system layer and sixty layers of a few files, with replacements and whiteouts.

    No links to files of lower layers: podman 4.3 and containerd 1.6 fail on them.
    """
    layers = [catalogue.system_layer(layout)]
    layers += [layout.add_layer(content, "gzip") for content in _small_layers(SMALL_LAYERS)]
    layout.tag("many", layout.add_image(layers))


OURS: dict[str, Callable[[Catalogue, Layout, Path], None]] = {
    "bench-ml": _ml,
    "bench-node": _node,
    "bench-many": _many,
}


def _system_layer(catalogue: Catalogue, layout: Layout, compression: Compression) -> Layer:
    if compression == "gzip":
        return catalogue.system_layer(layout)
    source = catalogue.layout("debian")
    manifest = source.document(source.tagged("debian-zstd")["digest"])
    config = source.document(manifest["config"]["digest"])
    return layout.link_layer(source, manifest["layers"][0], config["rootfs"]["diff_ids"][0])


def _application() -> Iterator[list[entries.Entry]]:
    yield [entries.directory("srv"), entries.directory("srv/app")]
    yield [entries.file(f"srv/app/module{number}.py", b"x = 1\n" * 200) for number in range(40)]
    yield [entries.file("etc/application.conf", b"[application]\n"), entries.directory("var/app")]


def _small_layers(count: int) -> Iterator[list[entries.Entry]]:
    chance = random.Random(60)
    for layer in range(count):
        folder = f"opt/step{layer % 12}"
        content = [entries.directory("opt"), entries.directory(folder)]
        for number in range(12):
            body = chance.randbytes(chance.randrange(2000)) + b"text\n" * chance.randrange(400)
            content.append(entries.file(f"{folder}/l{layer}-{number}", body))
        content.append(entries.symlink(f"{folder}/latest", f"l{layer}-0"))
        content.append(entries.file("etc/generation", f"{layer}\n".encode()))
        if layer % 6 == 5:
            content.append(entries.whiteout(f"opt/step{(layer - 1) % 12}/l{layer - 1}-3"))
        yield content


def _moved(root: Path, place: str) -> Iterator[entries.Entry]:
    """The entries of a tree below another place, all of one owner and time."""
    parts = place.split("/")
    for depth in range(1, len(parts) + 1):
        yield entries.directory("/".join(parts[:depth]))
    for entry in entries.tree_entries(root):
        if entry.name == ".":
            continue
        linkname = f"{place}/{entry.linkname}" if entry.kind == b"1" else entry.linkname
        yield dataclasses.replace(
            entry,
            name=f"{place}/{entry.name}",
            linkname=linkname,
            uid=0,
            gid=0,
            mtime=entries.EPOCH,
            xattrs={},
        )


def _python_packages(target: Path) -> tuple[Path, str]:
    target.mkdir()
    options = ["--quiet", "--no-compile", "--only-binary", ":all:", "--target", str(target)]
    done = _attempt([sys.executable, "-m", "pip", "install", *options, *PYTHON_PACKAGES], target)
    if done:
        return target, " ".join(PYTHON_PACKAGES)
    _make_up(target, files=8000, total=500_000_000)
    return target, SYNTHETIC


def _node_modules(target: Path) -> tuple[Path, str]:
    target.mkdir()
    (target / "package.json").write_text(json.dumps({"name": "bench", "private": True}))
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
    if not peers.missing("npm") and _attempt(["npm", "install", *options, *NODE_PACKAGES], target):
        # Where and when it was installed is no part of the image.
        (target / "node_modules" / ".package-lock.json").unlink(missing_ok=True)
        return target / "node_modules", " ".join(NODE_PACKAGES)
    _make_up(target / "node_modules", files=7000, total=80_000_000)
    return target / "node_modules", SYNTHETIC


def _attempt(command: list[str], folder: Path) -> bool:
    done = subprocess.run(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=INSTALL_SECONDS,
        check=False,
    )
    if done.returncode:
        print(f"{command[0]} failed, the layer is made up:\n{done.stderr[-500:]}", file=sys.stderr)
    return done.returncode == 0


def _make_up(target: Path, *, files: int, total: int) -> None:
    """Fill a folder with files whose sizes spread as those of packages, half noise, half text."""
    chance = random.Random(files)
    weights = [chance.paretovariate(0.9) for _ in range(files)]
    scale = total / sum(weights)
    noise = chance.randbytes(1 << 20)
    for number, weight in enumerate(weights):
        folder = target / f"package{number // 40}" / f"part{number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        size = max(1, int(weight * scale))
        block = noise[: 1 << 12] + b"some words of text\n" * 215
        (folder / f"file{number}").write_bytes((block * (size // len(block) + 1))[:size])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(IMAGES)}")
    parser.add_argument("--workdir", type=Path, default=default_workdir())
    arguments = parser.parse_args()
    for name in arguments.names or STANDARD:
        print(asdict(about(arguments.workdir, name)), flush=True)


if __name__ == "__main__":
    main()
