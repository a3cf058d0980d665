"""Which samples a step takes and how they are split into the parts of a code: the same on every rank, without a word.

A batch is a function of the step alone, so a worker that skipped rounds, or was started again, agrees with all others.
"""

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distopt.config import check_count
from distopt.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class DataPart:
    """What a worker computes the loss of: one part of one step's data.

    Attributes:
        step: The step (job) that the part belongs to; counts from 0 over the whole training.
        index: Which part of the step's data.
        count: Into how many parts the data is split.
        samples: (part's samples,) int64 indices into the data set; None if `attach` was given no `batches`.
        model: Which of the models it is for; 0 if there is one.
    """

    step: int
    index: int
    count: int
    samples: Tensor | None = None
    model: int = 0


class Batches:
    """Random batches without replacement: each epoch is a permutation of its own, by the seed; no short last one.

    Args:
        num_samples: Length of the data set.
        batch_size: Samples per step, over all workers; the whole data set by default.
        seed: Of the order.
    """

    def __init__(self, num_samples: int, batch_size: int | None = None, *, seed: int = 0) -> None:
        check_count("num_samples", num_samples, low=1, remedy="give the length of the training set")
        self.num_samples = num_samples
        self.batch_size = num_samples if batch_size is None else batch_size
        check_count("batch_size", self.batch_size, low=1, remedy="give the samples of one step")
        if self.batch_size > num_samples:
            raise ConfigError(
                f"batch_size must be at most the {num_samples} samples that there are, got {batch_size}; leave it out "
                "to take all of them in every step"
            )
        check_count("seed", seed, low=0, remedy="give the same seed on every rank")
        self.seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the data set."""
        return self.num_samples // self.batch_size

    def indices(self, step: int) -> Tensor:
        """The samples of a step, (batch_size,) int64; without a permutation where a batch is all there is."""
        if self.batch_size == self.num_samples:
            return torch.arange(self.num_samples)
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(self.num_samples, generator=generator)
            self._epoch = epoch
        return self._order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def describe(self) -> list[int]:
        """What all ranks must agree on."""
        return [self.num_samples, self.batch_size, self.seed]


def part_of(samples: Tensor, weights: NDArray[np.float64], index: int) -> Tensor:
    """The samples of one part, in proportion to its weight; all parts together are all samples, each once.

    Args:
        samples: (count,) int64.
        weights: (parts,) fractions that sum to 1.
        index: Which part.
    """
    ends = np.rint(np.cumsum(weights) * len(samples)).astype(int)
    ends[-1] = len(samples)
    start = 0 if index == 0 else int(ends[index - 1])
    return samples[start : int(ends[index])]
