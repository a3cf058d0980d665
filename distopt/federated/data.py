"""The clients' data: one set of tensors, and which of its samples each client owns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distopt.errors import ConfigError
from distopt.federated.partition import Partition


@dataclass(frozen=True, eq=False)
class ClientData:
    """Samples as tensors with equal first dimensions, and for each client the indices of its own.

    Args:
        tensors: Inputs, labels, whatever the loss takes; (num_samples, ...).
        parts: One int64 array of indices per client; some may be empty.

    Raises:
        ConfigError: Tensors differ in length, or an index is out of range.
    """

    tensors: tuple[Tensor, ...]
    parts: Sequence[NDArray[np.int64]]

    def __post_init__(self) -> None:
        lengths = [len(tensor) for tensor in self.tensors]
        if not lengths or len(set(lengths)) > 1:
            raise ConfigError(f"tensors must have one first dimension, got lengths {lengths}; one entry per sample")
        for client, part in enumerate(self.parts):
            if len(part) and not 0 <= part.min() <= part.max() < lengths[0]:
                raise ConfigError(
                    f"indices must be in [0, {lengths[0]}), got {part.min()} to {part.max()} of client {client}"
                )

    @classmethod
    def split(
        cls, tensors: tuple[Tensor, ...], partition: Partition, num_clients: int, *, seed: int = 0
    ) -> "ClientData":
        """The samples shared out by their last tensor, the labels."""
        return cls(tensors, partition.split(tensors[-1].cpu().numpy(), num_clients, seed))

    @property
    def num_clients(self) -> int:
        """How many clients there are."""
        return len(self.parts)

    def num_samples(self, client: int) -> int:
        """Of one client."""
        return len(self.parts[client])

    def batch(self, indices: NDArray[Any]) -> tuple[Tensor, ...]:
        """These samples."""
        chosen = torch.from_numpy(indices)
        return tuple(tensor[chosen] for tensor in self.tensors)
