"""DDP's one hook slot. It can be filled once per DDP object and never emptied, so we fill it with a slot of our own.

While nothing is attached the slot averages densely, which is what DDP does without a hook.
"""

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from distopt.comm import all_reduce_sum
from distopt.ddp.hook import CommHook
from distopt.errors import CompatibilityError


class HookSlot:
    """What DDP calls for every bucket.

    Attributes:
        hook: The hook of the current attachment, or None.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.hook: CommHook | None = None
        self._group = group

    def __call__(self, bucket: Any) -> Future[Tensor]:
        """Hands the bucket to the attached hook, or averages it."""
        if self.hook is not None:
            return self.hook(bucket)
        buffer = bucket.buffer().mul_(1.0 / self._group.size())
        return all_reduce_sum(buffer, self._group).then(lambda done: (done.value(), buffer)[1])


_slots: "weakref.WeakKeyDictionary[DistributedDataParallel, HookSlot]" = weakref.WeakKeyDictionary()


# DDP looks at the parameter's name and at these annotations, and needs a function with a __qualname__.
def distopt_hook(state: HookSlot, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """The function that is registered with DDP."""
    return state(bucket)


def claim_slot(model: DistributedDataParallel) -> HookSlot:
    """The slot in this DDP object, empty: that of an earlier attach, or a new one.

    Raises:
        CompatibilityError: An attachment is still in it, or the DDP object has somebody else's hook.
    """
    slot = _slots.get(model)
    if slot is None and getattr(model, "_comm_hooks", None):
        raise _foreign_hook(model._comm_hooks[0][0].__qualname__)
    if slot is not None and slot.hook is not None:
        raise CompatibilityError(
            "a DDP model can have one attachment at a time, got a second attach; call detach() on the first"
        )
    if slot is None:
        slot = HookSlot(model.process_group)
        try:
            model.register_comm_hook(slot, distopt_hook)
        except RuntimeError as error:  # DDP's built-in hooks leave no trace beforehand
            raise _foreign_hook("a built-in one") from error
        _slots[model] = slot
    return slot


def _foreign_hook(name: str) -> CompatibilityError:
    return CompatibilityError(
        f"DDP takes one communication hook, and {name} is registered already; leave that registration out, or wrap the "
        "model in DDP anew"
    )
