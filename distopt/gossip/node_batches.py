"""Which samples each node trains on, step by step."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distopt.config import check_count
from distopt.errors import ConfigError


class NodeBatches:
    """Batches of every node's own samples, each epoch in a new order of its own.

    The same on a real rank, which takes `of(rank, step)`, and in a simulation. The rest of an epoch that does not fill
    a batch is left out.

    Args:
        tensors: Inputs, labels and the like, with samples along the first axis.
        parts: For each node, the indices of its samples.
        batch_size: Samples in a batch of one node.
        seed: Of the orders.

    Raises:
        ConfigError: A node has too few samples, or an index is out of range.
    """

    def __init__(self, tensors: Sequence[Tensor], parts: Sequence[np.ndarray], batch_size: int, seed: int = 0) -> None:
        check_count("batch_size", batch_size, low=1, remedy="use 32")
        samples = len(tensors[0]) if tensors else 0
        if not tensors or any(len(tensor) != samples for tensor in tensors):
            raise ConfigError(
                f"tensors must be one or more of equally many samples, got {[len(tensor) for tensor in tensors]}; give "
                "inputs and labels of the same samples"
            )
        self._parts = [np.asarray(part, dtype=np.int64) for part in parts]
        for node, part in enumerate(self._parts):
            if len(part) < batch_size or part.min() < 0 or part.max() >= samples:
                raise ConfigError(
                    f"the part of a node must be at least {batch_size} indices from 0 to {samples - 1}, got "
                    f"{len(part)} for node {node}; use a smaller batch_size, or other parts"
                )
        self._tensors, self._batch_size, self._seed = tuple(tensors), batch_size, seed
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    @property
    def num_nodes(self) -> int:
        """How many nodes there are."""
        return len(self._parts)

    def of(self, node: int, step: int) -> tuple[Tensor, ...]:
        """The batch of one node in a step, counted from 0: each (batch_size, ...)."""
        taken = torch.from_numpy(self._indices(node, step))
        return tuple(tensor[taken] for tensor in self._tensors)

    def __call__(self, step: int) -> tuple[Tensor, ...]:
        """The batches of all nodes in a step: each (nodes, batch_size, ...)."""
        taken = torch.from_numpy(np.stack([self._indices(node, step) for node in range(self.num_nodes)]))
        return tuple(tensor[taken] for tensor in self._tensors)

    def _indices(self, node: int, step: int) -> np.ndarray:
        part = self._parts[node]
        epoch, number = divmod(step, len(part) // self._batch_size)
        kept = self._orders.get(node)
        if kept is None or kept[0] != epoch:
            kept = epoch, part[np.random.default_rng((self._seed, node, epoch)).permutation(len(part))]
            self._orders[node] = kept
        return kept[1][number * self._batch_size : (number + 1) * self._batch_size]
