"""All ranks' states of an attachment as one, for hosts whose checkpoint is one file that rank 0 writes.

It lies inside the host's own file: it is moved, rotated and deleted with it. In return rank 0 holds the memories of all
ranks in CPU memory while it saves, two copies of the gradient per rank with momentum correction and one without. Where
a host's checkpoint is a folder, `distopt.checkpoint` puts one file per rank into it instead.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.checkpoint import dealt_out
from distopt.ddp import Attachment
from distopt.ddp.state import PER_RANK
from distopt.errors import StateMismatchError


def gather_state(attachment: Attachment) -> dict[str, Any]:
    """What `attachment.state_dict()` says on every rank, on rank 0; on the others only their own. Collective.

    Tensors are copies on the CPU in the shape and dtype of the rank's own.
    """
    group = attachment.process_group
    state = attachment.state_dict()
    own = state[PER_RANK][str(group.rank())]
    ranks: dict[str, dict[str, dict[str, Tensor]]] = {
        str(rank): {name: {} for name in own} for rank in range(group.size() if group.rank() == 0 else 0)
    }
    for name, memories in own.items():  # the same names in the same order on every rank
        for key, tensor in memories.items():
            for rank, copy in enumerate(_gather(tensor, group)):
                ranks[str(rank)][name][key] = copy
    return {**state, PER_RANK: ranks or state[PER_RANK]}


def load_gathered(attachment: Attachment, state: Mapping[str, Any]) -> None:
    """Takes back what `gather_state` returned on rank 0, on any number of ranks. Collective if that has changed.

    Raises:
        StateMismatchError: The state is of another model, algorithm or momentum, or was not gathered.
        CompatibilityError: Another rank cannot load; quotes why.
    """
    group = attachment.process_group
    saved = int(state["world_size"])
    missing = [rank for rank in range(saved) if str(rank) not in state[PER_RANK]]
    if missing:
        raise StateMismatchError(
            f"the state must hold all {saved} ranks, got none of rank {', '.join(map(str, missing))}; save it with the "
            "object that this integration's attach returned"
        )
    mine = {str(rank): state[PER_RANK][str(rank)] for rank in dealt_out(saved, group.rank(), group.size())}
    attachment.load_state_dict({**state, PER_RANK: mine})


def _gather(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """The ranks' tensors on the CPU of rank 0; nothing on the others. As bytes: not every backend knows every dtype."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    received = [torch.empty_like(flat) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(flat, received, group=group, group_dst=0)
    return [one.cpu().view(tensor.dtype).reshape(tensor.shape) for one in received or []]
