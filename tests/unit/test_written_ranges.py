"""Which bytes are written, against a model that is a set of offsets."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowray.pipeline.written_ranges import WrittenRanges

SIZE = 40
ranges = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(
    lambda pair: (min(pair), max(pair))
)


def ignore(_prefix: int) -> None:
    """Show the prefix to nobody."""


def prefix_of(written: set[int]) -> int:
    return next(at for at in range(SIZE + 1) if at not in written)


@given(st.lists(st.tuples(ranges, st.sampled_from(["write", "fail", "keep"]))), ranges)
def test_claims_prefix_and_gaps_are_those_of_a_set_of_offsets(
    steps: list[tuple[tuple[int, int], str]], asked: tuple[int, int]
) -> None:
    found = WrittenRanges()
    written: set[int] = set()
    claimed: set[int] = set()
    for (start, end), fate in steps:
        parts = found.claim(start, end)
        got = [at for left, right in parts for at in range(left, right)]
        assert got == sorted(set(range(start, end)) - written - claimed), "each byte once, in order"
        for part in parts:
            offsets = set(range(*part))
            if fate == "write":
                before = prefix_of(written)
                written |= offsets
                shown: list[int] = []
                goes_on = found.note(part, shown.append)
                assert shown == [prefix_of(written)]
                assert goes_on == (prefix_of(written) > part[0])
                assert prefix_of(written) >= before
            elif fate == "fail":
                found.give_back(part)
            else:
                claimed |= offsets
    assert found.prefix == prefix_of(written)
    assert found.is_empty == (not written and not claimed)
    for only_written, there in ((True, written), (False, written | claimed)):
        missing = [at for at in range(*asked) if at not in there]
        gap = found.gap(*asked, written=only_written)
        if not missing:
            assert gap is None
        else:
            assert gap is not None
            assert gap[0] == missing[0]
            assert all(at not in there for at in range(*gap))
            assert gap[1] == asked[1] or gap[1] in there, "the whole of the gap"


@given(st.integers(0, SIZE), st.sets(st.integers(0, SIZE - 1)))
def test_what_is_there_already_counts_as_written(prefix: int, more: set[int]) -> None:
    written = set(range(prefix)) | more
    islands: list[tuple[int, int]] = []
    for at in sorted(written - set(range(prefix))):
        if islands and islands[-1][1] == at:
            islands[-1] = (islands[-1][0], at + 1)
        else:
            islands.append((at, at + 1))
    found = WrittenRanges()
    found.claim(3, 9)
    found.reset(prefix, islands)
    assert found.prefix == prefix_of(written)
    rest = [at for left, right in found.claim(0, SIZE) for at in range(left, right)]
    assert rest == sorted(set(range(SIZE)) - written)


def test_threads_never_get_the_same_byte() -> None:
    found = WrittenRanges()
    size, taken = 20_000, [0] * 20_000
    begin = threading.Barrier(4)

    def work(step: int) -> None:
        begin.wait()
        for start in range(0, size, step):
            for part in found.claim(start, min(size, start + step)):
                for at in range(*part):
                    taken[at] += 1
                found.note(part, ignore)

    threads = [threading.Thread(target=work, args=(step,)) for step in (7, 11, 13, 64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken == [1] * size
    assert found.prefix == size


def test_a_prefix_is_shown_before_anybody_else_can_move_it() -> None:
    found = WrittenRanges()
    found.claim(0, 10)
    found.claim(10, 20)
    entered, go_on = threading.Event(), threading.Event()
    shown: list[int] = []

    def slow(prefix: int) -> None:
        entered.set()
        go_on.wait(60)
        shown.append(prefix)

    first = threading.Thread(target=found.note, args=((0, 10), slow))
    first.start()
    assert entered.wait(60)
    second = threading.Thread(target=found.note, args=((10, 20), shown.append))
    second.start()
    go_on.set()
    first.join()
    second.join()
    assert shown == [10, 20]


def test_a_claim_that_failed_cannot_be_given_back_twice() -> None:
    found = WrittenRanges()
    (part,) = found.claim(0, 4)
    found.give_back(part)
    with pytest.raises(ValueError, match="not in list"):
        found.give_back(part)
