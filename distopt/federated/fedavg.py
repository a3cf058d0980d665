"""FedAvg: the mean of the clients' models, as a step of a server optimizer along the mean of their deltas.

McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data*, AISTATS 2017; the server's
optimizers are those of Reddi et al., *Adaptive Federated Optimization*, ICLR 2021, without bias correction.

Limits: where some clients take part more often than others the mean leans towards them; see FedAU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distopt.config import check_choice, check_number
from distopt.federated.algorithm import FederatedAlgorithm, stacked, step_from
from distopt.federated.averaging import sample_weights, uniform_weights
from distopt.federated.memory import ServerMemory
from distopt.federated.messages import DELTA, Reply
from distopt.ops import weighted_sum_

WEIGHTINGS = ("samples", "uniform")


def mean_weights(weighting: str, replies: Sequence[Reply]) -> list[float]:
    """n_k / sum of n_k, or the same for all; they sum to 1."""
    uniform = weighting == "uniform"
    found = uniform_weights(len(replies)) if uniform else sample_weights([reply.num_samples for reply in replies])
    return [float(weight) for weight in found]


def weighted_delta(replies: Sequence[Reply], weights: Sequence[float], num_trained: int, name: str = DELTA) -> Tensor:
    """(d,), the sum of one tensor of each reply times its weight, in the order of the clients."""
    rows = stacked(replies, name, num_trained)
    total = torch.empty_like(rows[0])
    weighted_sum_(total, rows, weights)
    return total


@dataclass(frozen=True, kw_only=True)
class FedAvg(FederatedAlgorithm, name="fedavg"):
    """`x + eta_g * sum_k w_k (y_k - x)` over the clients that replied.

    Args:
        weighting: "samples" or "uniform".
        server_lr: eta_g.
    """

    weighting: str = "samples"  # "uniform" counts every client the same, whatever its data
    server_lr: float = 1.0  # 1 is the mean of the models

    def __post_init__(self) -> None:
        check_choice("weighting", self.weighting, WEIGHTINGS)
        check_number("server_lr", self.server_lr, rule="above 0", remedy="use 1.0 for the mean", low=0.0, high=1e6)

    def weights(self, memory: ServerMemory, replies: Sequence[Reply]) -> list[float]:
        """See `FederatedAlgorithm.weights`."""
        return mean_weights(self.weighting, replies)

    def advance(
        self, memory: ServerMemory, model: Tensor, replies: Sequence[Reply], weights: Sequence[float]
    ) -> Tensor:
        """See `FederatedAlgorithm.advance`."""
        return step_from(model, weighted_delta(replies, weights, memory.num_trained), self.server_lr)
