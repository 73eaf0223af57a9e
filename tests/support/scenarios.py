"""What is done to a store while it is killed, cut off from power or refused by the disk.

Each scenario is a function of the store's path (with the boot it runs on); it does what the command
does, in this one process, so that every call can be counted. The images come from a layout on
disk: layers that share, link across and hide one another, as OCI and Docker types.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from stowray.pipeline.collect import collect, remove
from stowray.pipeline.crew import unpack_arguments
from stowray.pipeline.digest import Digest
from stowray.pipeline.engine import LocalEngine, PullOptions
from stowray.pipeline.errors import CancelledError
from stowray.pipeline.layer_tasks import LayerTasks
from stowray.pipeline.progress import Progress
from stowray.pipeline.references import pin_reference
from stowray.pipeline.rootfs import write_rootfs
from stowray.pipeline.run import Outcome
from stowray.pipeline.settings import Settings
from stowray.pipeline.source import parse_source
from stowray.pipeline.store import Store
from stowray.pipeline.verify import verify
from tests.support.entries import directory, file, hardlink, opaque, symlink, whiteout
from tests.support.images import Layout
from tests.support.stores import FIRST_BOOT, pattern

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stowray.pipeline.clock import Boot
    from stowray.pipeline.fetch import Fetcher
    from stowray.pipeline.image import Image
    from stowray.pipeline.plan import Step
    from stowray.pipeline.progress import Report

IMAGES_VARIABLE = "STOWRAY_TEST_IMAGES"


class InlineCrew:
    """Carries out each step at once and in this thread: the same calls in the same order."""

    commits_in_order = False

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store
        self._tasks = LayerTasks()
        self._failed = False

    def start_early(self) -> None:
        return

    def submit(
        self,
        step: Step,
        image: Image,
        fetcher: Fetcher,
        report: Report,
        cancelled: Callable[[], bool],
    ) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        try:
            if self._failed:
                # Who follows a fetch that has failed would wait for it in this very thread.
                raise CancelledError(step.id)
            if step.kind == "fetch":
                fetched = fetcher.fetch(
                    image.reference, step.descriptor, report=report, cancelled=cancelled
                )
                outcome = Outcome(source=fetched.source, fetched_bytes=fetched.fetched_bytes)
            else:
                arguments = unpack_arguments(self._settings, self._store, step)
                outcome = Outcome(
                    **self._tasks.run(step.kind, arguments, lambda *_: None, cancelled)
                )
        except BaseException as error:  # noqa: BLE001 - as an executor does
            self._failed = True
            future.set_exception(error)
        else:
            future.set_result(outcome)
        return future

    def close(self) -> None:
        return


def make_images(path: Path) -> Path:
    """Write the layout with the images ``one``, ``two`` (shares a layer) and ``three`` (Docker)."""
    layout = Layout(path)
    base = layout.add_layer(
        [
            directory("usr"),
            directory("usr/lib", mode=0o755),
            file("usr/lib/data", pattern(150_000, 1), xattrs={"user.note": b"x"}),
            hardlink("usr/lib/again", "usr/lib/data"),
            symlink("lib", "usr/lib"),
            directory("etc", mode=0o700, uid=7),
            file("etc/passwd", b"root:x:0:0::/:/bin/sh\n", mode=0o600),
            directory("gone"),
            file("gone/file", b"1"),
            directory("old"),
            file("old/file", b"2"),
        ]
    )
    # Depends on what lies below: through a link, a hard link to a lower file, implied parents.
    settled = layout.add_layer(
        [
            file("lib/new", b"through a lower link"),
            hardlink("usr/lib/third", "usr/lib/data"),
            file("etc/group", b"root:x:0:\n"),
            whiteout("gone"),
            opaque("old"),
            file("old/new", b"3"),
        ]
    )
    alone = layout.add_layer([directory("srv"), file("srv/page", pattern(20_000, 2))], "zstd")
    docker = layout.add_layer([directory("opt"), file("opt/x", b"docker")], docker=True)
    layout.tag("one", layout.add_image([base, settled]))
    layout.tag("two", layout.add_image([base, alone]))
    layout.tag("three", layout.add_image([docker], docker=True))
    return path


def source_text(name: str) -> str:
    """Return what one of the images is called; their place is the server's to know."""
    return f"oci:{os.environ[IMAGES_VARIABLE]}:{name}"


