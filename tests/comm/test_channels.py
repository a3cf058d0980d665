"""Groups of ranks for the exchanges: made once, by all or by a subset, and never by waiting for each other for ever."""

import torch
import torch.distributed as dist

from distopt.comm import Nodes, all_to_all, open_channels
from distopt.errors import CompatibilityError

CPU = torch.device("cpu")
ROUTES = ("balanced", "hierarchical")


def opened(members, *, apart):
    """What each rank gets; `apart` first puts some ranks, and not others, into a group of their own."""
    if apart:
        dist.new_group([0])
    world = dist.group.WORLD if members is None else dist.new_group(members)
    if members is not None and dist.get_rank() not in members:
        return None
    nodes = Nodes.of_size(world.size(), 2)
    try:
        channels = open_channels(world, nodes, ROUTES, CPU)
    except CompatibilityError as error:
        return str(error)
    again = open_channels(world, nodes, ROUTES, CPU)
    same = (again.phased, again.node, again.leaders) == (channels.phased, channels.node, channels.leaders)
    messages = torch.arange(world.size()) + 10 * world.rank()
    received = all_to_all(messages.view(-1, 1), channels.phased).view(-1).tolist()
    sizes = [group and group.size() for group in (channels.phased, channels.node, channels.leaders)]
    channels.close()
    return received, sizes, same


def test_all_ranks_although_they_are_in_different_numbers_of_groups(ranks):
    for rank, (received, sizes, same) in enumerate(ranks(4)(opened, None, apart=True)):
        assert received == [rank, 10 + rank, 20 + rank, 30 + rank]
        assert sizes == [4, 2, None if rank % 2 else 2]
        assert same


def test_a_subset_of_the_ranks(ranks):
    with_one_more = ranks(5)
    results = with_one_more(opened, [0, 1, 3, 4], apart=False)
    assert results[2] is None
    assert [result[1][0] for rank, result in enumerate(results) if rank != 2] == [4] * 4
    results = with_one_more(opened, [0, 1, 3, 4], apart=True)
    assert all("must be in equally many groups" in results[rank] for rank in (0, 1, 3, 4))
