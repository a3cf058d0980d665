"""One tracked parameter: its name, how densely it is sent, and what is kept for it between steps."""

import dataclasses
import math

import torch
from torch import Tensor

from distopt.ddp.decay import DecayMomentum
from distopt.ddp.memory import Memory
from distopt.ops.checks import is_dense_in_memory

LARGEST_INDEX = 2**31 - 1  # positions travel as int32


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """What a parameter group says of its parameters."""

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether there is neither momentum nor weight decay."""
        return not self.momentum and not self.weight_decay


@dataclasses.dataclass(eq=False, slots=True, kw_only=True)
class TrackedParameter:
    """What an attachment knows of one parameter.

    Attributes:
        name: As in `named_parameters()` of the wrapped module.
        parameter: The parameter itself.
        memory: What this rank keeps of its gradients.
        decay: Momentum of its weight decay; None without decay or where decay is part of the gradient.
        density: Fraction of entries sent after warm-up; None for a parameter that is always sent whole.
        local_decay: Weight decay added to the local gradient before selection; 0 for none.
        late: Whether what is replicated of SGD happens at the optimizer's step (see late.py).
        late_decay: Weight decay added to the averaged gradient there, before momentum; 0 for none.
        hyperparameters: What was taken over for it from the optimizer.
    """

    name: str
    parameter: Tensor
    memory: Memory
    decay: DecayMomentum | None = None
    density: float | None = None
    local_decay: float = 0.0
    late: bool = False
    late_decay: float = 0.0
    hyperparameters: Hyperparameters = Hyperparameters()


def shaped_like(flat: Tensor, parameter: Tensor) -> Tensor:
    """A view of a flat tensor with the parameter's shape, in the memory order that DDP's buckets give its gradient.

    That is the parameter's own order (channels_last included), or row-major if its entries are not dense in memory.
    """
    if is_dense_in_memory(parameter):
        return flat.as_strided(parameter.shape, parameter.stride(), flat.storage_offset())
    return flat.view(parameter.shape)


def flat_like(values: Tensor, parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of a tensor of the parameter's shape as a new flat tensor in that memory order."""
    flat = torch.empty(parameter.numel(), dtype=dtype, device=parameter.device)
    shaped_like(flat, parameter).copy_(values)
    return flat


def num_selected(numel: int, density: float) -> int:
    """k, the number of entries sent of a tensor: `max(1, ceil(numel * density))`, at most numel.

    A product that misses an integer only by rounding counts as that integer: 0.01 of 700 entries are 7, not 8.
    """
    product = numel * density
    nearest = round(product)
    exact = nearest if math.isclose(product, nearest, rel_tol=1e-12) else math.ceil(product)
    return min(numel, max(1, exact))
