"""FedProx: local steps that are drawn back to the model that the round began with.

Li et al., *Federated Optimization in Heterogeneous Networks*, MLSys 2020: the local objective is
`F_k(y) + mu/2 ||y - x||^2`, so each local gradient gets `mu (y - x)` over the whole vector.

Limits: those of FedAvg; a local step of lr * mu above 2 overshoots x further each time.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from distopt.federated.algorithm import Vectors
from distopt.federated.checks import check_from_zero
from distopt.federated.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class FedProx(FedAvg, name="fedprox"):
    """FedAvg with the local gradient `grad F_k(y) + mu (y - x)`.

    Args:
        mu: See above; 0 is FedAvg.
        weighting: See `FedAvg`.
        server_lr: See `SteppingServer`.
        server_optimizer: See `SteppingServer`.

    Raises:
        ConfigError: A value breaks its rule.
    """

    mu: float = 0.01  # larger keeps clients closer to the server's model: less drift, slower progress

    def __post_init__(self) -> None:
        super().__post_init__()
        check_from_zero("mu", self.mu, remedy="use 0.001 to 1.0; 0 is FedAvg")

    def direction(
        self, gradient: Callable[[Tensor | None], Tensor], moved: Tensor, kept: Vectors, extras: Vectors
    ) -> Tensor:
        """See `FederatedAlgorithm.direction`."""
        return gradient(None) + self.mu * moved
