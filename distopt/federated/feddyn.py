"""FedDyn: local objectives whose linear terms change so that the clients' optima agree with everybody's.

Acar et al., *Federated Learning Based on Dynamic Regularization*, ICLR 2021:

    client:  gradient grad F_i(y) - ghat_i + a (y - x);  at the end  ghat_i - a (y - x)
    server:  h - (a/N) sum_S (y_i - x);  x+ = mean_S y_i - h/a

-h/a is 1/N times the sum of all deltas so far, which is what the server remembers: a cancels, and N may grow.

Limits: a reply that the server refuses leaves ghat_i changed and h not. What h has gathered comes back in every round,
so with few of many clients per round the steps swing; a smaller local learning rate or a larger a calms them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from distopt.config import check_number
from distopt.federated.algorithm import LocalRound, Vectors
from distopt.federated.deltas import ALL_DELTAS, CorrectedMean, mean_weights
from distopt.federated.memory import ServerMemory
from distopt.federated.messages import DELTA, Reply

CORRECTION = "correction"


@dataclass(frozen=True, kw_only=True)
class FedDyn(CorrectedMean, name="feddyn"):
    """Uniform over all clients; see the module.

    Args:
        alpha: a.

    Raises:
        ConfigError: A value breaks its rule.
    """

    alpha: float = 0.01  # larger keeps clients closer to the server's model; too large and they hardly move

    kept = (CORRECTION,)
    remembered = (ALL_DELTAS,)

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, rule="a number in (0, 1e6]", remedy="use 0.1 or less", low=0.0, high=1e6)

    def direction(
        self, gradient: Callable[[Tensor | None], Tensor], moved: Tensor, kept: Vectors, extras: Vectors
    ) -> Tensor:
        """See `FederatedAlgorithm.direction`."""
        return gradient(None) - kept[CORRECTION] + self.alpha * moved

    def finish(self, local: LocalRound) -> tuple[Vectors, Vectors]:
        """See `FederatedAlgorithm.finish`."""
        return {CORRECTION: local.kept[CORRECTION] - self.alpha * local.moved}, {DELTA: local.moved}

    def weights(self, memory: ServerMemory, replies: Sequence[Reply]) -> list[float]:
        """See `FederatedAlgorithm.weights`."""
        return mean_weights("uniform", replies)
