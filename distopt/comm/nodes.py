"""Which ranks share a node: traffic inside a node is cheap, traffic between nodes is what the network carries.

torchrun says so in GROUP_RANK; without it ranks with the same host name share a node. The first rank of each node is
its leader.
"""

import dataclasses
import os
import socket
from collections.abc import Sequence
from typing import Self

import torch
import torch.distributed as dist

from distopt.comm.agreement import gather_json
from distopt.errors import CompatibilityError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank stands.

    Attributes:
        num_ranks: Ranks of the group.
        num_nodes: Nodes that they are on.
        node_size: Ranks on this rank's node.
        leads: Whether this rank is the first of its node.
    """

    num_ranks: int
    num_nodes: int = 1
    node_size: int = 1
    leads: bool = True


@dataclasses.dataclass(frozen=True)
class Nodes:
    """The ranks of a group by node: `members[i]` holds the group ranks of node i, ascending."""

    members: tuple[tuple[int, ...], ...]

    @classmethod
    def from_names(cls, names: Sequence[object]) -> Self:
        """Ranks whose names (in rank order) are equal share a node."""
        found: dict[object, list[int]] = {}
        for rank, name in enumerate(names):
            found.setdefault(name, []).append(rank)
        return cls(tuple(tuple(ranks) for ranks in found.values()))

    @classmethod
    def of_size(cls, num_ranks: int, ranks_per_node: int) -> Self:
        """Consecutive ranks share a node.

        Raises:
            CompatibilityError: They do not fill the nodes.
        """
        if num_ranks % ranks_per_node:
            raise CompatibilityError(
                f"ranks_per_node must divide the number of ranks, {num_ranks}, got {ranks_per_node}; leave it out to "
                "ask torchrun"
            )
        return cls.from_names([rank // ranks_per_node for rank in range(num_ranks)])

    def place_of(self, rank: int) -> Place:
        """Where this rank of the group stands."""
        own = self.members[self.node_of(rank)]
        return Place(
            num_ranks=sum(map(len, self.members)),
            num_nodes=len(self.members),
            node_size=len(own),
            leads=own[0] == rank,
        )

    def node_of(self, rank: int) -> int:
        """The node that this rank of the group is on."""
        return next(i for i, ranks in enumerate(self.members) if rank in ranks)

    @property
    def leaders(self) -> tuple[int, ...]:
        """The first rank of each node."""
        return tuple(ranks[0] for ranks in self.members)

    @property
    def are_shared(self) -> bool:
        """Whether there are several nodes and one of them has several ranks."""
        return 1 < len(self.members) < sum(map(len, self.members))


def find_nodes(group: dist.ProcessGroup, device: torch.device) -> Nodes:
    """The nodes, as the environment tells. Collective."""
    own = (os.environ.get("GROUP_RANK"), socket.gethostname())
    told = gather_json(own, group, device)
    by_launcher = all(launched is not None for launched, _ in told)
    return Nodes.from_names([launched if by_launcher else host for launched, host in told])
