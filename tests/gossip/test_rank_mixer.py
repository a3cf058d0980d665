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
def test_averaging_in_place_makes_the_same(ranks, graph, numel):
    for one, other in ranks(3)(mixer_rank.mixed_both_ways, GRAPHS[graph], numel):
        assert one == other


def test_an_exchange_that_breaks_half_way_changes_nothing(ranks):
    assert ranks(3)(mixer_rank.mixed_with_one_who_goes, 70_001) == [(True, True)] * 3
