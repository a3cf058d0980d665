"""Undirected graphs that are the same in every round."""

import dataclasses
import math

from distopt.config import check_count
from distopt.errors import ConfigError
from distopt.gossip.graph import Graph
from distopt.gossip.topology import Topology


@dataclasses.dataclass(frozen=True)
class Ring(Topology, name="ring"):
    """Each rank with the next and the one before: two neighbours, and a gap that falls with the square of n."""

    def make(self, num_ranks: int, number: int) -> Graph:
        """See `Topology.make`."""
        return Graph.undirected(num_ranks, ((i, (i + 1) % num_ranks) for i in range(num_ranks)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Torus(Topology, name="torus"):
    """A grid whose rows and columns are rings: four neighbours. A prime number of ranks makes it a ring."""

    rows: int | None = None  # the largest divisor up to the root of the ranks if left out

    def __post_init__(self) -> None:
        if self.rows is not None:
            check_count("rows", self.rows, low=1, remedy="leave it out for a grid that is as square as possible")

    def among(self, members: tuple[int, ...]) -> Topology:
        """See `Topology.among`: a grid that is as square as possible where the rows no longer divide the ranks."""
        return self if self.rows is None or len(members) % self.rows == 0 else Torus()

    def shape(self, num_ranks: int) -> tuple[int, int]:
        """Rows and columns; rank i is in row `i // columns`.

        Raises:
            ConfigError: The rows do not divide the number of ranks.
        """
        rows = self.rows or max(r for r in range(1, math.isqrt(num_ranks) + 1) if num_ranks % r == 0)
        if num_ranks % rows:
            raise ConfigError(
                f"rows must divide the number of ranks, got {rows} for {num_ranks}; leave it out for a grid that is as "
                "square as possible"
            )
        return rows, num_ranks // rows

    def make(self, num_ranks: int, number: int) -> Graph:
        """See `Topology.make`."""
        _, columns = self.shape(num_ranks)
        across = ((i, i - i % columns + (i + 1) % columns) for i in range(num_ranks))
        down = ((i, (i + columns) % num_ranks) for i in range(num_ranks))
        return Graph.undirected(num_ranks, (*across, *down))


@dataclasses.dataclass(frozen=True)
class Star(Topology, name="star"):
    """Rank 0 with everybody, and nobody else: its link carries everything, and all weights are 1/n."""

    def make(self, num_ranks: int, number: int) -> Graph:
        """See `Topology.make`."""
        return Graph.undirected(num_ranks, ((0, i) for i in range(1, num_ranks)))


@dataclasses.dataclass(frozen=True)
class Complete(Topology, name="complete"):
    """Everybody with everybody: the exact average in every round, at the price of n - 1 messages per rank."""

    def make(self, num_ranks: int, number: int) -> Graph:
        """See `Topology.make`."""
        return Graph.undirected(num_ranks, ((i, j) for i in range(num_ranks) for j in range(i)))
