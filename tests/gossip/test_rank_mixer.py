"""The exchange between real ranks."""

import mixer_rank
import pytest

GRAPHS = {
    "two senders": {"topology": "ring"},
    "one sender": {"topology": "one-peer-exponential"},
    "no sender at the first rank": {"topology": "edges", "edges": [[0, 1], [1, 2]], "directed": True},
}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("numel", [1, 70_001])
def test_averaging_in_place_makes_the_same_bits(ranks, graph, numel):
    assert ranks(3)(mixer_rank.mixed_both_ways, GRAPHS[graph], numel) == [(True, 0)] * 3
