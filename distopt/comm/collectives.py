"""The collectives that the hooks use, under one name on every torch that we support.

The first two start and return; the others wait (on CUDA: the current stream waits) and are for exchanges of several
phases. All sizes are fixed: gloo rejects uneven ones.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed all_gather_into_tensor; the old name warns there, the new one does not exist before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather(contribution: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, torch.futures.Future[Any]]:
    """Starts gathering a tensor of equal size from every rank.

    Args:
        contribution: Shape (n,), contiguous, the same n and dtype on every rank.
        group: The ranks.

    Returns:
        Shape (num_ranks, n), rank r's contribution in row r, valid once the future is done.
    """
    gathered = torch.empty((group.size(), contribution.numel()), dtype=contribution.dtype, device=contribution.device)
    work = _all_gather(gathered.view(-1), contribution, group=group, async_op=True)
    return gathered, work.get_future()


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup) -> torch.futures.Future[Any]:
    """Starts summing a tensor over the ranks in place; the sum is bit-identical on all of them."""
    work = dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group, async_op=True)
    assert work is not None
    future: torch.futures.Future[Any] = work.get_future()
    return future


def all_to_all(messages: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sends row j to rank j; row r of the result, of the same shape, came from rank r."""
    received = torch.empty_like(messages)
    dist.all_to_all_single(received.view(-1), messages.view(-1), group=group)
    return received


def reduce_to_first(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """Sums a tensor over the ranks, in place on the group's first rank; the others' contents are lost."""
    dist.reduce(tensor, group_dst=0, op=dist.ReduceOp.SUM, group=group)


def broadcast_from_first(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """Overwrites a tensor with that of the group's first rank."""
    dist.broadcast(tensor, group_src=0, group=group)
