from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowray.pipeline.cluster_plan import UNPACKED_RATIO, ClusterPlan
from stowray.pipeline.errors import NodeError, describe
from stowray.pipeline.prewarm_plan import Limits, Wave
from stowray.pipeline.prewarm_survey import (
    NodeSurvey,
    PlannedImage,
    PlannedLayer,
    Rates,
    manifest_requests,
)
from stowray.pipeline.quota import Quota

MIB = 1 << 20
BLOBS = {"config": 1000, "base": 300 * MIB, "top": 5 * MIB}
IMAGE = PlannedImage(
    reference="reg/app:1",
    digest="sha256:manifest",
    resolved="sha256:index",
    platform="linux/amd64",
    registry="reg",
    blobs=BLOBS,
    layers=(
        PlannedLayer("base", 300 * MIB, "chain-base"),
        PlannedLayer("top", 5 * MIB, "chain-top"),
    ),
)
OTHER = replace(
    IMAGE,
    reference="reg/other:1",
    digest="sha256:other",
    blobs={"config2": 900, "base": 300 * MIB},
    layers=IMAGE.layers[:1],
)
TOTAL = sum(BLOBS.values())


def node(name: str, **about: Any) -> NodeSurvey:
    about = {"free": 1 << 40, "store": f"store-{name}", "address": f"{name}:1", **about}
    return NodeSurvey(name, wants={IMAGE.reference: IMAGE.digest}, **about)


def plan(surveys: list[NodeSurvey], **more: Any) -> ClusterPlan:
    return ClusterPlan.of(surveys, [IMAGE], more.pop("limits", Limits()), **more)


def test_a_cold_cluster_takes_each_byte_from_the_origin_once() -> None:
    found = plan([node(f"n{number}") for number in range(5)])
    assert found.origin_bytes == TOTAL
    assert found.peer_bytes == 4 * TOTAL
    assert {blob.digest: (blob.have, blob.need) for blob in found.blobs} == dict.fromkeys(
        BLOBS, (0, 5)
    )
    assert [blob.digest for blob in found.blobs] == ["base", "top", "config"]


def test_a_warm_cluster_has_nothing_to_do() -> None:
    chains = frozenset({"chain-base", "chain-top"})
    found = plan([node(name, present=frozenset(BLOBS), chains=chains) for name in "ab"])
    assert found.is_complete
    assert (found.origin_bytes, found.peer_bytes) == (0, 0)
    assert all(row.disk_needed == 0 for row in found.nodes)
    assert {line["snapshot"] for line in found.results()} == {"have"}
    assert {blob["source"] for line in found.results() for blob in line["blobs"]} == {"store"}


def test_what_any_node_has_the_origin_need_not_give() -> None:
    found = plan([node("a", present=frozenset({"base"})), node("b"), node("c")])
    assert found.origin_bytes == TOTAL - BLOBS["base"]
    base = next(blob for blob in found.blobs if blob.digest == "base")
    assert (base.have, base.need, base.origin_bytes) == (1, 2, 0)
    assert base.peer_bytes == 2 * BLOBS["base"]


def test_bytes_that_lie_there_already_are_not_needed() -> None:
    found = plan([node("a", partial={"base": 100 * MIB, "top": 99 * MIB})])
    row = found.nodes[0]
    assert row.need_bytes == 200 * MIB + BLOBS["config"]
    assert {blob.digest: blob.state for blob in row.blobs} == {
        "config": "need",
        "base": "partial",
        "top": "partial",
    }


def test_nodes_of_one_store_count_once() -> None:
    shared = {"store": "nfs", "present": frozenset({"top"})}
    found = plan([node("a", **shared), node("b", **shared), node("c")])
    second = found.nodes[1]
    assert second.shares_with == "a"
    assert (second.need_bytes, second.disk_needed) == (0, 0)
    assert found.origin_bytes + found.peer_bytes == 2 * (TOTAL - BLOBS["top"]) + BLOBS["top"]
    top = next(blob for blob in found.blobs if blob.digest == "top")
    assert (top.have, top.need) == (1, 1)


def test_a_node_without_room_is_refused_and_costs_nothing() -> None:
    layers = 305 * MIB
    tight = node("tight", free=TOTAL + layers + 50, reserve=51)
    found = plan([node("a"), tight])
    assert found.accepted == ("a",)
    refused = found.refused[0]
    assert refused.name == "tight"
    assert refused.error is not None
    assert refused.error["type"] == "StorageError"
    assert str(TOTAL + layers) in refused.error["message"]
    assert found.peer_bytes == 0
    assert [line for line in found.results() if "error" in line] == [
        {"reference": IMAGE.reference, "node": "tight", "error": refused.error}
    ]
    # With one byte more it certainly fits, and probably not: it is warned of.
    fits = plan([replace(tight, reserve=50)])
    assert fits.accepted == ("tight",)
    assert fits.warnings == (fits.nodes[0].warning,)
    assert fits.nodes[0].disk_needed == TOTAL + int(layers * UNPACKED_RATIO)


def test_a_node_behind_a_store_without_room_is_refused_with_it() -> None:
    found = plan([node("a", store="s", free=5), node("b", store="s", free=5)])
    assert [row.name for row in found.refused] == ["a", "b"]


