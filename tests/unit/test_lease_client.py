"""Leases as a node sees them, with an owner that is started anew in between."""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/

from __future__ import annotations

from typing import Any

import pytest

from stowray.actors.lease_book import LeaseBooks
from stowray.actors.lease_client import LeaseClient
from stowray.actors.run_limits import LOOK_SECONDS, SILENT_SECONDS, RunLimits
from stowray.pipeline.errors import NodeError, UsageError
from stowray.pipeline.origin_leases import DEFAULT_TTL_SECONDS, Elsewhere, Granted, Later


class Owner:
    """Books that can be lost, as those of a process that died and was started again."""

    def __init__(self) -> None:
        self.now = 0.0
        self.is_up = True
        self.questions: list[str] = []
        self.books = LeaseBooks(restarted=False, monotonic=lambda: self.now)

    def lose(self) -> None:
        self.books = LeaseBooks(restarted=True, monotonic=lambda: self.now)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        self.questions.append(request["question"])
        if not self.is_up:
            raise NodeError("owner", "gone")
        return self.books.answer(request)

    def client(self, node: str, connections: int = 2) -> LeaseClient:
        return LeaseClient(
            self.answer, run="r", node=node, address=f"{node}:1", connections=connections
        )


@pytest.fixture
def owner() -> Owner:
    return Owner()


def test_one_node_reads_and_others_are_told_where(owner: Owner) -> None:
    a, b = owner.client("a"), owner.client("b")
    assert a.ask("k", 100, 0) == Granted(0, 100, DEFAULT_TTL_SECONDS)
    told = b.ask("k", 100, 0)
    assert isinstance(told, Elsewhere)
    assert (told.nodes, told.reading) == (("a",), True)
    assert b.address("a") == "a:1"
    assert b.address("nobody") == ""
    assert a.progress("k", 60) == DEFAULT_TTL_SECONDS
    a.release("k")
    assert b.ask("k", 100, 60) == Granted(60, 100, DEFAULT_TTL_SECONDS)
    a.has("k", 100, 0, 60)
    told = b.ask("k", 100, 0)
    assert isinstance(told, Elsewhere)
    assert told.nodes == ("a",)


def test_what_is_held_is_declared_to_a_new_owner_before_anybody_else_gets_it(owner: Owner) -> None:
    a, b = owner.client("a"), owner.client("b")
    a.ask("k", 100, 0)
    a.ask("other", 50, 0)
    a.has("other", 50)
    a.permit("k")
    a.progress("k", 40)
    owner.lose()
    # The new owner says nothing to others before it knows more.
    assert isinstance(b.ask("k", 100, 40), Later)
    assert a.progress("k", 45) == DEFAULT_TTL_SECONDS, "the holder reads on"
    told = b.ask("k", 100, 50)
    assert isinstance(told, Elsewhere)
    assert told.nodes == ("a",)
    assert "declare_permit" in owner.questions
    assert owner.questions.count("declare") == 1, "what was given back or read is not held"


def test_what_was_read_is_told_to_a_new_owner_and_not_read_again(owner: Owner) -> None:
    a, b = owner.client("a"), owner.client("b")
    a.ask("k", 100, 0)
    a.progress("k", 40)
    a.ask("wrong", 50, 0)
    a.progress("wrong", 20)
    a.lost("wrong")
    owner.lose()
    a.progress("k", 60)
    owner.now += DEFAULT_TTL_SECONDS + 1
    told = b.ask("k", 100, 0)
    assert isinstance(told, Elsewhere)
    assert (told.nodes, told.end, told.reading) == (("a",), 60, False)
    assert b.ask("wrong", 50, 0) == Granted(0, 50, DEFAULT_TTL_SECONDS)


def test_permits_are_for_the_whole_cluster_also_after_a_restart(owner: Owner) -> None:
    a, b = owner.client("a", 1), owner.client("b", 1)
    assert a.permit("x") == DEFAULT_TTL_SECONDS
    answer = b.permit("y")
    assert isinstance(answer, Later)
    assert 0 < answer.seconds < 1
    owner.lose()
    assert a.permit("x") == DEFAULT_TTL_SECONDS
    owner.now += DEFAULT_TTL_SECONDS / 2
    a.permit("x")
    owner.now += DEFAULT_TTL_SECONDS / 2 + 1
    assert isinstance(b.permit("y"), Later), "the old one still counts"
    a.give_back("x")
    assert b.permit("y") == DEFAULT_TTL_SECONDS


