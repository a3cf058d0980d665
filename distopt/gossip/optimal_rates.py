"""How often each edge of a graph should be used, so that DADAO needs the fewest messages: a semidefinite program.

Nabli and Oyallon, "DADAO", ICML 2023, announce such a program for "the optimal gossip rate of each edge minimizing the
total number of communications". DADAO converges at the rate of centralised descent if `chi1 chi2 <= 1/2`, with
`chi1 = 1 / lambda_2` and `chi2 = 1/2 max_e e' Lambda^+ e` of the Laplacian Lambda of the edges' rates. The program here
is derived from that condition, as the paper's own text was not at hand:

    minimise sum_e lambda_e  over  lambda >= 0 and a
    such that  Lambda - a (I - J) >= 0       which is  chi1 <= 1/a
    and  [[Lambda + J, e], [e', a]] >= 0     which is  e' Lambda^+ e <= a, so chi2 <= a/2, for each edge e

with J the matrix of 1/n. The product of the bounds is 1/2, so nothing is relaxed but one thing: an edge must be short
also if its rate is zero.

Limits: needs cvxpy (the extra `sdp`) and its solver; the work grows fast with the number of edges, to which the
constraints are as many matrices.
"""

import importlib
import math
from typing import Any

import numpy as np

from distopt.errors import CompatibilityError, ConfigError
from distopt.gossip.dadao import laplacian
from distopt.gossip.description import chis
from distopt.gossip.graph import Edge, Graph

_UNUSED = 1e-6  # of the largest rate: less than this is the solver's zero


def optimal_edge_rates(graph: Graph) -> dict[Edge, float]:
    """The rates of least sum with which DADAO needs no more gradients; for `simulate_dadao(rates=...)`.

    Args:
        graph: Undirected and connected.

    Returns:
        Messages per unit of time, in which a node computes one gradient on average; edges that are not used are left
        out.

    Raises:
        ConfigError: The graph is directed, has one rank or is not connected.
        CompatibilityError: cvxpy is not installed, or its solver has found no solution.
    """
    n = graph.num_ranks
    if graph.directed or n < 2 or math.isinf(chis(laplacian(n, dict.fromkeys(graph.edges, 1.0)))[0]):
        raise ConfigError(
            f"rates need an undirected, connected graph of at least two ranks, got edges {graph.edges!r:.100} of {n} "
            f"ranks{', directed' if graph.directed else ''}; use 'ring', say"
        )
    try:
        cvxpy: Any = importlib.import_module("cvxpy")
    except ImportError as error:
        raise CompatibilityError(
            "the best rates of edges need cvxpy, which is not installed; run pip install 'torch-distopt[sdp]', or "
            "leave rates out for equal ones"
        ) from error
    edges = graph.edges
    ends = np.zeros((len(edges), n))
    for row, (i, j) in enumerate(edges):
        ends[row, i], ends[row, j] = 1.0, -1.0
    mean = np.full((n, n), 1.0 / n)
    rates, least = cvxpy.Variable(len(edges), nonneg=True), cvxpy.Variable()
    weighted = ends.T @ cvxpy.diag(rates) @ ends
    short = [
        cvxpy.bmat([[weighted + mean, end[:, None]], [end[None, :], cvxpy.reshape(least, (1, 1), order="C")]]) >> 0
        for end in ends
    ]
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum(rates)), [weighted - least * (np.eye(n) - mean) >> 0, *short])
    problem.solve()
    if problem.status != cvxpy.OPTIMAL:
        raise CompatibilityError(
            f"the solver must find the rates of {len(edges)} edges, got {problem.status!r}; leave rates out for equal "
            "ones"
        )
    found = np.asarray(rates.value)
    used = found > _UNUSED * found.max()
    return {edge: float(rate) for edge, rate, keep in zip(edges, found, used, strict=True) if keep}
