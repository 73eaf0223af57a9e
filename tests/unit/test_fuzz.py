"""A sample of the fuzzing: all seeds and former findings, and some mutations of each."""

from __future__ import annotations

import pytest

from tests.fuzz.mutate import run
from tests.fuzz.targets import targets

EXECUTIONS = 1500
SLOW = {"stage": 100, "stream": 500, "settings": 300}


@pytest.mark.parametrize("name", list(targets()))
def test_hostile_input_is_refused_in_words_and_in_time(name: str) -> None:
    target = targets()[name]
    outcome = run(target, 0, max(SLOW.get(name, EXECUTIONS), len(target.inputs())))
    assert not outcome.findings, [(finding.error, finding.data) for finding in outcome.findings[:5]]


def test_mutations_can_be_made_again() -> None:
    from itertools import islice

    from tests.fuzz.mutate import inputs

    target = targets()["tar"]
    first, second = (list(islice(inputs(target, 7), 50)) for _ in range(2))
    assert first == second
