"""Laws of all topologies on many numbers of ranks, and what the papers say of some."""

import math

import networkx
import numpy as np
import pytest

from distopt.errors import ConfigError
from distopt.gossip import (
    Complete,
    EdgeList,
    ErdosRenyi,
    Graph,
    OnePeerExponential,
    RandomMatchings,
    RandomRegular,
    Ring,
    ScaleFree,
    Star,
    Topology,
    Torus,
    Weighted,
    describe,
)

ARGUMENTS = {"edges": {"edges": [[0, 1]]}, "weights": {"weights": [[0.5, 0.5], [0.5, 0.5]]}}
FOR_ANY_SIZE = [Topology.from_dict({"topology": name}) for name in sorted(set(Topology._known) - set(ARGUMENTS))]
SIZES = [1, 2, 3, 4, 5, 7, 8, 12, 13, 16, 33]

every = pytest.mark.parametrize("topology", FOR_ANY_SIZE, ids=lambda each: each.name)


def rounds(topology, size):
    return [topology.graph(size, number) for number in range(topology.period(size) or 20)]


@every
@pytest.mark.parametrize("size", SIZES)
def test_columns_add_up_to_1_and_what_is_undirected_is_symmetric(topology, size):
    for graph in rounds(topology, size):
        assert graph.num_ranks == size
        assert (graph.weights >= 0).all()
        np.testing.assert_allclose(graph.weights.sum(0), 1.0, rtol=0, atol=1e-12)
        if not graph.directed:
            np.testing.assert_allclose(graph.weights, graph.weights.T, rtol=0, atol=1e-12)
        for rank in range(size):
            assert rank not in graph.receivers(rank)
            assert all(rank in graph.senders(receiver) for receiver in graph.receivers(rank))
            if not graph.directed:
                assert graph.senders(rank) == graph.receivers(rank)


@every
@pytest.mark.parametrize("size", SIZES)
def test_every_built_in_topology_keeps_the_mean_and_agrees(topology, size):
    values = np.random.default_rng(size).standard_normal((size, 3))
    mixed = values
    for number in range(200):
        graph = topology.graph(size, number)
        assert graph.keeps_mean
        mixed = graph.weights @ mixed
        np.testing.assert_allclose(mixed.mean(0), values.mean(0), rtol=0, atol=1e-12)
    left = np.abs(mixed - values.mean(0)).max()
    assert left < 0.9 * np.abs(values - values.mean(0)).max() or size == 1
    assert describe(topology, size).spectral_gap > 0


@every
def test_all_ranks_make_the_same_graphs_by_themselves(topology):
    again = Topology.from_dict(topology.to_dict())
    for number in (0, 1, 5, 1000):
        np.testing.assert_array_equal(topology.graph(12, number).weights, again.graph(12, number).weights)


@pytest.mark.parametrize("power", [1, 2, 3, 4, 5])
def test_one_peer_exponential_is_exact_after_log2_n_rounds(power):
    assert describe(OnePeerExponential(), 2**power).exact_after == power


def test_one_peer_exponential_of_three_ranks_leaves_a_tenth_after_eight_rounds():
    product = np.eye(3)
    for number in range(8):
        product = OnePeerExponential().graph(3, number).weights @ product
    starts = np.eye(3) - 1 / 3
    assert 0.0 < np.linalg.norm(product @ starts, 2) < 0.2
    assert describe(OnePeerExponential(), 3).exact_after is None


def test_metropolis_weights_of_a_path():
    weights = Graph.undirected(3, [(0, 1), (1, 2)]).weights
    np.testing.assert_allclose(weights, [[2 / 3, 1 / 3, 0], [1 / 3, 1 / 3, 1 / 3], [0, 1 / 3, 2 / 3]], atol=1e-15)


def test_a_ring_of_16_is_that_of_a2cid2():
    described = describe(Ring(), 16)
    assert 1 / (2 * math.sqrt(described.chi1 * described.chi2)) == pytest.approx(0.143, abs=1e-3)  # eta
    assert 0.5 * math.sqrt(described.chi1 / described.chi2) == pytest.approx(1.87, abs=5e-3)  # alpha tilde


@pytest.mark.parametrize("size", [3, 8, 17])
def test_the_gap_of_a_ring(size):
    largest = max(abs(1 / 3 + 2 / 3 * math.cos(2 * math.pi * k / size)) for k in range(1, size))
    assert describe(Ring(), size).spectral_gap == pytest.approx(1 - largest, abs=1e-9)


@pytest.mark.parametrize("topology", [Ring(), Star(), Torus(), ScaleFree()], ids=lambda each: each.name)
def test_rounds_to_consensus_are_the_first_that_leave_a_thousandth(topology):
    found, product = describe(topology, 12).rounds_to_consensus, np.eye(12)
    for number in range(found):
        assert np.linalg.norm(product - 1 / 12, 2) > 1e-3, number
        product = topology.graph(12).weights @ product
    assert np.linalg.norm(product - 1 / 12, 2) <= 1e-3


def test_bytes_are_those_of_the_busiest_rank():
    assert describe(Star(), 9, model_bytes=100).bytes_per_round == 800
    assert describe(Ring(), 9, model_bytes=100).bytes_per_round == 200
    assert describe(RandomMatchings(), 2, model_bytes=100).bytes_per_round == 100
    assert describe(Ring(), 9).bytes_per_round is None


