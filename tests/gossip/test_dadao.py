"""DADAO: the equations, the rates, and linear convergence of a distributed ridge regression."""

import math

import numpy as np
import pytest
import torch

from distopt.errors import ConfigError
from distopt.gossip import EdgeList, Exponential, OnePeerExponential, Ring
from distopt.gossip.dadao import DadaoConstants, DadaoNode, Flow, edge_rates, simulate_dadao
from distopt.gossip.description import chis, mean_laplacian

CONSTANTS = DadaoConstants(smoothness=50.0, strong_convexity=1.0, chi1=3.0)


def ridge(nodes, size, condition):
    random = np.random.default_rng(0)
    features, targets = random.standard_normal((nodes, 2 * size, size)), random.standard_normal((nodes, 2 * size))
    hessians = np.einsum("nmi,nmj->nij", features, features) / (2 * size)
    largest = max(np.linalg.eigvalsh(each)[-1] for each in hessians)
    convexity = largest / (condition - 1)
    hessians += convexity * np.eye(size)
    linear = np.einsum("nmi,nm->ni", features, targets) / (2 * size)
    solution = np.linalg.solve(hessians.sum(0), linear.sum(0))
    h, c = torch.tensor(hessians), torch.tensor(linear)
    return {
        "gradient": lambda node, x: h[node] @ x - c[node],
        "start": torch.tensor(random.standard_normal((nodes, size))),
        "smoothness": largest + convexity,
        "strong_convexity": convexity,
        "solution": torch.tensor(solution),
    }


@pytest.mark.parametrize("condition", [5, 50, 500])
def test_the_flow_is_the_exponential_of_its_matrix(condition):
    matrix = DadaoConstants(smoothness=float(condition), strong_convexity=1.0, chi1=2.0).flow()
    flow = Flow(matrix)
    for time in (0.0, 1e-3, 0.3, 4.0):
        torch.testing.assert_close(flow(time), torch.linalg.matrix_exp(matrix * time), rtol=1e-10, atol=1e-11)


def test_the_equations_of_the_paper():
    """Written once more, with numpy and small steps of Euler in place of the exponential."""
    nu, L = 0.5, 50.0
    s = math.sqrt(nu / L)
    x, xt, y, yt, z, zt = np.random.default_rng(1).standard_normal((6, 4))
    node = DadaoNode(torch.tensor(x), CONSTANTS)
    node.vectors = torch.tensor(np.stack([x, xt, y, yt, z, zt]))
    steps = 200_000
    dt = 0.5 / steps
    for _ in range(steps):
        x, xt, y, yt, z, zt = (
            x + dt * s / 8 * (xt - x),
            xt + dt * s / 8 * (x - xt),
            y + dt * s / 4 * (yt - y),
            yt - dt / (2 * s) * (nu * xt + y + z),
            z + dt * s / 4 * (zt - z),
            zt + dt * s / 8 * (z - zt),
        )
    node.advance(0.5)
    np.testing.assert_allclose(node.vectors, np.stack([x, xt, y, yt, z, zt]), rtol=1e-4, atol=1e-4)
    x, xt, y, yt, z, zt = node.vectors.numpy().copy()
    node.take_gradient(lambda at: 3 * at)
    g = 3 * x - nu * x - yt
    expected = [x - g / (4 * L), xt - g / (4 * math.sqrt(L * nu)), y, yt + (s / 4 + 1) * g, z, zt]
    np.testing.assert_allclose(node.vectors, np.stack(expected), rtol=1e-12)
    yt = expected[3]
    other = torch.arange(4, dtype=torch.float64)
    own = node.message.clone()
    node.meet(own, other)
    m = (own - other).numpy()
    expected = [*expected[:4], z - m / 2, zt - 2 * 3.0 * math.sqrt(L / nu) * m]
    np.testing.assert_allclose(node.vectors, np.stack(expected), rtol=1e-12)


