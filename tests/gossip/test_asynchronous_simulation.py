"""Events at random times, in one process."""

import pytest
import torch

from distopt.errors import ConfigError
from distopt.gossip import EdgeList
from distopt.gossip.asynchronous_simulation import simulate_asynchronous
from distopt.gossip.clocks import PoissonClocks

NODES = 16
START = torch.randn(NODES, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def run(**changed):
    return simulate_asynchronous(**{"start": START, "topology": "ring", "duration": 100.0, **changed})


@pytest.mark.parametrize("topology", ["ring", "star"])
@pytest.mark.parametrize("accelerated", [False, True])
def test_gossip_alone_keeps_the_mean_and_agrees(topology, accelerated):
    found = run(topology=topology, accelerated=accelerated, evaluate=lambda rows: {"mean": float(rows.mean())})
    means = [row["mean"] for row in found.rows]
    assert max(abs(mean - float(START.mean())) for mean in means) < 1e-12
    torch.testing.assert_close(found.models.mean(0), START.mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.copies.mean(0), START.mean(0), rtol=0, atol=1e-12)
    assert found.rows[-1]["consensus_distance"] < 0.2 * found.rows[0]["consensus_distance"]


def test_the_second_vector_agrees_sooner_on_a_ring_from_the_same_events():
    ways = [run(accelerated=way, duration=1000.0, until=lambda row: row["consensus_distance"] < 1e-4) for way in (0, 1)]
    plain, accelerated = ([row["messages"] for row in found.rows] for found in ways)
    assert len(accelerated) < 0.6 * len(plain) < 600
    assert accelerated == plain[: len(accelerated)]
    assert not torch.equal(ways[1].models, ways[1].copies)
    assert torch.equal(ways[0].models, ways[0].copies)


def test_the_same_arguments_give_the_same_bits():
    first, second = run(duration=20.0), run(duration=20.0)
    assert torch.equal(first.models, second.models)
    assert first.rows == second.rows
    assert not torch.equal(first.models, run(duration=20.0, seed=1).models)


def test_events_come_as_often_as_they_should():
    found = run(duration=400.0, rate=2.0, topology="star")
    assert found.rows[-1]["time"] == 400.0
    assert len(found.rows) == 400
    assert found.rows[-1]["gradients"] == pytest.approx(400 * NODES, rel=0.06)  # five standard deviations
    assert found.rows[-1]["messages"] == pytest.approx(2.0 * 400 * NODES / 2, rel=0.06)


@pytest.mark.parametrize("accelerated", [False, True])
def test_nodes_find_the_minimum_of_the_sum_of_their_functions(accelerated):
    found = run(accelerated=accelerated, gradient=lambda node, x: x - START[node], lr=0.02, duration=300.0)
    assert float((found.models.mean(0) - START.mean(0)).norm()) < 0.05
    torch.testing.assert_close(found.models.mean(0), found.copies.mean(0), rtol=0, atol=1e-12)  # both got the gradients


def test_an_edge_ticks_as_often_as_its_rate_says():
    clocks = PoissonClocks(2, {(0, 1): 3.0}, seed=0)
    ticks = [clocks.tick() for _ in range(10_000)]
    assert ticks.count((0, 1)) == pytest.approx(6000, rel=0.05)
    assert clocks.time == pytest.approx(2000, rel=0.06)
    assert {ticks.count(node) // 1000 for node in (0, 1)} <= {1, 2}


def test_bad_input():
    with pytest.raises(ConfigError, match=r"undirected graph that stays the same, got 'one-peer-exponential'"):
        run(topology="one-peer-exponential")
    with pytest.raises(ConfigError, match="undirected graph"):
        run(topology=EdgeList(edges=((0, 1), (1, 0), (1, 15), (15, 0)), directed=True), start=START)
    with pytest.raises(ConfigError, match="must be connected"):
        run(topology=EdgeList(edges=((0, 1), (14, 15))))
    with pytest.raises(ConfigError, match="duration must be a positive number"):
        run(duration=0.0)
    with pytest.raises(ConfigError, match="two or more nodes"):
        run(start=START[:1])