def reference(name: str) -> str:
    return parse_source(source_text(name)).canonical


@contextmanager
def engine(path: Path, boot: Boot) -> Iterator[LocalEngine]:
    settings = Settings(store=str(path), node="test")
    with Store.open(path, boot=boot) as store:
        made = LocalEngine(
            settings,
            progress=Progress(node="test"),
            store=store,
            crew=InlineCrew(settings, store),
        )
        try:
            yield made
        finally:
            made.close()


def _pull(path: Path, boot: Boot, *names: str, sync: bool = False) -> dict[str, int]:
    fetched = 0
    with engine(path, boot) as local:
        for name in names:
            source = parse_source(source_text(name))
            result = local.pull(source, PullOptions(sync=sync))
            fetched += result.fetched_bytes
    return {"fetched": fetched}


def pull(path: Path, boot: Boot = FIRST_BOOT) -> dict[str, int]:
    """Pull two images that share a layer."""
    return _pull(path, boot, "one", "two")


def pull_docker(path: Path, boot: Boot = FIRST_BOOT) -> dict[str, int]:
    return _pull(path, boot, "three", sync=True)


def pull_all(path: Path, boot: Boot = FIRST_BOOT) -> dict[str, int]:
    return _pull(path, boot, "one", "two", "three", sync=True)


def drop(path: Path, boot: Boot = FIRST_BOOT) -> None:
    """Remove one image and collect."""
    with Store.open(path, boot=boot) as store:
        if store.find_reference(reference("one"), "linux/amd64") is not None:
            remove(store, reference("one"))
        collect(store)


def evict(path: Path, boot: Boot = FIRST_BOOT) -> None:
    """Collect to a size that leaves no room for anything but what is pinned."""
    with Store.open(path, boot=boot) as store:
        collect(store, max_size=1000)


def just_collect(path: Path, boot: Boot = FIRST_BOOT) -> None:
    """Collect, on a store that is used for nothing else."""
    with Store.open(path, boot=boot) as store:
        collect(store)


def pin(path: Path, boot: Boot = FIRST_BOOT) -> None:
    with Store.open(path, boot=boot) as store:
        pin_reference(store, reference("one"))
        pin_reference(store, reference("two"))
        pin_reference(store, reference("two"), pinned=False)


def sync(path: Path, boot: Boot = FIRST_BOOT) -> None:
    with Store.open(path, boot=boot) as store:
        store.sync()


def export(path: Path, boot: Boot = FIRST_BOOT) -> None:
    """Write a root filesystem out of the store."""
    with Store.open(path, boot=boot) as store:
        record = store.find_reference(reference("one"), "linux/amd64")
        if record is not None:
            folder = Path(tempfile.mkdtemp(dir=path.parent))
            try:
                write_rootfs(store, Digest(record.chain_id), folder / "root")
            finally:
                shutil.rmtree(folder)


def mend(path: Path, boot: Boot = FIRST_BOOT) -> None:
    """Find a damaged blob and a damaged tree, put them aside and pull again."""
    with Store.open(path, boot=boot) as store:
        record = store.find_reference(reference("one"), "linux/amd64")
        if record is not None:
            blob = store.blob_path(record.layers[0])
            with suppress(OSError):
                if blob.exists():
                    content = bytearray(blob.read_bytes())
                    if len(content) > 100:
                        content[100] ^= 1
                    blob.chmod(0o600)
                    blob.write_bytes(content)
                    blob.chmod(0o444)
        verify(store, deep=True, repair=True)
    _pull(path, boot, "one", "two", "three")


def put_aside(path: Path, boot: Boot = FIRST_BOOT) -> None:
    """Put a blob aside that was durable, and fetch it again."""
    with Store.open(path, boot=boot) as store:
        record = store.find_reference(reference("one"), "linux/amd64")
        if record is not None:
            for layer in record.layers:
                store.quarantine(layer)
            store.quarantine(record.manifest)
    _pull(path, boot, "one")


SCENARIOS: dict[str, Callable[..., object]] = {
    "pull": pull,
    "pull_docker": pull_docker,
    "pull_all": pull_all,
    "collect": just_collect,
    "drop": drop,
    "evict": evict,
    "pin": pin,
    "sync": sync,
    "export": export,
    "mend": mend,
    "put_aside": put_aside,
}
# What the store has before each: nothing, or all three images.
FROM_EMPTY = ("pull", "pull_docker")
