"""What a store is after a power cut that lost or emptied any one of its files, and after kills."""

from __future__ import annotations

import random
import shutil
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.collect import collect
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import StorageError
from stowray.pipeline.references import pin_reference
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.store import Store
from tests.support.stores import (
    FIRST_BOOT,
    NEXT_BOOT,
    check_blobs,
    kill,
    leftovers,
    pattern,
    start,
    stow,
)

if TYPE_CHECKING:
    from pathlib import Path

PULL = """
path, digest, size, seed = sys.argv[1], Digest(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
data = hashlib.shake_256(seed.to_bytes(8, "little")).digest(size)
store = Store.open(path)
say("begun")
while not store.has(digest, size):
    ingest = store.acquire(digest, size)
    if ingest is None:
        with store.follow(digest, size, grace_seconds=0.05) as follower:
            try:
                follower.read(), follower.wait_proven()
            except Exception as error:
                if type(error).__name__ not in ("NodeError", "GenerationChanged"):
                    raise
        continue
    with ingest:
        while ingest.offset < size:
            ingest.write(data[ingest.offset : ingest.offset + 65536])
        ingest.commit()
"""


def make(path: Path) -> Digest:
    with Store.open(path, boot=FIRST_BOOT) as store:
        known = stow(store, "a:1", "base", "top")
        store.confirm(known.manifest, "registry/a")
        pin_reference(store, "a:1")
        return Digest(known.chain_id)


def files(path: Path) -> list[str]:
    """Return the names of all files that the store itself keeps."""
    found = [str(file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file()]
    return [name for name in found if "/tree/" not in name]


@pytest.mark.parametrize("loss", ["emptied", "zeroed", "cut", "lost"])
def test_whatever_file_a_power_cut_spoils_the_next_pull_mends_the_store(
    workspace: Path, loss: str
) -> None:
    chain = make(workspace / "original")
    names = files(workspace / "original")
    assert len(names) > 15
    for number, name in enumerate(names):
        path = workspace / f"store-{number}"
        shutil.copytree(workspace / "original", path)
        victim = path / name
        if loss == "lost":
            victim.unlink()
        else:
            content = victim.read_bytes()
            mode = victim.stat().st_mode & 0o777
            victim.chmod(0o600)
            victim.write_bytes(
                {
                    "emptied": b"",
                    "zeroed": bytes(len(content)),
                    "cut": content[: len(content) // 2],
                }[loss]
            )
            victim.chmod(mode)
        if name in ("version", "nonce") and loss == "cut":
            # No power cut of a file system that journals its sizes leaves part of so small a file.
            continue
        with Store.open(path, boot=NEXT_BOOT) as store:
            for known in store.references():
                for digest in known.digests:
                    if store.has(digest):
                        with store.follow(digest, store.blob_path(digest).stat().st_size) as reader:
                            assert digest.matches(reader.read()), name
            if name.startswith("refs/") and loss != "lost":
                with pytest.raises(StorageError, match="damaged"):
                    collect(store)
            stow(store, "a:1", "base", "top")
            assert Snapshots(store).has(chain), name
            assert all(store.has(digest) for digest in store.references()[0].digests), name
            collect(store)
            assert leftovers(path) == [], name
        check_blobs(path)
        shutil.rmtree(path)


def test_pulls_of_one_blob_by_processes_that_are_killed_end_well(workspace: Path) -> None:
    choice = random.Random(7)
    size = 8 << 20
    path = workspace / "store"
    Store.open(path).close()
    for seed in range(5):
        digest = Digest.of(pattern(size, seed))
        processes = [start(PULL, path, digest, size, seed) for _ in range(3)]
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        kill(processes.pop(choice.randrange(3)))
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
        # The one that was killed may have been between the commit and the removal of its ingest.
        with Store.open(path) as store, store.lease("test", [digest]):
            collect(store)
        assert digest in check_blobs(path)
        assert [name for name in leftovers(path) if "/ingest/" in name] == []
