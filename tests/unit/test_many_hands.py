"""Processes that pull at once into one store, with limits of one everywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.engine import PullOptions
from stowray.pipeline.source import parse_source
from stowray.pipeline.store import Store
from tests.support.command import COMMAND_SECONDS, Stowray
from tests.support.hands import Hands
from tests.support.invariants import check_store
from tests.support.plain_user import PLAIN_UID, plain_directory, run_plain
from tests.support.registry import FakeRegistry, incompressible
from tests.support.small import local_engine, small_tar

if TYPE_CHECKING:
    from pathlib import Path

LIMITS = "[registry]\nconnections = 1\nrange_connections = 1\n[unpack]\nworkers = 1\n"
HANDS = 6


def test_each_blob_is_fetched_once_whoever_wants_it(workspace: Path) -> None:
    home = workspace / "home"
    home.mkdir()
    (home / "limits.toml").write_text(LIMITS)
    command = Stowray(workspace / "store", home)
    Store.open(command.store).close()
    with FakeRegistry() as registry:
        base = small_tar({"base": incompressible(300_000, 1)})
        names = []
        for number in range(3):
            own = small_tar({f"own/{number}": incompressible(200_000, 10 + number)})
            registry.add_image("a/b", str(number), [base, own])
            names.append(f"{registry.host}/a/b:{number}")
        processes = []
        for number in range(HANDS):
            wanted = (names[number % 3], names[(number + 1) % 3])
            arguments = command.command("pull", *wanted)
            arguments[1:1] = ["--config", str(home / "limits.toml")]
            processes.append(
                subprocess.Popen(
                    arguments,
                    env=command.environment(),
                    cwd=home,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                )
            )
        command.run("gc")
        for process in processes:
            _, errors = process.communicate(timeout=COMMAND_SECONDS)
            assert process.returncode == 0, errors.decode()
        fetched = Counter(
            request.path for request in registry.requests if "/blobs/" in request.path
        )
    # The layers of three images, one of them shared, and three configs.
    assert len(fetched) == 7
    assert set(fetched.values()) == {1}, fetched
    check_store(command.store)


def test_hands_that_are_killed_beside_gc_and_rm_lose_and_damage_nothing(workspace: Path) -> None:
    with FakeRegistry() as registry:
        hands = Hands(workspace, registry, seed=3)
        for _ in range(2):
            hands.round(8)
        hands.settle()


PLAIN = """
import json, sys
from stowray.pipeline.engine import LocalEngine, PullOptions
from stowray.pipeline.errors import StowrayError
from stowray.pipeline.progress import Progress
from stowray.pipeline.settings import Settings
from stowray.pipeline.source import parse_source
become_plain()
try:
    engine = LocalEngine(Settings(store=sys.argv[1]), progress=Progress(node="plain"))
except StowrayError as error:
    print(json.dumps([error.exit_code]))
    sys.exit()
told = []
for reference in sys.argv[2:]:
    try:
        told.append(engine.pull(parse_source(reference), PullOptions(unpack=False)).digest)
    except StowrayError as error:
        told.append(error.exit_code)
