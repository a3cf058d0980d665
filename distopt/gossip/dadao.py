"""DADAO: decentralised, asynchronous, accelerated optimisation of strongly convex functions.

Nabli and Oyallon, "DADAO: Decoupled Accelerated Decentralized Asynchronous Optimization", ICML 2023. Gradients and
messages come at random times of their own, independently, and nobody waits for anybody. Between events each node's six
vectors follow a linear differential equation, which is solved exactly.

Limits: gradients of the whole local function; its smoothness and strong convexity must be known.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from distopt.config import check_count, check_number
from distopt.errors import ConfigError
from distopt.gossip.clocks import PoissonClocks
from distopt.gossip.description import chis
from distopt.gossip.graph import Edge, Graph
from distopt.gossip.topology import Topology, make_topology

_WELL_APART = 1e4  # condition number of the eigenvectors, which rounding errors are multiplied by
_X, _XT, _Y, _YT, _Z, _ZT = range(6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DadaoConstants:
    """What the equations need, from the functions and the graph.

    Attributes:
        smoothness: L, of every node's function.
        strong_convexity: mu, of every node's function.
        chi1: Of the graph at the rates of its edges.
    """

    smoothness: float
    strong_convexity: float
    chi1: float

    def __post_init__(self) -> None:
        rule, remedy = "a positive number", "take the largest and smallest eigenvalue of the Hessians"
        check_number("smoothness", self.smoothness, rule=rule, remedy=remedy, low=0.0, high=1e30)
        check_number(
            "strong_convexity", self.strong_convexity, rule="a positive number of at most the smoothness",
            remedy="add a ridge to functions that have none", low=0.0, high=self.smoothness,
        )  # fmt: skip

    @property
    def nu(self) -> float:
        """Of the splitting, mu/2."""
        return self.strong_convexity / 2

    @property
    def step(self) -> float:
        """sqrt(nu/L)."""
        return math.sqrt(self.nu / self.smoothness)

    def flow(self) -> Tensor:
        """(6, 6) float64, the differential equation of (x, x~, y, y~, z, z~)."""
        s, nu = self.step, self.nu
        alpha, slow, theta = s / 4, s / 8, 1 / (2 * s)
        matrix = torch.zeros((6, 6), dtype=torch.float64)
        for one, other, rate in ((_X, _XT, slow), (_XT, _X, slow), (_Y, _YT, alpha), (_Z, _ZT, alpha), (_ZT, _Z, slow)):
            matrix[one, other], matrix[one, one] = rate, -rate
        matrix[_YT, _XT], matrix[_YT, _Y], matrix[_YT, _Z] = -theta * nu, -theta, -theta
        return matrix


class Flow:
    """exp(t A) of one small matrix for many t, by its eigenvectors where they are well apart.

    Args:
        matrix: A, (k, k) float64.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix
        values, vectors = np.linalg.eig(matrix.numpy())
        self._values, self._vectors = values, vectors
        self._is_apart = bool(np.linalg.cond(vectors) < _WELL_APART)
        self._inverse = np.linalg.inv(vectors) if self._is_apart else vectors

    def __call__(self, time: float) -> Tensor:
        """(k, k) float64."""
        if not self._is_apart:
            slowly: Tensor = torch.linalg.matrix_exp(self._matrix * time)
            return slowly
        return torch.from_numpy(((self._vectors * np.exp(self._values * time)) @ self._inverse).real.copy())


class DadaoNode:
    """One node.

    Args:
        start: (d,) float64, its first x.
        constants: Of the job.

    Attributes:
        vectors: (6, d): x, x~, y, y~, z, z~ at `time`.
        time: Of the last event; the unit is that in which a node computes one gradient on average.
    """

    def __init__(self, start: Tensor, constants: DadaoConstants) -> None:
        self._constants, self._flow = constants, Flow(constants.flow())
        self.vectors = torch.zeros((6, len(start)), dtype=torch.float64)
        self.vectors[_X] = start
        self.time = 0.0

    def advance(self, time: float) -> None:
        """Follows the differential equation until then."""
        self.vectors = self._flow(time - self.time) @ self.vectors
        self.time = time

    def take_gradient(self, gradient: Callable[[Tensor], Tensor]) -> None:
        """A gradient event: of the node's function at its x."""
        c, v = self._constants, self.vectors
        g = gradient(v[_X]) - c.nu * v[_X] - v[_YT]
        v[_X] -= g / (4 * c.smoothness)
        v[_XT] -= g / (4 * math.sqrt(c.smoothness * c.nu))
        v[_YT] += (c.step / 4 + 1) * g

    @property
    def message(self) -> Tensor:
        """(d,), y + z: what it sends when it meets another."""
        return self.vectors[_Y] + self.vectors[_Z]

    def meet(self, own: Tensor, other: Tensor) -> None:
        """A message event.

        Args:
            own: What it has sent.
            other: What the other has sent.
        """
        c = self._constants
        m = own - other
        self.vectors[_Z] -= m / 2
        self.vectors[_ZT] -= 2 * c.chi1 * math.sqrt(c.smoothness / c.nu) * m


