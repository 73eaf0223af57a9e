"""Build the images that the measurements pull, and say what they are.

python -m bench.images [--workdir DIR] [NAME…]
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.support.catalogue import Catalogue

# name -> (layout of the catalogue, the tag in it, the tag of its twin that umoci can read)
IMAGES = {
    "debian": ("debian", "debian", "debian"),
    "debian-zstd": ("debian", "debian-zstd", "debian"),
    "site": ("site", "site", "site"),
    "ml": ("ml", "ml", "ml"),
    "many": ("many", "many", "many"),
    "many-zstd": ("many", "many-zstd", "many-judge"),
    "many-plain": ("many-plain", "many-plain", "many-plain"),
    "multi": ("multi", "multi", "multi"),
    "large": ("large", "large", "large"),
}


@dataclass(frozen=True)
class About:
    """An image in numbers."""

    name: str
    layers: int
    compressed: int
    unpacked_tar: int


def default_workdir() -> Path:
    """Memory where there is one: stores on a disk measure the disk."""
    memory = Path("/dev/shm")
    return (memory if memory.is_dir() else Path(tempfile.gettempdir())) / "stowray-bench"


def catalogue(workdir: Path) -> Catalogue:
    """Images in gzip level 6, as docker and buildah publish them."""
    return Catalogue(workdir / "images", compression="gzip")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--workdir", type=Path, default=default_workdir())
    arguments = parser.parse_args()
    for name in arguments.names or IMAGES:
        print(asdict(about(arguments.workdir, name)))


if __name__ == "__main__":
    main()
