"""Rounds of a pre-warm in which something dies, stands still or goes away at a random moment.

    python -m tests.support.fault_rounds --rounds 30 --seed 1 --folder /dev/shm/rounds

Each round begins with empty stores, hurts the run once, and holds it to its promises: an answer of
a class that fits, the other nodes ready, no process of ours left, every store sound; then the same
run again finishes, and nothing is left over in any store.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.cluster.prewarm import Driver, add_image, is_gone, ours, states
from tests.support.invariants import check_store
from tests.support.origin import origin
from tests.support.ray_cluster import ray_cluster
from tests.support.registry import FakeRegistry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.origin import Origin
    from tests.support.ray_cluster import RayCluster

NAMES = ("n0", "n1", "n2", "n3")
MIB = 1 << 20
END_SECONDS = 60.0
# Ray gives up a silent node after 5 s here instead of 15.
SYSTEM = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}
ACTORS = ("NodeActor", "FetchActor", "UnpackActor", "ResolverActor", "ProgressActor")
FAULTS = (
    *(f"kill {actor}" for actor in ACTORS),
    "freeze NodeActor",
    "freeze node",
    "kill node",
    "kill driver",
    "cancel",
    "registry away",
)


@dataclass
class Round:
    """What one round was and came to."""

    number: int
    fault: str
    node: str
    after: float
    code: int = 0
    seconds: float = 0.0
    again: float = 0.0


class Rounds:
    """Hurts runs on a cluster of ``NAMES``; ``random`` decides what, where and when."""

    def __init__(self, cluster: RayCluster, folder: Path, seed: int) -> None:
        self.cluster = cluster
        self.folder = folder
        self.random = random.Random(seed)
        self.seed = seed

    def carry_out(self, number: int, fault: str = "") -> Round:
        """Do one round; raises AssertionError for a promise that was not kept."""
        dice = self.random
        fault = fault or dice.choice(FAULTS)
        # The head's node is the driver's: its death is another test's.
        node = dice.choice(NAMES[1:])
        done = Round(number, fault, node, round(dice.uniform(0.0, 5.0), 2))
        folder = self.folder / f"round-{self.seed}-{number}"
        folder.mkdir(parents=True)
        with FakeRegistry() as registry, origin(registry.host) as source:
            source.throttle(MIB)
            references = [
                add_image(registry, name, *sizes).replace(registry.host, source.host)
                for name, sizes in (("one", (3 * MIB, 1000)), ("two", (MIB, 2 * MIB, 300_000)))
            ]
            begun = time.monotonic()
            driver = Driver(self.cluster, folder, {"references": references})
            try:
                self._first_bytes(driver, source)
                self._pause(driver, done.after)
                self._hurt(driver, done, source)
                self._judge(driver, done, folder)
            finally:
                driver.end()
                for name in sorted({*NAMES} - {*self.cluster.names}):
                    self.cluster.add(name)
            done.seconds = round(time.monotonic() - begun, 1)
            source.throttle(None)
            source.come_back()
            begun = time.monotonic()
            driver = Driver(self.cluster, folder, {"references": references})
            try:
                code, report = driver.finish()
            finally:
                driver.end()
            assert code == 0, f"{done}: the next run: {json.dumps(report)}"
            assert states(report) == dict.fromkeys(NAMES, "ready"), f"{done}: {states(report)}"
            done.again = round(time.monotonic() - begun, 1)
            self._wait_gone(done)
            for name in NAMES:
                check_store(folder / name, finished=True)
        shutil.rmtree(folder)
        return done

    def _first_bytes(self, driver: Driver, source: Origin) -> None:
        while driver.process.poll() is None and not source.wait_sent(1, 0.05):
            continue

    def _pause(self, driver: Driver, seconds: float) -> None:
        with contextlib.suppress(Exception):
            driver.process.wait(seconds)

    def _victims(self, node: str, kind: str) -> list[int]:
        where = NAMES[0] if kind in ("ResolverActor", "ProgressActor") else node
        return ours(self.cluster, where, kind)

    def _hurt(self, driver: Driver, done: Round, source: Origin) -> None:
        verb, _, what = done.fault.partition(" ")
        if done.fault == "kill driver":
            driver.send(signal.SIGKILL)
        elif done.fault == "cancel":
            driver.cancel()
        elif done.fault == "kill node":
            self.cluster.kill(done.node)
        elif done.fault == "freeze node":
            self.cluster.freeze(done.node)
            self._pause(driver, 2.0)
            self.cluster.thaw(done.node)
        elif done.fault == "registry away":
            source.go_down()
            self._pause(driver, 3.0)
            source.come_back()
        else:
            number = signal.SIGKILL if verb == "kill" else signal.SIGSTOP
            while not (victims := self._victims(done.node, what)):
                self._pause(driver, 0.05)
                if driver.process.poll() is not None:
                    break
            if not victims:
                done.fault += " (none)"
            for victim in victims[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, number)

    def _judge(self, driver: Driver, done: Round, folder: Path) -> None:
        if done.fault == "kill driver":
            driver.process.wait()
        else:
            done.code, report = driver.finish()
            told = f"{done}: {json.dumps(report)[:4000]}"
            if "nodes" not in report:
                raise AssertionError(told)
            found = states(report)
            others = {state for name, state in found.items() if name != done.node}
            if done.fault == "cancel":
                assert done.code in (0, 130), told
            elif done.fault in ("kill node", "freeze node", "freeze NodeActor"):
                # It may have been ready before, or come back in time.
                assert done.code in (0, 1), told
                assert others == {"ready"}, told
            else:
                assert done.code == 0, told
                assert others == {"ready"}, told
        self._wait_gone(done)
        for name in NAMES:
            if (folder / name).is_dir():
                check_store(folder / name)

    def _wait_gone(self, done: Round) -> None:
        until = time.monotonic() + END_SECONDS
        while not is_gone(self.cluster):
            left = {name: ours(self.cluster, name) for name in self.cluster.names}
            assert time.monotonic() < until, f"{done}: left behind: {left}"
            time.sleep(0.1)


def main(arguments: Sequence[str]) -> int:
    """Do rounds and count; the folder of one that went wrong stays."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fault", default="")
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args(arguments)
    given.folder.mkdir(parents=True, exist_ok=True)
    counts: collections.Counter[str] = collections.Counter()
    with ray_cluster(given.folder, NAMES, system=SYSTEM) as cluster:
        rounds = Rounds(cluster, given.folder, given.seed)
        for number in range(given.rounds):
            try:
                done = rounds.carry_out(number, given.fault)
            except (AssertionError, OSError) as error:
                counts["bad"] += 1
                print(f"BAD {number}: {error}", flush=True)
                continue
            counts[done.fault] += 1
            print(json.dumps(vars(done)), flush=True)
    print(json.dumps(counts), flush=True)
    return 1 if counts["bad"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