def test_who_stays_alone_in_an_odd_number_changes():
    graphs = [RandomMatchings().graph(5, number) for number in range(30)]
    alone = [next(rank for rank in range(5) if not graph.receivers(rank)) for graph in graphs]
    assert set(alone) == set(range(5))
    assert all(len(graph.edges) == 2 for graph in graphs)


def test_a_torus_is_as_square_as_possible_or_has_the_rows_it_is_given():
    assert all(len(Torus().graph(12).receivers(rank)) == 4 for rank in range(12))
    assert all(len(Torus().graph(13).receivers(rank)) == 2 for rank in range(13))
    np.testing.assert_array_equal(Torus(rows=1).graph(9).weights, Ring().graph(9).weights)
    with pytest.raises(ConfigError, match=r"rows must divide the number of ranks, got 5 for 12; leave it out"):
        Torus(rows=5).graph(12)


def test_random_graphs_are_drawn_by_their_seed():
    for made in (RandomRegular, ErdosRenyi, ScaleFree):
        drawn = {made(seed=seed).graph(16).weights.tobytes() for seed in range(4)}
        assert len(drawn) == 4
    assert all(len(RandomRegular(degree=3).graph(10).receivers(rank)) == 3 for rank in range(10))
    np.testing.assert_array_equal(RandomRegular(degree=4).graph(5).weights, Complete().graph(5).weights)
    with pytest.raises(ConfigError, match=r"even number of ranks or an even degree, got 9 and 3; use degree=4"):
        RandomRegular(degree=3).graph(9)
    with pytest.raises(ConfigError, match=r"the graph must be connected.*use a probability of"):
        ErdosRenyi(probability=0.01).graph(30)


def test_a_graph_of_networkx():
    given = networkx.karate_club_graph()
    topology = EdgeList.from_networkx(networkx.Graph(given.edges))
    assert {frozenset(edge) for edge in topology.graph(34).edges} == {frozenset(edge) for edge in given.edges}
    assert not topology.graph(34).directed
    with pytest.raises(
        ConfigError, match=r"no weights of their own, got a graph with some; use distopt.gossip.Weighted"
    ):
        EdgeList.from_networkx(given)
    one_way = EdgeList.from_networkx(networkx.DiGraph([(0, 1), (1, 2), (2, 0), (0, 2)])).graph(3)
    assert one_way.directed
    assert one_way.receivers(0) == (1, 2)
    assert one_way.senders(0) == (2,)
    assert not one_way.keeps_mean
    with pytest.raises(ConfigError, match=r"nodes must be the ranks 0 to 1, got \['a', 'b'\]; use networkx.convert"):
        EdgeList.from_networkx(networkx.Graph([("a", "b")]))


def test_a_disconnected_graph_is_refused_and_says_who_is_cut_off():
    with pytest.raises(ConfigError, match=r"connected, got .* nothing of rank 0 reaches ranks 2, 3; add edges"):
        describe(EdgeList(edges=((0, 1), (2, 3))), 4)
    with pytest.raises(ConfigError, match=r"nothing of rank 1 reaches ranks 0; add edges"):
        describe(EdgeList(edges=((0, 1),), directed=True), 2)


@pytest.mark.parametrize(
    ("weights", "directed", "message"),
    [
        (
            [[0.5, 0.5], [0.4, 0.6]],
            False,
            r"symmetric, got 0.5 at \(0, 1\) against 0.4 .* use a directed graph",
        ),
        ([[0.5, 0.5], [0.4, 0.5]], True, r"must add up to 1, got 0.9 for rank 0; divide each column"),
        ([[1.5, -0.5], [-0.5, 1.5]], False, r"not negative, got -0.5 at \(0, 1\)"),
        ([[1.0, 0.0]], False, r"must be a square matrix, got shape \(1, 2\)"),
        ([["a"]], False, r"weights must be rows of numbers"),
        ([[float("nan")]], False, r"must be finite"),
    ],
)
def test_weights_that_break_their_promise_are_refused(weights, directed, message):
    with pytest.raises(ConfigError, match=message):
        Weighted(weights=weights, directed=directed)


def test_random_matchings_come_close_without_being_exact():
    described = describe(RandomMatchings(), 12)
    assert described.exact_after is None
    assert 0.2 < described.spectral_gap < 0.6


def test_a_graph_of_another_size_than_the_job_is_refused():
    with pytest.raises(ConfigError, match=r"equally many ranks, got 3 and 4; start as many"):
        EdgeList(edges=((0, 1), (1, 2))).graph(4)
    with pytest.raises(ConfigError, match=r"equally many ranks, got 2 and 3"):
        Weighted(weights=[[0.5, 0.5], [0.5, 0.5]]).graph(3)


def test_push_sum_s_weights_split_what_a_rank_has():
    graph = EdgeList(edges=((0, 1), (0, 2), (1, 2), (2, 0)), directed=True).graph(3)
    np.testing.assert_allclose(graph.weights, [[1 / 3, 0, 1 / 2], [1 / 3, 1 / 2, 0], [1 / 3, 1 / 2, 1 / 2]], atol=1e-15)
    assert not describe(EdgeList(edges=((0, 1), (0, 2), (1, 2), (2, 0)), directed=True), 3).keeps_mean
