"""A topology: for every number of ranks, the graph of each round.

All ranks compute the same graphs by themselves: what is drawn at random comes from a seed and the round.
"""

from abc import abstractmethod
from functools import lru_cache

from distopt.config import Configurable, check_count
from distopt.errors import ConfigError
from distopt.gossip.graph import Graph


class Topology(Configurable, tag="topology"):
    """Base of all topologies; each is a frozen dataclass."""

    def graph(self, num_ranks: int, number: int = 0) -> Graph:
        """Of round `number`, counted from 0.

        Raises:
            ConfigError: There is no such graph of so many ranks.
        """
        check_count("num_ranks", num_ranks, low=1, remedy="count the ranks of the job")
        check_count("number", number, low=0, remedy="count rounds from 0")
        period = self.period(num_ranks)
        return _graph(self, num_ranks, number if period is None else number % period)

    def period(self, num_ranks: int) -> int | None:
        """After how many rounds the graphs begin again; None if they never do."""
        return 1

    def among(self, members: tuple[int, ...]) -> "Topology":
        """For a job of which these ranks are left, or which others have joined: the i-th of them is its rank i.

        Most topologies are made for any number of ranks, and take as many as there are.

        Args:
            members: Numbers of the ranks, ascending; those from 0 on have begun, others came later.
        """
        return self

    @abstractmethod
    def make(self, num_ranks: int, number: int) -> Graph:
        """The graph of a round below the period; `graph` checks the arguments and remembers what was made."""


@lru_cache(maxsize=256)
def _graph(topology: Topology, num_ranks: int, number: int) -> Graph:
    return topology.make(num_ranks, number)


def make_topology(given: "Topology | str") -> Topology:
    """A topology, or the one of this name with its defaults.

    Raises:
        ConfigError: There is none of this name, or it has settings without defaults.
    """
    if isinstance(given, str):
        return Topology.from_dict({"topology": given})
    if not isinstance(given, Topology):
        raise ConfigError(
            f"topology must be a name or a topology, got {given!r:.200}; use 'ring', or distopt.gossip.Ring()"
        )
    return given
