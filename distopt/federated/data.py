"""The clients' data: one set of tensors, and which of its samples each client owns."""

import hashlib
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
        parts: One int64 array of indices per client; some may be empty, and clients may have samples in common.

    Raises:
        ConfigError: These are no tensors, they differ in length, or an index is out of range.
    """

    tensors: tuple[Tensor, ...]
    parts: Sequence[NDArray[np.int64]]

    def __post_init__(self) -> None:
        _check_tensors(self.tensors)
        lengths = [len(tensor) for tensor in self.tensors]
        if len(set(lengths)) > 1:
            raise ConfigError(f"tensors must have one first dimension, got lengths {lengths}; one entry per sample")
        if not len(self.parts):
            raise ConfigError("parts must have one entry per client, got none; there must be clients")
        for client, part in enumerate(self.parts):
            if not isinstance(part, np.ndarray) or part.dtype.kind not in "iu" or part.ndim != 1:
                got = f"{part.dtype} of shape {part.shape}" if isinstance(part, np.ndarray) else repr(part)[:80]
                raise ConfigError(f"parts must be flat numpy arrays of integers, got {got} of client {client}")
            if len(part) and not 0 <= part.min() <= part.max() < lengths[0]:
                raise ConfigError(
                    f"indices must be in [0, {lengths[0]}), got {part.min()} to {part.max()} of client {client}"
                )

    @classmethod
    def split(
        cls, tensors: tuple[Tensor, ...], partition: Partition, num_clients: int, *, seed: int = 0
    ) -> "ClientData":
        """The samples shared out by their last tensor, the labels.

        Where ids or a table say who owns a sample, use `ClientData(tensors, NaturalPartition().split(ids))`.
        """
        _check_tensors(tensors)
        return cls(tensors, partition.split(tensors[-1].cpu().numpy(), num_clients, seed))

    @property
    def num_clients(self) -> int:
        """How many clients there are."""
        return len(self.parts)

    @property
    def fingerprint(self) -> str:
        """Of which sample is whose, and of the tensors' forms: equal data have equal ones."""
        form = [(str(tensor.dtype), tuple(tensor.shape)) for tensor in self.tensors]
        digest = hashlib.blake2b(repr(form).encode(), digest_size=16)
        digest.update(np.array([len(part) for part in self.parts], dtype=np.int64).data)
        digest.update(np.concatenate([*self.parts, np.empty(0, dtype=np.int64)]).astype(np.int64).data)
        return digest.hexdigest()

    def num_samples(self, client: int) -> int:
        """Of one client."""
        return len(self.parts[client])

    def batch(self, indices: NDArray[Any]) -> tuple[Tensor, ...]:
        """These samples."""
        chosen = torch.from_numpy(indices)
        return tuple(tensor[chosen] for tensor in self.tensors)


def _check_tensors(tensors: object) -> None:
    if isinstance(tensors, tuple | list) and tensors and all(isinstance(each, Tensor) for each in tensors):
        return
    got = [type(each).__name__ for each in tensors] if isinstance(tensors, tuple | list) else type(tensors).__name__
    raise ConfigError(
        f"tensors must be a tuple of torch tensors, got {got}; use torch.from_numpy for arrays, and "
        "torch.utils.data.default_collate(list(dataset)) for a Dataset"
    )
