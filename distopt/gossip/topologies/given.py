"""Your own graph: an edge list, a networkx graph, or a matrix of weights."""

import dataclasses
from typing import Any, Self

import numpy as np

from distopt.config import check_switch
from distopt.errors import ConfigError
from distopt.gossip.graph import Edge, Graph
from distopt.gossip.topology import Topology


def _check_size(ranks: int, num_ranks: int) -> None:
    if ranks != num_ranks:
        raise ConfigError(
            f"the graph and the job must have equally many ranks, got {ranks} and {num_ranks}; start as many, or give "
            "another graph"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgeList(Topology, name="edges"):
    """An undirected graph by its edges, or a directed one by (sender, receiver)."""

    edges: tuple[Edge, ...]  # pairs of ranks
    directed: bool = False  # whether pairs are (sender, receiver), for push-sum

    def __post_init__(self) -> None:
        check_switch("directed", self.directed)
        try:
            edges = tuple((int(i), int(j)) for i, j in self.edges)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"edges must be pairs of ranks, got {self.edges!r:.200}; use [[0, 1], [1, 2]], say"
            ) from error
        if not edges:
            raise ConfigError(f"edges must be one pair of ranks or more, got {self.edges!r}; use [[0, 1], [1, 2]], say")
        object.__setattr__(self, "edges", edges)

    def make(self, num_ranks: int, number: int) -> Graph:
        """See `Topology.make`."""
        _check_size(1 + max(max(edge) for edge in self.edges), num_ranks)
        made = Graph.from_senders if self.directed else Graph.undirected
        return made(num_ranks, self.edges)

    @classmethod
    def from_networkx(cls, graph: Any) -> Self:
        """Of a networkx graph, or digraph, whose nodes are the ranks 0 to n - 1.

        Raises:
            ConfigError: Its nodes are others, or it has weights, which `Weighted` takes.
        """
        if sorted(graph.nodes) != list(range(len(graph))):
            raise ConfigError(
                f"the nodes must be the ranks 0 to {len(graph) - 1}, got {list(graph.nodes)!r:.200}; use "
                "networkx.convert_node_labels_to_integers"
            )
        return cls(edges=tuple(graph.edges()), directed=bool(graph.is_directed()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighted(Topology, name="weights"):
    """The weights themselves: symmetric, or with columns that add up to 1."""

    weights: tuple[tuple[float, ...], ...]  # row i: the parts that rank i takes of each rank's tensors
    directed: bool = False  # whether they need not be symmetric, for push-sum

    def __post_init__(self) -> None:
        check_switch("directed", self.directed)
        try:
            matrix = np.array([list(row) for row in self.weights], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"weights must be rows of numbers, got {self.weights!r:.200}; use a list of lists"
            ) from error
        Graph(matrix, directed=self.directed)
        object.__setattr__(self, "weights", tuple(tuple(row) for row in matrix.tolist()))

    def make(self, num_ranks: int, number: int) -> Graph:
        """See `Topology.make`."""
        _check_size(len(self.weights), num_ranks)
        return Graph(np.array(self.weights), directed=self.directed)
