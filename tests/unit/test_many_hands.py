"""Processes that pull at once into one store, with limits of one everywhere."""

from __future__ import annotations

import subprocess
from collections import Counter
from typing import TYPE_CHECKING

from stowray.pipeline.store import Store
from tests.support.command import COMMAND_SECONDS, Stowray
from tests.support.invariants import check_store
from tests.support.registry import FakeRegistry, incompressible
from tests.support.small import small_tar

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