def edge_rates(graph: Graph, rates: Mapping[Edge, float] | None = None) -> tuple[dict[Edge, float], float]:
    """How often each edge is used per unit of time, and chi1 at these rates.

    Together `sqrt(2 chi1 chi2)` of the graph whose edges share a rate of 1: as many as the theory asks for.

    Args:
        graph: Undirected.
        rates: Relative ones; all equal if left out.

    Raises:
        ConfigError: The graph is directed, or a rate belongs to no edge.
    """
    if graph.directed:
        raise ConfigError("DADAO needs an undirected graph, got a directed one; use 'ring', say")
    shares = dict.fromkeys(graph.edges, 1.0) if rates is None else dict(rates)
    if set(shares) - set(graph.edges) or not shares or min(shares.values()) <= 0:
        raise ConfigError(
            f"rates must be positive numbers by edge of the graph, got {shares!r:.200}; use {graph.edges[:2]}"
        )
    total = sum(shares.values())
    shares = {edge: share / total for edge, share in shares.items()}
    chi1, chi2 = chis(laplacian(graph.num_ranks, shares))
    if math.isinf(chi1):
        raise ConfigError(
            f"edges with a rate must join all {graph.num_ranks} ranks, got {list(shares)!r:.200}; add edges between "
            "them"
        )
    rate = math.sqrt(2 * chi1 * chi2)
    return {edge: share * rate for edge, share in shares.items()}, chi1 / rate


def prepare(
    topology: Topology | str,
    num_ranks: int,
    smoothness: float,
    strong_convexity: float,
    rates: Mapping[Edge, float] | None,
) -> tuple[dict[Edge, float], DadaoConstants]:
    """The rates of the edges and the constants of a job; see `simulate_dadao` for arguments and errors."""
    made = make_topology(topology)
    check_count("the number of ranks", num_ranks, low=2, remedy="minimise one function by gradient descent")
    if made.period(num_ranks) != 1:
        raise ConfigError(f"DADAO needs the same graph in every round, got {made.name!r}; use 'ring', say")
    per_edge, chi1 = edge_rates(made.graph(num_ranks), rates)
    return per_edge, DadaoConstants(smoothness=smoothness, strong_convexity=strong_convexity, chi1=chi1)


def laplacian(num_ranks: int, rates: Mapping[Edge, float]) -> np.ndarray:
    """(n, n) float64, of a graph with these rates of its edges."""
    found = np.zeros((num_ranks, num_ranks))
    for (i, j), rate in rates.items():
        found[[i, j], [i, j]] += rate
        found[[i, j], [j, i]] -= rate
    return found


@dataclasses.dataclass
class DadaoHistory:
    """What happened.

    Attributes:
        gradients: By all nodes, at each look.
        messages: Edges used so far, at each look.
        errors: Sum over nodes of the squared distance of x to `solution`, or to their mean if that is unknown, at each
            look.
        nodes: (n, d), the last x.
    """

    gradients: list[int] = dataclasses.field(default_factory=list)
    messages: list[int] = dataclasses.field(default_factory=list)
    errors: list[float] = dataclasses.field(default_factory=list)
    nodes: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))


def simulate_dadao(
    gradient: Callable[[int, Tensor], Tensor],
    *,
    start: Tensor,
    smoothness: float,
    strong_convexity: float,
    topology: Topology | str,
    num_gradients: int,
    solution: Tensor | None = None,
    look_every: int = 1000,
    rates: Mapping[Edge, float] | None = None,
    seed: int = 0,
) -> DadaoHistory:
    """Runs DADAO on nodes in this process, with Poisson clocks: a gradient per node and unit of time, and the edges'.

    Args:
        gradient: `gradient(node, x)`, (d,) float64: of the node's own function, any that is smooth and strongly convex;
            with a loss at hand, `torch.func.grad` makes one.
        start: (n, d) float64.
        smoothness: L of every node's function.
        strong_convexity: mu of every node's function.
        topology: Undirected, the same in every round.
        num_gradients: By all nodes together.
        solution: (d,), where the sum of the functions is least, if that is known: for the errors of the history.
        look_every: In gradients.
        rates: Of the edges, relative to each other; see `optimal_edge_rates`.
        seed: Of the clocks.

    Raises:
        ConfigError: A value breaks its rule.
    """
    check_count("num_gradients", num_gradients, low=1, remedy="use 10000")
    check_count("look_every", look_every, low=1, remedy="use 1000")
    per_edge, constants = prepare(topology, len(start), smoothness, strong_convexity, rates)
    nodes = [DadaoNode(row, constants) for row in start.double()]
    clocks = PoissonClocks(len(start), per_edge, seed)
    history, gradients, messages = DadaoHistory(), 0, 0

    def look() -> None:
        history.gradients.append(gradients)
        history.messages.append(messages)
        rows = torch.stack([node.vectors[_X] for node in nodes])
        history.errors.append(float((rows - (rows.mean(0) if solution is None else solution)).square().sum()))

    look()
    while gradients < num_gradients:
        event = clocks.tick()
        if isinstance(event, tuple):
            i, j = event
            for node in (nodes[i], nodes[j]):
                node.advance(clocks.time)
            first, second = nodes[i].message, nodes[j].message
            nodes[i].meet(first, second)
            nodes[j].meet(second, first)
            messages += 1
        else:
            nodes[event].advance(clocks.time)
            nodes[event].take_gradient(partial(gradient, event))
            gradients += 1
            if gradients % look_every == 0:
                look()
    for node in nodes:
        node.advance(clocks.time)
    history.nodes = torch.stack([node.vectors[_X] for node in nodes])
    return history
