"""Pull, remove, collect and kill for as long as one likes: `python -m bench.soak --minutes 30`.

Each round starts some processes of the command on one store, on same and overlapping references,
with removals and collections among them, and kills one or more at random moments. When all have
ended the store is judged from outside; whoever was not killed must have succeeded. With `--ray` a
fifth of the pulls go through a warm session, of which every tenth round kills an actor. Every
twentieth round all images are pulled, old leftovers collected and trees compared with those of a
store that nothing was killed in. One process lives through it all; its descriptors, threads and
memory are told, as are those of the actors, of each kind the most. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.actor_kills import actors_of
from tests.support.command import Stowray
from tests.support.invariants import age, check_store, trees_of, wait_quiet
from tests.support.registry import FakeRegistry, incompressible
from tests.support.small import small_tar

if TYPE_CHECKING:
    from collections.abc import Iterable

WAIT_SECONDS = 300
EVERY = 20
# What a process that was not killed may end with: a removal of what is not there is told as such.
FINE = {"pull": {0}, "rm": {0, 3}, "gc": {0}, "pin": {0, 3}, "verify": {0, 5}}

DWELLER = """
import os, sys
from pathlib import Path
from stowray.pipeline.collect import collect
from stowray.pipeline.engine import LocalEngine, PullOptions
from stowray.pipeline.progress import Progress
from stowray.pipeline.settings import Settings
from stowray.pipeline.source import parse_source
engine = LocalEngine(Settings(store=sys.argv[1]), progress=Progress(node="soak"))
print("ready", flush=True)
for line in sys.stdin:
    try:
        engine.pull(parse_source(line.strip()), PullOptions())
        print("done", flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
engine.close()
"""


class Soak:
    """One store, its registry and what happened to it."""

    def __init__(self, folder: Path, seed: int, hands: int, ray: bool) -> None:
        self.choice = random.Random(seed)
        self.hands = hands
        self.ray = ray
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir()
        self.command = Stowray(folder / "store", self.home)

    def images(self, registry: FakeRegistry) -> list[str]:
        """Publish images that share layers; return their references."""
        base = small_tar({f"base/{n}": incompressible(200_000, n) for n in range(10)})
        names = []
        for number in range(6):
            own = small_tar({f"own/{number}": incompressible(900_000, 100 + number)})
            middle = small_tar({f"middle/{number % 2}": incompressible(500_000, 50 + number % 2)})
            registry.add_image("soak/image", str(number), [base, middle, own])
            names.append(f"{registry.host}/soak/image:{number}")
        return names

    def start(self, name: str, *arguments: str, engine: str = "local") -> subprocess.Popen[bytes]:
        command = Stowray(self.command.store, self.home, engine)
        umask = self.choice.choice((0o022, 0o077, 0o002, 0))
        return subprocess.Popen(
            command.command(name, *arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=self.home,
            env=command.environment(),
            start_new_session=True,
            umask=umask,
        )

    def round(self, references: list[str]) -> None:
        """Some processes at once, some of them killed."""
        running: list[tuple[str, subprocess.Popen[bytes]]] = []
        for _ in range(self.choice.randint(1, self.hands)):
            name = self.choice.choice(("pull",) * 6 + ("rm", "gc", "gc", "pin"))
            engine = (
                "ray" if self.ray and name == "pull" and self.choice.random() < 0.2 else "local"
            )
            chosen = self.choice.choice(references)
            arguments = [] if name == "gc" else [chosen]
            if name == "gc" and self.choice.random() < 0.3:
                arguments = ["--max-size", "5M"]
            running.append((name, self.start(name, *arguments, engine=engine)))
            self.counts[f"{name} {engine}" if name == "pull" else name] += 1
        lost = self.ray and self.choice.random() < 0.1 and self._kill_an_actor()
        victims = self.choice.sample(running, self.choice.randint(1, min(2, len(running))))
        for _, process in victims:
            time.sleep(self.choice.uniform(0, 0.35))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                self.counts["killed"] += 1
        killed = {process.pid for _, process in victims}
        for name, process in running:
            try:
                _, errors = process.communicate(timeout=WAIT_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                self.wrong.append(f"{name} hangs")
                continue
            fine = FINE[name] | ({6} if lost and name == "pull" else set())
            if process.pid not in killed and process.returncode not in fine:
                text = errors.decode(errors="replace")[-600:]
                self.wrong.append(f"{name} ended with {process.returncode}: {text}")

    def _kill_an_actor(self) -> bool:
        time.sleep(self.choice.uniform(0, 0.3))
        actors = actors_of(str(self.home))
        if not actors:
            return False
        victim = self.choice.choice(sorted(actors))
        self.counts[f"killed {actors[victim]}"] += 1
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        return True

    def sample(self, dweller: int) -> dict[str, dict[str, int]]:
        """Return what the dweller and the session's actors take."""
        kinds: dict[str, list[int]] = {"dweller": [dweller]}
        for pid, name in actors_of(str(self.home)).items():
            kinds.setdefault(name, []).append(pid)
        return {name: usage_of_all(pids) for name, pids in sorted(kinds.items())}

    def judge(self, trees: dict[str, str]) -> None:
        try:
            if self.ray:
                wait_quiet(self.command.store)
            check_store(self.command.store, trees)
        except (AssertionError, OSError, ValueError) as error:
            self.wrong.append(str(error)[:2000])

    def settle(self, references: list[str], trees: dict[str, str]) -> None:
        """All images again, and nothing but them."""
        try:
            self.command.run("pull", *references)
            age(self.command.store)
            self.command.run("gc")
            check_store(self.command.store, trees, finished=True)
            found = trees_of(self.command.store)
            if found != trees:
                raise AssertionError(f"other trees: {sorted(found.items() ^ trees.items())}")
        except (AssertionError, OSError, ValueError) as error:
            self.wrong.append(f"settling: {str(error)[:2000]}")


def usage(pid: int) -> dict[str, int]:
    """Return descriptors, threads and resident memory (KiB) of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(fields["Threads"]),
        "kib": int(fields["VmRSS"].split()[0]),
    }


def usage_of_all(pids: Iterable[int]) -> dict[str, int]:
    """Return of each of these figures the most, and how many processes there are."""
    found: list[dict[str, int]] = []
    for pid in pids:
        with contextlib.suppress(OSError, KeyError):
            found.append(usage(pid))
    return {name: max(each[name] for each in found) for name in found[0]} if found else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--hands", type=int, default=5, help="processes at once, at most")
    parser.add_argument("--ray", action="store_true", help="a fifth of the pulls on a warm session")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    with (
        tempfile.TemporaryDirectory(prefix="stowray-soak-", dir=options.folder) as folder,
        FakeRegistry() as registry,
    ):
        soak = Soak(Path(folder), options.seed, options.hands, options.ray)
        references = soak.images(registry)
        pristine = Stowray(Path(folder) / "pristine", soak.home)
        pristine.run("pull", *references)
        pristine.run("gc")
        trees = trees_of(pristine.store)
        soak.command.run("pull", references[0])
        if options.ray:
            soak.command.run("session", "start")
        dweller = subprocess.Popen(
            [sys.executable, "-c", DWELLER, str(soak.command.store)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        if dweller.stdin is None or dweller.stdout is None:
            raise RuntimeError("no pipes")
        dweller.stdout.readline()
        samples = []
        rounds = 0
        while time.monotonic() < end and rounds < options.rounds:
            rounds += 1
            soak.round(references)
            dweller.stdin.write(soak.choice.choice(references) + "\n")
            dweller.stdin.flush()
            answer = dweller.stdout.readline().strip()
            soak.counts["pull by the dweller"] += 1
            if answer != "done":
                soak.wrong.append(f"dweller: {answer}")
            soak.judge(trees)
            if rounds % EVERY == 0:
                soak.settle(references, trees)
                samples.append(soak.sample(dweller.pid))
                print(
                    json.dumps({"rounds": rounds, "wrong": len(soak.wrong), **samples[-1]}),
                    flush=True,
                )
            for text in soak.wrong[soak.counts["told"] :]:
                print(f"  WRONG in round {rounds}: {text}", flush=True)
                soak.counts["told"] += 1
        soak.settle(references, trees)
        samples.append(soak.sample(dweller.pid))
        dweller.stdin.close()
        dweller.wait(timeout=60)
        if options.ray:
            soak.command.run("session", "stop")
        line = {"rounds": rounds, "wrong": len(soak.wrong), **soak.counts}
        line |= {"first": samples[0], "last": samples[-1]}
        print(json.dumps(line), flush=True)
        for text in soak.wrong:
            print(f"  {text}")
        return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
