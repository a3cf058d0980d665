"""Uneven inputs: keeping replicated state in step under `DDP.join()`.

A rank that has run out of data goes on calling the hook with zero gradients, but its parameters stand still until DDP
sends it the final model. Weight decay follows the parameters, so its momentum drifts apart on such ranks.

Hack: DDP has no hook for "the final model was sent", so its `_sync_final_model` is wrapped on this one object. Should a
torch release drop that method, decay momentum on joined ranks stays as it was when they joined; attach refuses then.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from distopt.ddp.parameters import TrackedParameter
from distopt.errors import CompatibilityError


def keep_decay_in_step(
    ddp: DistributedDataParallel, group: dist.ProcessGroup, tracked: Sequence[TrackedParameter]
) -> Callable[[], None]:
    """Sends decay momentum along whenever DDP sends the final model; returns what undoes this.

    Raises:
        CompatibilityError: This torch has no such place.
    """
    buffers = [entry.decay.buffer for entry in tracked if entry.decay is not None]
    if not buffers:
        return lambda: None
    original: Any = getattr(ddp, "_sync_final_model", None)
    if original is None:
        raise CompatibilityError(
            'weight_decay="momentum" needs a DistributedDataParallel with _sync_final_model, which this torch has not; '
            'use weight_decay="local"'
        )

    def sync_with_decay(is_last_joiner: bool) -> None:
        original(is_last_joiner)
        for buffer in buffers:
            dist.broadcast(buffer, group=group, group_src=ddp._authoritative_rank)

    ddp._sync_final_model = sync_with_decay  # type: ignore[method-assign]

    def undo() -> None:
        del ddp._sync_final_model

    return undo
