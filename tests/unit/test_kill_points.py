"""A sample of the sweeps of `bench.faults`: kills, power cuts and refusals at calls on a store."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.sweeps import DISK_CODES, LOSSES, Sweep

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUNDS = {"pull": 6, "pull_docker": 2, "drop": 2, "evict": 2, "pin": 1, "mend": 3, "put_aside": 2}
DISK = {"ENOSPC": 4, "EDQUOT": 2, "EIO": 6, "EROFS": 3, "EMFILE": 3, "ENOMEM": 3}


@pytest.fixture(scope="module")
def sweep(fast_tmp: Path) -> Iterator[Sweep]:
    with (
        tempfile.TemporaryDirectory(prefix="sweep-", dir=fast_tmp) as folder,
        Sweep(Path(folder)) as made,
    ):
        yield made


def sample(sweep: Sweep, kind: str, scenario: str, variant: str, rounds: int) -> None:
    """Try the fault at calls spread over the scenario, elsewhere for each kind of it."""
    calls = sweep.count(scenario, DISK_CODES.get(variant, 0)).count
    every = max(1, calls // rounds)
    first = 1 + sum(map(ord, kind + variant)) % every
    counts = sweep.run(kind, scenario, variant, first=first, every=every)
    assert counts.rounds >= min(rounds, calls)
    assert not counts.failures, "\n".join(counts.failures)


@pytest.mark.parametrize("scenario", ROUNDS)
def test_a_kill_loses_nothing_and_leaves_nothing_false(sweep: Sweep, scenario: str) -> None:
    sample(sweep, "kill", scenario, "", ROUNDS[scenario])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scenario", ["pull", "put_aside"])
def test_a_power_cut_costs_a_proof_and_no_byte(sweep: Sweep, scenario: str, loss: str) -> None:
    sample(sweep, "power", scenario, loss, 3)


@pytest.mark.parametrize("code", DISK)
@pytest.mark.parametrize("scenario", ["pull", "mend"])
def test_a_disk_that_refuses_is_named_and_harms_nothing(
    sweep: Sweep, scenario: str, code: str
) -> None:
    sample(sweep, "disk", scenario, code, DISK[code])
