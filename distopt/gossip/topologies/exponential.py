"""Directed graphs of hops by powers of two (Ying et al., "Exponential Graph is Provably Efficient", NeurIPS 2021).

All ranks have equally many senders and receivers, so the plain average keeps the mean on any number of them.
"""

import dataclasses

from distopt.gossip.graph import Graph
from distopt.gossip.topology import Topology


def _hops(num_ranks: int) -> list[int]:
    """1, 2, 4, ... below the number of ranks."""
    return [1 << power for power in range((num_ranks - 1).bit_length())]


@dataclasses.dataclass(frozen=True)
class Exponential(Topology, name="exponential"):
    """Each rank sends to those 1, 2, 4, ... further on: log2(n) messages, and a gap that hardly shrinks with n."""

    def make(self, num_ranks: int, number: int) -> Graph:
        """See `Topology.make`."""
        return Graph.from_senders(
            num_ranks, ((i, (i + h) % num_ranks) for h in _hops(num_ranks) for i in range(num_ranks))
        )


@dataclasses.dataclass(frozen=True)
class OnePeerExponential(Topology, name="one-peer-exponential"):
    """One message a round, to the rank 1, 2, 4, ... further on in turn.

    With 2^k ranks, k rounds make the exact average; with another number they do not, and it is reached in the limit.
    """

    def period(self, num_ranks: int) -> int:
        """See `Topology.period`."""
        return max(1, len(_hops(num_ranks)))

    def make(self, num_ranks: int, number: int) -> Graph:
        """See `Topology.make`."""
        hops = _hops(num_ranks)
        return Graph.from_senders(
            num_ranks, ((i, (i + hops[number]) % num_ranks) for i in range(num_ranks if hops else 0))
        )
