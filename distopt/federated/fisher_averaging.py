"""Fisher-weighted averaging: each parameter counts as much as a client's data determine it.

Matena & Raffel, *Merging Models with Fisher-Weighted Averaging*, NeurIPS 2022, in each round:

    theta = sum_k w_k F_k y_k / sum_k w_k F_k     (per coordinate)

F_k is the diagonal of the client's empirical Fisher information at y_k: the mean over its samples of the squared
gradient of each one's loss. The paper's is an expectation over the model's own labels; the empirical one needs any loss
and no classes, and is small where a model fits its data.

Limits: twice FedAvg's bytes up, and a pass over the client's data with a gradient for each sample. A model whose
output for one sample depends on others has none, so BatchNorm counts as in evaluation mode.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distopt.config import check_choice, check_number
from distopt.federated.algorithm import FederatedAlgorithm, LocalRound, Vectors
from distopt.federated.deltas import WEIGHTINGS, mean_weights
from distopt.federated.fisher import fisher_average
from distopt.federated.memory import ServerMemory
from distopt.federated.messages import DELTA, Reply

FISHER = "fisher"


@dataclass(frozen=True, kw_only=True)
class FisherAveraging(FederatedAlgorithm, name="fisher"):
    """See the module.

    Args:
        weighting: w_k, "samples", n_k / sum of n_k, or "uniform".
        floor: F counts as at least this.

    Raises:
        ConfigError: A value breaks its rule.
    """

    weighting: str = "samples"  # "uniform" counts every client the same, whatever its data
    floor: float = 1e-6  # higher: nearer to the plain average

    sends = (FISHER,)
    sends_whole = (FISHER,)

    def __post_init__(self) -> None:
        check_choice("weighting", self.weighting, WEIGHTINGS)
        check_number("floor", self.floor, rule="a number in (0, 1e6]", remedy="use 1e-6", low=0.0, high=1e6)

    def finish(self, local: LocalRound) -> tuple[Vectors, Vectors]:
        """See `FederatedAlgorithm.finish`."""
        return {}, {DELTA: local.moved, FISHER: local.squared_gradients()}

    def weights(self, memory: ServerMemory, replies: Sequence[Reply]) -> list[float]:
        """See `FederatedAlgorithm.weights`."""
        return mean_weights(self.weighting, replies)

    def advance(
        self, memory: ServerMemory, model: Tensor, replies: Sequence[Reply], weights: Sequence[float]
    ) -> Tensor:
        """See `FederatedAlgorithm.advance`; a negative F counts as none."""
        deltas = [reply.delta for reply in replies]
        fishers = [reply.tensors[FISHER].clamp_min(0.0) for reply in replies]
        moved = fisher_average(deltas, fishers, weights, self.floor)  # of deltas: the same, and nothing cancels
        return model if moved is None else torch.add(model, moved)
