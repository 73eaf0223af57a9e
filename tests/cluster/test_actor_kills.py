"""Actors of a session that die at a point of their work; all points: `bench.faults actors`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.actor_kills import ActorKills

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# One of each kind that writes.
CASES = {
    "FetchActor": "ingest-before-rename",
    "UnpackActor": "layer-after-rename",
    "NodeActor": "references-changed",
    "ResolverActor": "ingest-proven",
}


@pytest.fixture(scope="module")
def kills(fast_tmp: Path) -> Iterator[ActorKills]:
    folder = fast_tmp / "actor-kills"
    folder.mkdir()
    with ActorKills(folder) as made:
        yield made


@pytest.mark.parametrize("who", CASES)
def test_an_actor_that_dies_at_a_point_loses_nothing_and_leaves_nothing_false(
    kills: ActorKills, who: str
) -> None:
    assert kills.at(who, CASES[who]) == who


def test_a_driver_that_dies_in_mid_pull_does_no_harm(kills: ActorKills) -> None:
    assert kills.randomly("driver", 0.3) == "driver"
