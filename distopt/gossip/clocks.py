"""When things happen among nodes that do not wait for each other: Poisson clocks of nodes and of edges."""

from collections.abc import Mapping

import numpy as np

from distopt.gossip.graph import Edge


class PoissonClocks:
    """One clock for each node, which ticks once per unit of time on average, and one for each edge.

    All clocks together are one Poisson process, each of whose ticks is drawn to be that of one of them.

    Args:
        num_nodes: n.
        rates: Of the edges' clocks, per unit of time.
        seed: Of the draws.

    Attributes:
        time: Of the last tick.
    """

    def __init__(self, num_nodes: int, rates: Mapping[Edge, float], seed: int) -> None:
        self._happens: list[int | Edge] = [*range(num_nodes), *rates]
        each = np.concatenate([np.ones(num_nodes), np.array(list(rates.values()), dtype=np.float64)])
        self._total = float(each.sum())
        self._chances = np.cumsum(each) / self._total
        self._random = np.random.default_rng(seed)
        self.time = 0.0

    def tick(self) -> int | Edge:
        """Moves the time to the next tick; whose it is, a node's or an edge's."""
        self.time += self._random.exponential(1 / self._total)
        drawn = int(np.searchsorted(self._chances, self._random.random()))
        return self._happens[min(drawn, len(self._happens) - 1)]
