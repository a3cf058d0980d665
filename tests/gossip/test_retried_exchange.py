"""An exchange that breaks half-way and is made again with those that are left: as if it had been made once."""

import pytest
import torch

from distopt.gossip import Gossip, QuasiGlobalMomentum, Ring
from distopt.gossip.mixing.rule import Surroundings
from distopt.gossip.participant import Participant
from distopt.gossip.simulated_mixer import SimulatedMixer

NODES = 4


class Breaking(SimulatedMixer):
    """Breaks at the n-th message."""

    def __init__(self, left):
        super().__init__(Ring().graph(NODES), torch.device("cpu"))
        self.left = left

    def mix(self, *rows, by_squares=None):
        self.left -= 1
        if self.left == 0:
            raise ConnectionError
        return super().mix(*rows, by_squares=by_squares)


def after(break_at, gossip):
    torch.manual_seed(0)
    vectors = [torch.randn(NODES, 5, dtype=torch.float64), torch.randn(NODES, 3)]
    moments = [torch.randn(NODES, 2)]

    def perform(act):
        try:
            act(Breaking(break_at))
        except ConnectionError:
            act(Breaking(0))

    around = Surroundings(topology=gossip.graphs, num_ranks=NODES, every=1)
    made = Participant(gossip, around, vectors, [[], []], perform)
    for _ in range(3):
        for rows in vectors:
            rows -= 0.1
        made.stepped_(vectors, [0.1, 0.1], moments)
    return [*vectors, *moments, *(tensor for state in made.state_dict()["rule"] for tensor in state.values())]


@pytest.mark.parametrize("break_at", [1, 2, 3])
@pytest.mark.parametrize("mixing", ["noloco", QuasiGlobalMomentum(), "push-sum", "d-psgd"], ids=str)
def test_a_broken_exchange_leaves_nothing_behind(mixing, break_at):
    gossip = Gossip(topology="ring", mixing=mixing, correction="off")
    for found, expected in zip(after(break_at, gossip), after(0, gossip), strict=True):
        assert torch.equal(found, expected)
