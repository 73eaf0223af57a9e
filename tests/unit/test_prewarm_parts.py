"""Parts for nodes that begin at once, one after the other, or when others are ready."""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stowray.actors.prewarm_parts import Parts
from stowray.pipeline.spread import NodeState, Part

SIZES = {f"sha256:{number:064x}": 1000 * number + 1 for number in range(6)}


def node(name: str, missing: set[str]) -> NodeState:
    present = frozenset(SIZES) - missing
    return NodeState(name, frozenset(missing), present, address=f"{name}:1")


def holder(name: str) -> NodeState:
    return NodeState(name, present=frozenset(SIZES), address=f"{name}:1")


def wanted(part: Part) -> set[str]:
    return {portion.digest for portion in part.portions if not portion.holds}


@given(
    st.lists(
        st.tuples(st.sets(st.sampled_from(sorted(SIZES)), min_size=1), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 4),
    st.integers(0, 4),
)
def test_whoever_begins_gets_all_that_it_lacks_from_those_that_can_give_it(
    nodes: list[tuple[set[str], bool]], fan_out: int, at_once: int
) -> None:
    parts = Parts(fan_out=fan_out)
    parts.add_blobs(SIZES)
    begun: dict[str, set[str]] = {}
    ready: list[str] = []
    waiting = [(f"n{number}", *entry) for number, entry in enumerate(nodes)]
    while waiting:
        batch, waiting = waiting[: at_once or len(waiting)], waiting[at_once or len(waiting) :]
        working = [name for name in begun if name not in ready]
        states = [node(name, missing) for name, missing, _ in batch]
        dealt = parts.deal(states, [holder(name) for name in ready], working)
        begun |= {name: missing for name, missing, _ in batch}
        for name, missing, _ in batch:
            assert wanted(dealt[name]) == missing
            for portion in dealt[name].portions:
                assert len({p for p in dealt[name].portions if p.digest == portion.digest}) == (
                    portion.stripe.count
                )
                assert name not in portion.sources
                assert set(portion.sources) <= begun.keys() | set(ready)
                assert all(
                    dealt[name].addresses[source] == f"{source}:1" for source in portion.sources
                )
                assert not (ready and portion.is_root), "a ready node was passed over"
        ready += [name for name, _, is_done in batch if is_done]


def test_a_late_one_reads_from_those_at_work_and_not_from_the_origin() -> None:
    parts = Parts(fan_out=2)
    parts.add_blobs(SIZES)
    missing = set(SIZES)
    parts.deal([node("a", missing), node("b", missing)], [], [])
    late = parts.deal([node("c", missing)], [], ["a", "b"])["c"]
    assert not any(portion.is_root for portion in late.portions)
    later = parts.deal([node("d", missing)], [], ["a", "b", "c"])["d"]
    assert not any(portion.is_root for portion in later.portions)


def test_blobs_of_another_platform_are_read_from_the_origin_once() -> None:
    parts = Parts(fan_out=2)
    first, second = set(sorted(SIZES)[:3]), set(sorted(SIZES)[3:])
    parts.add_blobs({digest: SIZES[digest] for digest in first})
    only = NodeState("a", frozenset(first), address="a:1")
    parts.deal([only], [], [])
    parts.add_blobs({digest: SIZES[digest] for digest in second})
    arm = NodeState("b", frozenset(second), address="b:1")
    roots = parts.deal([arm], [], ["a"])["b"]
    assert {p.digest for p in roots.portions if p.is_root} == second
    other = NodeState("c", frozenset(second), address="c:1")
    late = parts.deal([other], [], ["a", "b"])["c"]
    assert wanted(late) == second
    assert {source for portion in late.portions for source in portion.sources} == {"b"}