def test_committed_layers_need_no_room_again() -> None:
    found = plan([node("a", chains=frozenset({"chain-base"}), present=frozenset({"base"}))])
    assert found.nodes[0].disk_least == BLOBS["top"] * 2 + BLOBS["config"]
    assert found.results()[0]["snapshot"] == "need"


def test_a_node_that_could_not_look_is_left_out_with_its_reason() -> None:
    error = describe(NodeError("b", "does not answer"))
    found = plan([node("a"), NodeSurvey("b", wants=node("b").wants, error=error)])
    assert found.accepted == ("a",)
    assert found.refused[0].error == error
    assert found.origin_bytes == TOTAL


def test_shared_blobs_of_two_images_are_counted_once_per_node() -> None:
    wants = {IMAGE.reference: IMAGE.digest, OTHER.reference: OTHER.digest}
    found = ClusterPlan.of([replace(node("a"), wants=wants)], [IMAGE, OTHER], Limits())
    assert found.origin_bytes == TOTAL + 900
    lines = {line["reference"]: line for line in found.results()}
    assert lines[OTHER.reference]["fetch_bytes"] == 300 * MIB + 900
    assert [blob["digest"] for blob in lines[IMAGE.reference]["blobs"]] == list(BLOBS)


def test_only_the_first_wave_reads_from_the_origin() -> None:
    found = plan([node(f"n{number}") for number in range(6)], waves=(Wave(count=2),))
    assert [row.wave for row in found.nodes] == [0, 0, 1, 1, 1, 1]
    assert found.origin_bytes == TOTAL
    assert [row.origin_bytes > 0 for row in found.nodes[2:]] == [False] * 4


def test_manifests_are_asked_for_once_however_many_nodes() -> None:
    arm = replace(IMAGE, digest="sha256:arm", platform="linux/arm64")
    single = replace(OTHER, resolved=OTHER.digest, registry="hub")
    assert manifest_requests([IMAGE, arm, single]) == {"reg": 3, "hub": 1}
    low = Quota(remaining=1, limit=100)
    found = plan([node("a")], quota={"reg": low, "hub": low})
    assert found.manifest_requests == 2
    assert [warning.partition(":")[0] for warning in found.warnings] == ["reg"]


def test_the_estimate_grows_with_what_there_is_to_do_and_with_the_limits() -> None:
    nodes = [node(f"n{number}") for number in range(8)]
    rates = Rates(origin=100e6, node=100e6, unpack=1e12, start_seconds=0.0)
    free = plan(nodes, rates=rates).seconds
    assert free == pytest.approx(TOTAL / 100e6)
    turns = plan(nodes, rates=rates, limits=Limits(nodes_at_once=2)).seconds
    assert turns == pytest.approx(4 * TOTAL / 100e6)
    slow = plan(nodes, rates=rates, limits=Limits(bandwidth=10_000_000))
    assert slow.seconds == pytest.approx(TOTAL / 10e6)
    assert slow.rates.node == 10e6


def test_a_survey_survives_the_wire() -> None:
    survey = node("a", present=frozenset({"b", "a"}), partial={"c": 3}, chains=frozenset({"x"}))
    assert NodeSurvey.from_dict(json.loads(json.dumps(survey.to_dict()))) == survey


def test_a_plan_is_plain_data() -> None:
    found = plan([node("a")], quota={"reg": Quota(5)})
    assert json.loads(json.dumps(found.to_dict()))["quota"]["reg"]["remaining"] == 5
    json.dumps(found.results())


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[NodeSurvey], tuple[Wave, ...]]:
    surveys = []
    for number in range(draw(st.integers(1, 7))):
        present = draw(st.frozensets(st.sampled_from(list(BLOBS))))
        partial = draw(st.dictionaries(st.sampled_from(list(BLOBS)), st.integers(0, 400 * MIB)))
        store = draw(st.sampled_from(["x", "y", f"own-{number}"]))
        surveys.append(node(f"n{number}", present=present, partial=partial, store=store))
    # What lies in a store is seen by all its nodes.
    first = {survey.store: survey for survey in reversed(surveys)}
    surveys = [
        replace(s, present=first[s.store].present, partial=first[s.store].partial) for s in surveys
    ]
    waves = (Wave(count=draw(st.integers(1, 4))),) if draw(st.booleans()) else ()
    return surveys, waves


@given(clusters())
def test_every_missing_byte_comes_from_somewhere_exactly_once(
    cluster: tuple[list[NodeSurvey], tuple[Wave, ...]],
) -> None:
    surveys, waves = cluster
    found = plan(surveys, waves=waves)
    stores = {survey.store: survey for survey in surveys}
    missing = sum(
        max(0, size - survey.partial.get(digest, 0))
        for survey in stores.values()
        for digest, size in BLOBS.items()
        if digest not in survey.present
    )
    assert found.origin_bytes + found.peer_bytes == missing
    held = frozenset().union(*(survey.present for survey in surveys))
    assert found.origin_bytes <= sum(size for name, size in BLOBS.items() if name not in held)
    for blob in found.blobs:
        assert blob.have + blob.need == len(stores)
        if blob.digest in held:
            assert blob.origin_bytes == 0
    assert sum(row.origin_bytes for row in found.nodes) == found.origin_bytes
    assert sum(blob.origin_bytes for blob in found.blobs) == found.origin_bytes
    assert sum(blob.peer_bytes for blob in found.blobs) == found.peer_bytes
