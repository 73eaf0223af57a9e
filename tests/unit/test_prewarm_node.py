"""What a node of a pre-warm run is given: its time for each image, and an end that is one."""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from stowray.actors.prewarm_node import IMAGES_AT_ONCE
from tests.support.prewarm_handles import Actor, Cluster


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


async def for_ever(actor: Actor, _request: dict[str, Any]) -> None:
    actor.note("asked")
    await asyncio.sleep(3600.0)


async def die(actor: Actor) -> None:
    actor.dead.set()
    await asyncio.sleep(3600.0)


# -- the time for an image ------------------------------------------------------------------------


def test_a_pull_whose_time_is_up_is_given_up_on_its_node(cluster: Cluster) -> None:
    cluster.add("n1", pull_seconds=3600.0)
    plan = {"images": ["debian:12"], "failure": {"node_timeout_seconds": 0.3}}
    report = cluster.run(plan).run()
    assert report.exit_code == 6
    (cell,) = report.cells
    assert cell.error is not None
    assert cell.error["message"] == "debian:12 on n1: no end after 0.3 s"
    assert cluster.told == [("pull", "n1"), ("cancel", "n1")]


def test_the_time_is_that_of_each_image(cluster: Cluster) -> None:
    """Twelve images of 0.4 s, four at once, take longer than the second that each of them has."""
    cluster.add("n1", pull_seconds=0.4)
    plan = {
        "images": [f"i{number}" for number in range(12)],
        "failure": {"node_timeout_seconds": 1.0},
    }
    report = cluster.run(plan).run()
    assert [cell.status for cell in report.cells] == ["done"] * 12
    assert report.seconds > 1.0


def test_images_whose_time_is_up_keep_no_other_from_coming(cluster: Cluster) -> None:
    async def pull(actor: Actor, request: dict[str, Any]) -> dict[str, Any]:
        if request["source"]["repository"] != "library/quick":
            await for_ever(actor, request)
        return await actor.do_pull(request)

    cluster.add("n1", pull=pull)
    plan = {
        "images": [*(f"slow{number}" for number in range(IMAGES_AT_ONCE)), "quick"],
        "failure": {"node_timeout_seconds": 0.3},
    }
    report = cluster.run(plan).run()
    assert [cell.status for cell in report.cells] == ["failed"] * IMAGES_AT_ONCE + ["done"]
    assert [node.state for node in report.nodes] == ["partial"]


def test_a_delivery_whose_time_is_up_is_a_failure_and_given_up(cluster: Cluster) -> None:
    cluster.add("n1", deliver=for_ever)
    plan = {
        "images": ["debian:12"],
        "deliver": ["containerd", "podman"],
        "failure": {"node_timeout_seconds": 0.3},
    }
    report = cluster.run(plan).run()
    assert [cell.status for cell in report.cells] == ["done"]
    assert [entry.runtime for entry in report.deliveries] == ["containerd", "podman"]
    assert all(entry.error for entry in report.deliveries)
    assert report.exit_code == 1
    assert ("cancel", "n1") in cluster.told


def test_a_delivery_that_was_lost_with_its_actor_is_made_again(cluster: Cluster) -> None:
    async def deliver(actor: Actor, request: dict[str, Any]) -> dict[str, Any]:
        if len(cluster.started) == 1:
            await die(actor)
        return await actor.do_deliver(request)

    cluster.add("n1", deliver=deliver)
    report = cluster.run({"images": ["debian:12"], "deliver": ["podman"]}).run()
    assert [entry.error for entry in report.deliveries] == [None]
    assert report.exit_code == 0


def test_a_start_anew_does_not_end_with_the_time_of_the_image_that_asked_for_it(
    cluster: Cluster,
) -> None:
    """The pull of the first image loses the actor; the second comes when there is another."""

    async def begin_run(actor: Actor, request: dict[str, Any]) -> dict[str, Any]:
        if len(cluster.started) > 1:
            await asyncio.sleep(0.6)
        return await actor.do_begin_run(request)

    async def pull(actor: Actor, request: dict[str, Any]) -> dict[str, Any]:
        if len(cluster.started) == 1:
            # The first has used up most of its time.
            await asyncio.sleep(0.6)
            await die(actor)
        return await actor.do_pull(request)

    cluster.add("n1", begin_run=begin_run, pull=pull)
    plan = {
        "images": [f"i{number}" for number in range(IMAGES_AT_ONCE + 1)],
        "failure": {"node_timeout_seconds": 1.0},
    }
    report = cluster.run(plan).run()
    assert [cell.status for cell in report.cells] == ["failed"] * IMAGES_AT_ONCE + ["done"]
    assert len(cluster.started) == 2
