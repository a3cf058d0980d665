"""Undirected graphs that are drawn once, by networkx (which torch brings along)."""

import dataclasses
import math
from typing import Any

from distopt.config import check_count, check_number
from distopt.errors import ConfigError
from distopt.gossip.graph import Graph
from distopt.gossip.topology import Topology

_TRIES = 100


def _connected(topology: Topology, drawn: Any, num_ranks: int, remedy: str) -> Graph:
    """The first of `drawn(seed)`, `drawn(seed + 1)`, ... that is connected."""
    import networkx

    seed = topology.seed  # type: ignore[attr-defined]
    for attempt in range(_TRIES):
        graph = drawn(networkx, seed * _TRIES + attempt)
        if num_ranks == 1 or networkx.is_connected(graph):
            return Graph.undirected(num_ranks, graph.edges)
    raise ConfigError(
        f"the graph must be connected, got {_TRIES} of {topology.to_dict()!r} with {num_ranks} ranks that are not; "
        f"{remedy}"
    )


def _usual(num_ranks: int) -> float:
    """Twice the probability of an edge above which graphs of so many ranks become connected."""
    return min(1.0, 2.0 * math.log(max(num_ranks, 2)) / num_ranks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomRegular(Topology, name="random-regular"):
    """Every rank has the same number of neighbours, drawn at random.

    With 3 or more it is an expander almost surely (Friedman 2008): its gap does not fall with the number of ranks.
    """

    degree: int = 4  # even, so that any number of ranks will do; more messages, and fewer rounds
    seed: int = 0  # the same on all ranks

    def __post_init__(self) -> None:
        check_count("degree", self.degree, low=2, remedy="use 4; 2 makes a ring")
        check_count("seed", self.seed, low=0, remedy="use 0, the same on every rank")

    def among(self, members: tuple[int, ...]) -> Topology:
        """See `Topology.among`: one neighbour more where an odd number of ranks cannot have an odd number each."""
        more = self.degree * len(members) % 2
        return dataclasses.replace(self, degree=self.degree + 1) if more else self

    def make(self, num_ranks: int, number: int) -> Graph:
        """See `Topology.make`."""
        if self.degree >= num_ranks:
            return Graph.undirected(num_ranks, ((i, j) for i in range(num_ranks) for j in range(i)))
        if num_ranks * self.degree % 2:
            raise ConfigError(
                f"a regular graph must have an even number of ranks or an even degree, got {num_ranks} and "
                f"{self.degree}; use degree={self.degree + 1}"
            )
        return _connected(
            self,
            lambda nx, seed: nx.random_regular_graph(self.degree, num_ranks, seed=seed),
            num_ranks,
            "use degree=3 or more",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ErdosRenyi(Topology, name="erdos-renyi"):
    """Each pair of ranks is joined with the same probability, independently; drawn until the graph is connected.

    Erdos and Renyi 1959; connected almost surely from log(n)/n on.
    """

    probability: float | None = None  # twice log(n)/n, where graphs become connected, if left out
    seed: int = 0  # the same on all ranks

    def __post_init__(self) -> None:
        if self.probability is not None:
            rule, remedy = "a number in (0, 1]", "leave it out for a graph that is just well connected"
            check_number("probability", self.probability, rule=rule, remedy=remedy, low=0.0, high=1.0)
        check_count("seed", self.seed, low=0, remedy="use 0, the same on every rank")

    def among(self, members: tuple[int, ...]) -> Topology:
        """See `Topology.among`: the same probability, or more where fewer ranks would not be connected by it."""
        usual = _usual(len(members))
        few = self.probability is not None and self.probability < usual
        return dataclasses.replace(self, probability=usual) if few else self

    def make(self, num_ranks: int, number: int) -> Graph:
        """See `Topology.make`."""
        usual = _usual(num_ranks)
        probability = usual if self.probability is None else self.probability
        return _connected(
            self,
            lambda nx, seed: nx.gnp_random_graph(num_ranks, probability, seed=seed),
            num_ranks,
            f"use a probability of {usual:.2g}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleFree(Topology, name="scale-free"):
    """A few ranks with many neighbours and many with few (Barabasi and Albert 1999)."""

    attach: int = 2  # neighbours that each new rank chooses; more messages, and fewer rounds
    seed: int = 0  # the same on all ranks

    def __post_init__(self) -> None:
        check_count("attach", self.attach, low=1, remedy="use 2; 1 makes a tree")
        check_count("seed", self.seed, low=0, remedy="use 0, the same on every rank")

    def make(self, num_ranks: int, number: int) -> Graph:
        """See `Topology.make`."""
        if self.attach >= num_ranks:
            return Graph.undirected(num_ranks, ((i, j) for i in range(num_ranks) for j in range(i)))
        return _connected(
            self,
            lambda nx, seed: nx.barabasi_albert_graph(num_ranks, self.attach, seed=seed),
            num_ranks,
            "use attach=2",
        )
