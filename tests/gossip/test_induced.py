"""Topologies after ranks have gone or come."""

import networkx
import numpy as np
import pytest

from distopt.gossip import EdgeList, ErdosRenyi, Gossip, PushSum, RandomMatchings, RandomRegular, Ring, Torus, Weighted

PATH = EdgeList(edges=((0, 1), (1, 2), (2, 3), (3, 4)))
LOOP = EdgeList(edges=((0, 1), (1, 2), (2, 3), (3, 4), (4, 0), (0, 3)), directed=True)
LAZY = Weighted(
    weights=tuple(tuple((0.6, 0.2, 0.0, 0.0, 0.2)[(i - j) % 5] for j in range(5)) for i in range(5)),
)
ALL = (0, 1, 2, 3, 4)
MEMBERS = [(0, 1, 2, 3), (0, 2, 3, 4), (0, 2, 4), (1, 3), (2,), (0, 1, 2, 3, 4, 5), (0, 2, 4, 6, 9)]


@pytest.mark.parametrize("given", [PATH, LOOP, LAZY], ids=["path", "directed", "weights"])
def test_all_are_what_was_given(given):
    assert given.among(ALL) is given


@pytest.mark.parametrize("members", MEMBERS, ids=str)
@pytest.mark.parametrize("given", [PATH, LOOP, LAZY], ids=["path", "directed", "weights"])
def test_those_who_are_there_keep_their_edges_and_are_connected(given, members):
    before = given.graph(5)
    graph = given.among(members).graph(len(members))
    assert graph.directed == before.directed
    kept = {(members[i], members[j]) for i in range(len(members)) for j in graph.receivers(i)}
    expected = {(i, j) for i in members if i < 5 for j in before.receivers(i) if j in members}
    assert expected <= kept
    found = networkx.from_numpy_array(graph.weights.T, create_using=networkx.DiGraph)
    assert networkx.is_strongly_connected(found)
    undirected = networkx.Graph(sorted(expected))
    undirected.add_nodes_from(members)
    if not graph.directed and networkx.is_connected(undirected):
        assert kept == expected  # nothing is added where nothing need be


def test_parts_are_joined_at_their_lowest_ranks():
    graph = PATH.among((0, 1, 3, 4)).graph(4)
    assert graph.edges == [(0, 1), (0, 2), (2, 3)]  # 1 and 3 were joined through 2: now 0 and 3 are
    np.testing.assert_allclose(graph.weights[0], [1 / 3, 1 / 3, 1 / 3, 0])  # Metropolis weights of the new degrees


def test_others_go_on_with_as_many_as_there_are():
    assert Ring().among((1, 2)) == Ring()
    assert Torus(rows=2).among((0, 1, 2, 3)) == Torus(rows=2)
    assert Torus(rows=2).among((0, 1, 2)) == Torus()
    assert RandomRegular(degree=3).among(ALL) == RandomRegular(degree=4)
    assert RandomRegular(degree=3).among((0, 1, 2, 3)) == RandomRegular(degree=3)
    assert ErdosRenyi(probability=0.9).among(ALL) == ErdosRenyi(probability=0.9)
    assert ErdosRenyi(probability=0.01).among(ALL).graph(5).num_ranks == 5
    assert RandomMatchings(of=PATH).among((0, 2, 3)).of == PATH.among((0, 2, 3))


def test_a_rule_that_needs_the_mean_uses_edges_in_both_directions_where_they_no_longer_keep_it():
    edges = tuple((i, (i + hop) % 5) for i in range(5) for hop in (1, 2))
    gossip = Gossip(topology=EdgeList(edges=edges, directed=True))
    assert gossip.surroundings(5).topology.graph(5).directed
    assert gossip.among(ALL).topology == gossip.topology
    around = gossip.among((0, 1, 3, 4))
    assert around.topology.graph(4).keeps_mean
    pushing = Gossip(topology=EdgeList(edges=edges, directed=True), mixing=PushSum()).among((0, 1, 3, 4))
    assert pushing.topology.graph(4).directed
