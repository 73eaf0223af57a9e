"""Small images for tests of what stands above layers and blobs: a tar, a registry, an engine."""

from __future__ import annotations

import io
import tarfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stowray.pipeline.engine import LocalEngine
from stowray.pipeline.progress import Progress
from stowray.pipeline.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def small_tar(files: dict[str, bytes]) -> bytes:
    """A tar of regular files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


@contextmanager
def local_engine(store: Path, **settings) -> Iterator[LocalEngine]:
    """An in-process engine over the store at ``store``."""
    made = Settings(store=str(store), node="test", **settings)
    engine = LocalEngine(made, progress=Progress(node="test"))
    try:
        yield engine
    finally:
        engine.close()
