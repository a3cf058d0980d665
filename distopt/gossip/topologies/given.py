"""Your own graph: an edge list, a networkx graph, or a matrix of weights."""

import dataclasses
import itertools
from collections.abc import Iterable
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


def induced(edges: Iterable[Edge], members: tuple[int, ...], *, directed: bool) -> Topology:
    """What is left of a graph among these ranks, and what must be added to it: Metropolis weights, or even parts.

    The edges between two of them stay. Where these leave the ranks in several parts, and for ranks that no edge names
    because they have come later, the lowest ranks of the parts are joined in a chain, each with the next; in a directed
    graph, whose parts are strongly connected ones, in a ring. So nobody who is left is cut off because of who is gone.
    """
    import networkx

    place = {number: index for index, number in enumerate(members)}
    graph = networkx.DiGraph() if directed else networkx.Graph()
    graph.add_nodes_from(range(len(members)))
    graph.add_edges_from((place[i], place[j]) for i, j in edges if i in place and j in place)
    find = networkx.strongly_connected_components if directed else networkx.connected_components
    lowest = sorted(min(part) for part in find(graph))
    graph.add_edges_from(itertools.pairwise(lowest))
    if directed and len(lowest) > 1:
        graph.add_edge(lowest[-1], lowest[0])
    return EdgeList(edges=tuple(graph.edges()) or ((0, 0),), directed=directed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgeList(Topology, name="edges"):
    """An undirected graph by its edges, or a directed one by (sender, receiver).

    Raises:
        ConfigError: The edges are no pairs of numbers, or there are none.
    """

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

    def among(self, members: tuple[int, ...]) -> Topology:
        """See `Topology.among`, and `induced`."""
        size = 1 + max(max(edge) for edge in self.edges)
        return self if members == tuple(range(size)) else induced(self.edges, members, directed=self.directed)

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
        if any("weight" in found for *_, found in graph.edges(data=True)):
            raise ConfigError(
                "edges must have no weights of their own, got a graph with some; use distopt.gossip.Weighted, or "
                "networkx.Graph(graph.edges), which has none"
            )
        return cls(edges=tuple(graph.edges()), directed=bool(graph.is_directed()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighted(Topology, name="weights"):
    """The weights themselves: symmetric, or with columns that add up to 1.

    Raises:
        ConfigError: They are no square matrix, negative, not symmetric, or a column does not add up to 1.
    """

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

    def among(self, members: tuple[int, ...]) -> Topology:
        """See `Topology.among`, and `induced`: the weights are given for these ranks and no others."""
        if members == tuple(range(len(self.weights))):
            return self
        edges = Graph(np.array(self.weights), directed=self.directed).edges
        return induced(edges, members, directed=self.directed)

    def make(self, num_ranks: int, number: int) -> Graph:
        """See `Topology.make`."""
        _check_size(len(self.weights), num_ranks)
        return Graph(np.array(self.weights), directed=self.directed)
