"""Many processes at one store: pulls of overlapping references, killed at random, beside gc and rm.

A round starts so many hands, each a command of its own with a umask of its own. Every hand ends by
itself with a status that its work allows, or by SIGKILL. What must hold after each round is told by
``tests.support.invariants`` and by a pull that finds everything or mends it.
"""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.support.command import COMMAND_SECONDS, Stowray
from tests.support.invariants import check_store
from tests.support.registry import FakeRegistry, incompressible
from tests.support.small import small_tar

if TYPE_CHECKING:
    from pathlib import Path

UMASKS = (0o000, 0o022, 0o077, 0o177, 0o777)
REFERENCES = 5
# What a hand may end with: done, or its image was removed or some of its images could not be had
# because another hand removed them meanwhile.
ALLOWED = {"pull": {0}, "gc": {0}, "rm": {0, 1, 3}, "verify": {0}, "images": {0}}


@dataclass
class Counts:
    """What was tried; ``ended`` by command and status, -9 for those that were killed."""

    rounds: int = 0
    hands: int = 0
    killed: int = 0
    ended: Counter[tuple[str, int]] = field(default_factory=Counter)


class Hands:
    """A registry with overlapping images, one store, and rounds of hands at it."""

    def __init__(self, folder: Path, registry: FakeRegistry, *, seed: int) -> None:
        self.counts = Counts()
        self._random = random.Random(seed)
        home = folder / "home"
        home.mkdir()
        self.command = Stowray(folder / "store", home)
        layers = [
            small_tar({f"d{n}/file": incompressible(150_000 + 50_000 * n, n)})
            for n in range(REFERENCES + 1)
        ]
        self.names = []
        for number in range(REFERENCES):
            # Each shares its base with all and its middle with the one before it.
            own = [layers[0], layers[number], layers[number + 1]]
            registry.add_image("a/b", str(number), list(dict.fromkeys(own)))
            self.names.append(f"{registry.host}/a/b:{number}")
        self.command.pull(self.names[0])

    def round(self, hands: int) -> None:
        """Let so many hands work at once, kill some, and look at the store."""
        self.counts.rounds += 1
        running = []
        for _ in range(hands):
            words = self._words()
            running.append((words[0], self._begin(words)))
            self.counts.hands += 1
        for _, process in running:
            if self._random.random() < 0.4:
                time.sleep(self._random.random() * 0.4)
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
                    self.counts.killed += 1
        for name, process in running:
            try:
                _, errors = process.communicate(timeout=COMMAND_SECONDS)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGABRT)
                _, errors = process.communicate()
                raise AssertionError(f"{name} hangs:\n{errors.decode()[-6000:]}") from None
            status = process.returncode
            self.counts.ended[name, status] += 1
            allowed = {*ALLOWED[name], -signal.SIGKILL}
            assert status in allowed, f"{name} ended with {status}:\n{errors.decode()[-4000:]}"
        check_store(self.command.store)

    def settle(self) -> None:
        """Ask for everything once more, and prove all of it."""
        self.command.run("pull", *self.names)
        self.command.run("verify", "--deep")
        self.command.run("gc")
        check_store(self.command.store)
        for name in self.names:
            self.command.run("pull", "--policy", "never", name)

    def _words(self) -> list[str]:
        kind = self._random.choices(
            ("pull", "gc", "rm", "verify", "images"), weights=(10, 3, 3, 1, 1)
        )[0]
        if kind == "pull":
            return ["pull", *self._random.sample(self.names, self._random.randint(1, 3))]
        if kind == "rm":
            return ["rm", self._random.choice(self.names)]
        return [kind]

    def _begin(self, words: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command.command(*words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=self.command.home,
            env=self.command.environment(),
            umask=self._random.choice(UMASKS),
        )
