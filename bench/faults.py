"""Kill, cut power, refuse the disk, damage files: `python -m bench.faults SWEEP`.

`kill`, `power` and `disk`: each round runs a scenario (a pull, a removal, a collection, a repair …)
on a copy of a store, in a process of its own that ends, or is refused, at one call that touches the
disk. Then the invariants are checked from outside, the work is done again and must end with the
same trees, and a collection must leave nothing behind. `--every N` takes each N-th call only. One
JSON line per scenario.

`flip` damages each file of a store instead, in six ways, and sees it named and mended; `--plain`
does so with trees as a plain user keeps them.

`actors` kills those of a session on Ray at each named point, at each N-th call on the store, and
`--random` times at any moment.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from stowray.pipeline.errors import StowrayError
from tests.support.actor_kills import ACTORS, POINTS, WRITERS, ActorKills
from tests.support.flips import HOWS, Flips
from tests.support.sweeps import DISK_CODES, LOSSES, Sweep

if TYPE_CHECKING:
    from collections.abc import Callable


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", choices=("kill", "power", "disk", "flip", "actors"))
    parser.add_argument("--scenario", action="append", default=[])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--loss", choices=LOSSES, action="append", default=[])
    parser.add_argument("--errno", choices=sorted(DISK_CODES), action="append", default=[])
    parser.add_argument("--lasting", action="store_true", help="the disk stays so")
    parser.add_argument("--plain", action="store_true", help="a plain user's trees (flip)")
    parser.add_argument("--random", type=int, default=20, help="times per kind of actor (actors)")
    options = parser.parse_args()
    if options.sweep == "actors":
        return _actors(options)
    if options.sweep == "flip":
        return _flip(options)
    failed = 0
    total = 0
    with (
        tempfile.TemporaryDirectory(prefix="stowray-faults-", dir=options.folder) as folder,
        Sweep(Path(folder)) as sweep,
    ):
        for name in options.scenario or sweep.names:
            for variant in _variants(options):
                begun = time.perf_counter()
                counts = sweep.run(
                    options.sweep,
                    name,
                    variant,
                    first=options.first,
                    every=options.every,
                    lasting=options.lasting,
                )
                total += counts.rounds
                failed += len(counts.failures)
                line = {"sweep": options.sweep, "scenario": name, "variant": variant}
                line |= {"rounds": counts.rounds, "ends": counts.ends, "bad": len(counts.failures)}
                print(json.dumps({**line, "seconds": round(time.perf_counter() - begun, 1)}))
                for failure in counts.failures:
                    print(f"  {failure}")
                sys.stdout.flush()
    print(json.dumps({"rounds": total, "bad": failed}))
    return 1 if failed else 0


def _flip(options: argparse.Namespace) -> int:
    ends: Counter[str] = Counter()
    with (
        tempfile.TemporaryDirectory(prefix="stowray-flips-", dir=options.folder) as folder,
        Flips(Path(folder), plain=options.plain) as flips,
    ):
        for name in flips.files():
            for how in HOWS:
                try:
                    ends[flips.round(name, how, options.first)] += 1
                except (AssertionError, OSError, StowrayError) as error:
                    ends["bad"] += 1
                    print(f"  {name} {how}: {type(error).__name__} {error}", flush=True)
    print(json.dumps({"sweep": "flip", "rounds": ends.total(), "ends": ends, "bad": ends["bad"]}))
    return 1 if ends["bad"] else 0


def _actors(options: argparse.Namespace) -> int:
    bad = 0
    with (
        tempfile.TemporaryDirectory(prefix="stowray-actors-", dir=options.folder) as folder,
        ActorKills(Path(folder)) as kills,
    ):

        def attempt(round_: Callable[[], str]) -> str:
            nonlocal bad
            try:
                return round_()
            except (AssertionError, OSError) as error:
                bad += 1
                print(f"  {str(error)[:3000]}", flush=True)
                if bad > 20:
                    raise
                return "bad"

        for who, point in itertools.product((*WRITERS, "driver"), POINTS):
            victim = attempt(lambda who=who, point=point: kills.at(who, point))  # type: ignore[misc]
            print(json.dumps({"point": point, "killed": victim}), flush=True)
        for who in (*ACTORS, "driver"):
            for number in itertools.count(options.first, options.every):
                if not attempt(lambda who=who, n=number: kills.at(who, str(n))):  # type: ignore[misc]
                    break
            choice = random.Random(who)
            for _ in range(options.random):
                seconds = choice.uniform(0, 0.8)
                attempt(lambda who=who, s=seconds: kills.randomly(who, s))  # type: ignore[misc]
            ends = Counter[str]()
            for (victim, where, status), count in kills.ends.items():
                kind = "call" if where.isdigit() else where.replace(" ", "-")
                ends[f"{victim} {kind} {status}"] += count
            print(json.dumps({"after": who, "bad": bad, **ends}), flush=True)
    print(json.dumps({"rounds": kills.ends.total() + bad, "bad": bad}))
    return 1 if bad else 0


def _variants(options: argparse.Namespace) -> list[str]:
    if options.sweep == "power":
        return options.loss or list(LOSSES)
    if options.sweep == "disk":
        return options.errno or sorted(DISK_CODES)
    return [""]


if __name__ == "__main__":
    sys.exit(main())
