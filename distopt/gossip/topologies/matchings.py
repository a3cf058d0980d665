"""Random pairs, drawn anew in every round."""

import dataclasses

import numpy as np

from distopt.config import check_count
from distopt.errors import ConfigError
from distopt.gossip.graph import Graph
from distopt.gossip.topology import Topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomMatchings(Topology, name="random-matchings"):
    """Each rank averages with one other; who finds nobody stays alone for a round.

    Boyd, Ghosh, Prabhakar and Shah, "Randomized Gossip Algorithms", IEEE Transactions on Information Theory 2006, with
    as many pairs at once as find each other.
    """

    of: Topology | None = dataclasses.field(
        default=None, metadata={"configurable": Topology}
    )  # only its neighbours meet
    seed: int = 0  # the same on all ranks

    def __post_init__(self) -> None:
        check_count("seed", self.seed, low=0, remedy="use 0, the same on every rank")
        if self.of is not None and not isinstance(self.of, Topology):
            raise ConfigError(f"of must be a topology or None, got {self.of!r:.200}; use distopt.gossip.Ring(), say")

    def among(self, members: tuple[int, ...]) -> Topology:
        """See `Topology.among`."""
        return self if self.of is None else dataclasses.replace(self, of=self.of.among(members))

    def period(self, num_ranks: int) -> int | None:
        """See `Topology.period`: never, but where there is only one pair."""
        return 1 if num_ranks <= 2 else None

    def make(self, num_ranks: int, number: int) -> Graph:
        """See `Topology.make`."""
        random = np.random.default_rng((self.seed, num_ranks, number))
        if self.of is None:
            order = random.permutation(num_ranks).tolist()
            return Graph.undirected(num_ranks, zip(order[::2], order[1::2], strict=False))
        graph = self.of.graph(num_ranks, number)
        if graph.directed:
            raise ConfigError(
                f"ranks that meet must be neighbours of an undirected graph, got {self.of.name!r}; use 'ring', say"
            )
        pairs, free = [], set(range(num_ranks))
        for i, j in random.permutation(graph.edges).tolist() if graph.edges else []:
            if i in free and j in free:
                pairs.append((i, j))
                free -= {i, j}
        return Graph.undirected(num_ranks, pairs)