def test_a_dead_node_holds_nothing(owner: Owner) -> None:
    a, b = owner.client("a", 1), owner.client("b", 1)
    a.ask("k", 100, 0)
    a.permit("k")
    owner.books.node_died("r", "a")
    owner.books.node_died("another run", "a")
    assert isinstance(b.ask("k", 100, 0), Granted)
    assert b.permit("k") == DEFAULT_TTL_SECONDS
    assert b.address("a") == ""


def test_runs_do_not_know_each_other(owner: Owner) -> None:
    owner.client("a").ask("k", 100, 0)
    other = LeaseClient(owner.answer, run="s", node="b", address="", connections=1)
    assert isinstance(other.ask("k", 100, 0), Granted)


def test_no_answer_is_an_error_and_what_is_held_stays_held(owner: Owner) -> None:
    a = owner.client("a")
    a.ask("k", 100, 0)
    owner.is_up = False
    with pytest.raises(NodeError):
        a.progress("k", 10)
    owner.is_up = True
    owner.lose()
    assert a.progress("k", 20) > 0
    assert owner.questions[-2:] == ["declare", "progress"]


def test_an_unknown_question_is_refused(owner: Owner) -> None:
    with pytest.raises(UsageError):
        owner.client("a")._ask("burn")


def limits(owner: Owner, node: str) -> RunLimits:
    return RunLimits(owner.client(node), lambda: owner.now)


def test_the_lines_of_a_registry_are_those_of_all_nodes_together(owner: Owner) -> None:
    a, b = limits(owner, "a"), limits(owner, "b")
    assert [a.book("h", "requests", 0.5), b.book("h", "requests", 0.5)] == [0.0, 0.5]
    assert a.book("h", "requests", 0.5) == 1.0
    # Other lines and other hosts are lines of their own.
    assert [b.book("h", "bytes", 9.0), b.book("other", "requests", 9.0)] == [0.0, 0.0]
    owner.now = 10.0
    assert a.book("h", "requests", 0.5) == 0.0


def test_a_pause_that_one_node_was_asked_for_is_kept_by_all(owner: Owner) -> None:
    a, b = limits(owner, "a"), limits(owner, "b")
    assert b.rest("h") == 0.0
    a.pause("h", 20.0)
    assert a.rest("h") == 20.0
    owner.now = LOOK_SECONDS
    assert b.rest("h") == 20.0 - LOOK_SECONDS
    assert b.rest("other") == 0.0
    asked = len(owner.questions)
    owner.now = 19.0
    assert b.rest("h") == 1.0
    assert len(owner.questions) == asked, "what is known needs no question"
    owner.now = 20.0
    assert (a.rest("h"), b.rest("h")) == (0.0, 0.0)


def test_without_an_owner_a_node_has_its_own_limits_alone(owner: Owner) -> None:
    a = limits(owner, "a")
    owner.is_up = False
    assert a.book("h", "requests", 5.0) == 0.0
    asked = len(owner.questions)
    assert a.book("h", "requests", 5.0) == a.rest("h") == 0.0
    assert len(owner.questions) == asked, "who does not answer is left alone for a while"
    a.pause("h", 5.0)
    assert a.rest("h") == 5.0
    owner.is_up = True
    owner.now += 2 * SILENT_SECONDS
    assert [a.book("h", "requests", 5.0), a.book("h", "requests", 5.0)] == [0.0, 5.0]


@pytest.mark.parametrize(("line", "seconds"), [("hours", 1.0), ("bytes", -1.0), ("bytes", 1e9)])
def test_no_such_part_of_a_line(owner: Owner, line: str, seconds: float) -> None:
    with pytest.raises(UsageError):
        owner.client("a").book("h", line, seconds)
