"""The rates of edges with which DADAO needs the fewest messages."""

import sys

import networkx as nx
import numpy as np
import pytest
from test_dadao import ridge

from distopt.errors import CompatibilityError, ConfigError
from distopt.gossip import Complete, EdgeList, Exponential, Ring, optimal_edge_rates, simulate_dadao
from distopt.gossip.dadao import edge_rates, laplacian
from distopt.gossip.description import chis

BARBELL = EdgeList(edges=tuple(nx.barbell_graph(4, 0).edges()))  # two crowds, and a bridge that all depends on


def product(num_ranks, rates):
    chi1, chi2 = chis(laplacian(num_ranks, rates))
    return chi1 * chi2


def test_no_rates_nearby_need_fewer_messages():
    pytest.importorskip("cvxpy", reason="the rates are found with cvxpy, the extra sdp")
    graph = BARBELL.graph(8)
    found = optimal_edge_rates(graph)
    assert product(8, found) == pytest.approx(0.5, rel=1e-4)
    total = sum(edge_rates(graph, found)[0].values())  # scaled to exactly 1/2
    assert total == pytest.approx(sum(found.values()), rel=1e-4)
    assert total < 0.65 * sum(edge_rates(graph)[0].values())
    random = np.random.default_rng(0)
    for size in (0.3, 0.03):
        for _ in range(20):
            other = {edge: rate * np.exp(size * random.standard_normal()) for edge, rate in found.items()}
            assert sum(edge_rates(graph, other)[0].values()) > total * (1 - 1e-4)
    bridge = max(found, key=found.get)
    assert bridge == (3, 4)


@pytest.mark.parametrize(("topology", "size"), [(Ring(), 7), (Complete(), 5)])
def test_where_all_edges_are_alike_their_rates_are_equal(topology, size):
    pytest.importorskip("cvxpy", reason="the rates are found with cvxpy, the extra sdp")
    graph = topology.graph(size)
    found = optimal_edge_rates(graph)
    assert set(found) == set(graph.edges)
    np.testing.assert_allclose(list(found.values()), list(edge_rates(graph)[0].values()), rtol=1e-3)


def test_dadao_comes_as_far_with_fewer_messages():
    pytest.importorskip("cvxpy", reason="the rates are found with cvxpy, the extra sdp")
    settings = {**ridge(8, 3, 10), "topology": BARBELL, "num_gradients": 1500, "look_every": 1500}
    plain = simulate_dadao(**settings)
    best = simulate_dadao(**settings, rates=optimal_edge_rates(BARBELL.graph(8)))
    assert best.messages[-1] < 0.7 * plain.messages[-1]
    assert best.errors[-1] < 2 * plain.errors[-1] < 0.05 * plain.errors[0]


def test_what_is_said_without_cvxpy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(CompatibilityError, match=r"pip install 'torch-distopt\[sdp\]', or leave rates out"):
        optimal_edge_rates(Ring().graph(4))


@pytest.mark.parametrize("graph", [Exponential().graph(8), Ring().graph(1), EdgeList(edges=((0, 1), (2, 3))).graph(4)])
def test_graphs_that_have_no_rates(graph):
    with pytest.raises(
        ConfigError, match=r"rates need an undirected, connected graph of at least two ranks, got edges"
    ):
        optimal_edge_rates(graph)
