"""Goes through all calls of a scenario: what a fault at each of them leaves, and the work again.

A round: copy the store, run the scenario with one fault, check the invariants, run it again without
any, pull all images, collect, and check that trees and content are what they are without a fault.
"""

from __future__ import annotations

import errno
import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.support.faults import Faults, copied, lose, state_of
from tests.support.invariants import age, check_store, trees_of
from tests.support.scenarios import FROM_EMPTY, SCENARIOS, make_images
from tests.support.stores import FIRST_BOOT, NEXT_BOOT

if TYPE_CHECKING:
    from pathlib import Path

    from stowray.pipeline.clock import Boot
    from tests.support.faults import End

LOSSES = ("emptied", "zeroed", "torn")
DISK_CODES = {
    "ENOSPC": errno.ENOSPC,
    "EDQUOT": errno.EDQUOT,
    "EIO": errno.EIO,
    "EROFS": errno.EROFS,
    "EMFILE": errno.EMFILE,
    "ENFILE": errno.ENFILE,
    "ENOMEM": errno.ENOMEM,
}
# What is done with a store that is damaged on purpose, and then again after the fault.
DAMAGING = ("mend", "put_aside")
AGAIN = ("drop", "evict", "pin", "mend")
# What the class of the error must be: the disk stands in the way, nothing else.
STORAGE = "StorageError"


@dataclass
class Counts:
    """What came of a sweep."""

    rounds: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


class Sweep:
    """The template store, its server of faults, and the sweeps; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = make_images(folder / "images")
        self.template = folder / "template" / "store"
        self.template.parent.mkdir()
        self.faults = Faults(self.images)
        self._numbers = itertools.count(1)
        self.names = list(SCENARIOS)

    def __enter__(self) -> Sweep:
        end = self.faults.run("pull_all", self.template)
        assert end.status == "done", end
        self.trees = trees_of(self.template)
        self.content = _content(self.template)
        check_store(self.template, self.trees, finished=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.faults.__exit__()

    def count(self, scenario: str, code: int = 0) -> End:
        """Run a scenario without any fault; return its end with the calls that it made."""
        with self._copy(scenario) as store:
            end = self.faults.run(scenario, store, code=code)
            assert end.status == "done", end
            return end

    def run(
        self,
        sweep: str,
        scenario: str,
        variant: str = "",
        *,
        first: int = 1,
        every: int = 1,
        lasting: bool = False,
    ) -> Counts:
        """Try the fault at the calls ``first``, ``first + every``, …"""
        counts = Counts()
        ends: Counter[str] = Counter()
        calls = self.count(scenario, DISK_CODES.get(variant, 0)).count
        for number in range(first, calls + 1, every):
            counts.rounds += 1
            what = f"{sweep} {scenario} {variant} at call {number} of {calls}"
            try:
                ends[self.round(sweep, scenario, variant, number, lasting=lasting)] += 1
            except AssertionError as error:
                counts.failures.append(f"{what}: {error}")
                ends["bad"] += 1
        counts.ends = dict(ends)
        return counts

    def round(
        self, sweep: str, scenario: str, variant: str, number: int, *, lasting: bool = False
    ) -> str:
        """Do one round; an AssertionError says what is wrong."""
        with self._copy(scenario) as store:
            before = state_of(store) if store.exists() else {}
            boot = FIRST_BOOT
            if sweep == "disk":
                code = DISK_CODES[variant]
                end = self.faults.run(scenario, store, fail=number, code=code, lasting=lasting)
                assert end.status in ("done", "refused"), f"{end.error} {end.message}"
                if end.status == "refused":
                    assert end.error == STORAGE, f"{end.error}: {end.message}"
                if store.exists() and scenario not in DAMAGING:
                    check_store(store, self.trees)
            else:
                end = self.faults.run(scenario, store, kill=number)
                if end.status == "done":
                    return "done"  # fewer calls than the first time
                assert end.status == "killed", end
                if sweep == "power":
                    if store.exists():
                        lose(store, before, variant)
                    boot = NEXT_BOOT
                elif store.exists() and scenario not in DAMAGING:
                    check_store(store, self.trees)
            self.recover(scenario, store, boot)
            return end.status if end.status != "refused" else end.error

    def recover(self, scenario: str, store: Path, boot: Boot) -> None:
        """Do the work again, then all of it; nothing may be false, lost or left over."""
        if scenario == "mend" or (scenario in AGAIN and boot == FIRST_BOOT):
            again = self.faults.run(scenario, store, boot=boot)
            assert again.status == "done", f"not done again: {again}"
            if boot == FIRST_BOOT:
                check_store(store, self.trees)
        end = self.faults.run("pull_all", store, boot=boot)
        assert end.status == "done", f"the next pull fails: {end.error} {end.message}"
        if boot == FIRST_BOOT:
            check_store(store, self.trees)
        age(store)
        end = self.faults.run("collect", store, boot=boot)
        assert end.status == "done", f"the next collection fails: {end.error} {end.message}"
        check_store(store, self.trees, finished=True)
        found = _content(store)
        assert found == self.content, f"differs in {sorted(found ^ self.content)}"

    def _copy(self, scenario: str):  # type: ignore[no-untyped-def]
        place = self.folder / f"round-{next(self._numbers)}"
        empty = self.folder / "nothing"
        return copied(empty if scenario in FROM_EMPTY else self.template, place)


def _content(store: Path) -> set[str]:
    """Return the names of all blobs, trees, snapshots and records."""
    folders = ("blobs/sha256", "sources/sha256", "layers", "snapshots", "refs")
    names = {f"{folder}/{path.name}" for folder in folders for path in (store / folder).iterdir()}
    return {name for name in names if not name.startswith("refs/.")}


__all__ = ["DISK_CODES", "LOSSES", "Counts", "Sweep"]
