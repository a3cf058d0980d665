"""Buffers on the CPU for what is sent and what arrives."""

from typing import Any

import torch
from torch import Tensor


class Staging:
    """Buffers that are kept from round to round: new memory costs more than what it carries."""

    def __init__(self) -> None:
        self._kept: dict[Any, Tensor] = {}

    def like(self, name: Any, row: Tensor) -> Tensor:
        """A contiguous CPU tensor of this shape and dtype, pinned where that speeds copies up."""
        buffer = self._kept.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (row.shape, row.dtype):
            buffer = torch.empty(row.shape, dtype=row.dtype, pin_memory=row.is_cuda)
            self._kept[name] = buffer
        return buffer
