"""What a node of a pre-warm run is given: its time for each image, and an end that is one."""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest

from stowray.actors.prewarm_node import IMAGES_AT_ONCE
from tests.support.prewarm_handles import Actor, Cluster

if TYPE_CHECKING:
    from collections.abc import Callable

# What Ctrl-C promises.
END_SECONDS = 3.0


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def after(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() >= until


def when(cluster: Cluster, what: str, *, times: int = 1) -> Callable[[], bool]:
    return lambda: [told for told, _ in cluster.told].count(what) >= times


async def for_ever(actor: Actor, _request: dict[str, Any]) -> None:
    actor.note("asked")
    await asyncio.sleep(3600.0)


async def end_late(_actor: Actor) -> None:
    """End in order, which takes so long that what comes of that on other nodes can be seen."""
    await asyncio.sleep(0.4)


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


# -- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("deadline", [0.0, 0.5])
def test_a_run_that_is_ended_begins_nothing_more(cluster: Cluster, deadline: float) -> None:
    cluster.add("n1", pull_seconds=3600.0, end_run=end_late)
    plan = {
        "images": [f"i{number}" for number in range(6)],
        "failure": {"deadline_seconds": deadline},
    }
    cancelled = after(3600.0) if deadline else when(cluster, "pull")
    report = cluster.run(plan).run(cancelled)
    assert report.exit_code == (6 if deadline else 130)
    assert [node.state for node in report.nodes] == ["failed"]
    kind = "DeadlineError" if deadline else "CancelledError"
    assert [(cell.status, (cell.error or {})["type"]) for cell in report.cells] == [
        ("failed", kind)
    ] * 6
    assert (
        sorted(cluster.told)
        == [("cancel", "n1")] * IMAGES_AT_ONCE + [("pull", "n1")] * IMAGES_AT_ONCE
    )
    assert cluster.left == []


@pytest.mark.parametrize("deadline", [0.0, 0.5])
def test_what_was_not_delivered_when_a_run_is_ended_is_told(
    cluster: Cluster, deadline: float
) -> None:
    cluster.add("n1", deliver=for_ever)
    plan = {
        "images": ["a", "b"],
        "deliver": ["podman"],
        "failure": {"deadline_seconds": deadline},
    }
    cancelled = after(3600.0) if deadline else when(cluster, "asked")
    report = cluster.run(plan).run(cancelled)
    assert report.exit_code == (1 if deadline else 130)
    kind = "DeadlineError" if deadline else "CancelledError"
    assert [(entry.error or {})["type"] for entry in report.deliveries] == [kind] * 2


def test_a_run_that_is_ended_while_its_nodes_begin_leaves_no_actor(cluster: Cluster) -> None:
    """One actor takes its time to end, and those that were ended before it are not lost ones."""

    async def begin_run(actor: Actor, request: dict[str, Any]) -> dict[str, Any]:
        if len([other for other in cluster.started if other.name == actor.name]) == 1:
            await for_ever(actor, request)
        return await actor.do_begin_run(request)

    cluster.add("n1", begin_run=begin_run)
    cluster.add("n2", begin_run=begin_run)
    cluster.add("n3", begin_run=begin_run, end_run=end_late)
    cancelled, begun = when(cluster, "asked"), time.monotonic()
    report = cluster.run({"images": ["debian:12"]}).run(cancelled)
    assert time.monotonic() - begun < END_SECONDS
    assert report.exit_code == 130
    assert [(node.error or {})["type"] for node in report.nodes] == ["CancelledError"] * 3
    assert len(cluster.started) == 3
    assert cluster.left == []


def test_a_run_that_is_ended_while_an_actor_is_started_anew_leaves_none(cluster: Cluster) -> None:
    async def begin_run(actor: Actor, request: dict[str, Any]) -> dict[str, Any]:
        if len([other for other in cluster.started if other.name == "n1"]) == 2:
            await for_ever(actor, request)
        return await actor.do_begin_run(request)

    async def pull(actor: Actor, _request: dict[str, Any]) -> None:
        await die(actor)

    cluster.add("n1", begin_run=begin_run, pull=pull)
    cluster.add("n2", pull_seconds=3600.0, end_run=end_late)
    plan = {"images": ["debian:12"], "failure": {"tries": 5}}
    report = cluster.run(plan).run(when(cluster, "asked"))
    assert report.exit_code == 130
    assert [(cell.error or {})["type"] for cell in report.cells] == ["CancelledError"] * 2
    assert [actor.name for actor in cluster.started].count("n1") == 2
    assert cluster.left == []


def test_a_node_that_rests_begins_again_when_another_joins(cluster: Cluster) -> None:
    """Its actor was ended, and serves the one that joins for as long as that takes."""

    async def end_run(actor: Actor) -> None:
        actor.note("ended")
        if "n2" not in [name for _, name in cluster.told]:
            cluster.add("n2", end_run=end_run)

    cluster.add("n1", end_run=end_run)
    all_ended, too_late = when(cluster, "ended", times=3), after(30.0)
    run = cluster.run({"images": ["debian:12"]}, watch=True)
    report = run.run(lambda: all_ended() or too_late())
    assert [cell.status for cell in report.cells] == ["done"] * 2
    assert [actor.name for actor in cluster.started] == ["n1", "n2", "n1"]
    assert cluster.left == []
