"""The process groups that an exchange needs, made at the first attach that needs them and kept for the next.

Where the exchange is among all ranks, all of them make every group. A subset of the ranks makes its groups alone
(`use_local_synchronization`); torch then finds the members under a name made of their ranks and of how many groups the
process is in, so ranks that are in different numbers of groups would wait for each other for ever. They are told.
"""

import dataclasses
import weakref
from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist

from distopt.comm.agreement import gather_json
from distopt.comm.nodes import Nodes
from distopt.comm.serial import SerialWorker
from distopt.errors import CompatibilityError

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
    phased = node = leaders = None
    if BALANCED in routes:
        phased = _own_group(world, "phased", [tuple(range(world.size()))], device)
    if HIERARCHICAL in routes:
        node = _own_group(world, "node", nodes.members, device)
        leaders = _own_group(world, "leaders", [nodes.leaders], device)
    return Channels(
        world=world,
        worker=SerialWorker(device),
        phased=phased,
        node=node,
        leaders=leaders,
    )


_Key = tuple[str, tuple[tuple[int, ...], ...]]
_made: "weakref.WeakKeyDictionary[dist.ProcessGroup, dict[_Key, dist.ProcessGroup | None]]"
_made = weakref.WeakKeyDictionary()


def _own_group(
    world: dist.ProcessGroup, purpose: str, members: Sequence[tuple[int, ...]], device: torch.device
) -> dist.ProcessGroup | None:
    """Of groups of these ranks of `world`, one for each entry, the one that this rank is in, if any. Collective."""
    groups = _made.setdefault(world, {})
    key = (purpose, tuple(members))
    if key not in groups:
        groups[key] = _make_own_group(world, members, device)
    return groups[key]


def _make_own_group(
    world: dist.ProcessGroup, members: Sequence[tuple[int, ...]], device: torch.device
) -> dist.ProcessGroup | None:
    own: dist.ProcessGroup | None = None
    by_all = world is dist.group.WORLD
    if not by_all:
        _check_names(world, device)
    for ranks in members:
        is_in = world.rank() in ranks
        if by_all or is_in:
            in_default = [dist.get_global_rank(world, rank) for rank in ranks]
            group = dist.new_group(in_default, use_local_synchronization=not by_all)
            own = group if is_in else own
    return own


def _check_names(world: dist.ProcessGroup, device: torch.device) -> None:
    told = gather_json(len(dist.distributed_c10d._world.pg_names), world, device)
    if len(set(told)) > 1:
        raise CompatibilityError(
            f"the ranks of a process_group must be in equally many groups to make further ones, got {told} in rank "
            'order; make all groups on all ranks with torch.distributed.new_group, or use exchange="allgather"'
        )