engine.close()
print(json.dumps(told))
"""


# Another plain user, in the group of the first one.
NEIGHBOUR = PLAIN.replace(
    "become_plain()", f"import os; os.setgroups([]); os.setgid({PLAIN_UID}); os.setuid(65533)"
)


@pytest.mark.root
def test_a_store_is_its_owners_and_whoever_else_comes_is_refused_and_leaves_nothing() -> None:
    base = small_tar({"base": incompressible(100_000, 1)})
    with FakeRegistry() as registry, plain_directory() as folder:
        digests, names = [], []
        for number in range(4):
            layers = [base, small_tar({f"own/{number}": b""})]
            digests.append(registry.add_image("a/b", str(number), layers))
            names.append(f"{registry.host}/a/b:{number}")
        store = folder / "store"
        assert json.loads(run_plain(PLAIN, store, names[0])) == digests[:1]
        home = folder / "home"
        home.mkdir()
        root = Stowray(store, home)
        commands = (
            ["pull", *names],
            ["images"],
            ["gc"],
            ["rm", names[0]],
            ["pin", names[0]],
            ["verify", "--repair"],
            ["mount", names[0], home / "mounted"],
        )
        with ThreadPoolExecutor(len(commands) + 1) as pool:
            owner = pool.submit(run_plain, PLAIN, store, *names)
            answers = list(pool.map(lambda words: root.attempt(*words), commands))
            assert json.loads(owner.result()) == digests
        for words, answer in zip(commands, answers, strict=True):
            assert answer.status == 7, (words, answer)
            assert f"sudo -u '#{PLAIN_UID}'" in answer.stderr + answer.text
        # As a group that may enter the directory: the files in it are its owner's alone.
        store.chmod(0o770)
        assert json.loads(run_plain(NEIGHBOUR, store, names[0])) == [7]
        store.chmod(0o700)
        assert json.loads(run_plain(NEIGHBOUR, store, names[0])) == [7]
        owners = {path.lstat().st_uid for path in [store, *store.rglob("*")]}
        assert owners == {PLAIN_UID}
        assert json.loads(run_plain(PLAIN, store, *names)) == digests
        check_store(store)
        # A store of root's is closed to a plain user.
        own = folder / "roots"
        with local_engine(own) as engine:
            engine.pull(parse_source(names[0]), PullOptions())
        assert json.loads(run_plain(PLAIN, own, names[0])) == [7]
        check_store(own)


# Whatever root makes there belongs to the directory's owner, as setfsuid(2) brings about here.
ONE_OWNER = """
import ctypes, os, sys
from stowray.pipeline.digest import Digest
from stowray.pipeline.store import Store
import stowray.pipeline.probe, stowray.pipeline.layout, stowray.pipeline.references
assert os.geteuid() == 0
ctypes.CDLL(None).setfsuid(65534)
with Store.open(sys.argv[1]) as store:
    digest = Digest.of(b"here")
    store.put_blob(digest, b"here")
    print(digest)
"""


@pytest.mark.root
def test_root_may_use_a_file_system_that_gives_all_files_one_owner() -> None:
    with plain_directory() as folder:
        (folder / "store").mkdir(mode=0o700)
        os.chown(folder / "store", PLAIN_UID, PLAIN_UID)
        for _ in range(2):
            assert run_plain(ONE_OWNER, folder / "store").startswith("sha256:")


CREEP = """
import gc, json, os, sys, threading
from stowray.pipeline.engine import LocalEngine, PullOptions
from stowray.pipeline.progress import Progress
from stowray.pipeline.settings import Settings
from stowray.pipeline.source import parse_source
from stowray.pipeline.store import Store
store, count, *names = sys.argv[1:]

def now():
    gc.collect()
    with open("/proc/self/statm") as memory:
        pages = int(memory.read().split()[1])
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "memory": pages * os.sysconf("SC_PAGESIZE"),
    }

told = []
engine = LocalEngine(Settings(store=store), progress=Progress(node="creep"))
for number in range(int(count)):
    name = parse_source(names[number % len(names)])
    engine.pull(name, PullOptions(policy="always"))
    if number % 5 == 4:
        engine.store.remove_reference(name.canonical)
    if (number + 1) % (int(count) // 4) == 0:
        told.append(now())
engine.close()
print(json.dumps(told))
"""


def creep(workspace: Path, pulls: int) -> list[dict[str, int]]:
    """Pull so often in one process, and return what it holds after each quarter."""
    with FakeRegistry() as registry:
        names = []
        for number in range(4):
            layers = [small_tar({f"x/{number}/{n}": incompressible(60_000, n)}) for n in range(3)]
            registry.add_image("a/b", str(number), layers)
            names.append(f"{registry.host}/a/b:{number}")
        done = subprocess.run(
            [sys.executable, "-c", CREEP, str(workspace / "store"), str(pulls), *names],
            stdout=subprocess.PIPE,
            check=True,
            timeout=COMMAND_SECONDS,
        )
    told: list[dict[str, int]] = json.loads(done.stdout)
    return told


def test_two_hundred_pulls_in_one_process_leave_nothing_behind(workspace: Path) -> None:
    first, *_, last = creep(workspace, 200)
    assert last["descriptors"] <= first["descriptors"]
    assert last["threads"] <= first["threads"]
    # Of 150 pulls not 40 kB each: what a forgotten document, answer or ingest would take.
    assert last["memory"] - first["memory"] < 6 << 20
