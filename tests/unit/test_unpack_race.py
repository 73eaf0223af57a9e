"""Another process swaps directories for symlinks while layers are staged, copied and removed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.errors import StorageError
from stowray.pipeline.layer import stage_layer
from stowray.pipeline.overlay import ChainView
from stowray.pipeline.removal import remove_tree
from stowray.pipeline.rootfs import flatten
from tests.support.entries import Entry, directory, file, hardlink, opaque, whiteout
from tests.support.layer_cases import make_host, watch
from tests.support.stacks import reader, tar_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

# A long run by hand or at night: STOWRAY_TEST_RACE_SECONDS=30.
SECONDS = float(os.environ.get("STOWRAY_TEST_RACE_SECONDS", "2"))
ROOT = os.geteuid() == 0
NAMES = [f"d{number}" for number in range(4)]

SWAPPER = """
import ctypes, os, signal, sys
from pathlib import Path
tree, trap, victim = map(Path, sys.argv[1:4])
names = sys.argv[4:]
stopped = False
def stop(*_):
    global stopped
    stopped = True
signal.signal(signal.SIGTERM, stop)
libc = ctypes.CDLL(None)
pairs = [(os.fsencode(tree / name), os.fsencode(trap / name)) for name in names]
swaps = junk = 0
print("ready", flush=True)
while not stopped:
    for inside, outside in pairs:
        # AT_FDCWD, RENAME_EXCHANGE
        if libc.renameat2(-100, inside, -100, outside, 2) == 0:
            swaps += 1
        elif not os.path.islink(outside):
            # The tree is gone and its directory is here: arm the trap anew.
            try:
                os.rename(outside, outside + b".%d" % junk)
            except FileNotFoundError:
                pass
            os.symlink(victim, outside)
            junk += 1
print(swaps)
"""


@pytest.fixture
def base() -> Iterator[Path]:
    memory = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(dir=memory, prefix="stowray-race-"))
    yield path
    remove_tree(path)


@contextlib.contextmanager
def swapping(tree: Path, trap: Path, victim: Path, counts: list[int]) -> Iterator[None]:
    trap.mkdir()
    for name in NAMES:
        (trap / name).symlink_to(victim)
    process = subprocess.Popen(
        [sys.executable, "-c", SWAPPER, tree, trap, victim, *NAMES],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield
    finally:
        process.terminate()
        output, _ = process.communicate(timeout=60)
        counts.append(int(output))


def layer() -> bytes:
    entries: list[Entry] = []
    for number in range(400):
        name = NAMES[number % 4]
        place = f"{name}/s{number % 7}"
        entries += [file(f"{place}/hello", b"owned"), directory(name, 0o777, mtime=number)]
        entries += [file(f"{name}/hello", b"owned"), file(f"{name}/new", b"owned", uid=7)]
        entries += [whiteout(f"{name}/f"), hardlink(f"{place}/l", f"{place}/hello")]
        entries += [hardlink(f"{name}/l", f"{name}/hello"), opaque(place)]
    return tar_bytes(entries)


def test_another_process_leads_nobody_out(base: Path) -> None:
    victim = make_host(base)
    check = watch(base)
    tree, copy, blob = base / "layer", base / "layer-copy", layer()
    counts: list[int] = []
    rounds = 0
    give_up = time.monotonic() + SECONDS
    with swapping(tree, base / "layer-trap", victim, counts):
        while time.monotonic() < give_up or rounds < 2:
            tree.mkdir()
            # Whether anybody notices is a matter of luck; nothing outside may ever change, and
            # nothing from outside may come in.
            with contextlib.suppress(StorageError):
                stage_layer(reader(blob), tree, privileged=ROOT)
                with ChainView([tree], ROOT) as view:
                    flatten(view, copy)
            for path in [*copy.rglob("*")] if copy.exists() else []:
                assert path.name != "also-exists-outside-root"
                assert not path.is_file() or path.is_symlink() or path.read_bytes() != b"hello"
            for path in (copy, tree):
                while path.exists():
                    with contextlib.suppress(StorageError):
                        remove_tree(path)
            check()
            rounds += 1
    check()
    assert counts[0] > rounds, "the other process did not get to swap anything"
    print(f"{rounds} layers, {counts[0]} swaps in {SECONDS:g} s: nothing outside changed")