def test_edges_are_used_as_often_as_the_theory_asks_for():
    graph = Ring().graph(16)
    rates, chi1 = edge_rates(graph)
    shared = mean_laplacian([graph]) / 8  # 16 edges share a rate of 1, each has 1/2 there
    first, second = chis(shared)
    assert sum(rates.values()) == pytest.approx(math.sqrt(2 * first * second))
    assert chi1 == pytest.approx(first / sum(rates.values()))
    given = {edge: 1.0 + (edge == (0, 1)) for edge in graph.edges}
    uneven, _ = edge_rates(graph, given)
    assert uneven[0, 1] == pytest.approx(2 * uneven[1, 2])


def test_it_converges_linearly_to_the_floor():
    problem = ridge(8, 4, 20)
    found = simulate_dadao(**problem, topology="ring", num_gradients=14_000, look_every=2000, seed=1)
    decay = np.log10(np.array(found.errors) / found.errors[0])
    slopes = np.diff(decay[:5])
    assert (slopes < -1.5).all()  # at least so many digits in each 2000 gradients, and equally many
    assert slopes.min() > 2.2 * slopes.max()
    assert decay[-1] < -18
    torch.testing.assert_close(found.nodes, problem["solution"].expand(8, 4), rtol=0, atol=1e-8)
    again = simulate_dadao(**problem, topology="ring", num_gradients=300, seed=1)
    assert torch.equal(again.nodes, simulate_dadao(**problem, topology="ring", num_gradients=300, seed=1).nodes)


def test_a_user_s_own_problem_whose_solution_nobody_knows():
    """Logistic regression with a ridge, gradients by torch: no gradient is left at the end, and no disagreement."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(4, 20, 3, generator=random, dtype=torch.float64)
    labels = torch.where(torch.rand(4, 20, generator=random) < 0.5, 1.0, -1.0).double()
    convexity = 0.5

    def loss(x, node):
        return torch.nn.functional.softplus(-labels[node] * (features[node] @ x)).mean() + convexity / 2 * x @ x

    gradient = torch.func.grad(loss)
    smoothness = convexity + max(float(torch.linalg.matrix_norm(each, 2)) ** 2 for each in features) / 80
    found = simulate_dadao(
        lambda node, x: gradient(x, node), start=torch.zeros(4, 3), smoothness=smoothness, strong_convexity=convexity,
        topology="ring", num_gradients=3000,
    )  # fmt: skip
    assert found.errors[-1] < 1e-12
    left = sum(gradient(found.nodes.mean(0), node) for node in range(4)) / 4
    assert left.norm() < 1e-6 < sum(gradient(found.nodes[0] * 0, node) for node in range(4)).norm()


def test_bad_input():
    problem = ridge(4, 2, 10)
    with pytest.raises(ConfigError, match=r"same graph in every round, got 'one-peer-exponential'; use 'ring'"):
        simulate_dadao(**problem, topology=OnePeerExponential(), num_gradients=1)
    with pytest.raises(ConfigError, match=r"undirected graph, got a directed one"):
        simulate_dadao(**problem, topology=Exponential(), num_gradients=1)
    with pytest.raises(ConfigError, match=r"rates must be positive numbers by edge"):
        edge_rates(EdgeList(edges=((0, 1), (1, 2))).graph(3), {(0, 2): 1.0})
    with pytest.raises(ConfigError, match=r"strong_convexity must be a positive number of at most the smoothness"):
        DadaoConstants(smoothness=1.0, strong_convexity=2.0, chi1=1.0)


def test_a_graph_in_parts_is_refused():
    problem = ridge(4, 2, 10)
    apart = EdgeList(edges=((0, 1), (2, 3)))
    with pytest.raises(ConfigError, match=r"edges with a rate must join all 4 ranks, got \[\(0, 1\), \(2, 3\)\]"):
        simulate_dadao(**problem, topology=apart, num_gradients=1)
    with pytest.raises(ConfigError, match=r"edges with a rate must join all 4 ranks, got \[\(0, 1\)\]"):
        simulate_dadao(**problem, topology="ring", rates={(0, 1): 1.0}, num_gradients=1)
    with pytest.raises(ConfigError, match="the number of ranks must be"):
        simulate_dadao(**ridge(1, 2, 10), topology="ring", num_gradients=1)
