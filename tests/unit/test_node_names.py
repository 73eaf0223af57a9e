# ruff: noqa: TID251 - the ban on the actors is for pipeline/

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowray.actors.node_names import chosen_name, unique_names


@pytest.mark.parametrize(
    ("configured", "described", "host", "expected"),
    [
        pytest.param("n1", {"NodeName": "worker"}, "vm", "n1", id="what the node says itself"),
        pytest.param("", {"NodeName": "worker"}, "vm", "worker", id="Ray's name"),
        pytest.param("", {"NodeName": "10.0.0.7"}, "vm", "vm", id="an address is no name"),
        pytest.param("", {"NodeName": "fd00::1"}, "vm", "vm", id="nor is one of IPv6"),
        pytest.param("", {"NodeManagerHostname": "h"}, "", "h", id="no answer"),
        pytest.param("../../etc", {}, "", ".._.._etc", id="no path"),
        pytest.param("..", {}, "", "node", id="not the parent"),
    ],
)
def test_a_node_is_called(configured: str, described: dict, host: str, expected: str) -> None:
    assert chosen_name(configured, described, host) == expected


def test_those_of_one_host_are_told_apart_whatever_their_order() -> None:
    nodes = [("aaaaaaaa11", "vm"), ("bbbbbbbb22", "vm"), ("cccccccc33", "other")]
    expected = {"aaaaaaaa11": "vm-aaaaaaaa", "bbbbbbbb22": "vm-bbbbbbbb", "cccccccc33": "other"}
    assert unique_names(nodes) == unique_names(nodes[::-1]) == expected


def test_who_comes_later_changes_nobody_s_name() -> None:
    first = unique_names([("aaaaaaaa11", "vm")])
    assert unique_names([("aaaaaaaa11", "vm"), ("bbbbbbbb22", "vm")], first) == {
        "aaaaaaaa11": "vm",
        "bbbbbbbb22": "vm-bbbbbbbb",
    }


@given(
    st.lists(
        st.tuples(st.text("abc", min_size=1, max_size=12), st.sampled_from(["n", "n-a", "n-aa"])),
        unique_by=lambda node: node[0],
    )
)
def test_names_are_unique(nodes: list[tuple[str, str]]) -> None:
    names = unique_names(nodes)
    assert names.keys() == {node_id for node_id, _ in nodes}
    assert len(set(names.values())) == len(names)
