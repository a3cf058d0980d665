"""The process groups that an exchange needs, made at the first attach that needs them and kept for the next.

(Kept because torch finds the members of such a group under a name made of their ranks: a second one of the same ranks
would meet the addresses of the first.)
"""

import dataclasses
import weakref
from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist

from distopt.comm.nodes import Nodes
from distopt.comm.serial import SerialWorker

BALANCED, HIERARCHICAL = "balanced", "hierarchical"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Channels:
    """Who talks to whom.

    Attributes:
        world: All ranks; its collectives are started from the hook, in bucket order.
        worker: Runs what has several phases, on the groups below.
        phased: All ranks once more, or None.
        node: The ranks of this node, or None.
        leaders: The first ranks of all nodes; None on other ranks.
    """

    world: dist.ProcessGroup
    worker: SerialWorker
    phased: dist.ProcessGroup | None = None
    node: dist.ProcessGroup | None = None
    leaders: dist.ProcessGroup | None = None

    def close(self) -> None:
        """Ends the worker. The groups stay."""
        self.worker.close()


def open_channels(world: dist.ProcessGroup, nodes: Nodes, routes: Collection[str], device: torch.device) -> Channels:
    """Makes the groups that these routes need. Collective."""
    rank = world.rank()
    phased = node = leaders = None
    if BALANCED in routes:
        phased = _subgroup(world, "phased", range(world.size()))
    if HIERARCHICAL in routes:
        node = _subgroup(world, "node", nodes.members[nodes.node_of(rank)])
        leaders = _subgroup(world, "leaders", nodes.leaders) if rank in nodes.leaders else None
    return Channels(
        world=world,
        worker=SerialWorker(device),
        phased=phased,
        node=node,
        leaders=leaders,
    )


_made: "weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[str, tuple[int, ...]], dist.ProcessGroup]]"
_made = weakref.WeakKeyDictionary()


def _subgroup(world: dist.ProcessGroup, purpose: str, ranks: Sequence[int]) -> dist.ProcessGroup:
    """A group of these ranks of `world`, for one purpose; only they take part in making it."""
    groups = _made.setdefault(world, {})
    key = (purpose, tuple(ranks))
    if key not in groups:
        in_default = [dist.get_global_rank(world, rank) for rank in ranks]
        groups[key] = dist.new_group(in_default, use_local_synchronization=True)
    return groups[key]
