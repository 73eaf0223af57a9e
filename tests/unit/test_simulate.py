from __future__ import annotations

from dataclasses import replace

import pytest

from bench import simulate, simulate_messages
from bench.simulate import Simulation, World, measure
from stowray.pipeline import origin_leases, source_choice
from stowray.pipeline import spread as planner

SMALL = World(layers=(600_000_000, 80_000_000), slow_share=0.0, death_share=0.0)


def test_the_product_decides() -> None:
    assert simulate.spread is planner.spread
    assert simulate.SourceChoice is source_choice.SourceChoice
    assert simulate.OriginLeases is origin_leases.OriginLeases


@pytest.mark.parametrize("nodes", [1, 4, 40])
def test_without_faults_each_origin_byte_is_read_once(nodes: int) -> None:
    outcome, _ = measure(replace(SMALL, nodes=nodes))
    assert len(outcome.ready) == nodes
    assert outcome.origin_bytes == outcome.image_bytes


def test_one_node_is_as_fast_as_the_narrowest_link() -> None:
    _, alone = measure(replace(SMALL, nodes=1, origin=50e6))
    assert alone == pytest.approx(680e6 / 50e6, rel=0.05)


def test_no_node_is_ready_before_the_unpacking_can_be() -> None:
    outcome, alone = measure(replace(SMALL, nodes=4, unpack=50e6))
    assert min(*outcome.ready, alone) >= 600e6 / 50e6


def test_the_living_finish_when_nodes_die_and_others_are_slow() -> None:
    world = replace(SMALL, nodes=60, slow_share=0.05, death_share=0.05)
    outcome, _ = measure(world)
    assert (outcome.dead, outcome.unready, outcome.slow_unready) == (3, 0, 0)
    assert len(outcome.ready) == 54
    assert len(outcome.slow_ready) == 3


def test_slow_nodes_that_are_late_do_not_count_against_the_others() -> None:
    world = replace(SMALL, nodes=60, slow_share=0.05, slow_factor=100.0, limit=40.0)
    outcome = Simulation(world).run()
    assert (outcome.slow_unready, outcome.unready) == (3, 0)
    assert outcome.after(1.0) < 40.0


def test_a_slow_root_does_not_hold_the_cluster_up() -> None:
    # Of this world a whole tree once hung on its slow root until that one was done, at 40 s.
    world = World(nodes=300, death_within=8.0, seed=102, fan_out=8, limit=60.0)
    simulation = Simulation(world)
    assert any(tree.order[0] in simulation.slow for tree in simulation.plan.trees)
    assert simulation.run().after(0.99) < 20.0


def test_the_same_seed_gives_the_same_run() -> None:
    world = replace(SMALL, nodes=30, slow_share=0.1, death_share=0.1)
    first, second = measure(world)[0], measure(world)[0]
    assert (first.ready, first.reports) == (second.ready, second.reports)


def test_messages_are_counted_in_the_second_in_which_they_come() -> None:
    driver = simulate_messages.driver_messages(4, [1.5, 1.6, 2.5])
    # Parts and work at the start, beats of two messages a node every two seconds, and the answers.
    assert driver == {0: 12 + 4, 1: 4 + 2, 2: 4 + 1}
    frames = simulate_messages.progress_messages(4, [1.5, 1.0, 2.0])
    assert frames == {0: 30, 1: 15}


def test_the_limits_of_messages_are_those_of_the_actors() -> None:
    frames = pytest.importorskip("stowray.actors.frames", reason="needs Ray")
    pulse = pytest.importorskip("stowray.actors.prewarm_pulse", reason="needs Ray")
    assert simulate_messages.FRAME_SECONDS == frames.FRAME_SECONDS
    assert simulate_messages.SECONDS_PER_NODE == frames.SECONDS_PER_NODE
    assert simulate_messages.BEAT_SECONDS == pulse.BEAT_SECONDS
    assert simulate_messages.BEATS_PER_SECOND == pulse.BEATS_PER_SECOND
