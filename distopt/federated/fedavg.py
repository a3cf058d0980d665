"""FedAvg: the mean of the clients' models, as a step along the mean of their deltas.

McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data*, AISTATS 2017. With another
`server_optimizer` it is FedAvgM, FedAdam, FedYogi or FedAdagrad.

Limits: where some clients take part more often than others the mean leans towards them; see FedAU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distopt.config import check_choice
from distopt.federated.deltas import WEIGHTINGS, SummedDeltas, mean_weights
from distopt.federated.memory import ServerMemory
from distopt.federated.messages import Reply


@dataclass(frozen=True, kw_only=True)
class FedAvg(SummedDeltas, name="fedavg"):
    """`x + eta_g * sum_k w_k (y_k - x)` over the clients that replied.

    Args:
        weighting: "samples", w_k = n_k / sum of n_k, or "uniform", the same for all.
        server_lr: See `SteppingServer`.
        server_optimizer: See `SteppingServer`.

    Raises:
        ConfigError: A value breaks its rule.
    """

    weighting: str = "samples"  # "uniform" counts every client the same, whatever its data

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("weighting", self.weighting, WEIGHTINGS)

    def weights(self, memory: ServerMemory, replies: Sequence[Reply]) -> list[float]:
        """See `FederatedAlgorithm.weights`."""
        return mean_weights(self.weighting, replies)
