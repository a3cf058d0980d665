"""Which ways there are between the ranks: asked for, or all that make sense here with a model to choose by."""

import dataclasses

import torch
import torch.distributed as dist

from distopt.comm import Channels, Link, Nodes, find_nodes, gather_json, measure_link, open_channels
from distopt.ddp.policy import Routing, WirePolicy
from distopt.ddp.prediction import Predictor, measure_speed
from distopt.errors import CompatibilityError

_FEWEST_OWNERS = 3  # with two ranks the balanced exchange only adds a phase


def open_routes(policy: WirePolicy, group: dist.ProcessGroup, device: torch.device) -> tuple[Routing, Channels]:
    """Finds the nodes, makes the process groups, and measures what "auto" needs. Collective.

    Args:
        policy: What was asked for.
        group: The ranks.
        device: Where the gradients live.

    Raises:
        CompatibilityError: The ranks do not form nodes as the policy says, or as a hierarchical exchange needs.
    """
    routes = _candidates(policy, group.size())
    nodes = Nodes.from_names(range(group.size()))
    if "hierarchical" in routes:
        nodes = _nodes(policy, group, device)
        if not nodes.are_shared:
            if policy.exchange == "hierarchical":
                raise CompatibilityError(
                    'exchange="hierarchical" needs several nodes and several ranks on one of them, got '
                    f"{group.size()} ranks on {len(nodes.members)} nodes; set ranks_per_node, or use "
                    'exchange="allgather"'
                )
            routes = tuple(route for route in routes if route != "hierarchical")
    channels = open_channels(group, nodes, routes, device)
    predict = None
    if len(routes) > 1:
        predict = Predictor(
            link=policy.link or measure_link(group, device),
            speed=measure_speed(group, device),
            node_link=_link_inside(channels, group, device),
            leader_link=_link_between(channels, group, device, policy.link),
        )
    return Routing(place=nodes.place_of(group.rank()), routes=routes, predict=predict), channels


def _candidates(policy: WirePolicy, num_ranks: int) -> tuple[str, ...]:
    if policy.exchange != "auto":
        return (policy.exchange,)
    if num_ranks == 1:
        return ("allgather",)
    return ("allgather", "whole", *(("balanced", "hierarchical") if num_ranks >= _FEWEST_OWNERS else ()))


def _nodes(policy: WirePolicy, group: dist.ProcessGroup, device: torch.device) -> Nodes:
    if policy.ranks_per_node is not None:
        return Nodes.of_size(group.size(), policy.ranks_per_node)
    return find_nodes(group, device)


def _link_inside(channels: Channels, group: dist.ProcessGroup, device: torch.device) -> Link | None:
    """The slowest node's link, agreed by all."""
    if channels.node is None:
        return None
    own = measure_link(channels.node, device) if channels.node.size() > 1 else None
    return _slowest(own, group, device)


def _link_between(
    channels: Channels, group: dist.ProcessGroup, device: torch.device, given: Link | None
) -> Link | None:
    if channels.node is None:
        return None
    if given is not None:
        return given
    return _slowest(measure_link(channels.leaders, device) if channels.leaders else None, group, device)


def _slowest(own: Link | None, group: dist.ProcessGroup, device: torch.device) -> Link:
    told = [Link(**fact) for fact in gather_json(dataclasses.asdict(own) if own else None, group, device) if fact]
    reductions = [link.reduction for link in told if link.reduction is not None]
    return Link(
        latency_s=max(link.latency_s for link in told),
        bandwidth=min(link.bandwidth for link in told),
        reduction=min(reductions, default=None),
    )
