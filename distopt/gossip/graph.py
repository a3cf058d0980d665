"""One round's graph: who sends to whom, and the weights of the average, `x_i <- sum_j W_ij x_j`.

An undirected graph has symmetric Metropolis weights, `W_ij = 1 / (1 + max(d_i, d_j))`, so that the plain average keeps
the mean. In a directed graph each sender splits what it has evenly among its receivers and itself,
`W_ji = 1 / (1 + outdegree_i)`: the columns add up to 1, which is what push-sum needs, and where all degrees are equal
the rows do as well.
"""

from collections.abc import Iterable
from functools import cached_property

import numpy as np

from distopt.errors import ConfigError

TOLERANCE = 1e-12

Edge = tuple[int, int]


class Graph:
    """Weights of one round.

    Args:
        weights: (n, n) float64; `weights[i, j]` is the part that rank i takes of rank j's tensors. Not negative; rank
            j sends to rank i where it is not zero.
        directed: Whether the columns alone must add up to 1; if not, the weights must be symmetric.

    Raises:
        ConfigError: The weights break that promise.
    """

    def __init__(self, weights: np.ndarray, *, directed: bool = False) -> None:
        weights = np.array(weights, dtype=np.float64)
        if weights.ndim != 2 or weights.shape[0] != weights.shape[1] or not weights.size:
            raise ConfigError(f"weights must be a square matrix, got shape {weights.shape}; use a row a rank")
        if (wrong := ~(np.isfinite(weights) & (weights >= 0))).any():
            raise ConfigError(
                f"weights must be finite and not negative, got {_first(weights, wrong)}; a part of a tensor cannot be "
                "less than nothing"
            )
        if not directed and (wrong := np.abs(weights - weights.T) > TOLERANCE).any():
            raise ConfigError(
                f"weights of an undirected graph must be symmetric, got {_first(weights, wrong)} against "
                f"{_first(weights.T, wrong)} the other way; use a directed graph, with push-sum"
            )
        if not np.allclose(sums := weights.sum(0), 1.0, rtol=0, atol=TOLERANCE * len(weights)):
            column = int(np.abs(sums - 1.0).argmax())
            raise ConfigError(
                f"what a rank gives away must add up to 1, got {sums[column]:.6g} for rank {column}; divide each "
                "column by its sum"
            )
        weights.setflags(write=False)
        self.weights, self.directed = weights, directed

    @classmethod
    def undirected(cls, num_ranks: int, edges: Iterable[Edge]) -> "Graph":
        """With Metropolis weights (Xiao, Boyd and Lall 2006); an edge given twice, or from a rank to itself, is one."""
        adjacent = _adjacency(num_ranks, edges)
        adjacent |= adjacent.T
        degrees = adjacent.sum(0)
        weights = adjacent / (1.0 + np.maximum(degrees[:, None], degrees[None, :]))
        np.fill_diagonal(weights, 1.0 - weights.sum(1))
        return cls(weights)

    @classmethod
    def from_senders(cls, num_ranks: int, edges: Iterable[Edge]) -> "Graph":
        """A directed graph of (sender, receiver); each sender gives everybody the same part, itself included."""
        sends = _adjacency(num_ranks, edges)
        np.fill_diagonal(sends, True)
        return cls((sends / sends.sum(1, keepdims=True)).T, directed=True)

    @property
    def num_ranks(self) -> int:
        """Of the job."""
        return len(self.weights)

    @cached_property
    def keeps_mean(self) -> bool:
        """Whether the plain average keeps the mean of all ranks and of equal ones makes the same: doubly stochastic."""
        return bool(np.allclose(self.weights.sum(1), 1.0, rtol=0, atol=TOLERANCE * self.num_ranks))

    @cached_property
    def _sends(self) -> np.ndarray:
        sends = self.weights.T > 0
        np.fill_diagonal(sends, False)
        return sends

    def receivers(self, rank: int) -> tuple[int, ...]:
        """To whom this rank sends, ascending, without itself."""
        return tuple(np.flatnonzero(self._sends[rank]).tolist())

    def senders(self, rank: int) -> tuple[int, ...]:
        """Who sends to this rank, ascending, without itself."""
        return tuple(np.flatnonzero(self._sends[:, rank]).tolist())

    @property
    def edges(self) -> list[Edge]:
        """(sender, receiver) of all; in an undirected graph each pair once, the lower rank first."""
        sends = self._sends if self.directed else np.triu(self._sends)
        return [(int(i), int(j)) for i, j in zip(*np.nonzero(sends), strict=True)]


def _adjacency(num_ranks: int, edges: Iterable[Edge]) -> np.ndarray:
    adjacent = np.zeros((num_ranks, num_ranks), dtype=bool)
    for first, second in edges:
        if not (0 <= first < num_ranks and 0 <= second < num_ranks):
            raise ConfigError(
                f"an edge must be between ranks 0 to {num_ranks - 1}, got {(first, second)}; start more ranks, or "
                "number the nodes anew"
            )
        adjacent[first, second] = True
    np.fill_diagonal(adjacent, False)
    return adjacent


def _first(weights: np.ndarray, where: np.ndarray) -> str:
    i, j = np.argwhere(where)[0].tolist()
    return f"{weights[i, j]:.6g} at ({i}, {j})"
