"""What a communication hook is fed: DDP's `GradBucket`, or anything with the same six methods.

`GradBucket` has no Python constructor, so the hook is written against this protocol; `FlatBucket` is the plain form of
it for hosts other than DDP.
"""

from typing import Protocol

import torch
from torch import Tensor

from distopt.ddp.parameters import flat_like, shaped_like


class Bucket(Protocol):
    """Consecutive gradients in one flat buffer. Parameter i occupies the numel(i) entries behind those before it."""

    def index(self) -> int:
        """Position of this bucket among the step's buckets."""

    def buffer(self) -> Tensor:
        """The flat gradients, shape (numel,), not divided by the number of ranks."""

    def gradients(self) -> list[Tensor]:
        """One view into the buffer per parameter, with the parameter's shape.

        DDP's are row-major even where the buffer holds another order: use `shaped_like` where positions matter.
        """

    def parameters(self) -> list[Tensor]:
        """The parameters, in the buffer's order."""

    def is_last(self) -> bool:
        """Whether this is the last bucket of the step."""

    def set_buffer(self, tensor: Tensor) -> None:
        """Replaces the buffer."""


class FlatBucket:
    """A `Bucket` over parameters whose gradients are copied into a new buffer, in the order given.

    Within it each gradient lies as in DDP's buckets: in its parameter's memory order (see `shaped_like`).
    """

    def __init__(self, parameters: list[Tensor], gradients: list[Tensor], *, index: int = 0, last: bool = True) -> None:
        self._parameters = parameters
        self._buffer = torch.cat([flat_like(g, p, g.dtype) for g, p in zip(gradients, parameters, strict=True)])
        self._index = index
        self._last = last

    def index(self) -> int:
        """See `Bucket.index`."""
        return self._index

    def buffer(self) -> Tensor:
        """See `Bucket.buffer`."""
        return self._buffer

    def gradients(self) -> list[Tensor]:
        """See `Bucket.gradients`."""
        parts = self._buffer.split([parameter.numel() for parameter in self._parameters])
        return [shaped_like(part, parameter) for part, parameter in zip(parts, self._parameters, strict=True)]

    def parameters(self) -> list[Tensor]:
        """See `Bucket.parameters`."""
        return self._parameters

    def is_last(self) -> bool:
        """See `Bucket.is_last`."""
        return self._last

    def set_buffer(self, tensor: Tensor) -> None:
        """See `Bucket.set_buffer`."""
        self._buffer = tensor
